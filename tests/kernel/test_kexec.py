# SPDX-License-Identifier: GPL-2.0-or-later
"""One kernel dies, the next is born, and what was preserved is there."""

import os
from typing import Any

import numpy as np
import pytest

from pkramfs.cli import verify
from pkramfs.errors import ConflictError, ExhaustedError, FormatError, MachineError, NotPreservedError, UsageError
from pkramfs.kernel import boot, kernelrecord, kexec, loading, nvram, running, staging, succession
from pkramfs.kernel.image import load_image
from pkramfs.kernel.loading import Request
from pkramfs.kernel.running import Running
from pkramfs.kernel.segments import destinations
from pkramfs.kernel.steps import Operation
from pkramfs.kernel.transition import DecideBoot, MountReport, Verify, WriteRegions
from pkramfs.pkram import superblock
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, MIB, PAGE_SHIFT


def test_a_node_survives(lab: Any) -> None:
    lab.preserve("a", 3000)
    old = lab.up().info
    kernel = lab.cycle()
    assert kernel.generation == 2
    assert lab.intact("a")
    assert kernel.info.old_super_pfn == old.super_pfn
    assert [n.name for n in kernel.store.nodes()] == [b"a"]
    log = lab.machine.dmesg()
    assert f"pkram: found super block at pfn {old.super_pfn:x}, 1 node, " in log
    assert "Kernel moved from" in log


def test_what_was_not_preserved_is_gone(lab: Any) -> None:
    _, runs, _ = lab.grow(500)
    lab.preserve("a", 500)
    kernel = lab.cycle()
    assert all(not any(kernel.ram.peek(pfn, count)) for pfn, count in runs)
    assert lab.intact("a")


@pytest.mark.parametrize("poison", [False, True])
def test_many_generations_lose_and_leak_nothing(lab: Any, poison: bool) -> None:
    free = None
    for generation in range(6):
        name = f"node{generation % 3}"
        kernel = lab.up()
        if kernel.store.find(name.encode()):
            kernel.store.withdraw(name.encode())
            kernel.sweep()
        lab.preserve(name, 700 + 300 * (generation % 3), seed=generation)
        kernel = lab.cycle("builtin:6M", poison=poison)
        assert all(lab.intact(n.name.decode()) for n in kernel.store.nodes())
        own = (kernel.info.own_pages - kernel.info.reserve_pages).outward(BLOCK_PAGES)
        assert kernel.leases.counts()["kernel"] <= own.total, "what only boot needed was given back"
        if generation >= 3:
            left = kernel.leases.counts()["free"]
            assert free in (None, left)
            free = left


def test_nodes_that_nobody_mounted_survive_a_second_kexec(lab: Any) -> None:
    """Keep nodes that nobody mounted over a second kexec; the original forgets them (D3)."""
    lab.preserve("a", 1000)
    for _ in range(3):
        lab.cycle(poison=True)
        assert lab.intact("a")


@pytest.mark.parametrize("step", [s.__name__ for s in boot.STEPS])
def test_boot_that_dies_ends_in_the_same_state(make_lab: Any, step: str) -> None:
    facts = []
    for name in ("straight", "killed"):
        lab = make_lab(name=name)
        lab.preserve("a", 2000)
        lab.load()
        if name == "killed":
            with lab.dies(step):
                lab.execute()
            assert (kernelrecord.read(lab.machine) is None) == (step != "publish")
        else:
            lab.execute()
        assert lab.intact("a")
        facts.append(lab.facts())
    straight, killed = facts
    assert straight == killed


def test_the_same_boot_twice_writes_the_same_ram(lab: Any) -> None:
    lab.preserve("a", 2000)
    lab.load()
    with lab.dies("publish"):
        lab.execute()
    first = kernelrecord.read(lab.machine)
    lab.machine.remove(kernelrecord.NAME)
    with lab.dies("publish"):
        lab.up()
    second = kernelrecord.read(lab.machine)
    assert first is not None
    assert second is not None
    assert (first.reserved, first.super_pfn, first.stale) == (second.reserved, second.super_pfn, second.stale)
    lab.up()
    assert lab.intact("a")


