# SPDX-License-Identifier: GPL-2.0-or-later
"""The collector of cyclic garbage has nothing to do with a tree, and is kept from looking at it."""

import gc
from collections.abc import Iterator

import pytest

from pkramfs.fs import collector
from pkramfs.fs.directory import Directory
from pkramfs.fs.inode import Inode
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.tree import Tree


@pytest.fixture
def collections() -> Iterator[None]:
    """Collections happen when the test says so, and afterwards as before."""
    callbacks = list(gc.callbacks)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.callbacks[:] = callbacks
        gc.unfreeze()
        gc.enable()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_a_tree_gives_up_is_in_no_cycle(tree: Tree, sh, collections: None) -> None:
    for name in (b"one", b"two"):
        top = sh.mkdir(name)
        below = sh.mkdir(b"below", parent=top)
        file = sh.write(b"file", b"x" * 10_000, parent=below)
        tree.setxattr(file, b"user.x", b"value")
        tree.link(file, top, b"link")
        tree.symlink(top, b"symlink", b"target")
        for parent, gone in ((below, b"file"), (top, b"link"), (top, b"symlink")):
            tree.unlink(parent, gone)
        tree.rmdir(top, b"below")
        tree.rmdir(1, name)
    assert len(tree.inodes) == 1
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    assert [found for found in gc.garbage if isinstance(found, Inode | Directory | PageMap)] == []


def test_a_settled_tree_is_not_looked_at(tree: Tree, sh, collections: None) -> None:
    before = sh.write(b"before", b"x")
    collector.settle()
    after = sh.write(b"after", b"x")
    watched = {number: tree.inode(number) for number in (before, after)}
    looked_at = {found.ino for found in gc.get_objects() if isinstance(found, Inode)}
    assert before not in looked_at and after in looked_at
    gc.collect(0)
    gc.collect(1)
    assert any(found is watched[after] for found in gc.get_objects()), "it has not survived a full collection yet"
    gc.collect()
    assert not any(found is watched[after] for found in gc.get_objects())


def test_garbage_is_collected_as_ever(collections: None) -> None:
    collector.settle()
    collector.settle()
    for _ in range(3):
        Cycle()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert sum(isinstance(found, Cycle) for found in gc.garbage) == 1
        gc.set_debug(0)
        gc.garbage.clear()
        gc.collect()


def test_a_pause_within_a_pause() -> None:
    with collector.paused():
        with collector.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
