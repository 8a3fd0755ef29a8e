# SPDX-License-Identifier: GPL-2.0-or-later
"""What is verified after a replay, which is only what is awake, comes to the same as verifying all of the tree."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from pkramfs.errors import FormatError
from pkramfs.fs import brief, records
from pkramfs.fs.inode import Inode
from pkramfs.fs.records import Kind
from pkramfs.fs.tree import Tree
from tests.support.journals import USER, Checkpoint, Driver, Memory, live
from tests.support.whole import Both

HARD, SUB, BELOW = b"hard", b"sub", b"below"


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    with Memory.make(8) as made:
        yield made


@pytest.fixture(scope="module")
def tree(memory: Memory) -> Tree:
    """Three directories with a file of two pages and a subdirectory each, as a checkpoint."""
    made = memory.tree()
    for name in (b"one", b"two", b"three"):
        folder = made.mkdir(1, name, 0o755).ino
        made.write(made.create(folder, b"file", 0o644).ino, 0, name * 2000)
        below = made.mkdir(folder, SUB, 0o755).ino
        made.create(below, BELOW, 0o600)
    made.link(made.lookup(number(made, b"one"), b"file").ino, number(made, b"two"), HARD)
    gone = made.create(1, b"gone", 0o600)
    made.open_inode(gone, os.O_RDWR, USER)
    made.unlink(1, b"gone")
    Checkpoint(memory, made).finish()
    return made


def number(tree: Tree, *path: bytes) -> int:
    """The inode number of a path."""
    ino = 1
    for name in path:
        found = tree.lookup(ino, name)
        assert found is not None
        ino = found.ino
    return ino


def told(memory: Memory, tree: Tree, *told: bytes) -> Both:
    """What is said of the tree if its log has these records, too."""
    with memory.copy() as other, pytest.MonkeyPatch.context() as patch:
        recovered = other.recover(live(tree))
        assert recovered.journal is not None
        recovered.journal.log.write(list(told))
        recovered.journal.log.commit()
        both = Both(patch)
        with contextlib.suppress(FormatError):
            other.rebuild(live(tree))
        return both


def attributes(tree: Tree, ino: int, **changed: int) -> bytes:
    """The record of the attributes of an inode, some of which are others."""
    inode, now = tree.inode(ino), Inode(ino, 0, 0, 0, 0, 0, 0)
    for field in ("mode", "nlink", "size", "opens"):
        setattr(now, field, changed.get(field, getattr(inode, field)))
    return records.pack_inode(now, ())


def test_what_fits_is_accepted(memory: Memory, tree: Tree) -> None:
    one, two = number(tree, b"one"), number(tree, b"two")
    file, sub = number(tree, b"one", b"file"), number(tree, b"two", SUB)
    for fits in (
        [attributes(tree, file, mode=0o100600)],
        [attributes(tree, two, mode=0o041777)],
        [attributes(tree, sub, mode=0o041777)],
        [records.pack_range(Kind.CUT, file, 0, 9), records.pack_run(file, 5, frame(tree, file), 1)],
        [records.pack_leave(two, HARD), attributes(tree, file, nlink=1), attributes(tree, two, size=80)],
        [
            records.pack_leave(one, SUB), records.pack_enter(two, b"moved", number(tree, b"one", SUB), 99),
            attributes(tree, one, size=60, nlink=2), attributes(tree, two, size=120, nlink=4),
        ],
    ):  # fmt: skip
        both = told(memory, tree, *fits)
        assert (both.asked, both.whole, both.awake) == (1, None, None), fits


def frame(tree: Tree, ino: int) -> int:
    """The first frame of a file."""
    pages = tree.inode(ino).pages
    assert pages is not None
    return next(iter(pages))[1]


def test_what_does_not_fit_is_refused(memory: Memory, tree: Tree) -> None:
    """Also where it does not fit to what sleeps: links, sizes, frames, and what names that sleep stand for."""
    one, two, three = (number(tree, name) for name in (b"one", b"two", b"three"))
    file, sub = number(tree, b"one", b"file"), number(tree, b"two", SUB)
    other, below = number(tree, b"three", b"file"), number(tree, b"two", SUB, BELOW)
    moved = Inode(two, 0o040755, 0, 0, 0, 0, 0)
    into_itself = brief.pack_moved(
        (brief.pack_moved, moved, tree.inode(1), b"two", tree.inode(sub), b"in", 9, 0, 0), 0, 0
    )
    for wrong in (
        [attributes(tree, file, nlink=1)],
        [attributes(tree, file, nlink=3)],
        [attributes(tree, two, size=60)],
        [attributes(tree, two, nlink=2)],
        [attributes(tree, sub, size=40)],
        [attributes(tree, sub, nlink=0), records.pack_leave(two, SUB)],
        [records.pack_leave(two, SUB), attributes(tree, two, size=80, nlink=2), records.pack_reaped(sub)],
        [records.pack_leave(one, b"file"), attributes(tree, one, size=60), records.pack_reaped(file)],
        [records.pack_run(file, 9, frame(tree, other), 1)],
        [records.pack_run(file, 9, frame(tree, file), 1)],
        [records.pack_run(below, 0, frame(tree, other), 1)],
        [into_itself[brief.AHEAD :]],
        [records.pack_enter(1, b"a/b", three, 99), attributes(tree, 1, size=120, nlink=6)],
        [records.pack_enter(1, b"second", three, 99), attributes(tree, 1, size=120, nlink=6)],
    ):  # fmt: skip
        both = told(memory, tree, *wrong)
        assert both.asked == 1 and both.whole and both.awake, (wrong, both.whole, both.awake)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_to_a_tree_that_sleeps(seed: int) -> None:
    with Memory.make(8) as memory, pytest.MonkeyPatch.context() as patch:
        tree = memory.tree()
        driver, both, slept = Driver(tree, seed), Both(patch), 0
        for _ in range(150):
            driver.step()
        Checkpoint(memory, tree).finish()
        for _ in range(10):
            for _ in range(3):
                driver.step()
            slept += memory.rebuild(live(tree)).tree.asleep is not None
            assert (both.whole, both.awake) == (None, None)
        assert both.asked > 8 and slept