def test_take_over_may_be_repeated(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 100)
    lab.load()
    real, calls = nvram.finished, []

    def dies(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("killed")
        real(*args)

    monkeypatch.setattr(nvram, "finished", dies)
    with pytest.raises(RuntimeError, match="killed"):
        lab.execute()
    assert nvram.pending(lab.machine) is not None
    assert lab.up().generation == 2
    assert nvram.pending(lab.machine) is None
    assert lab.intact("a")


def test_dying_before_the_point_of_no_return_cancels(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 100)
    lab.load()

    def dies(_: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(succession, "retire", dies)
    with pytest.raises(RuntimeError):
        lab.execute()
    assert nvram.pending(lab.machine) is not None
    kernel = lab.up()
    assert (kernel.generation, nvram.pending(lab.machine)) == (1, None)
    assert lab.intact("a")
    monkeypatch.undo()


def test_dying_while_segments_are_copied_resumes(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 100)
    lab.load()
    real = staging.copy_into_ram

    def dies(*args: Any) -> None:
        real(*args)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "copy_into_ram", dies)
        with pytest.raises(RuntimeError):
            lab.execute()
    assert kernelrecord.read(lab.machine) is None
    assert lab.up().generation == 2
    assert lab.intact("a")


def test_the_boot_process_is_given_nothing_else(lab: Any) -> None:
    lab.preserve("a", 10)
    lab.load()
    seen: list[list[str]] = []
    lab.after = lambda step: seen.append(sorted(_files(lab.machine))) if step == "purgatory" else None
    lab.execute()
    # nobody decides anything by history.json (test_history.py)
    assert seen == [["dmesg", "history.json", "lock", "machine.json", "machine.json.copy", "nvram.json", "ram"]]


def _files(machine: Any) -> list[str]:
    import os

    found = [name for name in os.listdir(machine.path()) if os.path.isfile(machine.path(name))]
    found += os.listdir(machine.path("kexec")) + os.listdir(machine.path("mounts"))
    return [name for name in found if name not in ("lock.tables", "lock.boot")]


def test_nothing_preserved_is_empty_not_invalid(lab: Any) -> None:
    """Boot with nothing preserved: that is no error (D32)."""
    lab.cycle()
    log = lab.machine.dmesg()
    assert "is empty" in log
    assert "invalid" not in log


def test_a_kexec_out_of_scratch_into_scratch(lab: Any) -> None:
    lab.cycle(append="ro scratch=64M")
    scratch = lab.up().info.reserved["Scratch"]
    lab.preserve("a", 30000)
    for _ in range(4):
        loaded = lab.load(append="ro scratch=64M").loaded
        assert not destinations(loaded.segments) - Spans([scratch])
        kernel = lab.execute(poison=True)
        assert kernel.info.reserved["Scratch"] == scratch
        assert Spans([scratch]).covers(*kernel.info.reserved["Kernel image"])
        assert not kernel.store.preserved() & Spans([scratch])
        assert lab.intact("a")


def test_numa_counts_are_reported(make_lab: Any) -> None:
    lab = make_lab(nodes=4, name="numa")
    lab.preserve("a", 40000)
    kernel = lab.cycle()
    numa = kernel.info.report["numa"]
    assert list(numa) == ["0", "1", "2", "3"]
    assert sum(node["preserved"] for node in numa.values()) == kernel.info.report["preserved_pages"] > 40000
    assert sum(node["pages"] for node in numa.values()) == lab.machine.hardware().usable.total


def test_a_tree_in_more_pieces_than_the_reserve_can_list(make_lab: Any) -> None:
    """Make the list coarser where it is too long; the original drops its tail (D8)."""
    lab = make_lab(16 << 30, name="large")
    frames, runs, _ = lab.grow(1)
    kernel = lab.up()
    pieces = 140_000
    runs = frames.allocate(2 * pieces)
    pages = np.concatenate([np.arange(start, start + count, 2, dtype=np.uint64) for start, count in runs])
    with kernel.store.prepare_save(b"a", tree_id=frames.tree_id, frames=frames) as save:
        with save.object() as stream:
            stream.save_runs(np.arange(len(pages), dtype=np.uint64), pages, np.ones_like(pages))
        save.finish()
    marked = [int(pages[n]) for n in (0, 1, 77_777, -1)]
    for pfn in marked:
        kernel.ram.words(pfn)[:] = pfn
    preserved = kernel.store.preserved()
    assert len(preserved) > 129_000
    kernel = lab.cycle()
    assert kernel.store.preserved() == preserved
    assert all((kernel.ram.words(pfn) == pfn).all() for pfn in marked)
    assert kernel.info.report["preserved_ranges"] < 1000
    assert len(kernel.info.stale) < 10


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("append", "said"),
    [("ro pkram=", ""), ("ro pkram=abc", "the loaded command line says pkram=abc, "), ("ro pkram=0", "says pkram=0, ")],
)
def test_a_missing_or_wrong_pkram_is_refused(lab: Any, append: str, said: str) -> None:
    lab.preserve("a", 256)
    report = lab.load(append=append)
    pfn = lab.up().info.super_pfn
    expected = rf"1 node \(a\), 1\.0 MiB would be lost: .*{said}append pkram={pfn:x}"
    assert any(__import__("re").search(expected, w) for w in report.warnings), report.warnings
    with pytest.raises(NotPreservedError, match=expected):
        lab.execute()
    assert lab.intact("a")
    kernel = lab.execute(force=True)
    assert kernel.store.nodes() == []
    assert kernel.leases.counts()["tree"] == 0
    assert "pkram: node a is lost (" in lab.machine.dmesg()


