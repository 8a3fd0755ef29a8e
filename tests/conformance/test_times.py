# SPDX-License-Identifier: GPL-2.0-or-later
"""Which call changes which time of what, and times that are given."""

import itertools
import mmap
import os
import time
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import DEVICES, make, write
from tests.conformance.record import TICK
from tests.conformance.system import UTIME_NOW, UTIME_OMIT, utimensat

pytestmark = pytest.mark.mount


def opened(flags: int) -> Any:
    return lambda t: t.touched(os.open, "a", flags)


def with_fd(function: Any, *args: Any, flags: int = os.O_RDWR, name: str = "a") -> Any:
    def call(t: Any) -> None:
        fd = os.open(name, flags)
        t.touched(function, fd, *args, watch=("a", "b"))
        os.close(fd)

    return call


def mapped(fd: int, how: str) -> None:
    with mmap.mmap(fd, 7) as memory:
        if "read" in how:
            memory[:2]
        if "write" in how:
            memory[:2] = b"XX"
            memory.flush()


CALLS = {
    "chmod": lambda t: t.touched(os.chmod, "a", 0o600),
    "chmod-same": lambda t: t.touched(os.chmod, "a", 0o644),
    "chown": lambda t: t.touched(os.chown, "a", os.getuid(), os.getgid()),
    "chown-none": lambda t: t.touched(os.chown, "a", -1, -1),
    **{
        f"chown-none-{kind}": lambda t, kind=kind: (make(kind, "x"), t.touched(os.lchown, "x", -1, -1))
        for kind in ("dir", "link", "fifo", "socket", *DEVICES)
    },
    "link": lambda t: t.touched(os.link, "a", "new"),
    "unlink": lambda t: t.touched(os.unlink, "a", watch=("twin",)),
    "rename": lambda t: t.touched(os.rename, "a", "new", watch=("twin",)),
    "rename-same": lambda t: t.touched(os.rename, "a", "twin"),
    "rename-over": lambda t: t.touched(os.rename, "b2", "b", watch=("a",)),
    "mkdir": lambda t: t.touched(os.mkdir, "new"),
    "mkdir-in": lambda t: t.touched(os.mkdir, "d/new", watch=("d",)),
    "rmdir": lambda t: t.touched(os.rmdir, "d"),
    "symlink": lambda t: t.touched(os.symlink, "a", "new"),
    "mkfifo": lambda t: t.touched(os.mkfifo, "new"),
    "readlink": lambda t: t.touched(os.readlink, "l"),
    "through-link": lambda t: t.touched(os.stat, "l/x", watch=("l",)),
    "listdir": lambda t: t.touched(os.listdir, "d"),
    "stat": lambda t: t.touched(os.stat, "a"),
    "truncate": lambda t: t.touched(os.truncate, "a", 3),
    "truncate-same": lambda t: t.touched(os.truncate, "a", 7),
    "truncate-grow": lambda t: t.touched(os.truncate, "a", 7000),
    "ftruncate": with_fd(os.ftruncate, 3),
    "ftruncate-same": with_fd(os.ftruncate, 7),
    "ftruncate-grow": with_fd(os.ftruncate, 7000),
    "open-read": opened(os.O_RDONLY),
    "open-write": opened(os.O_WRONLY),
    "open-creat": opened(os.O_WRONLY | os.O_CREAT),
    "open-trunc": opened(os.O_WRONLY | os.O_TRUNC),
    "open-trunc-empty": lambda t: t.touched(os.open, "empty", os.O_WRONLY | os.O_TRUNC),
    "open-new": lambda t: t.touched(os.open, "new", os.O_WRONLY | os.O_CREAT),
    "read": with_fd(os.pread, 3, 0),
    "read-end": with_fd(os.pread, 3, 100),
    "read-none": with_fd(os.pread, 0, 0),
    "write": with_fd(os.write, b"new"),
    "write-none": with_fd(os.write, b""),
    "write-same": with_fd(os.write, b"content"),
    "write-end": with_fd(os.pwrite, b"new", 5000),
    "write-big": with_fd(os.pwrite, b"new" * 100_000, 0),
    "fsync": with_fd(os.fsync),
    "fchmod": with_fd(os.fchmod, 0o600),
    "map-read": with_fd(mapped, "read"),
    "map-write": with_fd(mapped, "write"),
    "map-read-write": with_fd(mapped, "read-write"),
    "fallocate": with_fd(os.posix_fallocate, 0, 10_000),
    "fallocate-refused": with_fd(system.fallocate, system.ZERO_RANGE, 0, 7),
    "copy-range": lambda t: t.touched(copy_range, "a", "b"),
    "setxattr": lambda t: t.touched(os.setxattr, "a", "user.x", b"1"),
    "setxattr-same": lambda t: (os.setxattr("a", "user.x", b"1"), t.touched(os.setxattr, "a", "user.x", b"1")),
    "getxattr": lambda t: t.touched(os.getxattr, "a", "user.x"),
    "removexattr": lambda t: (os.setxattr("a", "user.x", b"1"), t.touched(os.removexattr, "a", "user.x")),
    "removexattr-none": lambda t: t.touched(os.removexattr, "a", "user.x"),
    "utime-now": lambda t: t.touched(os.utime, "a"),
    "access": lambda t: t.touched(os.access, "a", os.R_OK),
    "failed-mkdir": lambda t: t.touched(os.mkdir, "a"),
    "failed-rename": lambda t: t.touched(os.rename, "a", "d"),
    "failed-rmdir": lambda t: t.touched(os.rmdir, "full"),
}


def copy_range(source: str, target: str) -> int:
    with open(source, "rb") as reader, open(target, "r+b") as writer:
        return os.copy_file_range(reader.fileno(), writer.fileno(), 5)


