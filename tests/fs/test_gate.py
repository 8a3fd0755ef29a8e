# SPDX-License-Identifier: GPL-2.0-or-later
"""Frozen and preserved trees: which calls are changes, and what happens at the first one."""

import errno
import os

import pytest

from pkramfs.fs.namespace import RENAME_WHITEOUT
from pkramfs.spans import Spans

CHANGES = {
    "create": lambda t, f, d: t.create(1, b"new", 0o644),
    "mkdir": lambda t, f, d: t.mkdir(1, b"new", 0o755),
    "mknod": lambda t, f, d: t.mknod(1, b"new", 0o010644),
    "symlink": lambda t, f, d: t.symlink(1, b"new", b"x" * 200),
    "link": lambda t, f, d: t.link(f, 1, b"new"),
    "unlink": lambda t, f, d: t.unlink(1, b"f"),
    "rmdir": lambda t, f, d: t.rmdir(1, b"d"),
    "rename": lambda t, f, d: t.rename(1, b"f", 1, b"g"),
    "whiteout": lambda t, f, d: t.rename(1, b"f", 1, b"g", RENAME_WHITEOUT),
    "chmod": lambda t, f, d: t.setattr(f, mode=0o600),
    "chown": lambda t, f, d: t.setattr(d, uid=5),
    "truncate": lambda t, f, d: t.setattr(f, size=1),
    "utimens": lambda t, f, d: t.setattr(f, mtime=5),
    "setxattr": lambda t, f, d: t.setxattr(f, b"user.a", b"2"),
    "removexattr": lambda t, f, d: t.removexattr(f, b"user.a"),
    "acl": lambda t, f, d: t.removexattr(f, b"system.posix_acl_access"),
    "rewrite": lambda t, f, d: t.write(f, 0, b"new"),
    "append": lambda t, f, d: t.write(f, 5000, b"new"),
    "open O_TRUNC": lambda t, f, d: t.open(f, os.O_RDONLY | os.O_TRUNC),
    "allocate": lambda t, f, d: t.allocate(f, 0, 1 << 20),
    "sparsify": lambda t, f, d: t.sparsify(t.lookup(1, b"zeros").ino),
    "punch": lambda t, f, d: t.punch(f, 0, 4096),
}


@pytest.fixture
def some(tree, sh):
    file = sh.write(b"f", b"data")
    tree.setxattr(file, b"user.a", b"1")
    sh.write(b"zeros", bytes(5000))
    return file, sh.mkdir(b"d")


def snapshot(tree):
    return [
        (i.ino, i.mode, i.uid, i.gid, i.nlink, i.size, i.mtime, i.ctime, dict(i.xattrs or {}), i.blocks)
        for i in tree.inodes.values()
    ] + [tree.limits.pages, tree.limits.inode_space, [n for n, _, _ in tree.readdir(1)], bytes(tree.read(2, 0, 99))]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_frozen_tree_refuses_every_change(tree, some, change) -> None:
    tree.freeze()
    before = snapshot(tree)
    with pytest.raises(OSError) as caught:
        change(tree, *some)
    assert caught.value.errno == errno.EROFS
    assert snapshot(tree) == before
    tree.thaw()
    change(tree, *some)
    for inode in tree.inodes.values():
        inode.opens = 0


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_first_change_of_a_preserved_tree_comes_after_the_withdrawal(tree, some, change) -> None:
    calls = []
    before = snapshot(tree)
    tree.preservation.restore(lambda: calls.append(snapshot(tree) == before), Spans())
    change(tree, *some)
    assert calls == [True]
    assert not tree.preserved
    tree.create(1, b"second", 0o644)
    assert calls == [True]
    for inode in tree.inodes.values():
        inode.opens = 0


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_where_the_withdrawal_fails_nothing_changes(tree, some, change) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "no")

    before = snapshot(tree)
    tree.preservation.restore(fail, Spans())
    with pytest.raises(OSError):
        change(tree, *some)
    assert tree.preserved
    assert snapshot(tree) == before


def test_looking_is_no_change(tree, sh, some) -> None:
    file, _ = some
    tree.preservation.restore(lambda: pytest.fail("withdrawn by a look"), Spans())
    tree.lookup(1, b"f")
    list(tree.readdir(1))
    tree.read(file, 0, 10)
    tree.release(tree.open(file, os.O_RDWR))
    tree.getxattr(file, b"user.a")
    tree.statfs()
    inode = tree.inode(file)
    tree.setattr(file, mtime=inode.mtime, ctime=inode.ctime)  # the kernel flushes what it was told
    for failing in (lambda: tree.create(1, b"f", 0o644), lambda: tree.unlink(1, b"absent")):
        with pytest.raises(OSError):
            failing()
    assert tree.preserved