@pytest.mark.parametrize(("append", "said"), [("ro pkram=", "has no pkram="), ("ro pkram=abc", "says pkram=abc")])
def test_a_command_line_that_will_lose_what_is_preserved_later_is_a_warning(lab: Any, append: str, said: str) -> None:
    report, pfn = lab.load(append=append), lab.up().info.super_pfn
    assert report.warnings == [f"the command line {said}: to keep what will be preserved, append pkram={pfn:x}"]
    assert lab.load().warnings == []


def test_a_stale_pkram_restores_nothing(lab: Any) -> None:
    """Boot twice with the same pfn, while all that it named is still there (D31)."""
    lab.preserve("a", 256)
    pfn = lab.up().info.super_pfn
    lab.cycle()
    lab.preserve("b", 256, seed=2)
    lab.load(append=f"ro pkram={pfn:x}")
    with pytest.raises(NotPreservedError, match=r"2 nodes \(b, a\), .* would be lost"):
        lab.execute()
    kernel = lab.execute(force=True)
    assert kernel.store.nodes() == []
    assert "invalid super block" in lab.machine.dmesg()


def test_mounts_that_are_not_preserved_are_refused(lab: Any) -> None:
    lab.load()
    mounts = [MountReport("/mnt/a", "a", False, 3, "not preserved: do this"), MountReport("/mnt/b", "b", True, 1)]
    with lab.machine.lifecycle(shared=False):
        plan = kexec.plan(lab.machine, mounts)
        with pytest.raises(NotPreservedError, match=r"/mnt/a: 3 files would be lost \(not preserved: do this\)"):
            plan.execute()
        assert len(plan.problems) == 1
        stopped: list[str] = []
        kexec.plan(lab.machine, mounts, force=True, stop=lambda: stopped.append("all")).execute()
    assert stopped == ["all"]
    assert "/mnt/a (a, not preserved) is lost" in lab.machine.dmesg()


def test_nothing_loaded(lab: Any) -> None:
    lab.up()
    with pytest.raises(MachineError, match="no kernel is loaded"):
        lab.execute()
    lab.load()
    assert loading.unload(lab.machine) is True
    assert loading.unload(lab.machine) is False
    with pytest.raises(MachineError, match="no kernel is loaded"):
        lab.execute()


def test_damaged_metadata_stop_the_boot_before_anything_is_punched(lab: Any) -> None:
    lab.preserve("a", 256)
    node = lab.up().store.nodes()[0]
    lab.load()
    with lab.dies("purgatory"):
        lab.execute()
    ram = lab.machine.ram()
    good = bytes(ram.page(node.pfn))
    ram.page(node.pfn)[100:104] = b"oops"
    before = ram.data_spans()
    for _ in range(2):
        with pytest.raises(FormatError):
            lab.up()
    assert ram.data_spans() == before
    ram.page(node.pfn)[:] = good
    assert lab.up().generation == 2
    assert lab.intact("a")


def test_a_boot_that_stopped_at_damage_says_how_to_go_on(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 256)
    node = lab.up().store.nodes()[0]
    lab.load()
    with lab.dies("purgatory"):
        lab.execute()
    lab.machine.ram().page(node.pfn)[100:104] = b"oops"
    monkeypatch.undo()  # boot in a process of its own, as everywhere else
    with pytest.raises(MachineError, match=r"boot failed: Node at pfn .*pkram-kexec --resume --force goes on"):
        lab.up()
    with lab.machine.lifecycle(shared=False):
        assert Running(lab.machine, succession.bring_up(lab.machine, force=True)).store.nodes() == []


