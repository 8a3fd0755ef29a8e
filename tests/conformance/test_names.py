# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that take a name: over every kind, with slashes, too long, not UTF-8, through loops."""

import mmap
import os
import stat
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import DEVICES, KINDS, make, write

pytestmark = pytest.mark.mount


def name_max(path: str) -> int:
    return os.statvfs(path).f_namemax


def chdir(t: Any, name: str) -> None:
    here = os.getcwd()
    t(os.chdir, name)
    t(os.stat, ".")
    os.chdir(here)


CALLS = {
    "unlink": lambda t, n: t(os.unlink, n),
    "rmdir": lambda t, n: t(os.rmdir, n),
    "mkdir": lambda t, n: t(os.mkdir, n, 0o750),
    "mkfifo": lambda t, n: t(os.mkfifo, n),
    "mknod": lambda t, n: t(os.mknod, n, stat.S_IFREG | 0o640),
    "symlink": lambda t, n: t(os.symlink, "to", n),
    "linkfrom": lambda t, n: t(os.link, n, "new", follow_symlinks=False),
    "linkfollow": lambda t, n: t(system.linkat, system.AT_FDCWD, n, "new", system.AT_SYMLINK_FOLLOW),
    "linkto": lambda t, n: t(os.link, "other", n),
    "readlink": lambda t, n: t(os.readlink, n),
    "stat": lambda t, n: t(os.stat, n),
    "lstat": lambda t, n: t(os.lstat, n),
    "chmod": lambda t, n: t(os.chmod, n, 0o604),
    "lchown": lambda t, n: t(os.lchown, n, -1, os.getgid()),
    "listdir": lambda t, n: t(os.listdir, n),
    "truncate": lambda t, n: t(os.truncate, n, 5),
    "chdir": chdir,
    "utime": lambda t, n: t(os.utime, n, ns=(1, 2)),
    "listxattr": lambda t, n: t(os.listxattr, n, follow_symlinks=False),
    "setxattr": lambda t, n: t(os.setxattr, n, "user.x", b"1", follow_symlinks=False),
    "creat": lambda t, n: t(os.open, n, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600),
    "statvfs": lambda t, n: t(name_max, n),
}


@pytest.mark.parametrize("kind", (*KINDS, "loop", *DEVICES))
@pytest.mark.parametrize("call", CALLS)
def test_calls(both: Any, call: str, kind: str) -> None:
    def case(t: Any) -> None:
        os.mkdir("work")
        os.chdir("work")
        write("other", b"other")
        make(kind, "a")
        for name in ("a", "a/", "a/.", "a/..", "a/x"):
            CALLS[call](t, name)

    both(case)


NAMES = {
    "255": "n" * 255,
    "256": "n" * 256,
    "pathmax": "./" * 2047 + "f",
    "over": "./" * 2048 + "f",
    "utf8-255": "ü" * 127 + "x",
    "utf8-256": "ü" * 128,
    "not-utf8": os.fsdecode(b"\xfc\xff\xfe"),
    "newline": "a\nb",
    "control": "\x01\x7f",
    "space": " ",
    "dots": "...",
    "dash": "-rf",
    "backslash": "a\\b",
    "percent": "%s%n",
    "colon": "a:b,c=d",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "empty": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(both: Any, name: str) -> None:
    def case(t: Any) -> None:
        for call in ("creat", "stat", "setxattr", "linkfrom", "unlink", "mkdir", "rmdir", "symlink", "readlink"):
            CALLS[call](t, NAMES[name])
        t(os.listdir, b".")
        t(os.rename, NAMES[name], "x" * 255)
        CALLS["mkfifo"](t, NAMES[name])
        t(os.listdir, b".")

    both(case)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 4094, 4095, 4096])
def test_symlink_targets(both: Any, length: int) -> None:
    def case(t: Any) -> None:
        t(os.symlink, "t" * length, "l")
        t(os.readlink, "l")
        t(os.lstat, "l")
        t(os.stat, "l")
        t(os.symlink, b"\xff" * min(length, 255), b"l\xff")
        t(os.readlink, b"l\xff")

    both(case)