def test_opening_for_writing_is_refused_while_frozen(tree, some) -> None:
    file, _ = some
    tree.freeze()
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC):
        with pytest.raises(OSError):
            tree.open(file, flags)
    tree.release(tree.open(file, os.O_RDONLY))


def test_writers_are_named(tree, sh, some) -> None:
    file, folder = some
    below = sh.write(b"g", parent=folder)
    reading, writing = tree.open(file, os.O_RDONLY), tree.open(below, os.O_WRONLY)
    assert tree.writers() == [b"/d/g"]
    tree.release(writing)
    assert tree.writers() == []
    tree.release(reading)


def test_many_writers_are_counted_and_a_few_are_named(tree, sh) -> None:
    handles = [tree.open(sh.write(b"%d" % number), os.O_RDWR) for number in range(100)]
    again = tree.open(handles[0], os.O_WRONLY)
    assert tree.writers() == [b"/%d" % number for number in range(10)]
    assert (tree.writers(2), tree.writer_count) == ([b"/0", b"/1"], 100)
    for number in range(100):
        tree.unlink(1, b"%d" % number)
    assert tree.deleted(1) == [b"/0 (deleted)"] and tree.deleted_count == 100
    tree.release(again)
    assert tree.writer_count == 100
    for handle in handles:
        tree.release(handle)
    assert (tree.writer_count, tree.deleted_count, tree.writing) == (0, 0, {})


def test_a_path_is_found_from_below(tree, sh, monkeypatch) -> None:
    """By what each inode knows: nothing is searched, whatever was renamed, linked, exchanged or removed."""
    monkeypatch.setattr(type(tree), "_other_name", None)
    one, two = sh.mkdir(b"one"), sh.mkdir(b"two")
    deep = sh.mkdir(b"deep", parent=one)
    file, other = sh.write(b"file", parent=deep), sh.write(b"other", parent=two)
    assert tree.path(tree.inode(file)) == b"/one/deep/file"
    tree.rename(1, b"one", two, b"moved")
    assert tree.path(tree.inode(file)) == b"/two/moved/deep/file"
    tree.rename(deep, b"file", two, b"other", 2)
    assert (tree.path(tree.inode(file)), tree.path(tree.inode(other))) == (b"/two/other", b"/two/moved/deep/file")
    tree.rename(two, b"other", two, b"white", 4)
    assert tree.path(tree.lookup(two, b"other")) == b"/two/other" and tree.path(tree.inode(file)) == b"/two/white"
    tree.link(file, 1, b"link")
    tree.unlink(two, b"white")
    assert tree.path(tree.inode(file)) == b"/link"
    inode, handle = tree.inode(other), tree.open(other)
    tree.unlink(deep, b"file")
    tree.rmdir(one, b"deep")
    assert tree.path(inode) == b"/two/moved/deep/file (deleted)"
    tree.release(handle)


def test_the_last_name_of_several_is_searched_but_not_for_ever(tree, sh, monkeypatch) -> None:
    folder = sh.mkdir(b"folder")
    ino = sh.write(b"first", parent=folder)
    tree.link(ino, 1, b"second")
    tree.unlink(1, b"second")
    assert tree.path(tree.inode(ino)) == b"/folder/first"
    for number in range(10):
        sh.write(b"%d" % number)
    monkeypatch.setattr("pkramfs.fs.core._SEARCH", 14)
    assert tree.path(tree.inode(ino)) == b"/folder/first"
    monkeypatch.setattr("pkramfs.fs.core._SEARCH", 10)
    assert tree.path(tree.inode(ino)) == b"inode %d" % ino


def test_a_path_longer_than_any_call_takes_is_shown_by_its_end(tree, sh) -> None:
    parent = 1
    for _ in range(3000):
        parent = sh.mkdir(b"d" * 250, parent=parent)
    file = tree.inode(sh.write(b"the file", parent=parent))
    path = tree.path(file)
    assert path.startswith(b".../") and path.endswith(b"d/the file") and len(path) == 4096
    short = tree.inode(sh.write(b"s" * 255))
    assert tree.path(short) == b"/" + b"s" * 255