def test_damaged_metadata_are_given_up_by_force(lab: Any) -> None:
    lab.preserve("a", 256)
    node = lab.up().store.nodes()[0]
    lab.load()
    with lab.dies("purgatory"):
        lab.execute()
    lab.machine.ram().page(node.pfn)[100:104] = b"oops"
    with lab.machine.lifecycle(shared=False):
        kernel = Running(lab.machine, succession.bring_up(lab.machine, force=True))
    assert kernel.store.nodes() == []
    assert "node a is lost (" in lab.machine.dmesg()


def test_damaged_metadata_are_refused_by_the_plan(lab: Any) -> None:
    lab.preserve("a", 256)
    lab.load()
    node = lab.up().store.nodes()[0]
    lab.up().ram.page(node.pfn)[100:104] = b"oops"
    with pytest.raises(FormatError):
        lab.execute()
    assert lab.execute(force=True).store.nodes() == []


def test_a_segment_that_changed_in_ram_is_not_entered(lab: Any) -> None:
    lab.load()
    segments = staging.read(lab.machine).segments
    with lab.dies("purgatory"):
        lab.execute()
    kernel = next(s for s in segments if s.name == "kernel")
    lab.machine.ram().page(kernel.pfn)[5] ^= 1
    with pytest.raises(MachineError, match="purgatory: the kernel at pfn"):
        lab.up()


def test_no_room_is_found_before_the_old_kernel_is_stopped(lab: Any) -> None:
    lab.preserve("a", 100)
    lab.load("builtin:120M")
    with lab.machine.lifecycle(shared=False):
        plan = kexec.plan(lab.machine, [MountReport("/mnt", "a", True, 1)], stop=lambda: pytest.fail("stopped"))
        with pytest.raises(ExhaustedError, match=r"KASLR: no slot.*append nokaslr"):
            plan.execute()
    kernel = lab.cycle("builtin:120M", "ro nokaslr")
    assert "KASLR disabled" in lab.machine.dmesg()
    assert lab.intact("a")
    assert kernel.generation == 2


# -- loading ------------------------------------------------------------------------------------------------------


def test_loading_replaces_and_leaves_no_files(lab: Any, tmp_path: Any) -> None:
    (tmp_path / "initrd").write_bytes(b"initrd" * 1000)
    lab.load(initrd=str(tmp_path / "initrd"))
    lab.load("builtin:8M")
    loaded = staging.read(lab.machine)
    assert loaded.segment("initrd") is None
    import os

    assert len(os.listdir(lab.machine.path("kexec"))) == 1 + len(loaded.segments)
    for bad in ({"initrd": "/nonexistent"}, {"image": "/nonexistent"}):
        with pytest.raises(UsageError, match="nonexistent"):
            lab.load(**bad)
    assert staging.read(lab.machine) == loaded
    assert len(os.listdir(lab.machine.path("kexec"))) == 1 + len(loaded.segments)


def test_the_kernel_chooses_destinations_clear_of_preserved_pages(lab: Any) -> None:
    lab.preserve("a", 40000)
    loaded = lab.load("builtin:16M").loaded
    assert not destinations(loaded.segments) & lab.up().store.preserved()
    assert not destinations(loaded.segments) & lab.up().info.own_pages


def test_without_a_free_block_only_pages_that_are_not_preserved_are_chosen(lab: Any) -> None:
    """Choose blocks of a tree that is not preserved, which may be relocated, before any that are (row 18)."""
    kernel = lab.up()
    lab.preserve("a", (kernel.leases.counts()["free"] - 9) * BLOCK_PAGES)
    lab.grow(kernel.leases.counts()["free"] * BLOCK_PAGES, seed=2)
    assert kernel.leases.counts()["free"] == 0
    loaded = lab.load("builtin:4M").loaded
    assert not destinations(loaded.segments) & (kernel.store.preserved() | kernel.info.own_pages)


