# SPDX-License-Identifier: GPL-2.0-or-later
"""What `-e` will do, said before it is done: steps, segments, losses, relocated pages and whose."""

from typing import Any

import pytest

from pkramfs.errors import ExhaustedError, NotPreservedError
from pkramfs.kernel import kernelrecord, kexec, nvram, running, staging
from pkramfs.kernel.segments import Segment, conflicts, destinations
from pkramfs.kernel.steps import Plan
from pkramfs.kernel.transition import MountReport
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT


def planned(lab: Any, *mounts: MountReport, **how: Any) -> Plan:
    with lab.machine.lifecycle(shared=False):
        return kexec.plan(lab.machine, mounts, **how)


def load_over(lab: Any, runs: Any) -> Spans:
    """Load a kernel where a tree that is not preserved lies; the tree's pages in its destinations."""
    lab.load(syscall="load", mem_min=runs[0][0] << PAGE_SHIFT)
    return lab.up().banned() & Spans((pfn, pfn + count) for pfn, count in runs)


def test_a_kernel_loaded_with_s_goes_elsewhere_if_pages_came_to_lie_there(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.load("builtin:4M")
    placed = {s.name: s for s in staging.read(lab.machine).segments}
    kernel = lab.up()
    with monkeypatch.context() as patch:
        patch.setattr(running.Running, "banned", lambda _: Spans())
        free = kernel.leases.taken().gaps(0, kernel.info.blocks).total
        lab.preserve("a", (free - 12) * BLOCK_PAGES)
        if not Spans([(placed["kernel"].pfn, placed["kernel"].end)]) & kernel.store.preserved():
            pytest.fail("the test did not make a conflict")
    with lab.machine.lifecycle(shared=False):
        plan = kexec.plan(lab.machine, [])
        lines = plan.describe()
        at = next(number for number, line in enumerate(lines) if line.startswith("load again elsewhere: "))
        counted = (destinations(placed.values()) & kernel.store.preserved()).total
        assert lines[at + 1] == f"  {counted:,} pages of node a"
        logs: list[str] = []
        plan.execute(lambda _: logs.append(lab.machine.dmesg()))
    assert all(f"kexec: {line.strip()}" in logs[-3] for line in lines[at : at + 2]), "the dying kernel's own log"
    assert lab.intact("a")


def test_data_that_are_lost_already_are_named_before_they_are_given_up(lab: Any) -> None:
    """Preserve a tree without the data that a refused write-back lost."""
    lab.preserve("a", 10)
    lab.load()
    lost = MountReport("/mnt", "a", True, 1, lost="data written to /f are lost")
    (refusal,) = planned(lab, lost).problems
    assert isinstance(refusal, NotPreservedError) and str(refusal) == "/mnt: data written to /f are lost"
    forced = planned(lab, lost, force=True)
    assert forced.problems == [] and str(refusal) in forced.warnings


def test_the_plan_is_told_step_by_step(lab: Any) -> None:
    lab.preserve("a", 10)
    lab.load()
    told: list[str] = []
    with lab.machine.lifecycle(shared=False):
        plan = kexec.plan(lab.machine, [MountReport("/mnt", "a", True, 1)])
        lines = plan.describe()
        plan.execute(lambda operation: told.extend(operation.lines()))
    assert lines[:-1] == told
    order = [next(at for at, line in enumerate(lines) if begin in line) for begin in ("room", "hand over", "stop 1 m")]
    assert order == sorted(order) and "stop 1 mount: /mnt" in lines, "nothing is stopped before all is known"
    assert any("point of no return" in line for line in lines)
    assert lines[-1] == "predicted pause: 0.5 s"


def test_the_pause_is_what_the_last_kexec_took_and_what_is_to_be_copied(lab: Any, tmp_path: Any) -> None:
    with open(tmp_path / "initrd", "wb") as initrd:
        initrd.truncate(40_000_000)
    lab.load(initrd=str(tmp_path / "initrd"))
    first = planned(lab)
    assert 0.1 < first.copying < first.pause
    nvram.set_pause(lab.machine, 7.5)
    assert planned(lab).pause == pytest.approx(7.5 + first.copying)
    lab.execute()
    assert nvram.pause(lab.machine) == 7.5, "it crosses the kexec"


def test_every_segment_has_a_source_and_a_destination(lab: Any, bzimage: Any, tmp_path: Any) -> None:
    (tmp_path / "initrd").write_bytes(b"i" * 5000)
    image = bzimage(tmp_path / "vmlinuz")
    lab.load(image, initrd=str(tmp_path / "initrd"))
    lines = planned(lab).describe()
    at = lines.index("copy 5 segments and boot")
    segments = staging.read(lab.machine).segments
    sources = {"kernel": image, "initrd": str(tmp_path / "initrd")}
    for line, segment in zip(lines[at + 1 :], segments, strict=False):
        assert line.startswith(f"  {segment.name} ({sources.get(segment.name, 'made by the loader')}): ")
        assert f"{segment.pfn << PAGE_SHIFT:#x}-{(segment.end << PAGE_SHIFT) - 1:#x}" in line


def test_what_crosses_is_listed_by_node(lab: Any) -> None:
    lab.preserve("a", 300)
    lab.preserve("b", 600, seed=2)
    lab.load()
    lines = planned(lab).describe()
    pages = {node.name.decode(): node.pages for node in lab.up().store.nodes()}
    at = next(number for number, line in enumerate(lines) if line.startswith("hand over 2 nodes, "))
    assert [line.partition(" page")[0] for line in lines[at + 1 : at + 3]] == [
        f"  {name}: {pages[name]:,}" for name in ("b", "a")
    ]


def test_relocations_are_told_by_owner_before_and_after(lab: Any) -> None:
    frames, runs, total = lab.grow(1000)
    inside = load_over(lab, runs)
    mount = MountReport("/mnt", "a", False, 1, "why not", frames.tree_id)
    said = planned(lab, mount).relocations
    expected = (lab.up().leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES) & lab.up().banned()).total
    assert 0 < inside.total <= expected
    assert said == [f"would be relocated by its preserve: up to {expected:,} pages of /mnt (a)"]
    assert planned(lab, mount, force=True).relocations == [], "forced, it is lost"

    lab.publish("a", frames, runs, total)
    assert lab.up().store.find(b"a").relocated == inside.total
    plan = planned(lab, MountReport("/mnt", "a", True, 1, "", frames.tree_id))
    assert plan.relocations == [f"relocated when it was preserved: {inside.total:,} pages of node a"]
    assert plan.relocations[0] in plan.describe()

    lab.execute(poison=True)
    assert lab.intact("a")
    (node,) = kernelrecord.read(lab.machine).report["nodes"]
    assert (node["name"], node["moved"]) == ("a", inside.total)
    assert f"{inside.total:,} of them relocated when saved" in lab.machine.dmesg()


