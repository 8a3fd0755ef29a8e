# SPDX-License-Identifier: GPL-2.0-or-later
"""rename over every pair of kinds, with every flag, and what it does to times, counts and `..`."""

import os
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import DEVICES, make, write
from tests.conformance.system import EXCHANGE, NOREPLACE, WHITEOUT, renameat2

pytestmark = pytest.mark.mount
KINDS = ("none", "file", "dir", "full", "link", "fifo", "socket", *DEVICES[:1])
FLAGS = {"plain": 0, "noreplace": NOREPLACE, "exchange": EXCHANGE, "whiteout": WHITEOUT}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_pairs(both: Any, old: str, new: str, flags: str) -> None:
    def case(t: Any) -> None:
        os.mkdir("p")
        os.mkdir("q")
        make(old, "p/a")
        make(new, "q/b")
        t(renameat2, "p/a", "q/b", FLAGS[flags])
        for directory in ("p", "q"):
            t(os.stat, directory)
            t(os.listdir, directory)

    both(case)


@pytest.mark.parametrize("flags", [3, 5, 6, 7, 8, 1 << 30])
def test_flags(both: Any, flags: int) -> None:
    def case(t: Any) -> None:
        write("a", b"a")
        write("b", b"b")
        t(renameat2, "a", "b", flags)
        t(renameat2, "a", "c", flags)

    both(case)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a", "a"), ("a", "twin"), ("a/", "b"), ("a", "b/"), ("d/", "e"), ("d", "e/"), ("d/", "e/"), ("d", "d"),
        ("d", "d/x"), ("d", "d/sub/x"), ("d/sub", "d"), ("d/sub", "."), (".", "x"), ("..", "x"), ("d/.", "x"),
        ("d/..", "x"), ("a", "."), ("a", ".."), ("a", "d/."), ("a", "d/.."), ("a", ""), ("", "a"), ("a", "none/x"),
        ("none/x", "a"), ("a/x", "b"), ("a", "link/x"), ("link", "link2"), ("loop", "x"), ("loop/x", "y"),
        ("a", "n" * 255), ("a", "n" * 256), ("n" * 256, "a"), ("d/sub", "sub"), ("d/sub", "d/other"), ("a", "/proc/x"),
        ("todir", "x"), ("todir/", "x"), ("a", "todir"), ("d", "todir"), ("d", "todir/"), ("d", "todir/x"),
    ],
)  # fmt: skip
def test_names(both: Any, old: str, new: str, flags: str) -> None:
    def case(t: Any) -> None:
        os.mkdir("work")  # so that .. is no mount point
        os.chdir("work")
        make("file", "a")
        os.link("a", "twin")
        make("full", "d")
        make("link", "link")
        make("loop", "loop")
        os.mkdir("target")
        os.symlink("target", "todir")
        t(renameat2, old, new, FLAGS[flags])
        t(os.listdir, ".")
        t(os.listdir, "d")

    both(case)


@pytest.mark.parametrize("flags", ["plain", "exchange", "whiteout"])
@pytest.mark.parametrize("kind", ["file", "dir", "full", "link"])
@pytest.mark.parametrize("new", ["none", "same"])
def test_times(both: Any, kind: str, new: str, flags: str) -> None:
    def case(t: Any) -> None:
        os.mkdir("p")
        os.mkdir("q")
        make(kind, "p/a")
        if new == "same":
            make(kind if kind != "full" else "dir", "q/b")
            if kind == "file":
                os.link("q/b", "keep")
            for path in ("p/a", "q/b"):
                os.utime(path, ns=(7, 7), follow_symlinks=False)
        t.touched(renameat2, "p/a", "q/b", FLAGS[flags], watch=("p", "q", "keep"))
        t.touched(renameat2, "q/b", "q/c", FLAGS[flags] & ~EXCHANGE, watch=("p", "q", "keep"))

    both(case)


def test_dotdot_follows(both: Any) -> None:
    def case(t: Any) -> None:
        os.makedirs("a/x/deep")
        os.mkdir("b")
        make("file", "mark")
        t(os.rename, "a/x", "b/x")
        for path in ("b/x/..", "b", "a", "b/x/deep/../../../mark"):
            t(os.stat, path)
        t(renameat2, "b/x/deep", "a", EXCHANGE)
        for path in ("a/..", "b/x/deep/.."):
            t(os.stat, path)
        t(os.listdir, "b/x/deep")

    both(case)


def test_over_open_file(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"new")
        write("b", b"old content")
        fd = t(os.open, "b", os.O_RDWR)
        t(os.rename, "a", "b")
        t(os.fstat, fd)
        t(os.pread, fd, 20, 0)
        t(os.pwrite, fd, b"ghost", 0)
        t(os.pread, fd, 20, 0)
        t(os.ftruncate, fd, 3)
        t(os.fchmod, fd, 0o600)
        t(os.fstat, fd)
        t(system.linkat, fd, "", "again", system.AT_EMPTY_PATH)
        t(system.linkat, system.AT_FDCWD, f"/proc/self/fd/{fd}", "again", system.AT_SYMLINK_FOLLOW)
        t(os.close, fd)

    both(case)


def test_removed_directory(both: Any) -> None:
    def case(t: Any) -> None:
        os.mkdir("d")
        fd = t(os.open, "d", os.O_RDONLY)
        t(os.rmdir, "d")
        t(os.fstat, fd)
        t(os.listdir, fd)
        for call in (os.mkdir, os.mkfifo, os.unlink):
            t(call, "x", dir_fd=fd)
        t(os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        t(os.stat, "..", dir_fd=fd)
        t(os.fchmod, fd, 0o700)
        t(os.fstat, fd)
        t(os.setxattr, fd, "user.x", b"1")

    both(case)


def test_chain(both: Any) -> None:
    """Many renames of one name, and names back and forth."""

    def case(t: Any) -> None:
        write("n0", b"x")
        for number in range(60):
            t(os.rename, f"n{number}", f"n{number + 1}")
        for number in range(20):
            write(f"m{number}", b"%d" % number)
        for number in range(19):
            t(renameat2, f"m{number}", f"m{number + 1}", EXCHANGE)
        t(os.listdir, ".")

    both(case)
