# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket between a daemon and the holder of its mount: messages, and descriptors that go with them.

    held      device, lock, facts      the mount exists: start another daemon with these when this one dies
    facts     facts                    the same with other facts
    shadow    a pidfd                  the process that makes a checkpoint: it must end before another daemon starts
    alone     0 or 1                   whether only the daemon may have the tree, so no standby
    ready                              a standby has the tree, and waits for `go`
    renew     {patience}               run the code on disk, and send `well` when that is done
    proven                             this daemon of new code has served: the old code may end
    crosses   a file                   a kexec comes: the file has the users of the tree (crossing.py)
    well                               requests are served that the dead daemon had not read
    leaves    status                   the daemon makes room, with this exit status
    ends                               the mount ends: start no daemon

A message is one JSON object. The holder sends only three messages: `go`, with the facts, to a standby; `well` to a
daemon when it first holds that daemon's mount, as the code that it runs; and `back`, with a pidfd of its own, when it
holds the mount again because the code on disk has failed. No other message is answered; the daemon notices the death of
a holder by its pidfd.

New code on trial sends `hello` to the old code, and `failed` with the reason (trial.py).

Kernel: net/core/scm.c (scm_detach_fds)
"""

import array
import contextlib
import json
import os
import select
import socket
from typing import Any, NamedTuple

from pkramfs.machine import process
from pkramfs.schema import Anything, Invalid, Maybe, Object, Text, Whole, parse

HELD, FACTS, SHADOW, CROSSES = "held", "facts", "shadow", "crosses"
WELL, LEAVES, ENDS, RENEW = "well", "leaves", "ends", "renew"
PROVEN, BACK, HELLO, FAILED = "proven", "back", "hello", "failed"
ALONE, READY, GO = "alone", "ready", "go"
_MOST, _DESCRIPTORS = 1 << 16, 2
_MESSAGE = Object(
    {"say": Text()}, optional={"facts": Maybe(Object({}, others=Anything())), "status": Maybe(Whole(0, 255))}
)


class Said(NamedTuple):
    """One message."""

    say: str
    facts: dict[str, Any]
    status: int
    descriptors: list[int]


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the holder's end and the daemon's."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


class Leash:
    """The daemon's end, with the pid of the holder."""

    def __init__(self, end: socket.socket, holder: int) -> None:
        self._end, self.holder = end, holder
        self.on_trial = False
        """True while our death is to be that of all new code, and so our holder's is ours."""

    @property
    def end(self) -> socket.socket:
        """Return our end."""
        return self._end

    def held(self, device: int, lock: int, facts: dict[str, Any]) -> None:
        """Give the holder all that another daemon needs; from now on the death of this one does not end the mount."""
        self._send(HELD, [device, lock], facts=facts)
        if not self.on_trial:
            process.die_with_parent(no=True)

    def facts(self, facts: dict[str, Any]) -> None:
        """Send the changed facts."""
        self._send(FACTS, facts=facts)

    def shadow(self, pidfd: int) -> None:
        """Send the pidfd of the process that makes a checkpoint."""
        self._send(SHADOW, [pidfd])

    def alone(self, *, yes: bool) -> None:
        """Tell whether a standby is forbidden."""
        self._send(ALONE, status=int(yes))

    def ready(self) -> None:
        """Tell that this standby is ready."""
        self._send(READY)

    def go(self, facts: dict[str, Any], *, suspect: bool) -> None:
        """Make a standby take over; the holder sends this through its end."""
        self._send(GO, facts=facts, status=int(suspect))

    def said(self, seconds: float) -> "Said | None":
        """Return the next message of the holder, None if none comes in time; raise EOFError if the holder has died."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        if (found := receive(self._end)) is None:
            raise EOFError
        return found

    def crosses(self, users: int) -> None:
        """Send the file with the users of the tree, for a daemon of the next kernel."""
        self._send(CROSSES, [users])

    def renew(self, patience: float) -> None:
        """Make the holder run the code on disk, whose daemon may take `patience` seconds until it is proven."""
        self._send(RENEW, facts={"patience": patience})

    def proven(self) -> None:
        """Tell that this daemon has served, so that the old code may end."""
        self._send(PROVEN)
        self.on_trial = False
        process.die_with_parent(no=True)

    def back(self, pidfd: int) -> None:
        """Tell a daemon that this process holds its mount again; sent by the holder."""
        self._send(BACK, [pidfd], facts={"holder": os.getpid()})

    def hello(self) -> None:
        """Tell the old code that this process knows of the trial."""
        self._send(HELLO)

    def failed(self, why: str) -> None:
        """Tell the old code why it must go on."""
        self._send(FAILED, facts={"why": why})

    def well(self) -> None:
        """Tell that all is well."""
        self._send(WELL)

    def leaves(self, status: int) -> None:
        """Send the status with which this daemon is about to end, for a holder that is not its parent."""
        self._send(LEAVES, status=status)

    def ends(self) -> None:
        """Tell that the mount ends."""
        self._send(ENDS)

    def _send(self, say: str, descriptors: list[int] | None = None, **more: Any) -> None:
        passed = array.array("i", descriptors or []).tobytes()
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if passed else []
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # the holder was killed
            self._end.sendmsg([json.dumps({"say": say} | more).encode()], extra)


def receive(end: socket.socket) -> Said | None:
    """Return the next message, None if there is none now."""
    size = array.array("i").itemsize
    try:
        text, extra, _, _ = end.recvmsg(_MOST, socket.CMSG_SPACE(_DESCRIPTORS * size), socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    if not text:
        return None  # the other end is closed
    found = [fd for _, _, data in extra for fd in array.array("i", data[: len(data) // size * size])]
    for fd in found:
        os.set_inheritable(fd, False)
    try:
        said = _MESSAGE.read(parse(text))
    except Invalid:
        return Said("", {}, 0, found)
    return Said(said["say"], said.get("facts") or {}, said.get("status") or 0, found)
