# SPDX-License-Identifier: GPL-2.0-or-later
"""huge=: which holes are filled with whole aligned 2 MiB, and what becomes of their tails.

Frames are the real ones here: what is to be seen are physical addresses.
"""

import contextlib
import errno
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pkramfs.fs.limits import Limits
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE

MIB2, PAGES = BLOCK_SIZE, BLOCK_PAGES
SUPER_PFN = 9


@pytest.fixture
def frames(ram: Ram) -> Frames:
    leases = Leases(ram, 1, ram.pages // PAGES, contextlib.nullcontext)
    leases.ids[0] = KERNEL
    return Frames(ram, leases, 0xABC)


@pytest.fixture
def make(ram: Ram, frames: Frames) -> Callable[..., Tree]:
    def build(huge: str, limit: int = 0) -> Tree:
        made = Tree(ram, frames, Limits(limit))
        made.huge = huge
        return made

    return build


def write(tree: Tree, name: bytes, *pieces: tuple[int, bytes]) -> int:
    found = tree.lookup(1, name)
    ino = tree.create(1, name, 0o644).ino if found is None else found.ino
    for offset, data in pieces:
        assert tree.write(ino, offset, data) == len(data)
    return ino


def layout(tree: Tree, ino: int) -> list[tuple[int, int, bool]]:
    """(index, pages, whether it lies aligned) of every run."""
    pages = tree.inode(ino).pages
    return [(index, count, (pfn - index) % PAGES == 0) for index, pfn, count in pages or ()]


def test_a_byte_takes_a_whole_huge_page(make: Any) -> None:
    tree = make("always")
    ino = write(tree, b"a", (5 * MIB2 + 7, b"x"))
    assert layout(tree, ino) == [(5 * PAGES, PAGES, True)]
    assert (tree.inode(ino).blocks, tree.limits.pages) == (PAGES * 8, PAGES)
    assert bytes(tree.read(ino, 5 * MIB2, 99)) == bytes(7) + b"x"


@pytest.mark.parametrize("huge", ["never", "advise"])
def test_small_pages(make: Any, huge: str) -> None:
    tree = make(huge)
    ino = write(tree, b"a", (0, bytes(range(256)) * 16), (3 * MIB2, b"x"))
    assert [(index, count) for index, count, _ in layout(tree, ino)] == [(0, 1), (3 * PAGES, 1)]


def test_a_range_with_a_page_in_it_gets_small_pages(make: Any) -> None:
    tree = make("never")
    ino = write(tree, b"a", (MIB2 + PAGE_SIZE, b"old"))
    tree.huge = "always"
    write(tree, b"a", (0, b"y" * (3 * MIB2)))
    pages = tree.inode(ino).pages
    assert pages.count == 3 * PAGES
    for first in (0, 2 * PAGES):  # around it: huge
        ((_, pfn, count),) = pages.between(first, first + PAGES)
        assert (pfn % PAGES, count) == (0, PAGES)
    assert bytes(tree.read(ino, MIB2, 2 * PAGE_SIZE)) == b"y" * 2 * PAGE_SIZE


def test_within_size_looks_at_the_size(make: Any) -> None:
    tree = make("within_size")
    ino = write(tree, b"a", (0, b"x"))
    assert tree.inode(ino).blocks == 8
    tree.setattr(ino, size=3 * MIB2 + 1)
    write(tree, b"a", (MIB2, b"x"), (3 * MIB2, b"x"))
    assert [row[:2] for row in layout(tree, ino)] == [(0, 1), (PAGES, PAGES), (3 * PAGES, 1)]


def test_block_size(make: Any) -> None:
    tree = make("never")
    ino = write(tree, b"a", (0, b"x"))

    def seen(huge: str, size: int) -> int:
        tree.huge = huge
        return tree.block_size(tree.setattr(ino, size=size))

    assert [seen(huge, MIB2) for huge in ("never", "advise", "within_size", "always")] == [4096, 4096, MIB2, MIB2]
    assert [seen("within_size", MIB2 - size) for size in (4095, 4096)] == [MIB2, 4096]
    tree.huge = "always"
    assert tree.block_size(tree.root) == 4096


def test_what_is_cut_comes_back_and_growth_shows_zeros(make: Any) -> None:
    tree = make("always")
    ino = write(tree, b"a", (0, b"x" * 10_000))
    tree.setattr(ino, size=5000)
    assert tree.inode(ino).blocks == 16
    tree.setattr(ino, size=MIB2)
    assert bytes(tree.read(ino, 0, MIB2)) == b"x" * 5000 + bytes(MIB2 - 5000)
    tree.punch(ino, 0, PAGE_SIZE)
    assert tree.limits.pages == 1


def test_tails_go_before_anybody_meets_enospc(make: Any) -> None:
    tree = make("always", limit=PAGES + 100)
    first = write(tree, b"a", (0, b"a"))
    second = write(tree, b"b", (0, b"b" * 50 * PAGE_SIZE))  # no room for a huge page until a's tail goes
    assert [tree.inode(ino).blocks // 8 for ino in (first, second)] == [1, PAGES]
    third = write(tree, b"c", (0, b"c" * 500 * PAGE_SIZE))
    assert [tree.inode(ino).blocks // 8 for ino in (first, second, third)] == [1, 50, PAGES]
    assert tree.write(third, MIB2, b"c" * 99 * PAGE_SIZE) == 61 * PAGE_SIZE  # c's own tail went
    with pytest.raises(OSError) as caught:
        tree.write(third, 2 * MIB2, b"c")
    assert caught.value.errno == errno.ENOSPC
    assert bytes(tree.read(second, 0, MIB2)) == b"b" * 50 * PAGE_SIZE


def test_pages_that_were_asked_for_are_no_tail(make: Any) -> None:
    tree = make("always", limit=PAGES + 1)
    ino = tree.create(1, b"a", 0o644).ino
    tree.allocate(ino, 0, MIB2, keep_size=True)
    tree.write(ino, 0, b"x")
    write(tree, b"b", (0, b"y"))
    with pytest.raises(OSError, match="No space"):
        write(tree, b"c", (0, b"z"))
    assert tree.inode(ino).blocks // 8 == PAGES


def test_tails_of_what_is_deleted_are_forgotten(make: Any) -> None:
    tree = make("always")
    write(tree, b"a", (0, b"x"))
    assert tree.tails
    tree.unlink(1, b"a")
    assert not tree.tails


def test_giving_back_a_tail_passes_the_gate(make: Any) -> None:
    tree = make("always", limit=PAGES)
    write(tree, b"a", (0, b"a"))
    seen = []
    tree.preservation.restore(lambda: seen.append(tree.limits.pages), Spans())
    write(tree, b"b", (0, b"b"))
    assert seen[0] == PAGES  # nothing was freed before


def test_saved_as_entries_of_order_9_and_restored(ram: Ram, frames: Frames, make: Any) -> None:
    superblock.create(ram, SUPER_PFN, generation=7)
    store = Store(ram, SUPER_PFN, contextlib.nullcontext)
    tree = make("always")
    ino = write(tree, b"a", (0, b"x" * 100), (7 * MIB2, b"y" * (MIB2 + 5)))
    before = layout(tree, ino)
    assert [row[1:] for row in before] == [(PAGES, True), (2 * PAGES, True)]
    tree.freeze()
    list(save(tree, store, b"huge"))
    with store.prepare_load(b"huge") as load:
        _, pages = load
        _, _, order = pages.load_pages()
    assert Counter(order.tolist()).keys() <= {9, 10}
    assert sum(1 << bits for bits in order.tolist()) == 3 * PAGES
    again = _last(restore(store, b"huge", ram, frames, Limits()))
    assert layout(again, ino) == before
    assert bytes(again.read(ino, 7 * MIB2, MIB2 + 5)) == b"y" * (MIB2 + 5)


def test_strict_writes_an_entry_for_each_huge_page_and_for_each_other(ram: Ram, frames: Frames, make: Any) -> None:
    superblock.create(ram, SUPER_PFN, generation=7)
    store = Store(ram, SUPER_PFN, contextlib.nullcontext)
    tree = make("never")
    small = write(tree, b"small", (PAGE_SIZE, b"s" * 3 * PAGE_SIZE))
    tree.huge = "always"
    large = write(tree, b"large", (0, b"l" * 3 * MIB2), (9 * MIB2, b"m"))
    write(tree, b"small", (0, b"s" * (MIB2 + 1)))  # 2 MiB of small pages, then a huge one
    tree.punch(large, MIB2 + 7 * PAGE_SIZE, PAGE_SIZE)  # no huge page any more
    before = {ino: bytes(tree.read(ino, 0, 10 * MIB2)) for ino in (small, large)}
    aligned = sum(count // PAGES for ino in (small, large) for _, count, is_huge in layout(tree, ino) if is_huge)
    tree.freeze()
    report = _last(save(tree, store, b"huge", strict=True))
    with store.prepare_load(b"huge") as load:
        _, pages = load
        assert report.runs == len(pages.load_runs()[0])
        _, _, order = pages.load_pages()
    found = Counter(order.tolist())
    assert found.keys() == {0, 9}
    assert found[9] >= 4 and found[9] >= aligned - 1
    assert found[0] + found[9] * PAGES == tree.limits.pages
    again = _last(restore(store, b"huge", ram, frames, Limits()))
    assert {ino: bytes(again.read(ino, 0, 10 * MIB2)) for ino in (small, large)} == before


def test_strict_with_nothing_to_save(ram: Ram, frames: Frames, make: Any) -> None:
    superblock.create(ram, SUPER_PFN, generation=7)
    store = Store(ram, SUPER_PFN, contextlib.nullcontext)
    tree = make("always")
    tree.create(1, b"empty", 0o644)
    tree.freeze()
    assert _last(save(tree, store, b"huge", strict=True)).pages == 0
    assert _last(restore(store, b"huge", ram, frames, Limits())).lookup(1, b"empty") is not None


def _last(work: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value
