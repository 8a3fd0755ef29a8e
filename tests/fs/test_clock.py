# SPDX-License-Identifier: GPL-2.0-or-later
"""Time stamps: none of ours may be older than one that the kernel has given before, nor newer than now."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pkramfs.fs import clock
from pkramfs.fs.tree import Tree

ROUNDS = 50


@pytest.fixture(autouse=True)
def fine_clock() -> None:
    """Here the clock stays as it is."""


@pytest.fixture
def kernel() -> Iterator[Callable[[], int]]:
    """A time that the kernel gives to a file of another file system, as precise as it can."""
    fd = os.memfd_create("stamped")

    def stamp() -> int:
        os.utime(fd)
        os.fstat(fd)  # who has looked gets a time from between the ticks for the next change
        os.utime(fd)
        return os.fstat(fd).st_ctime_ns

    yield stamp
    os.close(fd)


def test_no_time_is_before_one_of_the_kernel(kernel: Callable[[], int]) -> None:
    for _ in range(ROUNDS):
        given = kernel()
        assert given <= clock.now() <= time.time_ns()


def test_times_never_go_back() -> None:
    times = [clock.now() for _ in range(1000)]
    assert times == sorted(times)


OPERATIONS: dict[str, Callable[[Tree, int], Any]] = {
    "create": lambda tree, _: tree.create(1, b"new", 0o644),
    "mkdir": lambda tree, _: tree.mkdir(1, b"new", 0o755),
    "mkfifo": lambda tree, _: tree.mknod(1, b"new", 0o010644),
    "symlink": lambda tree, _: tree.symlink(1, b"new", b"target"),
    "link": lambda tree, ino: tree.link(ino, 1, b"new"),
    "unlink": lambda tree, _: tree.unlink(1, b"a"),
    "rename": lambda tree, _: tree.rename(1, b"a", 1, b"b"),
    "exchange": lambda tree, _: tree.rename(1, b"a", 1, b"twin", 2),
    "chmod": lambda tree, ino: tree.setattr(ino, mode=0o600),
    "chown": lambda tree, ino: tree.setattr(ino, uid=5),
    "truncate": lambda tree, ino: tree.setattr(ino, size=3),
    "open": lambda tree, ino: tree.open(ino, os.O_WRONLY | os.O_TRUNC),
    "touch": lambda tree, ino: tree.set_times(ino, 0, 0, None),
    "write": lambda tree, ino: tree.write(ino, 0, b"x"),
    "punch": lambda tree, ino: tree.punch(ino, 0, 4096),
    "allocate": lambda tree, ino: tree.allocate(ino, 0, 8192),
    "setxattr": lambda tree, ino: tree.setxattr(ino, b"user.y", b"1"),
    "removexattr": lambda tree, ino: tree.removexattr(ino, b"user.x"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_is_changed_is_newer(sh: Any, kernel: Callable[[], int], operation: str) -> None:
    """Of what an operation touches nothing looks older than what the kernel has stamped before."""
    ino = sh.write(b"a", b"content")
    sh.write(b"twin")
    sh.tree.setxattr(ino, b"user.x", b"1")
    before = {inode.ino: inode.ctime for inode in sh.tree.inodes.values()}
    file = sh.tree.inode(ino)
    given = kernel()
    OPERATIONS[operation](sh.tree, ino)
    stamped = [inode.ctime for inode in (file, *sh.tree.inodes.values()) if inode.ctime != before.get(inode.ino)]
    assert stamped and min(stamped) >= given


def test_reading_is_newer(sh: Any, kernel: Callable[[], int]) -> None:
    ino = sh.write(b"a", b"content")
    given = kernel()
    sh.tree.read(ino, 0, 1)
    assert sh.tree.inode(ino).atime >= given


@pytest.mark.parametrize("ahead", [10**6, 10**7, 10**9, 10**18])
def test_times_from_the_future_do_not_spread(sh: Any, ahead: int) -> None:
    """What somebody gives to a file is that file's alone, however near it is."""
    ino = sh.write(b"a")
    future = time.time_ns() + ahead
    sh.tree.set_times(ino, future, future, future)
    made = sh.tree.mkdir(1, b"d", 0o755)
    assert made.mtime <= time.time_ns() and sh.tree.root.mtime == made.mtime
    sh.tree.open(ino, os.O_WRONLY | os.O_TRUNC)
    assert sh.tree.inode(ino).mtime <= time.time_ns()


def test_a_kernel_that_stamps_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coarse clock is the next best."""

    def refuse(_: int) -> None:
        raise PermissionError

    clock._pipe.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(os, "utime", refuse)
        assert abs(clock.now() - time.time_ns()) < 10**9
        assert clock._pipe() is None
    clock._pipe.cache_clear()
    assert clock._pipe() is not None
