# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks of every kind between processes and descriptors, and leases."""

import errno
import fcntl
import os
import signal
import struct
from typing import Any

import pytest

from tests.conformance.kinds import make, write

pytestmark = pytest.mark.mount

OFD_GETLK, OFD_SETLK = 36, 37
KINDS = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "unlock": fcntl.F_UNLCK}


def locked(fd: int, command: int, kind: int, start: int, size: int) -> tuple[int, ...]:
    """What the kernel answers, without the pid."""
    answer = fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0))
    return struct.unpack("hhqqi4x", answer)[:4]


@pytest.mark.parametrize("mine", [fcntl.LOCK_SH, fcntl.LOCK_EX])
@pytest.mark.parametrize("theirs", [fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN])
@pytest.mark.parametrize("kind", ["file", "dir"])
def test_flock(both: Any, kind: str, mine: int, theirs: int) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        one, two = os.open("a", os.O_RDONLY), os.open("a", os.O_RDONLY)
        t(fcntl.flock, one, mine)
        t(fcntl.flock, two, theirs | fcntl.LOCK_NB)
        t.other(lambda u: u(fcntl.flock, os.open("a", os.O_RDONLY), theirs | fcntl.LOCK_NB), os.getuid(), os.getgid())
        os.close(one)
        t(fcntl.flock, two, theirs | fcntl.LOCK_NB)

    both(case)


@pytest.mark.parametrize("mine", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
@pytest.mark.parametrize("command", ["posix", "ofd"])
@pytest.mark.parametrize("place", [(0, 0), (0, 10), (5, 10), (10, 10), (100, 1)], ids=str)
def test_ranges(both: Any, mine: str, theirs: str, command: str, place: tuple[int, int]) -> None:
    setting, asking = (fcntl.F_SETLK, fcntl.F_GETLK) if command == "posix" else (OFD_SETLK, OFD_GETLK)

    def case(t: Any) -> None:
        write("a", b"x" * 200)
        fd = os.open("a", os.O_RDWR)
        t(locked, fd, setting, KINDS[mine], 0, 10)

        def user(u: Any) -> None:
            other = os.open("a", os.O_RDWR)
            u(locked, other, asking, KINDS[theirs], *place)
            u(locked, other, setting, KINDS[theirs], *place)

        t.other(user, os.getuid(), os.getgid())
        second = os.open("a", os.O_RDWR)
        t(locked, second, setting, KINDS[theirs], *place)
        os.close(second)  # a POSIX lock of this process is gone now

        t.other(user, os.getuid(), os.getgid())

    both(case)


@pytest.mark.parametrize("mode", ["r", "w"])
def test_lock_needs_the_right_mode(both: Any, mode: str) -> None:
    def case(t: Any) -> None:
        write("a", b"x")
        fd = os.open("a", os.O_RDONLY if mode == "r" else os.O_WRONLY)
        for kind in KINDS:
            t(locked, fd, fcntl.F_SETLK, KINDS[kind], 0, 1)

    both(case)


def test_blocking_lock_is_given_on(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"x")
        fd = os.open("a", os.O_RDWR)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            other = os.open("a", os.O_RDWR)
            os.write(go, b"r")
            fcntl.lockf(other, fcntl.LOCK_EX)
            os._exit(7)
        os.read(ready, 1)
        fcntl.lockf(fd, fcntl.LOCK_UN)
        t.note(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    both(case)


@pytest.mark.parametrize("kind", ["read", "write", "unlock"])
@pytest.mark.parametrize("readers", [0, 1])
def test_leases(both: Any, kind: str, readers: int) -> None:
    def case(t: Any) -> None:
        write("a", b"x")
        fd = os.open("a", os.O_RDONLY if kind == "read" else os.O_RDWR)
        others = [os.open("a", os.O_RDONLY) for _ in range(readers)]
        t(fcntl.fcntl, fd, fcntl.F_GETLEASE)
        t(fcntl.fcntl, fd, fcntl.F_SETLEASE, KINDS[kind])
        t(fcntl.fcntl, fd, fcntl.F_GETLEASE)
        t.note(len(others))

    both(case)


def test_broken_lease(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"x")
        told: list[int] = []
        before = signal.signal(signal.SIGIO, lambda number, frame: told.append(number))
        try:
            fd = os.open("a", os.O_RDONLY)
            t(fcntl.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            try:
                os.open("a", os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                t.note(errno.errorcode[error.errno or 0])
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            t.note("no lease")
        finally:
            signal.signal(signal.SIGIO, before)
        t.note(len(told))

    both(case)
