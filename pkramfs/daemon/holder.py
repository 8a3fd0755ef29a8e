# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that holds a mount: it outlives daemons, and starts another when one dies.

    mount.pkramfs ──starts──▶ holder ──fork──▶ daemon        builds the tree, mounts, serves
                                │  ◀─ device, lock ─┘
                                │                 ✗          dies, of whatever
                                └──fork──▶ daemon            recovers the tree, has the kernel send again what it
                                                             did not answer, and goes on

The kernel ends a mount when the last descriptor of its connection is closed. The holder has one, so that programs
which use the mount wait a moment and go on: with their open files, locks, maps and working directories. It does
nothing else, has one thread, and has imported all that a daemon needs; so the next daemon is there at once, and shares
this memory.

    the daemon ends             the holder
    -------------------------------------------------------------------------------------------
    in order (0)                ends
    before it serves            ends with the same status: the command says why
    of a signal we passed on    ends, as with FINAL: it was told to end and did not serve yet
    FINAL                       ends: no other daemon would do better. Programs get ENOTCONN, the tree stays in RAM
    HANDED_OVER                 becomes the code on disk (execve), and starts another daemon
    otherwise                   starts another: at once, then after longer and longer (PAUSES)
    more than DEATHS in WITHIN  ends, as with FINAL

What counts is a death of the daemon's own, and any before it was *well*: before it came to a request that the dead had
not seen. Kills from outside (SIGKILL, of the OOM killer too) of daemons that are well are no reason to give up. After
POISON_DEATHS, requests that the dead did not answer are refused with EIO: one of them may be what kills.

A mount without a name has no journal, and one with fuse=pyfuse3 cannot tell whether a request was done: they have no
holder and end with their daemon.

Kernel: fs/fuse/dev.c (fuse_dev_release, fuse_chan_resend), include/uapi/linux/fuse.h (FUSE_NOTIFY_RESEND)
"""

import array
import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from pkramfs.daemon import serving
from pkramfs.daemon.job import FINAL, HANDED_OVER, Held, Job
from pkramfs.errors import PkramfsError
from pkramfs.machine import process
from pkramfs.machine.directory import Machine
from pkramfs.mounting.options import parse
from pkramfs.mounting.starting import ANYTHING

PAUSES = (0.0, 0.1, 0.5, 1.0, 2.0)
"""Seconds before the next daemon is started, after one death, two, …"""
DEATHS, WITHIN = 5, 60.0
"""How many deaths in how many seconds may be."""
POISON_DEATHS = 3
"""How many of them make what was not answered suspect."""
WELL, ENDS = b"well", b"ends"
_MESSAGE = 1 << 16
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mount: FD for the answer, mount point, options, FD to read GO from."""
    job = serving.read_job(argv)
    if job is None:
        return 0
    return Holder(job).run() if _is_held(job.text) else serving.serve(job)


def _is_held(text: str) -> bool:
    """Return True if a mount with these options is to outlive its daemon. Wrong options are the daemon's to refuse."""
    try:
        options = parse(text)
    except PkramfsError:
        return False
    return options.name is not None and options.fuse != "pyfuse3" and process.threads() == 1


def again(argv: Sequence[str]) -> int:
    """Go on with a mount whose daemon has made room: mount point, options, device, lock, facts."""
    mountpoint, text, device, lock, facts = argv
    for fd in (int(device), int(lock)):
        os.set_inheritable(fd, False)
    holder = Holder(Job(-1, mountpoint, text, ANYTHING))
    holder.held = Held(int(device), int(lock), json.loads(facts), False)
    return holder.run()


