# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel has of a tree is told to whoever goes on with both, deleted files too."""

import os

import pytest

from pkramfs.fs import handles
from pkramfs.fs.inode import ROOT
from pkramfs.fs.limits import Limits
from pkramfs.fs.recover import begin
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from tests.support.journals import TREE, Memory, end

NAME = b"shmem-x"


def used(tree: Tree) -> dict[str, int]:
    """A file in each state that the kernel may have it in; their numbers."""
    found = {}
    for name in ("open", "gone", "twice"):
        inode = tree.create(1, name.encode(), 0o640)
        tree.remember(inode)
        handle = tree.open_inode(inode, os.O_RDWR, ROOT)
        tree.write(handle, 0, memoryview(name.encode() * 5000))
        found[name] = inode.ino
    tree.open(found["twice"], os.O_RDONLY)
    unnamed = tree.tmpfile(1, 0o600)
    tree.remember(unnamed)
    tree.open_inode(unnamed, os.O_RDWR, ROOT)
    folder = tree.mkdir(1, b"folder", 0o700)
    tree.remember(folder)
    known = tree.create(1, b"known", 0o600)
    tree.remember(known)
    tree.unlink(1, b"gone")
    tree.rmdir(1, b"folder")
    tree.commit()
    return found | {"unnamed": unnamed.ino, "folder": folder.ino, "known": known.ino}


def describe(tree: Tree) -> dict[int, tuple[object, ...]]:
    """All that must be the same afterwards."""
    tree.wake()
    return {
        i.ino: (i.mode, i.nlink, i.size, i.mtime, i.ctime, i.opens, i.writers, i.ino in tree.unnamed)
        for i in tree.inodes.values()
    }


def crossed(memory: Memory, tree: Tree) -> Tree:
    """The tree after a kexec: from its node alone, and what was told of its users."""
    told = handles.open_files(tree)
    tree.freeze()
    end(save(tree, memory.store, NAME))
    fresh = end(restore(memory.store, NAME, memory.ram, Frames(memory.ram, memory.leases, TREE), Limits()))
    begin(fresh, b"x", 8, memory.store.find(NAME).pfn)
    handles.reopen(fresh, told)
    return fresh


def test_all_that_is_in_use_crosses() -> None:
    with Memory.make() as memory:
        tree = Tree(memory.ram, memory.frames, Limits())
        begin(tree, b"x", 7)
        numbers = used(tree)
        before = describe(tree)
        assert set(handles.known(tree) or ()) == {1, *numbers.values()}
        handles.shelter(tree)
        after = crossed(memory, tree)
        handles.unshelter(after)
        assert describe(after) == before
        assert after.writing.keys() == tree.writing.keys()
        assert set(after.orphans) == {numbers[name] for name in ("gone", "unnamed", "folder")}
        assert bytes(after.read(numbers["gone"], 0, 9)) == b"gonegoneg"
        assert after.lookup(1, handles.SHELTER) is None
        assert after.counts().files == 5
        for name in ("gone", "unnamed", "folder"):
            after.close_all(after.inode(numbers[name]))
        assert after.orphans == {}


def test_where_it_does_not_come_to_it_nothing_has_changed() -> None:
    with Memory.make() as memory:
        tree = Tree(memory.ram, memory.frames, Limits())
        begin(tree, b"x", 7)
        used(tree)
        before, times = describe(tree), (tree.root.mtime, tree.root.ctime)
        handles.shelter(tree)
        assert tree.lookup(1, handles.SHELTER) is not None and not tree.orphans and handles.left_behind(tree)
        handles.unshelter(tree)
        assert not handles.left_behind(tree)
        assert (describe(tree), tree.root.mtime, tree.root.ctime) == (before, *times)


def test_what_has_that_name_by_itself_is_left_alone() -> None:
    with Memory.make() as memory:
        tree = Tree(memory.ram, memory.frames, Limits())
        begin(tree, b"x", 7)
        folder = tree.mkdir(1, handles.SHELTER, 0o700)
        assert not handles.left_behind(tree)
        tree.create(folder.ino, b"3000", 0o600)
        handles.unshelter(tree)
        assert tree.lookup(folder.ino, b"3000") is not None
        used(tree)
        with pytest.raises(FileExistsError):
            handles.shelter(tree)


def test_of_a_tree_that_sleeps_everything_may_be_known() -> None:
    with Memory.make() as memory:
        tree = Tree(memory.ram, memory.frames, Limits())
        begin(tree, b"x", 7)
        folder = tree.mkdir(1, b"folder", 0o700)
        for number in range(20):
            tree.create(folder.ino, b"%d" % number, 0o600)
        asleep = crossed(memory, tree)
        assert asleep.asleep is not None and handles.known(asleep) == [1]
        asleep.assume_known()
        assert handles.known(asleep) is None
        assert sorted(handles.numbers(asleep)) == sorted(tree.inodes)