@pytest.mark.parametrize("depth", [2, 39, 40, 41])
def test_symlink_chains(both: Any, depth: int) -> None:
    def case(t: Any) -> None:
        write("l0", b"end")
        for number in range(depth):
            os.symlink(f"l{number}", f"l{number + 1}")
        t(os.stat, f"l{depth}")
        t(os.open, f"l{depth}", os.O_RDONLY)
        t(os.open, f"l{depth}", os.O_RDONLY | os.O_NOFOLLOW)

    both(case)


@pytest.mark.parametrize("depth", [1, 10, 60])
def test_deep_trees(both: Any, depth: int) -> None:
    def case(t: Any) -> None:
        for _ in range(depth):
            t(os.mkdir, "d" * 60)
            t(os.chdir, "d" * 60)
        t(os.stat, "..")
        write("leaf", b"x")
        for _ in range(depth):
            os.chdir("..")
        t(os.stat, "/".join(["d" * 60] * depth) + "/leaf")

    both(case)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_link_counts(both: Any, count: int) -> None:
    def case(t: Any) -> None:
        write("a", b"x")
        for number in range(count):
            t(os.link, "a", f"l{number}")
            os.mkdir(f"d{number}")
        t(os.stat, "a")
        t(os.stat, ".")
        for number in range(count):
            t(os.unlink, f"l{number}")
            t(os.rmdir, f"d{number}")
        t(os.stat, "a")
        t(os.stat, ".")

    both(case)


USES = {
    "read": lambda t, fd: t(os.read, fd, 3),
    "write": lambda t, fd: (t(os.pwrite, fd, b"xyz", 5000), t(os.fsync, fd)),
    "truncate": lambda t, fd: t(os.ftruncate, fd, 3),
    "chmod": lambda t, fd: t(os.fchmod, fd, 0o4711),
    "chown": lambda t, fd: t(os.fchown, fd, os.getuid(), os.getgid()),
    "utime": lambda t, fd: t(os.utime, fd, ns=(5, 6)),
    "xattr": lambda t, fd: (t(os.setxattr, fd, "user.x", b"1"), t(os.listxattr, fd)),
    "link": lambda t, fd: t(system.linkat, system.AT_FDCWD, f"/proc/self/fd/{fd}", "back", system.AT_SYMLINK_FOLLOW),
    "reopen": lambda t, fd: t(os.read, t(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY), 10),
    "trunc": lambda t, fd: t(os.open, f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC),
    "mmap": lambda t, fd: _write_mapped(fd),
}


def _write_mapped(fd: int) -> None:
    with mmap.mmap(fd, 7) as memory:
        memory[:3] = b"MAP"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("links", [0, 1])
def test_open_but_deleted(both: Any, use: str, links: int) -> None:
    def case(t: Any) -> None:
        write("a", b"content")
        if links:
            os.link("a", "b")
        fd = t(os.open, "a", os.O_RDWR)
        t(os.unlink, "a")
        USES[use](t, fd)
        t(os.fstat, fd)
        t(os.pread, fd, 100, 0)
        t(os.close, fd)
        t(os.stat, "a")

    both(case)


TYPES = {
    "file": stat.S_IFREG,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "chr": stat.S_IFCHR,
    "blk": stat.S_IFBLK,
    "dir": stat.S_IFDIR,
    "link": stat.S_IFLNK,
    "zero": 0,
    "invalid": 0o150000,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("mode", [0o644, 0o7777, 0])
def test_mknod(both: Any, kind: str, mode: int) -> None:
    def case(t: Any) -> None:
        t(os.mknod, "n", TYPES[kind] | mode, os.makedev(7, 300))
        t(os.lstat, "n")
        t(os.mknod, "zero", TYPES[kind] | mode, 0)
        t(os.lstat, "zero")
        t(os.mknod, "n", TYPES[kind] | mode, 0)
        t.other(lambda u: u(os.mknod, "user", TYPES[kind] | mode, os.makedev(1, 3)))
        t.other(lambda u: u(os.mknod, "user0", TYPES[kind] | mode, 0))

    both(case)