def test_a_chosen_address_with_preserved_pages_is_refused_and_lists_whose(lab: Any, tmp_path: Any) -> None:
    lab.preserve("guest", 4000)
    spans = lab.up().store.preserved()
    address = int(spans.starts[0]) << PAGE_SHIFT
    (tmp_path / "f").write_bytes(b"x" * 8192)
    with pytest.raises(ConflictError, match="belongs to node guest") as caught:
        lab.load(syscall="load", mem_min=100 * MIB, segments=[(str(tmp_path / "f"), address)])
    assert caught.value.conflicts == [
        f"segment0 at {address:#x}: {address:#x}-{address + 8191:#x} (2 pages) belongs to node guest"
    ]
    for address, reason in ((0xA0000, "not all of it is usable RAM"), (1 << 45, "not all of it is usable RAM")):
        with pytest.raises(ConflictError, match=reason):
            lab.load(syscall="load", segments=[(str(tmp_path / "f"), address)])
    with pytest.raises(UsageError, match="multiple of 4096"):
        lab.load(syscall="load", segments=[(str(tmp_path / "f"), 4097)])


def test_mem_min_and_mem_max_bound_the_destinations(lab: Any) -> None:
    loaded = lab.load(syscall="load", mem_min=100 * MIB, mem_max=120 * MIB).loaded
    assert all(s.pfn << PAGE_SHIFT >= 100 * MIB and s.end << PAGE_SHIFT <= 120 * MIB for s in loaded.segments)
    with pytest.raises(ExhaustedError, match=r"no place for the kernel: .*; widen --mem-min and --mem-max"):
        lab.load(syscall="load", mem_min=100 * MIB, mem_max=101 * MIB)


def test_a_bzimage_with_an_initrd(lab: Any, bzimage: Any, tmp_path: Any) -> None:
    (tmp_path / "initrd").write_bytes(b"i" * 3_000_000)
    image = bzimage(tmp_path / "vmlinuz", payload=b"k" * 2_000_000)
    lab.preserve("a", 3000)
    lab.load(image, initrd=str(tmp_path / "initrd"))
    kernel = lab.execute(poison=True)
    assert lab.intact("a")
    start, end = kernel.info.reserved["Kernel image"]
    assert (end - start) << PAGE_SHIFT == 0x800000
    assert bytes(kernel.ram.page(start, 489)[:2_000_000]) == b"k" * 2_000_000
    assert "boots vmlinuz 6.1.0-13-amd64 (bzImage)" in lab.machine.dmesg()


def test_an_elf_kernel_runs_at_its_address_only(lab: Any, elf: Any, tmp_path: Any) -> None:
    image = elf(tmp_path / "vmlinux", [(64 * MIB, b"text" * 2000, MIB), (68 * MIB, b"data", 4096)])
    lab.preserve("a", 3000)
    lab.load(image)
    kernel = lab.execute()
    assert kernel.info.reserved["Kernel image"] == (64 * MIB >> PAGE_SHIFT, (68 * MIB >> PAGE_SHIFT) + 1)
    assert bytes(kernel.ram.page(68 * MIB >> PAGE_SHIFT)[:5]) == b"data\0"
    lab.cycle()
    lab.preserve("b", 48000)
    with pytest.raises(ConflictError, match=r"belongs to node b; .*vmlinux cannot run anywhere else"):
        lab.load(image)


def test_a_kernel_that_cannot_move_is_refused_as_crash_kernel(lab: Any, elf: Any, tmp_path: Any) -> None:
    lab.cycle(append="ro crashkernel=32M")
    with pytest.raises(ConflictError, match="must be relocatable"):
        loading.load(lab.machine, Request(elf(tmp_path / "k", [(64 * MIB, b"text", MIB)])), panic=True)


def test_pages_preserved_after_loading_are_relocated(lab: Any) -> None:
    """Save a tree that lies where the kernel will be copied: the save relocates it (row 15)."""
    frames, runs, total = lab.grow(1000)
    lab.load(syscall="load", mem_min=runs[0][0] << PAGE_SHIFT)
    banned = lab.up().banned()
    assert banned & Spans((pfn, pfn + count) for pfn, count in runs)
    lab.publish("a", frames, runs, total)
    assert not banned & lab.up().store.preserved()
    lab.execute(poison=True)
    assert lab.intact("a")


