# SPDX-License-Identifier: GPL-2.0-or-later
"""Scheduling: requests are served one after the other while they arrive; then all other tasks have a turn.

For each request pyfuse3 takes a lock, waits for the device, reads, works and answers. Under trio that is two
rounds of the scheduler and five system calls, and they are most of what a small request costs:

    trio's           epoll_wait(0) · epoll_ctl · epoll_wait · read · writev
    here                      poll · read · writev

(On two quiet processors a file system that does nothing created 6,000 files a second with the former, and
18,000 with the latter.) So the scheduler is left out while requests follow each other. After an answer the
reader waits here for the next request, for LINGER. Only then, or when requests have come without a
break for TURN, does it wait through trio, and all other tasks of the daemon have a turn: verbs, a save,
signals. They wait for TURN at most; an idle daemon sleeps in trio and costs nothing.

A sleeping wait lets its processor halt, and the next request pays for waking it: more than for everything
else, especially in virtual machines. So during the first part of LINGER, a *window*, the reader polls; see
`Window` for when this pays.

The lock is not handed over either. A task that releases it makes one of the waiters runnable, which sees at trio's
next round whether the lock is free. If the reader waits for requests again, nothing has changed; if its handler
waits for something (room), or it has ended, the waiter continues reading.

pyfuse3 takes the scheduler that it uses from its own module variable `trio`, so that pyfuse3.asyncio can put
another one there. `Turns` is put there for the same reason: it is trio, but for these two.

Kernel: fs/fuse/dev.c (fuse_dev_poll, fuse_dev_do_read), kernel/sched/ (a time slice),
drivers/cpuidle/governors/haltpoll.c (adjust_poll_limit)
"""

from __future__ import annotations

import os
import resource
import select
import time
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from pkramfs.fuse.filter import Filter

LINGER_MS = 1
"""How long the next request is waited for before the scheduler is asked: the least that poll(2) knows."""
TURN = 0.005
"""Seconds that requests may follow each other before everybody else has a turn."""

WINDOW = 100e-6
"""Seconds to ask for the next request without sleeping, at most."""
SHORT = 300e-6
"""A sleep that was shorter may have been worth a window: with none, waking up alone takes a good part of it."""
_LEAST = WINDOW / 8
_PATIENCE = 64
"""Short sleeps before the window is tried again, at most; each failure doubles them."""
_CALM = 16
"""Turns without being preempted before the window is tried again."""


class Window:
    """How long to poll for the next request without sleeping: `seconds`, from 0 to WINDOW.

    It opens when sleeps are short, because then requests follow each other. A request inside the window opens it
    to WINDOW; a window without a request halves it, and each closing makes the next opening rarer. It stays closed

    * with one processor: the client needs the processor that the poll would use;
    * if other processes want the processors, which shows in preemptions: they would lose what requests gain, and
      a processor that never halts wakes us quickly anyway.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._patience = self._asleep = 0
        self._shut = 0
        self._preempted = _preemptions()

    def hit(self) -> None:
        """Note that a request came inside the window."""
        self.seconds = WINDOW
        self._patience = 0

    def missed(self) -> None:
        """Note that none came inside the window."""
        self.seconds /= 2
        if self.seconds < _LEAST:
            self.seconds = 0.0
            self._patience = min(2 * self._patience + 1, _PATIENCE)

    def slept(self, seconds: float) -> None:
        """Note that a request came after a sleep of so long."""
        if self.seconds or self._shut or seconds > SHORT:
            return
        self._asleep += 1
        if self._asleep > self._patience:
            self._asleep = 0
            self.seconds = WINDOW
            self._look()

    def turn(self) -> None:
        """Begin a turn."""
        if self._shut:
            self._shut -= 1
        if self.seconds or self._shut == 1:
            self._look()

    def _look(self) -> None:
        """Close the window if other processes want the processors."""
        preempted = _preemptions()
        if preempted != self._preempted or len(os.sched_getaffinity(0)) < 2:
            self._preempted = preempted
            self._shut, self.seconds = _CALM, 0.0


def _preemptions() -> int:
    """Return how often this thread was preempted."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


class Lock:
    """Mutual exclusion among pyfuse3's workers, without a cost while no holder waits."""

    def __init__(self) -> None:
        self._held = False
        self._others = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._others.park()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        self._others.unpark()


class Device:
    """Waiting for one descriptor, first here, then in trio. All other functions are those of trio.lowlevel."""

    def __init__(self) -> None:
        self._turn_ends = 0.0
        self._watched = -1
        self._window = Window()
        self.filter: Filter | None = None
        self.shut: trio.Event | None = None
        """Set when requests may be read again; None while they may."""

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Wait for a request that pyfuse3 shall read; with a filter, for the end of the device."""
        if fd != self._watched:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            self._watched, self._poll, self._turn_ends = fd, poll.poll, 0.0
        there = self.linger() if self.filter is None else self._serve(self.filter)
        while not there:
            await self._begin(fd)
            if self.filter is None or not self.filter.serve_timed():
                return
            there = self._serve(self.filter)

    def _serve(self, served: Filter) -> bool:
        """Answer requests while they follow each other; return True at the end of the device.

        It repeats `linger`, because it runs for each request: local names and one call less save a twentieth.
        """
        clock, poll, window, ends, serve = time.monotonic, self._poll, self._window, self._turn_ends, served.serve
        while not served.waiting and (now := clock()) < ends:
            if window.seconds:
                if not self.linger():
                    return False
            elif poll(LINGER_MS):
                window.slept(clock() - now)
            else:
                return False
            if not serve():
                return True
        return False

    async def _begin(self, fd: int) -> None:
        """Let all other tasks have a turn, and begin a new turn of requests with the next one."""
        if self.filter is not None:
            self.filter.rest()
        await trio.lowlevel.wait_readable(fd)
        while self.shut is not None:  # only tasks that may wait are at work: see Session.stand_still
            await self.shut.wait()
        self._turn_ends = time.monotonic() + TURN
        self._window.turn()

    def linger(self) -> bool:
        """Wait for the next request while the turn lasts, first without sleeping; return True if there is one."""
        now, poll, window = time.monotonic(), self._poll, self._window
        if now >= self._turn_ends or (self.filter is not None and self.filter.waiting):
            return False  # tasks that wait are woken only by the scheduler
        if window.seconds:
            end = now + window.seconds
            while not poll(0):
                if time.monotonic() > end:
                    window.missed()
                    break
            else:
                window.hit()
                return True
            return bool(poll(LINGER_MS))
        if not poll(LINGER_MS):
            return False
        window.slept(time.monotonic() - now)
        return True


class Turns:
    """The module that pyfuse3 uses as trio."""

    Lock = Lock

    def __init__(self) -> None:
        self.lowlevel = Device()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)
