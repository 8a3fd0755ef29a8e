# SPDX-License-Identifier: GPL-2.0-or-later
"""What moved over a kexec, and why: each owner of the earlier picture has one line."""

from typing import Any

from pkramfs.kernel import history, kernelrecord, memorymap, moves
from pkramfs.kernel.memorymap import LEASED, PRESERVED
from pkramfs.kernel.moves import ENDED, MOVED, STAYED, Move
from pkramfs.spans import Spans
from tests.support.lab import Boots


def over(lab: Boots, mounts: dict[int, str] | None = None) -> dict[str, Move]:
    """What moved over the last kexec of a machine, by owner."""
    info = kernelrecord.read(lab.machine)
    assert info is not None
    before = memorymap.remembered(lab.machine, history.read(lab.machine)["before"])
    found = moves.moves(before, memorymap.parts(lab.up(), mounts or {}), info)
    return {one.owner: one for one in found}


def test_trees_stay_and_kernels_move(lab: Boots):
    lab.preserve("a", 700)
    lab.cycle("builtin:2M")
    lab.cycle("builtin:4M")
    found = over(lab)
    assert found["a"].what == STAYED and found["a"].why.endswith("stayed where they were: a kexec copies none")
    assert found["a"].before == found["a"].now
    image = found["Kernel image"]
    assert image.what == MOVED and image.before != image.now and "KASLR chose one of" in image.why
    assert found["builtin:4M"].what == ENDED and "was copied here, and booted" in found["builtin:4M"].why


def test_a_kernel_may_run_where_it_was_loaded(lab: Boots):
    lab.cycle(append="nokaslr")
    assert over(lab)["Kernel image"].why.endswith("it runs where it was loaded")


def test_pages_that_were_relocated_are_counted(lab: Boots):
    frames, runs, total = lab.grow(600)
    start, count = runs[0]
    lab.load("builtin:4M", syscall="load", mem_min=start << 12, mem_max=(start + 1024 + count) << 12)
    banned = lab.up().banned()
    lab.publish("a", frames, runs, total)
    relocated = lab.up().store.nodes()[0].relocated
    assert relocated == (banned & Spans((first, first + size) for first, size in runs)).total > 0
    lab.execute()
    assert f"{relocated} pages had been moved out of the way of the loaded kernel" in over(lab)["a"].why


def test_a_tree_that_was_given_back_or_lost_is_said_to_be(lab: Boots):
    lab.preserve("a", 10)
    lab.preserve("b", 10, seed=2)
    lab.cycle()
    lab.up().store.withdraw(b"a")
    assert over(lab)["a"].what == ENDED and over(lab)["a"].why.endswith("given back since")
    lab.cycle(append="pkram=0", force=True)
    assert over(lab)["b"] == over(lab)["b"]._replace(what=ENDED, why="lost: the new kernel did not find its node")


def test_a_tree_that_lives_again_is_where_it_was(lab: Boots):
    lab.preserve("a", 10)
    lab.cycle()
    (node,) = lab.up().store.nodes()
    lab.up().store.withdraw(b"a")
    assert over(lab, {node.tree_id: "/mnt"})["a"].why.endswith(
        "live since, on /mnt: its node was withdrawn by the first change"
    )


def test_what_nobody_preserved_is_lost(lab: Boots):
    lab.cycle()
    info = kernelrecord.read(lab.machine)
    assert info is not None
    report: dict[str, Any] = info.report | {"lost": [{"name": "/mnt (one, not preserved)", "pages": 0}]}
    info = kernelrecord.KernelInfo(**(vars(info) | {"report": report}))
    before = [memorymap.Part(LEASED, mount, Spans([(9, 12)])) for mount in ("/mnt", "/m")]
    assert moves.moves(before, [], info) == [
        Move(ENDED, "/mnt", "lost: nobody had preserved it", Spans([(9, 12)]), Spans())
    ]
    assert moves.moves([memorymap.Part(PRESERVED, "z", Spans([(9, 12)]))], [], info)[0].what == ENDED