def test_init_s_words_are_left_and_what_is_added_goes_before_them(lab: Any) -> None:
    pfn = lab.up().info.super_pfn
    lab.preserve("kept", 3)
    report = loading.load(lab.machine, Request("builtin:4M", append=f"ro pkram={pfn:x} -- single pkram=99"))
    assert report.warnings == []
    lab.execute()
    assert lab.intact("kept") and lab.up().cmdline.endswith("-- single pkram=99")
    pfn = lab.up().info.super_pfn
    loading.load(lab.machine, Request("builtin:4M", reuse_cmdline=True, append="quiet -- two"))
    assert staging.read(lab.machine).cmdline == f"ro pkram={pfn:x} quiet -- single pkram=99 two"
    report = loading.load(lab.machine, Request("builtin:4M", append=f"ro -- pkram={pfn:x}"))
    assert len(report.warnings) == 1 and "would be lost" in report.warnings[0]


def test_reuse_cmdline_makes_pkram_current(lab: Any) -> None:
    lab.cycle()
    loading.load(lab.machine, Request("builtin:4M", reuse_cmdline=True, append="quiet"))
    pfn = lab.up().info.super_pfn
    assert staging.read(lab.machine).cmdline == f"ro pkram={pfn:x} quiet"


@pytest.mark.parametrize("step", [Verify, DecideBoot])
def test_a_kexec_that_fails_takes_its_region_list_back(
    lab: Any, monkeypatch: pytest.MonkeyPatch, step: type[Operation]
) -> None:
    lab.preserve("a", 700)
    lab.load()

    def fails(self: object) -> None:
        raise MachineError("no room")

    with monkeypatch.context() as patched, pytest.raises(MachineError, match="no room"):
        patched.setattr(step, "execute", fails)
        lab.execute()
    kernel = running.look(lab.machine)
    assert superblock.check(kernel.ram, kernel.info.super_pfn).region_pfn == 0
    lab.preserve("b", 300, seed=2)
    assert verify.check(lab.up(), []) == (2, [])
    lab.execute()
    assert lab.intact("a") and lab.intact("b")


def test_whoever_comes_next_takes_back_the_list_of_a_kexec_that_was_killed(lab: Any) -> None:
    lab.preserve("a", 700)
    lab.load()
    with lab.machine.lifecycle(shared=False):
        for step in kexec.plan(lab.machine, []).operations:
            step.execute()
            if isinstance(step, WriteRegions):
                break
    kernel = running.look(lab.machine)
    assert superblock.check(kernel.ram, kernel.info.super_pfn).region_pfn
    kernel.store.withdraw(b"a")
    assert verify.check(kernel, []) == (0, []), "what nobody will read is no damage"
    lab.up()
    assert superblock.check(kernel.ram, kernel.info.super_pfn).region_pfn == 0
    lab.preserve("b", 300, seed=2)
    lab.execute()
    assert lab.intact("b")


@pytest.mark.parametrize("what", ["fifo", "zero", "directory", "gone", "loop"])
@pytest.mark.parametrize("how", ["initrd", "segment", "image"])
def test_what_is_no_file_is_refused_before_anybody_waits(lab: Any, tmp_path: Any, what: str, how: str) -> None:
    path = tmp_path / what
    if what == "fifo":
        os.mkfifo(path)
    elif what == "zero":
        path.symlink_to("/dev/zero")
    elif what == "directory":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    words = {"initrd": {"initrd": str(path)}, "segment": {"segments": [(str(path), 0x2000000)], "syscall": "load"}}
    image = str(path) if how == "image" else "builtin:4M"
    lab.up()
    with (
        lab.machine.lifecycle(shared=False, timeout=5),  # it does not come to the lock
        pytest.raises(UsageError, match=r"cannot load (a kernel|the initrd|the segment) from"),
    ):
        loading.load(lab.machine, Request(image, append="ro", **words.get(how, {})))
    assert os.listdir(lab.machine.path("kexec")) == []


def test_a_file_is_loaded_as_long_as_it_was(lab: Any, tmp_path: Any) -> None:
    """Load no more than a file's size: files of /proc say that they are empty, and may have no end."""
    lab.load(initrd="/proc/self/maps")
    assert staging.read(lab.machine).segment("initrd").size == 0
    (tmp_path / "initrd").write_bytes(b"i" * 5000)
    (tmp_path / "link").symlink_to("initrd")
    lab.load(initrd=str(tmp_path / "link"))
    assert staging.read(lab.machine).segment("initrd").size == 5000


def test_an_image_that_became_something_else_is_not_waited_for(lab: Any, tmp_path: Any, bzimage: Any) -> None:
    path = tmp_path / "image"
    image = load_image(bzimage(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="a FIFO, not a regular file"):
        list(image.payload())
