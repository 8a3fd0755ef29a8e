# SPDX-License-Identifier: GPL-2.0-or-later
"""What a thread that waits is about to do: children that wait in calls on pipes, and calls as /proc shows them."""

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pkramfs.fuse import callers
from pkramfs.fuse.callers import Call, look

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of calls are this machine's")
FULL = bytes(1 << 20)


@contextmanager
def waiting(act: Callable[[int, int], object], *, full: bool = True) -> Iterator[tuple[int, int]]:
    """Have a child wait in a call on a pipe; gives its pid, and the descriptor that it writes to."""
    ours, theirs = os.pipe()
    if full:
        os.set_blocking(theirs, False)
        os.write(theirs, FULL)
        os.set_blocking(theirs, True)
    pid = os.fork()
    if not pid:
        act(ours, theirs)
        os._exit(0)
    try:
        yield pid, theirs
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours)
        os.close(theirs)


def found(pid: int, count: int) -> Call:
    """Return the call in which a child waits, once it does."""
    while True:
        try:
            call = look(pid)
        except BlockingIOError:
            continue
        if call is not None and call.count == count:
            return call


@pytest.mark.parametrize("parts", [[b"x" * 5000], [b"x" * 700, b"", b"y" * 4300]], ids=["write", "writev"])
def test_a_writer(parts: list[bytes]) -> None:
    with waiting(lambda _, pipe: os.writev(pipe, parts) if parts[1:] else os.write(pipe, *parts)) as (pid, pipe):
        call = found(pid, 5000)
        assert (call.place(77), call.place(None)) == (0, 0)
        fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_APPEND)
        assert (call.place(77), call.place(None)) == (77, None)
    assert call.place(77) is None, "it is gone"


def test_a_reader() -> None:
    with waiting(lambda pipe, _: os.read(pipe, 5000), full=False) as (pid, _):
        assert found(pid, 0).count == 0


def test_nobody_knows() -> None:
    with waiting(lambda *_: signal.pause()) as (pid, _):
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert look(pid) is None, "another call"
    assert look(pid) is None, "it is gone"


def test_who_runs() -> None:
    def spin(*_: int) -> None:
        while True:
            pass

    with waiting(spin) as (pid, _), pytest.raises(BlockingIOError):
        while True:
            look(pid)  # None while it is still in fork


@pytest.mark.parametrize(
    ("number", "length", "count", "place"),
    [(18, 100, 100, 5000), (18, 1 << 40, 0x7FFFF000, 5000), (1, 100, 100, 0)],
    ids=["pwrite64", "large", "write"],
)
def test_places(number: int, length: int, count: int, place: int) -> None:
    """write(2) goes where the file stands, whatever is in the registers behind its arguments."""
    with open("/dev/zero", "rb") as file:
        call = callers._understood(os.getpid(), number, [file.fileno(), 0, length, 5000, 0, 0])
        assert call is not None
        assert (call.count, call.place(7), call.place(None)) == (count, place, place)


@pytest.mark.parametrize(
    ("start", "flags", "place"),
    [(5000, 0, 5000), ((1 << 64) - 1, 0, 0), (5000, 0x10, None)],
    ids=["at", "-1", "append"],
)
def test_pwritev2(monkeypatch: pytest.MonkeyPatch, start: int, flags: int, place: int | None) -> None:
    monkeypatch.setattr(callers, "_vector", lambda *_: 100)
    with open("/dev/zero", "rb") as file:
        call = callers._understood(os.getpid(), 328, [file.fileno(), 0, 1, start, 0, flags])
        assert call is not None and call.place(None) == place


def test_a_vector_that_cannot_be_read() -> None:
    assert callers._vector(os.getpid(), 16, 4) is None
    assert callers._vector(os.getpid(), (1 << 64) - 8, 4) is None
    assert callers._vector(1 << 30, 4096, 1) is None