class Holder:
    """The holder of one mount."""

    def __init__(self, job: Job) -> None:
        self._job = job
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: self._forward(number))
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.held: Held | None = None
        self._child = self._passed = 0
        self._well = True
        self._deaths: deque[float] = deque(maxlen=DEATHS + 1)

    def run(self) -> int:
        """Start daemons until one ends the mount, or no other would help; return the exit status."""
        gc.freeze()
        process.adopt_orphans()
        while True:
            status = self._live(self._start())
            code = os.waitstatus_to_exitcode(status)
            _end_orphans()
            if self.held is None or code == 0:
                return code if code >= 0 else 128 - code
            facts = self.held.facts
            self.held = self.held._replace(facts=facts | {"taken": facts.get("taken", 0) + 1})
            if code == HANDED_OVER:
                self._become_new(self.held)
            if self._is_hopeless(code):
                return 1
            time.sleep(PAUSES[min(self._recent(), len(PAUSES) - 1)] if not self._well else 0)
            self._well = False

    def _start(self) -> int:
        """Fork a daemon; return its pid."""
        pid = os.fork()
        if pid:
            self._child = pid
            return pid
        status = 1
        try:
            for number in _FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            if self.held is None:
                process.die_with_parent()  # who gives up waiting for us kills our parent
                status = serving.serve(self._job, self._tell)
            else:
                status = serving.serve(self._job, self._tell, self.held)
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)

    def _tell(
        self, device: int = -1, lock: int = -1, facts: dict[str, Any] | None = None, *, ends: bool = False
    ) -> None:
        """Give the holder what it must keep, or tell it that all is well, or ends; called in the daemon."""
        if facts is None:
            with contextlib.suppress(OSError):  # it was killed
                self._theirs.send(ENDS if ends else WELL)
            return
        passed = array.array("i", [device, lock]).tobytes()
        self._theirs.sendmsg([json.dumps(facts).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
        process.die_with_parent(no=True)

    def _live(self, pid: int) -> int:
        """Wait until a daemon has ended, take what it gives us, pass signals on; return its wait status."""
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(self._ours, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            while pidfd not in {fd for fd, _ in poll.poll()}:
                self._receive()
        finally:
            os.close(pidfd)
        while self._receive():
            pass
        self._child = 0
        return os.waitpid(pid, 0)[1]

    def _receive(self) -> bool:
        """Take the descriptors that a daemon sends, if it does."""
        size = array.array("i").itemsize
        try:
            text, extra, _, _ = self._ours.recvmsg(_MESSAGE, socket.CMSG_SPACE(2 * size), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if text == WELL:
            self._well = True
            return True
        if text == ENDS:
            self._let_go()
            return True
        device, lock = array.array("i", extra[0][2][: 2 * size])
        for fd in (device, lock):
            os.set_inheritable(fd, False)
        if self.held is None:
            os.close(self._job.fd)  # the daemon answers the command
        self.held = Held(device, lock, json.loads(text), False)
        return True

    def _let_go(self) -> None:
        """Close the connection: its end is the daemon's to give, in order."""
        if self.held is not None:
            os.close(self.held.device)
            self.held = None

    def _forward(self, number: int) -> None:
        """Pass a signal on to the daemon; without one, end, and leave the tree to who mounts it again."""
        if not self._child:
            os._exit(128 + number)
        self._passed = number
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def _become_new(self, held: Held) -> None:
        """Go on as the code on disk: another holder in this process, which forks the next daemon."""
        words = [self._job.mountpoint, self._job.text, str(held.device), str(held.lock), json.dumps(held.facts)]
        for fd in (held.device, held.lock):
            os.set_inheritable(fd, True)
        os.execv(sys.executable, [sys.executable, "-P", "-m", "pkramfs", "hold", *words])

    def _recent(self) -> int:
        """Return how many deaths count."""
        return sum(1 for when in self._deaths if when > time.monotonic() - WITHIN)

    def _is_hopeless(self, code: int) -> bool:
        """Note a death; return True if no other daemon is to be started, and say so."""
        assert self.held is not None
        if not self._well or code != -signal.SIGKILL:
            self._deaths.append(time.monotonic())
        self.held = self.held._replace(suspect=self._recent() >= POISON_DEATHS)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        often = self._recent() > DEATHS
        hopeless = code in (FINAL, -self._passed) or often or (code < 0 and serving.panics(self._job, -code))
        why = f": {DEATHS + 1} deaths in {WITHIN:g} s are too many" if often else ""
        then = f", and none takes over{why}: mount it again" if hopeless else ", another takes over"
        self._log(f"pkramfs: the daemon of {self.held.facts['name']} {how}{then}")
        return hopeless

    def _log(self, line: str) -> None:
        with contextlib.suppress(PkramfsError):
            Machine.locate(parse(self._job.text).machine).log(line)


def _end_orphans() -> None:
    """Kill who makes a checkpoint for a daemon that has died, and wait until it is gone: its frames are free now."""
    for pid in process.children():
        if process.words(pid)[-2:] == [b"pkramfs", b"checkpoint"]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with contextlib.suppress(ChildProcessError):  # others, such as fusermount3, may wait for the next daemon
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
