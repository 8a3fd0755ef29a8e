# SPDX-License-Identifier: GPL-2.0-or-later
"""New code under a mount, until it has served: the code before waits beside it, and takes the mount back if it fails.

    holder, old code
      ├──fork──▶ reserve, old code            has connection and lock, and waits
      └──execve─▶ holder, new code ──hello──▶
                    │ well ──▶ the daemon before leaves
                    └──fork──▶ daemon, new code: recovers, serves
                                 │ ✗ it dies, or hangs        can the old code read the log?
                                 │           ──failed──▶        yes: ends all of the new code, is the holder now
                                 │                              no:  ends; the new code goes on as after any death
                                 └ proven ─▶ the reserve is killed

The files of the old code are gone by then: only a process still has it. It was forked before execve(2), so it costs
what that had for itself, and only as long as the trial lasts. Which of the two may start daemons is never in doubt: the
new code, until the reserve has ended all of it. Whoever the new code has forked dies with its parent meanwhile, and has
the socket to the reserve open; so the reserve knows when the last of them is gone.

A daemon is proven when it has served for SECONDS and answered ANSWERED requests, or has served for QUIET_SECONDS. Until
then it makes no checkpoint, so that it leaves a log behind which begins as the old code knows it. New code that writes
logs of a later version leaves no way back (journal/layout): the old code refuses them, and touches nothing.

Code that knows of no trial does not say hello. The reserve ends then, once the daemon before has left.

Kernel: kernel/exit.c (forget_original_parent), PR_SET_PDEATHSIG; drivers/firmware, "boot counting" by other means
"""

import contextlib
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

import trio

from pkramfs.daemon import leash
from pkramfs.daemon.leash import Leash
from pkramfs.machine import process

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "pkram-reserve"
"""What ps calls the code before while it waits."""
SECONDS, ANSWERED = 0.5, 32
"""How long a daemon of new code must serve, and how many requests."""
QUIET_SECONDS = 5.0
"""How long it must serve where nobody asks for so much."""
HELLO_SECONDS = 20.0
"""How long execve(2) and all imports may take."""
LEAST_SECONDS = 20.0
"""How long the next daemon may take until it is proven, with an empty tree."""
_INODE_SECONDS, _REQUEST_SECONDS = 5e-5, 5e-4
"""How much longer for each inode and for each request of the log: ten times what it should take."""
_GONE_SECONDS, _POLL_SECONDS = 10.0, 0.05


def patience(inodes: int, requests: int) -> float:
    """Return how many seconds the next daemon may take until it is proven."""
    return LEAST_SECONDS + inodes * _INODE_SECONDS + requests * _REQUEST_SECONDS


class Failed(NamedTuple):
    """Why new code has failed, and whether the daemon before still serves, since it had not left."""

    why: str
    serves: bool


class Trial:
    """The new code's side: the reserve that may take the mount back; without a pid there is none."""

    def __init__(self, pid: int = 0, end: int = -1) -> None:
        self.fd = end
        """Our end of the socket, which everybody has whom we fork."""
        self.began = False
        """True once a daemon of the new code was started."""
        self._pid, self._pidfd, self._end = pid, -1, None if end < 0 else socket.socket(fileno=end)
        if self._end is not None:
            os.set_inheritable(end, False)
            with contextlib.suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(pid)

    @property
    def runs(self) -> bool:
        """Return True while there is a way back."""
        return self._pidfd >= 0

    def hello(self) -> None:
        """Say that we are the new code, and know of the trial."""
        if self._end is not None:
            Leash(self._end, 0).hello()

    def failed(self, why: str) -> None:
        """Have the reserve take the mount back, which ends this process; return if it cannot."""
        if self._end is not None:
            Leash(self._end, 0).failed(why)
            _wait([self._pidfd], None)
        self.over()

    def over(self) -> None:
        """End the reserve."""
        if self._pidfd >= 0:
            process.end(self._pidfd)
            os.close(self._pidfd)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
        if self._end is not None:
            self._end.close()
        self._pid, self._pidfd, self._end, self.fd = 0, -1, None, -1


def keep(daemon: int, patience: float, unreadable: "Callable[[], str]") -> tuple[int, int] | Failed:
    """Fork a reserve before this process becomes the code on disk; `daemon` is the pidfd of the daemon that serves.

    Return in this process the reserve's pid and an end of the socket to it. In the reserve return when the new code has
    failed and has ended, unless `unreadable` says why the old code cannot read what it leaves.
    """
    ours, theirs = leash.pair()
    holder = os.getpid()
    new = os.pidfd_open(holder)
    if pid := os.fork():
        theirs.close()
        os.close(new)
        os.set_inheritable(ours.fileno(), True)
        return pid, ours.detach()
    with contextlib.ExitStack() as ending:
        ending.callback(os._exit, 1)
        ours.close()
        before = process.name(NAME)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        failed = _watch(theirs, new, daemon, patience)
        if not failed.serves and unreadable():
            os._exit(0)
        if not _end_all(theirs, new, holder, {os.getpid(), process.pid(daemon) if failed.serves else 0}):
            os._exit(1)
        theirs.close()
        os.close(new)
        process.name(before)
        ending.pop_all()
    return failed


def _watch(end: socket.socket, new: int, daemon: int, patience: float) -> Failed:
    """Wait, in the reserve, until the new code has failed. It kills us when it has not."""
    serves, greets, deadline = True, True, time.monotonic() + HELLO_SECONDS
    while True:
        watched = [new, end.fileno(), *([daemon] if serves else [])]
        ready = _wait(watched, None if serves and not greets else deadline)
        if daemon in ready:  # before what is said later
            serves, deadline = False, time.monotonic() + patience + HELLO_SECONDS * greets
        if end.fileno() in ready and (said := leash.receive(end)) is not None:
            greets = greets and said.say != leash.HELLO
            if said.say == leash.FAILED:
                return Failed(str(said.facts.get("why", "")), serves)
        if new in ready:
            return Failed("its holder ended", serves)
        if ready:
            continue
        if greets and not serves:
            os._exit(0)  # it knows of no trial
        late = HELLO_SECONDS if serves else patience
        return Failed(f"its {'holder' if serves else 'daemon'} did not serve within {late:.0f} s", serves)


def _end_all(end: socket.socket, new: int, holder: int, spared: set[int]) -> bool:
    """End the new code: its holder, and whom that has forked; return False if one of those cannot be found."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(new, signal.SIGSTOP)
        for pid in process.children(holder):
            if pid not in spared:
                with contextlib.suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(pid)
                    process.end(pidfd)
                    os.close(pidfd)
    process.end(new)
    poll = select.poll()
    poll.register(end, 0)  # POLLHUP: nobody has the other end any more
    return bool(poll.poll(_GONE_SECONDS * 1000))


def _wait(watched: list[int], deadline: float | None) -> set[int]:
    """Return which descriptors say something; none at the deadline."""
    poll = select.poll()
    for fd in watched:
        poll.register(fd, select.POLLIN)
    left = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
    return {fd for fd, _ in poll.poll(left)}


async def prove(answered: "Callable[[], int]") -> None:
    """Return when a daemon of new code, which serves from now on, is proven; `answered` counts its requests."""
    with trio.move_on_after(QUIET_SECONDS):
        await trio.sleep(SECONDS)
        while answered() < ANSWERED:
            await trio.sleep(_POLL_SECONDS)
