# SPDX-License-Identifier: GPL-2.0-or-later
"""Flags of chattr, files without a name, births: what they are, and that they cross a kexec."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.protection import APPEND, IMMUTABLE, NOATIME, NODUMP
from pkramfs.fs.restore import restore
from pkramfs.pkram.treeformat import HAS_FLAGS, TREE

OLD = Path(__file__).parents[1] / "data" / "tree-1.npz"

CALLS = {
    "open-r": lambda t, f, d: t.release(t.open(f)),
    "open-w": lambda t, f, d: t.release(t.open(f, os.O_WRONLY)),
    "open-a": lambda t, f, d: t.release(t.open(f, os.O_WRONLY | os.O_APPEND)),
    "open-trunc": lambda t, f, d: t.release(t.open(f, os.O_WRONLY | os.O_APPEND | os.O_TRUNC)),
    "truncate": lambda t, f, d: t.setattr(f, size=3),
    "chmod": lambda t, f, d: t.setattr(f, mode=0o600),
    "chown": lambda t, f, d: t.setattr(f, uid=5),
    "utime": lambda t, f, d: t.setattr(f, atime=5, mtime=5),
    "touch": lambda t, f, d: t.set_times(f, 5, 5, None, touch=True),
    "atime": lambda t, f, d: t.set_times(f, 5, None, None),
    "mtime": lambda t, f, d: t.set_times(f, None, 5, None),
    "setxattr": lambda t, f, d: t.setxattr(f, b"user.a", b"1"),
    "removexattr": lambda t, f, d: t.removexattr(f, b"user.b"),
    "link": lambda t, f, d: t.link(f, d, b"more"),
    "unlink": lambda t, f, d: t.unlink(d, b"f"),
    "rename": lambda t, f, d: t.rename(d, b"f", d, b"other"),
    "replace": lambda t, f, d: t.rename(d, b"g", d, b"f"),
    "exchange": lambda t, f, d: t.rename(d, b"g", d, b"f", 2),
    "allocate": lambda t, f, d: t.allocate(f, 0, 100),
    "punch": lambda t, f, d: t.punch(f, 0, 100),
    "create": lambda t, f, d: t.create(d, b"new", 0o644),
    "mkdir": lambda t, f, d: t.mkdir(d, b"new", 0o755),
    "tmpfile": lambda t, f, d: t.tmpfile(d, 0o644),
    "rmdir": lambda t, f, d: t.rmdir(d, b"sub"),
}
EVERY = set(CALLS)
REMOVING = {"unlink", "rename", "replace", "exchange"}
FILE = {"truncate", "chmod", "chown", "utime", "atime", "mtime", "setxattr", "removexattr", "link", "punch", *REMOVING}
REFUSED = {
    ("file", NODUMP | NOATIME): set(),
    ("file", APPEND): FILE | {"open-w", "open-trunc"},
    ("file", IMMUTABLE): FILE | {"open-w", "open-a", "open-trunc", "touch", "allocate"},
    ("dir", APPEND): REMOVING | {"rmdir"},
    ("dir", IMMUTABLE): REMOVING | {"rmdir", "create", "mkdir", "tmpfile", "link"},
}


def refused():
    return pytest.raises(OSError, match=rf"^\[Errno {errno.EPERM}\]")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("what", "flags"), REFUSED, ids=str)
def test_what_flags_forbid(tree, sh, what: str, flags: int, call: str) -> None:
    folder = sh.mkdir(b"d")
    file = sh.write(b"f", b"x" * 5000, parent=folder)
    sh.write(b"g", parent=folder)
    sh.mkdir(b"sub", parent=folder)
    tree.setxattr(file, b"user.b", b"1")
    tree.set_flags(file if what == "file" else folder, flags)
    if call in REFUSED[what, flags]:
        with refused():
            CALLS[call](tree, file, folder)
    else:
        made = CALLS[call](tree, file, folder)
        if call == "tmpfile":
            tree.forget(made.ino, 0)


@pytest.mark.parametrize("flags", [APPEND, IMMUTABLE])
@pytest.mark.parametrize("what", ["folder", "itself"])
def test_a_protected_directory_is_not_asked_whether_it_is_empty(tree, sh, what: str, flags: int) -> None:
    folder = sh.mkdir(b"d")
    full = sh.mkdir(b"full", parent=folder)
    sh.write(b"f", parent=full)
    tree.set_flags(folder if what == "folder" else full, flags)
    with pytest.raises(OSError) as caught:
        tree.rmdir(folder, b"full")
    assert caught.value.errno == errno.EPERM


def test_who_has_it_open_still_writes(tree, sh) -> None:
    file = sh.write(b"f", b"x" * 100)
    handle = tree.open(file, os.O_RDWR)
    tree.set_flags(file, IMMUTABLE)
    tree.write(handle, 0, b"new")
    tree.setattr(handle, size=50)
    tree.set_times(handle, None, 7, 8)  # what the kernel notes of a write
    with refused():
        tree.set_times(file, None, 6, 9)
    tree.release(handle)
    assert sh.content(file)[:4] == b"newx" and tree.inode(file).size == 50
    tree.set_times(file, None, 7, 9)  # of a new name
    with refused():
        tree.set_times(file, None, 9, 9)
    tree.set_flags(file, 0)


def test_new_inodes_inherit_two_of_them(tree, sh) -> None:
    folder = sh.mkdir(b"d")
    tree.set_flags(folder, APPEND | NODUMP | NOATIME)
    for inode in (tree.create(folder, b"f", 0o644), tree.mkdir(folder, b"e", 0o755), tree.symlink(folder, b"l", b"x")):
        assert inode.flags == NODUMP | NOATIME


def test_noatime_and_ctime(tree, sh) -> None:
    file = sh.write(b"f", b"x")
    before, ctime = tree.inode(file).atime, tree.inode(file).ctime
    tree.set_flags(file, NOATIME)
    tree.read(file, 0, 1)
    assert tree.inode(file).atime == before and tree.inode(file).ctime > ctime


def test_unknown_flags_are_refused(tree, sh) -> None:
    with pytest.raises(OSError) as caught:
        tree.set_flags(1, 0x1)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_births_and_flags_cross_a_kexec(tree, sh, round_trip) -> None:
    folder = sh.mkdir(b"d")
    file = sh.write(b"f", b"x", parent=folder)
    tree.set_flags(file, NODUMP)
    tree.setattr(file, mtime=5)
    born = [tree.inode(ino).btime for ino in (1, folder, file)]
    assert born == sorted(set(born)) and born[0] > 0
    for _ in range(2):
        tree = round_trip(tree)  # the second time it is saved asleep
    assert [tree.inode(ino).btime for ino in (1, folder, file)] == born
    assert tree.inode(file).flags == NODUMP and tree.inode(folder).flags == 0


def test_a_tree_without_flags_has_no_column_of_them(tree, sh, small_store) -> None:
    sh.write(b"f", b"x")
    tree.freeze()
    sh.exhaust(sh.save(tree, small_store, b"a"))
    assert not TREE.read(small_store.saved[b"a"][0]).flags & HAS_FLAGS


def test_a_tree_of_the_first_format_loads(small_store, ram, frames, sh) -> None:
    """As it was saved before births, flags and unwritten pages were kept."""
    with np.load(OLD) as old:
        stream, runs = old["stream"].tobytes(), tuple(old[name] for name in ("index", "pfn", "count"))
    assert TREE.read(stream).flags == 0
    small_store.saved[b"old"] = [stream, runs]
    tree = sh.exhaust(restore(small_store, b"old", ram, type(frames)(ram), Limits()))
    sh.audit(tree)
    file = tree.lookup(1, b"file")
    assert (file.btime, file.flags, file.unwritten, file.size, file.blocks) == (0, 0, None, 40_961, 9 * 8)
    assert tree.getxattr(file.ino, b"user.a") == b"value" and file.nlink == 2
    tree.freeze()
    sh.exhaust(sh.save(tree, small_store, b"new"))
    again = sh.exhaust(restore(small_store, b"new", ram, type(frames)(ram), Limits()))
    sh.audit(again)
    assert again.lookup(1, b"file").btime == 0


# -- files without a name -----------------------------------------------------------------------


def test_a_file_without_a_name_lives_as_long_as_it_is_open(tree, sh) -> None:
    inode = tree.tmpfile(1, 0o640, Credentials(uid=5, gid=6, umask=0o077))
    handle = tree.open(inode.ino, os.O_RDWR)
    assert (inode.nlink, inode.uid, inode.gid, inode.mode & 0o777) == (0, 5, 6, 0o600)
    tree.write(handle, 0, b"x" * 5000)
    assert tree.deleted() == [b"/#%d (deleted)" % inode.ino]
    sh.audit(tree)
    tree.release(handle)
    assert inode.ino not in tree.inodes and not tree.orphans and not tree.unnamed


def test_it_may_get_a_name_once_and_is_counted_once(tree, sh) -> None:
    space = tree.limits.inode_space
    inode = tree.tmpfile(1, 0o644)
    handle = tree.open(inode.ino, os.O_RDWR)
    tree.limits.max_inodes = 2
    assert tree.link(inode.ino, 1, b"name") is inode
    tree.release(handle)
    assert inode.nlink == 1 and tree.limits.inode_space == space + 1024 and not tree.orphans
    sh.audit(tree)
    tree.unlink(1, b"name")
    assert tree.limits.inode_space == space


def test_an_exclusive_one_gets_none(tree) -> None:
    inode = tree.tmpfile(1, 0o644, linkable=False)
    handle = tree.open(inode.ino, os.O_RDWR)
    with pytest.raises(OSError) as caught:
        tree.link(inode.ino, 1, b"name")
    assert caught.value.errno == errno.ENOENT
    tree.release(handle)


def test_it_needs_an_inode_and_a_directory_that_is_there(tree, sh) -> None:
    gone = tree.mkdir(1, b"gone", 0o755)
    gone.lookups = 1
    tree.rmdir(1, b"gone")
    with pytest.raises(OSError) as caught:
        tree.tmpfile(gone.ino, 0o644)
    assert caught.value.errno == errno.ENOENT
    tree.forget(gone.ino)
    tree.limits.max_inodes = 1
    with pytest.raises(OSError) as caught:
        tree.tmpfile(1, 0o644)
    assert caught.value.errno == errno.ENOSPC