def test_a_tree_that_lies_elsewhere_is_not_relocated(lab: Any) -> None:
    lab.load()
    frames, runs, total = lab.grow(100)
    assert planned(lab, MountReport("/mnt", "a", False, 1, "", frames.tree_id)).relocations == []
    lab.publish("a", frames, runs, total)
    assert planned(lab).relocations == []


def test_scratch_that_is_too_small_says_what_is_enough(lab: Any) -> None:
    lab.load("builtin:16M", "ro scratch=24M")
    (problem,) = planned(lab).problems
    assert isinstance(problem, ExhaustedError)
    assert str(problem) == "KASLR: no slot for a kernel of 16.0 MiB in scratch=24M: scratch=40M is enough"
    lab.load("builtin:16M", "ro scratch=40M")
    assert planned(lab).problems == []
    lab.execute()
    with pytest.raises(ExhaustedError, match=r"no place for the kernel: 48\.0 MiB .*; boot with a larger scratch="):
        lab.load("builtin:48M")


def test_a_refusal_lists_the_first_of_many_ranges() -> None:
    owner = Spans((pfn, pfn + 1) for pfn in range(0, 2000, 2))
    lines = conflicts([Segment("kernel", "", 1, 1000, pfn=500)], {"node a": owner})
    assert lines[0] == "kernel at 0x1f4000: 0x1f4000-0x1f4fff (1 page) belongs to node a"
    assert lines[-1] == "kernel at 0x1f4000: 480 more ranges of node a, 500 pages in all"
    assert len(lines) == 21


OPERATIONS = ["TakeRoom", "WriteRegions", "Verify", "DecideBoot", "StopMounts", "LastLook"]
OPERATIONS += ["PointOfNoReturn", "Boot", "TakeOver"]


@pytest.mark.parametrize("after", OPERATIONS)
def test_dying_between_any_two_steps_and_going_on_ends_in_the_same_state(make_lab: Any, after: str) -> None:
    """Die after each step in turn; then finish the kexec, or begin it again with the same command line."""
    facts = []
    for name in ("straight", "killed"):
        lab = make_lab(name=name)
        lab.preserve("a", 2000)
        lab.load()
        with lab.machine.lifecycle(shared=False):
            operations = kexec.plan(lab.machine, [MountReport("/mnt", "a", True, 1)]).operations
            assert [type(operation).__name__ for operation in operations] == OPERATIONS
            for operation in operations:
                operation.execute()
                if name == "killed" and type(operation).__name__ == after:
                    break
        if lab.up().generation == 1:
            assert OPERATIONS.index(after) < OPERATIONS.index("PointOfNoReturn")
            lab.execute()
        assert lab.intact("a")
        facts.append(lab.facts())
    straight, killed = facts
    assert straight == killed
