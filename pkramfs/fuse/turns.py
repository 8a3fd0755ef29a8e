# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose turn it is: requests one after the other while they come, then everybody else.

For each request pyfuse3 takes a lock, waits for the device, reads, works and answers. Under trio that is two
rounds of the scheduler and five system calls, and they are most of what a small request costs:

    trio's           epoll_wait(0) · epoll_ctl · epoll_wait · read · writev
    here                      poll · read · writev

(On two quiet processors a file system that does nothing created 6,000 files a second with the former, and
18,000 with the latter.) So the scheduler is left out while requests follow each other. After an answer the
next request is waited for right here, for LINGER; only then, or when requests have come without a
break for TURN, does the reader wait as trio wants it, and everything else in the daemon has its turn: verbs,
a save, signals. They wait for TURN at most; an idle daemon sleeps in trio and costs nothing.

The lock does not hand itself over either. Who gives it back makes one of the others runnable, who sees at trio's
next round whether it is free: if the reader waits for requests again, nothing has happened; if its handler
waits for something (room), or it has ended, the other goes on reading.

pyfuse3 takes the scheduler that it uses from its own module variable `trio`, so that pyfuse3.asyncio can put
another one there. `Turns` is put there for the same reason: it is trio, but for these two.

Kernel: fs/fuse/dev.c (fuse_dev_poll, fuse_dev_do_read), kernel/sched/ (a time slice)
"""

import select
import time
from typing import Any

import trio

LINGER_MS = 1
"""How long the next request is waited for before the scheduler is asked: the least that poll(2) knows."""
TURN = 0.005
"""Seconds that requests may follow each other before everybody else has a turn."""


class Lock:
    """Mutual exclusion among pyfuse3's workers, free to take and to give back while nobody waits inside."""

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
    """Waiting for one descriptor: first here, then in trio. Everything else is trio.lowlevel's."""

    def __init__(self) -> None:
        self._turn_ends = 0.0
        self._watched = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        if fd != self._watched:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            self._watched, self._poll = fd, poll.poll
        elif time.monotonic() < self._turn_ends and self._poll(LINGER_MS):
            return
        await trio.lowlevel.wait_readable(fd)
        self._turn_ends = time.monotonic() + TURN


class Turns:
    """What pyfuse3 shall take for trio."""

    Lock = Lock

    def __init__(self) -> None:
        self.lowlevel = Device()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)
