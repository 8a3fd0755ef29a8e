# SPDX-License-Identifier: GPL-2.0-or-later
"""A second daemon that is ready before it is needed: `-o standby`.

    holder ──fork──▶ standby        rebuilds the tree from checkpoint and log, then follows the log's tail
       │                │ ready
       │  the daemon dies
       └─────── go ────▶│           applies the rest, adopts the frames, serves: it is the daemon now

So a takeover takes as long for a million files as for a thousand. The price is memory for a second tree, in the form of
a restored one, asleep except for changes since the checkpoint; and processor time to read each change once more.

When there is a new checkpoint, the standby ends, and the holder forks another, which begins with that. Until this one
is ready, a takeover takes as long as without a standby. The same holds after any problem: a standby that cannot
continue ends with STALE, and has changed nothing. A standby holds no lock of the machine, and no kexec waits for it:
daemons ensure that there is none when a kernel ends.

Kernel: drivers/md/raid1.c (a spare), by other means
"""

import contextlib
import gc
import os
import socket
import time
from typing import NamedTuple

from pkramfs.daemon import leash as messages
from pkramfs.daemon.job import Held
from pkramfs.daemon.leash import Leash
from pkramfs.errors import FormatError, PkramfsError
from pkramfs.fs import collector
from pkramfs.fs.limits import Limits
from pkramfs.fs.picture import complete
from pkramfs.fs.recover import Rebuilt
from pkramfs.fs.standby import Follower
from pkramfs.kernel.running import Running, look
from pkramfs.machine import process
from pkramfs.machine.directory import Machine
from pkramfs.machine.frames import Frames
from pkramfs.machine.policy import Policy
from pkramfs.mounting.options import Options
from pkramfs.units import PAGE_SHIFT

NAME = "pkram-standby"
"""What ps calls a standby that is ready."""
STALE = 78
"""Exit status of a standby that cannot become the daemon."""
AGAIN_SECONDS, SELDOM_SECONDS = 1.0, 60.0
"""How long to wait before another standby is started, and at most, if one after the other fails."""
_SOON, _SELDOM = 0.01, 0.2
"""Seconds between two looks at the log: after a change, and when there has been none for long."""


class Standing(NamedTuple):
    """The state of a standby when it takes over."""

    kernel: Running
    frames: Frames
    follower: Follower

    def taken(self, limits: Limits) -> Rebuilt | None:
        """Return the tree of a daemon that has died, with the present limits; None if it must be recovered."""
        try:
            rebuilt = self.follower.finish()
        except FormatError:  # if this is damage, a recovery will report it
            return None
        if rebuilt is not None:
            there = rebuilt.tree.limits
            there.max_pages, there.max_inodes = limits.max_pages, limits.max_inodes
        return rebuilt


def stand_by(options: Options, held: Held, leash: Leash) -> tuple[Standing, Held]:
    """Follow the tree until the holder sends `go`; end this process if following is no longer possible."""
    process.die_with_parent()
    with contextlib.ExitStack() as ending:
        ending.callback(os._exit, STALE)
        with contextlib.suppress(PkramfsError, OSError, EOFError):  # the next daemon will report the fault
            with collector.paused():
                standing = _prepare(options, held)
            gc.freeze()
            before = process.name(NAME)
            leash.ready()
            if (went := _follow(standing.follower, held, leash)) is not None:
                process.name(before)
                ending.pop_all()
                return standing, went
    raise AssertionError


def _prepare(options: Options, held: Held) -> Standing:
    machine = Machine.locate(options.machine)
    kernel = look(machine)
    policy = Policy.parse(options.mpol, machine.hardware())
    frames = Frames(kernel.ram, kernel.leases, held.facts["tree_id"], policy)
    limits = Limits(*options.limits(machine.hardware().pages << PAGE_SHIFT))
    follower = Follower(kernel.store, held.facts["live"], kernel.ram, frames, limits)
    complete(follower.prepare())
    return Standing(kernel, frames, follower)


def _follow(follower: Follower, held: Held, leash: Leash) -> Held | None:
    """Follow the log; return the message `go` of the holder, or None if there is a new checkpoint."""
    pause = _SOON
    while (said := leash.said(pause)) is None:
        before = follower.position
        if not follower.follow():
            return None
        pause = _SOON if follower.position != before else min(2 * pause, _SELDOM)
    if said.say != messages.GO:
        return None
    process.die_with_parent(no=True)
    return held._replace(facts=said.facts, suspect=bool(said.status))


class Second:
    """The holder's side: the standby of one mount, if there is one."""

    def __init__(self, *, wanted: bool) -> None:
        self.pid = self.pidfd = -1
        self.ours: socket.socket | None = None
        self.ready, self.allowed = False, wanted
        self._started, self._pause = 0.0, AGAIN_SECONDS

    @property
    def is_due(self) -> bool:
        """Return True if a standby should be started now."""
        return self.allowed and self.pid < 0 and time.monotonic() - self._started >= self._pause

    @property
    def watched(self) -> list[int]:
        """Return the descriptors to poll for it."""
        return [] if self.pid < 0 or self.ours is None else [self.pidfd, self.ours.fileno()]

    @property
    def patience(self) -> float | None:
        """Return the milliseconds until a standby may be due."""
        return self._pause * 1000 if self.allowed and self.pid < 0 else None

    def began(self, pid: int, ours: socket.socket) -> None:
        """Note that a standby was started."""
        self.pid, self.pidfd, self.ours = pid, os.pidfd_open(pid), ours
        self.ready, self._started = False, time.monotonic()

    def hear(self, ready: set[int]) -> None:
        """Read its message, or notice its end."""
        if self.ours is not None and self.ours.fileno() in ready:
            said = messages.receive(self.ours)
            if said is not None and said.say == messages.READY:
                self.ready, self._pause = True, AGAIN_SECONDS
        if self.pidfd in ready:
            if not self.ready:
                self._pause = min(2 * self._pause, SELDOM_SECONDS)
            self.end()

    def give(self) -> tuple[int, int, socket.socket]:
        """Return its pid, its pidfd and its socket: it becomes the daemon."""
        assert self.ours is not None
        found = self.pid, self.pidfd, self.ours
        self.pid = self.pidfd = -1
        self.ours, self.ready = None, False
        return found

    def end(self) -> None:
        """Kill it, if there is one, and wait until it has ended."""
        if self.pid >= 0:
            pid, pidfd, ours = self.give()
            process.end(pidfd)
            os.close(pidfd)
            ours.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
