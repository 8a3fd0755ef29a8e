# SPDX-License-Identifier: GPL-2.0-or-later
"""What is saved is what is restored: compared recursively, to the nanosecond and the hole."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkramfs.errors import ExhaustedError, PkramError
from pkramfs.fs import acl
from pkramfs.fs.limits import Limits
from pkramfs.fs.tree import Tree

ACL = acl.pack([(1, 7, -1 & 0xFFFFFFFF), (2, 6, 7), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 1, 0xFFFFFFFF)])


def describe(tree: Tree) -> dict[bytes, tuple]:
    """Everything that a user can see of a tree, by path, in the order of listings."""
    found, stack = {}, [(b"", tree.root.ino)]
    while stack:
        path, ino = stack.pop()
        inode = tree.inode(ino)
        content, holes = b"", None
        if inode.is_file and inode.size < 1 << 24:
            content = bytes(tree.read(ino, 0, inode.size))
        if inode.pages is not None:
            holes = inode.pages.holes(0, (inode.size + 4095) >> 12)
        if inode.entries is not None:
            below = [(name, child.ino, cookie) for name, child, cookie in tree.readdir(ino)]
            content = below
            stack += [(path + b"/" + name, child) for name, child, _ in below[2:]]
        found[path] = (
            *(getattr(inode, field) for field in ("ino", "mode", "uid", "gid", "nlink", "size", "rdev", "blocks")),
            *(inode.mtime, inode.ctime, inode.target, inode.xattrs or None, content, holes),
        )
    return found


def fill(tree: Tree, sh) -> None:
    """One of everything."""
    folder = sh.mkdir(b"folder")
    deep = sh.mkdir(b"deep", parent=folder)
    big = sh.write(b"big", os.urandom(1 << 20), parent=deep)
    sh.write(b"empty")
    sh.write(b"one", b"1", mode=0o4755)
    sparse = sh.write(b"sparse", b"head")
    tree.write(sparse, 1 << 40, b"middle")
    tree.setattr(sparse, size=(1 << 62) + 5)
    punched = sh.write(b"punched", b"x" * 50_000)
    tree.punch(punched, 8192, 20_000)
    tree.allocate(punched, 60_000, 100_000, keep_size=True)
    tree.link(big, 1, b"hard link")
    tree.symlink(1, b"short", b"to/\xff")
    tree.symlink(1, b"long", b"y" * 3000)
    for number, kind in enumerate((0o010000, 0o140000, 0o020000, 0o060000)):
        tree.mknod(folder, b"special %d" % number, kind | 0o640, 0x0105)
    tree.setxattr(folder, acl.DEFAULT, ACL)
    tree.setxattr(big, acl.ACCESS, ACL)
    tree.setxattr(big, b"user.\xfe", b"\0\1" * 500)
    tree.setxattr(1, b"trusted.overlay", b"")
    tree.setattr(big, atime=-5, mtime=1_600_000_000_123_456_789, ctime=7)
    tree.setattr(1, mode=0o755, uid=9, gid=8)
    sh.write(b"gone", b"z" * 9000)
    tree.unlink(1, b"gone")
    sh.write(b"\xff\n" + b"n" * 253)
    tree.rename(1, b"empty", folder, b"renamed")


def atimes(tree: Tree) -> dict[int, int]:
    tree.wake()
    return {inode.ino: inode.atime for inode in tree.inodes.values()}


def test_everything_survives(tree, sh, round_trip) -> None:
    fill(tree, sh)
    copy = round_trip(tree)
    assert atimes(copy) == atimes(tree)
    assert describe(copy) == describe(tree)
    assert copy.counts() == tree.counts()
    assert (copy.limits.pages, copy.limits.inode_space) == (tree.limits.pages, tree.limits.inode_space)
    assert copy.next_ino == tree.next_ino
    assert copy.preserved and not copy.frozen


def test_a_restored_tree_lives_on(ram, frames, sh, round_trip) -> None:
    tree = Tree(ram, type(frames)(ram), Limits())  # its frames will be the copy's
    fill(tree, type(sh)(tree))
    copy = round_trip(tree)
    calls = []
    copy.preservation.on_withdrawn = lambda: calls.append(1)
    ino = copy.create(1, b"new", 0o644).ino
    assert ino == tree.next_ino
    copy.write(ino, 0, b"fresh" * 1000)
    copy.unlink(1, b"hard link")
    copy.setattr(copy.lookup(1, b"sparse").ino, size=0)
    sh.audit(copy)
    assert calls == [1]


def test_an_empty_tree(tree, round_trip) -> None:
    assert describe(round_trip(tree)) == describe(tree)


def test_saving_twice_with_a_restore_between(tree, sh, round_trip) -> None:
    fill(tree, sh)
    assert describe(round_trip(round_trip(tree))) == describe(tree)


def test_files_share_runs_in_the_page_stream(tree, sh, small_store) -> None:
    for number in range(100):
        sh.write(b"%d" % number, b"x")
    tree.freeze()
    report = sh.exhaust(sh.save(tree, small_store, b"shmem-x"))
    assert (report.pages, report.runs) == (100, 1)
    assert report.stream_bytes < 100 * 130 + 500


def test_deleted_files_are_named_and_not_saved(tree, sh, small_store) -> None:
    folder = sh.mkdir(b"folder")
    ino = sh.write(b"open", b"data", parent=folder)
    handle = tree.open(ino)
    tree.unlink(folder, b"open")
    tree.freeze()
    report = sh.exhaust(sh.save(tree, small_store, b"shmem-x"))
    assert report.deleted == ["/folder/open (deleted)"]
    assert (report.files, report.directories, report.pages) == (0, 2, 0)
    tree.release(handle)


def test_only_a_frozen_tree_is_saved(tree, sh, small_store) -> None:
    with pytest.raises(PkramError) as caught:
        sh.exhaust(sh.save(tree, small_store, b"shmem-x"))
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda t: t.mkdir(1, b"d", 0o755), "/d is not a regular file"),
        (lambda t: t.symlink(1, b"l", b"x"), "/l is not a regular file"),
        (lambda t: t.mknod(1, b"p", 0o010600), "/p is not a regular file"),
        (lambda t: t.link(t.create(1, b"f", 0o644).ino, 1, b"g"), "/[fg] has 2 hard links"),
    ],
)
def test_strict_refuses_what_pkram_refuses(tree, sh, small_store, make, named) -> None:
    sh.write(b"fine", b"1")
    make(tree)
    tree.freeze()
    with pytest.raises(PkramError, match=named) as caught:
        sh.exhaust(sh.save(tree, small_store, b"shmem-x", strict=True))
    assert caught.value.errno == errno.EINVAL
    assert not tree.preserved and not small_store.saved


def test_strict_saves_what_pkram_saves(tree, sh, round_trip) -> None:
    sh.write(b"a", b"1" * 9000)
    sh.write(b"b")
    assert describe(round_trip(tree, strict=True)) == describe(tree)


def test_a_mount_that_is_too_small_is_refused_with_the_figures(tree, sh, round_trip) -> None:
    fill(tree, sh)
    pages, inodes = tree.limits.pages, -(-tree.limits.inode_space // 1024)
    words = rf"\({pages * 4096} bytes\), but size= allows {pages * 4096 - 4096} bytes; nothing is lost"
    with pytest.raises(ExhaustedError, match=words):
        round_trip(tree, Limits(max_pages=pages - 1))
    with pytest.raises(ExhaustedError, match=rf"has {inodes} inodes .* nr_inodes= allows {inodes - 1}"):
        round_trip(tree, Limits(max_inodes=inodes - 1))
    round_trip(tree, Limits(pages, inodes))


names = st.sampled_from([b"a", b"b", b"c", b"d"])
steps = st.lists(
    st.tuples(
        st.sampled_from(["file", "dir", "link", "symlink", "rename", "unlink", "rmdir", "write", "truncate", "xattr"]),
        names,
        names,
        st.integers(0, 30_000),
        st.integers(0, 5),
    ),
    max_size=40,
)


def apply(tree: Tree, step, folders: list[int] | None = None) -> None:
    """One random call in one or two of the directories; what is impossible is refused, which is fine."""
    action, one, two, number, where = step
    if folders is None:
        folders = [i.ino for i in tree.inodes.values() if i.entries is not None]
    here, there = folders[where % len(folders)], folders[number % len(folders)]
    found = tree.lookup(here, one)
    try:
        if action == "file":
            tree.create(here, one, 0o644)
        elif action == "dir":
            tree.mkdir(here, one, 0o755)
        elif action == "symlink":
            tree.symlink(here, one, two * (number % 300 + 1))
        elif action == "rename":
            tree.rename(here, one, there, two, number % 5 if number % 5 != 3 else 0)
        elif action == "unlink":
            tree.unlink(here, one)
        elif action == "rmdir":
            tree.rmdir(here, one)
        elif found is not None and action == "link":
            tree.link(found.ino, there, two)
        elif found is not None and action == "write":
            tree.write(found.ino, number, one * (where * 3000 + 1))
        elif found is not None and action == "truncate":
            tree.setattr(found.ino, size=number)
        elif found is not None and action == "xattr":
            tree.setxattr(found.ino, b"user." + two, bytes(where))
    except OSError as error:
        assert error.errno not in (errno.ESTALE, errno.EIO)


@given(steps)
@settings(max_examples=120, deadline=None)
def test_any_tree_survives(small_round_trip, steps) -> None:
    tree, check = small_round_trip()
    for step in steps:
        apply(tree, step)
    copy = check(tree)
    assert describe(copy) == describe(tree)
    assert copy.counts() == tree.counts()
    assert copy.limits.inode_space == tree.limits.inode_space