@pytest.mark.parametrize("call", CALLS)
def test_changes(both: Any, call: str) -> None:
    def case(t: Any) -> None:
        make("file", "b")
        write("a", b"content")
        write("empty")
        write("b2")
        os.link("a", "twin")
        os.symlink("d", "l")
        make("dir", "d")
        make("full", "full")
        _settle()
        CALLS[call](t)

    both(case)


def test_what_is_newer_never_looks_older(both: Any) -> None:
    """Files that the kernel stamps (what is written), and objects that are made before and after, in one order.

    What one step stamps has no order: a file's content is written after its name was made, by a tick at times.
    """
    makers = [os.mkdir, os.mkfifo, lambda name: os.symlink("a", name), write, lambda name: os.link("a", name)]

    def case(t: Any) -> None:
        fd, other = os.open("a", os.O_RDWR | os.O_CREAT), os.memfd_create("elsewhere")
        steps: list[list[int]] = []
        for number in range(100):
            os.utime(other)
            steps.append([os.fstat(other).st_ctime_ns])  # another file system gives times between two ticks
            os.write(fd, b"x")
            steps.append([os.fstat(fd).st_mtime_ns])
            name = f"b{number}"
            makers[number % len(makers)](name)
            steps.append([os.lstat(name).st_ctime_ns, os.stat(".").st_mtime_ns])
            os.rename(name, f"c{number}")
            steps.append([os.stat(".").st_mtime_ns])
        t.note("reversed:", sum(min(late) < max(early) for early, late in itertools.pairwise(steps)))

    both(case)


def _settle() -> None:
    """Access times newer than the others, so that the next access changes none (relatime)."""
    time.sleep(TICK)
    now = time.time_ns()
    for name in ("a", "b", "b2", "empty", "d", "full", "l"):
        os.utime(name, ns=(now + 60 * 10**9, now), follow_symlinks=False)


@pytest.mark.parametrize("call", ["read", "readlink", "listdir", "map", "read-twice", "exec"])
@pytest.mark.parametrize("age", ["older", "newer", "day"])
def test_access_time(both: Any, call: str, age: str) -> None:
    """relatime, asked of a file that nobody has in a cache."""

    def case(t: Any) -> None:
        write("a", b"content")
        os.symlink("a", "l")
        make("full", "d")
        now = time.time_ns()
        access = now - {"older": 10**9, "newer": -60 * 10**9, "day": 90_000 * 10**9}[age]
        change = now - (100_000 * 10**9 if age == "day" else 0)
        for name in ("a", "l", "d"):
            os.utime(name, ns=(access, change), follow_symlinks=False)
        match call:
            case "read":
                with_fd(os.pread, 3, 0, flags=os.O_RDONLY)(t)
            case "read-twice":
                with_fd(os.pread, 3, 0, flags=os.O_RDONLY)(t)
                with_fd(os.pread, 3, 0, flags=os.O_RDONLY)(t)
            case "readlink":
                t.touched(os.readlink, "l")
            case "listdir":
                t.touched(os.listdir, "d")
            case "map":
                with_fd(mapped, "read")(t)

    both(case)


SPECIAL = {
    "now": (0, UTIME_NOW),
    "omit": (0, UTIME_OMIT),
    "zero": (0, 0),
    "ns": (1_000_000_000, 123_456_789),
    "negative": (-5, 999_999_999),
    "last": ((1 << 33), 1),
    "far": ((1 << 62), 0),
    "before": (-(1 << 40), 0),
    "invalid": (1, 1_000_000_000),
}


@pytest.mark.parametrize("access", SPECIAL)
@pytest.mark.parametrize("change", SPECIAL)
def test_utimensat(both: Any, access: str, change: str) -> None:
    def case(t: Any) -> None:
        write("a", b"x")
        os.utime("a", ns=(11, 22))
        t.touched(utimensat, "a", SPECIAL[access], SPECIAL[change])
        info = os.stat("a")
        given = [n if n < 10**18 or n > 3 * 10**18 else "now" for n in (info.st_atime_ns, info.st_mtime_ns)]
        t.note(given)
        if {access, change} & {"far", "before"}:
            os.unlink("a")  # what is beyond 64 bits of nanoseconds is kept only as long as the kernel has it cached

    both(case)


@pytest.mark.parametrize("special", ["now", "omit", "ns"])
@pytest.mark.parametrize("mode", [0o600, 0o666, 0o444])
def test_utimensat_of_others(both: Any, special: str, mode: int) -> None:
    def case(t: Any) -> None:
        write("a", b"x", mode)
        for change in ("now", "omit", "ns"):
            t.other(lambda u, c=change: u(utimensat, "a", SPECIAL[special], SPECIAL[c]))

    both(case)


def test_utimensat_of_links(both: Any) -> None:
    def case(t: Any) -> None:
        make("link", "l")
        t.touched(utimensat, "l", (5, 6), (7, 8), system.AT_SYMLINK_NOFOLLOW, watch=("l.target",))
        t.touched(utimensat, "l", (5, 6), (7, 8), watch=("l.target",))
        t.note(os.lstat("l").st_mtime_ns, os.stat("l").st_mtime_ns)

    both(case)


def test_times_given_while_dirty(both: Any) -> None:
    """Data that the kernel writes back later must not undo utimensat."""

    def case(t: Any) -> None:
        fd = os.open("a", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"x" * 100_000)
        os.utime(fd, ns=(1, 2))
        t.note(os.fstat(fd).st_mtime_ns)
        os.fsync(fd)
        t.note(os.fstat(fd).st_mtime_ns)
        os.close(fd)
        t.note(os.stat("a").st_mtime_ns)

    both(case)
