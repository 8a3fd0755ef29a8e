# SPDX-License-Identifier: GPL-2.0-or-later
"""Bounded waiting for system calls that a stopped daemon would hold for ever: a child process makes them.

    within(lambda: os.statvfs(directory).f_bsize, 10, f"{directory} to answer")

A FUSE file system is answered for by its daemon, which may be stopped, or be waiting itself. Then no signal wakes
the process that asks, and a process with such a thread does not end. So a child process asks. It is killed when its
time is over; the call may still be completed when the daemon goes on.

Kernel: fs/fuse/dev.c (request_wait_answer), fs/namespace.c (do_umount, do_remount: both write back what is dirty)
"""

import contextlib
import errno
import marshal
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pkramfs.errors import ErrnoError

ANSWER_SECONDS = 10.0
"""How long a file system may take to answer a question that needs no work."""

T = TypeVar("T")


class StuckError(ErrnoError):
    """There was no answer in time; the message names the question."""

    default_errno = errno.ETIMEDOUT


_meanwhile: list[tuple[Callable[[], None], Callable[[float], None]]] = []
"""What a command does while it waits, and whom it tells how far that is: see `calling`."""
TICK_SECONDS = 0.1


@contextlib.contextmanager
def calling(meanwhile: Callable[[], None], told: Callable[[float], None] = lambda _: None) -> Iterator[None]:
    """Have `meanwhile` called ten times a second while anything in the block waits; it must be short.

    `told` gets the argument of `tell`.
    """
    both = meanwhile, told
    _meanwhile.append(both)
    try:
        yield
    finally:
        _meanwhile.remove(both)


def tell(part: float) -> None:
    """Tell how much of the present step is done, from 0 to 1."""
    for _, told in _meanwhile[-1:]:
        told(part)


def tick() -> bool:
    """Do pending work; return True if there was any."""
    for meanwhile, _ in _meanwhile[-1:]:
        meanwhile()
    return bool(_meanwhile)


def is_ready(waiting: select.poll, deadline: float) -> bool:
    """Wait until something can be read; return False if nothing can be until the deadline."""
    while True:
        left = max(deadline - time.monotonic(), 0)
        if waiting.poll((min(left, TICK_SECONDS) if tick() else left) * 1000):
            return True
        if time.monotonic() >= deadline:
            return False


def within(work: Callable[[], T], seconds: float, what: str) -> T:
    """Return the result of `work` (numbers, text, tuples of them), or raise its OSError; StuckError if it is late."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        _work(work, theirs)
    os.close(theirs)
    try:
        answer = _read(ours, time.monotonic() + seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it has sent all, or its time is over
        os.close(ours)
    status = 0
    with contextlib.suppress(ChildProcessError):  # SIGCHLD may be ignored by inheritance: the child is gone
        _, status = os.waitpid(child, os.WNOHANG if answer is None else 0)  # it may be a while until it ends
    if answer is None:
        raise StuckError(f"waited {seconds:g} s for {what}, in vain")
    if not answer:
        raise ErrnoError(f"the process that waited for {what} was killed{_by(status)}", errno.EINTR)
    done, value = marshal.loads(answer)
    if not done:
        raise OSError(*value)
    found: T = value
    return found


def _work(work: Callable[[], Any], pipe: int) -> None:
    """Run in the child: do the work, send its result, and end without any of the parent's clean-up."""
    try:
        try:
            told = marshal.dumps((True, work()))
        except OSError as error:
            path = error.filename
            file = os.fspath(path) if isinstance(path, os.PathLike) else path
            told = marshal.dumps((False, (error.errno, error.strerror, file)))
        except BaseException as error:  # of ours, or of a handler of signals: it is told
            told = marshal.dumps((False, (errno.EIO, f"internal error: {error!r}", None)))
        while told:
            told = told[os.write(pipe, told) :]
    finally:
        os._exit(0)


def _by(status: int) -> str:
    """Return the signal that a child with this status was killed by, as the end of a sentence."""
    return f" by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else ""


def _read(pipe: int, deadline: float) -> bytes | None:
    """Read until the other end is closed; return None if that takes too long."""
    parts: list[bytes] = []
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while is_ready(ready, deadline):
        part = os.read(pipe, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None
