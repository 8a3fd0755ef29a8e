# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's side of its holder: the facts that the holder needs, and a new holder when it dies.

    facts     all that another daemon needs beside device and lock; sent again when they change
    watch     the holder's pidfd ─▶ it has died ─▶ start another, which gets device, lock, facts, and the daemon's pidfd

The new holder is a fresh process, since fork(2) is not for a process with threads. From its first moment it has the
connection, so the mount outlives us again, and it starts another daemon if we have died before it knows us.

A holder that becomes the code on disk leaves a copy of itself (trial.py), which says `back` if that code fails.

Kernel: kernel/pid.c (pidfd_poll)
"""

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import trio

from pkramfs.daemon import leash
from pkramfs.daemon.job import Held, Job, words
from pkramfs.daemon.leash import Leash, Said
from pkramfs.machine import process
from pkramfs.mounting.starting import environment

READY_SECONDS = 30.0
"""How long a new holder may take until it says that it is one."""
PAUSES, SELDOM = (0.0, 1.0, 5.0), 60.0
"""Seconds before each attempt to start a holder: the first ones, and all others."""


class Holding:
    """What holds one mount. `changed` is called when there is another holder, or none."""

    def __init__(self, of: Leash, job: Job, say: Callable[[str], None], changed: Callable[[], None]) -> None:
        self.leash: Leash | None = of
        """None while nobody would start another daemon."""
        self.pid = of.holder
        """The holder, also one that is only about to be one."""
        self._job, self._say, self._changed = job, say, changed
        self._held: Held | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        """That of a holder which is neither our parent nor our child."""
        self._renewed = trio.Event()
        self._renewed.set()

    def hold(self, device: int, lock: int, facts: dict[str, Any]) -> None:
        """Give all to the holder."""
        self._held = Held(device, lock, facts, False)
        if self.leash is not None:
            self.leash.held(device, lock, facts)

    def tell(self, **more: Any) -> None:
        """Tell further facts."""
        if self._held is not None:
            self._held = self._held._replace(facts=self._held.facts | more)
            if self.leash is not None:
                self.leash.facts(self._held.facts)

    def kept(self, kept: bool) -> None:
        """Tell whether the tree is frozen by preserve."""
        self.tell(kept=kept)

    async def be_alone(self) -> None:
        """See to it that no standby maps RAM, nor will."""
        if self.leash is not None:
            self.leash.alone(yes=True)
            for pid in process.children(self.pid):
                if pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        pidfd = os.pidfd_open(pid)
                        await trio.to_thread.run_sync(process.end, pidfd)
                        os.close(pidfd)

    async def renew(self, patience: float) -> bool:
        """Have the holder become the code on disk while we serve; return False if it does not, or there is none.

        The next daemon may take `patience` seconds.
        """
        if self.leash is None:
            return False
        self._renewed = trio.Event()
        try:
            self.leash.renew(patience)
            said = await _said(self.leash.end)
            if said is not None and said.say == leash.BACK and said.descriptors:
                self.leash.holder, self._pidfd, self._process = said.facts["holder"], said.descriptors[0], None
                self._set(self.leash, said.facts["holder"])
        finally:
            self._renewed.set()
        return said is not None and said.say == leash.WELL

    def served_by(self, device: int) -> None:
        """Note that the connection has another descriptor now."""
        if self._held is not None:
            self._held = self._held._replace(device=device)

    async def watch(self) -> None:
        """Start another holder whenever one has died, until cancelled."""
        while True:
            of = self.pid
            await self._death()
            await self._renewed.wait()  # it may be back
            if self.pid != of:
                continue
            self._say(f"pkramfs: the holder of {self._job.mountpoint} (pid {self.pid}) has died")
            self._set(None, 0)
            for pause in chain(PAUSES, repeat(SELDOM)):
                await trio.sleep(pause)
                if await self._start():
                    break
                self._say(f"pkramfs: no holder for {self._job.mountpoint} can be started: it ends with its daemon")

    async def _death(self) -> None:
        """Wait until the holder has died, whose pid is nobody else's as long as it is our parent or our child."""
        given, self._pidfd = self._pidfd, -1
        try:
            pidfd = os.pidfd_open(self.pid) if given < 0 else given
        except ProcessLookupError:
            return
        try:
            if given >= 0 or self._process is not None or os.getppid() == self.pid:
                await trio.lowlevel.wait_readable(pidfd)
            if self._process is not None:
                self._process.wait()
        finally:
            os.close(pidfd)

    async def _start(self) -> bool:
        """Start another holder; return False if it does not come so far as to hold."""
        if self._held is None:
            return False
        ours, theirs = leash.pair()
        own = os.pidfd_open(os.getpid())
        try:
            self._process = _spawn(self._job, self._held, own, theirs.fileno())
        except OSError:
            ours.close()
            return False
        finally:
            os.close(own)
            theirs.close()
        self._set(None, self._process.pid)
        if await _is_ready(ours):
            self._set(Leash(ours, self.pid), self.pid)
            return True
        self._process.kill()
        self._process.wait()
        ours.close()
        self._set(None, 0)
        return False

    def _set(self, found: Leash | None, pid: int) -> None:
        self.leash, self.pid = found, pid
        self._changed()


def _spawn(job: Job, held: Held, own: int, end: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        words(job, held, own, end),
        pass_fds=[held.device, held.lock, own, end],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        cwd="/",
        start_new_session=True,
    )


async def _is_ready(end: socket.socket) -> bool:
    """Wait until a new holder says that it is one; return False if it does not."""
    said = await _said(end)
    return said is not None and said.say == leash.WELL


async def _said(end: socket.socket) -> Said | None:
    """Wait for what a holder says; return None if it says nothing, or has died."""
    with trio.move_on_after(READY_SECONDS):
        await trio.lowlevel.wait_readable(end)
        return leash.receive(end)
    return None


def parting(of: Holding | None, status: int) -> None:
    """End this process with a status that the holder hears of, although it may not be our parent."""
    if of is not None and of.leash is not None:
        of.leash.leaves(status)
    with contextlib.ExitStack() as ending:
        ending.callback(os._exit, status)
