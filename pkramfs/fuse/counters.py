# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters of requests by kind, some of them timed, in memory that another process reads without the daemon's help.

    words   0  the layout's version         2  bytes of replies of a page or more
            1  bytes of requests, likewise  8  requests of each kind (opcodes below KINDS)
            8 + KINDS  for each kind: nanoseconds, then how many took less than 2, 4, 8 … 2^31 ns

The words are in a memfd of the daemon, which `pkramctl metrics` finds in /proc/PID/fd. A word
is stored whole, so a reader sees the number before or after a change.

All requests are counted. Only the first of a turn (turns.py) is timed: one that came after a pause, or one in 5 ms of
requests without a pause; reading the clock twice for each would cost more than all the rest. Time is what the daemon
takes from when a request can be read to its answer, or to having put it off.

Kernel: fs/fuse/dev.c; include/trace/events/fuse.h
"""

import contextlib
import logging
import mmap
import os
import struct
from typing import NamedTuple

from pkramfs.errors import explain

log = logging.getLogger(__name__)

VERSION, KINDS, BUCKETS = 1, 64, 32
RECEIVED, SENT, COUNTS = 1, 2, 8
TIMES = COUNTS + KINDS
WORDS = TIMES + KINDS * BUCKETS
PAGE = 4096
_NAME = "pkramfs-requests"
_FOUND = (f"/memfd:{_NAME} (deleted)", f"/memfd:{_NAME}")


class Snapshot(NamedTuple):
    """The counters of a daemon: bytes each way, requests by opcode, and nanoseconds and buckets of timed requests."""

    received: int
    sent: int
    requests: dict[int, int]
    times: dict[int, tuple[int, tuple[int, ...]]]


def make() -> memoryview:
    """Return the words, shared if the host allows it; otherwise they are private to the daemon."""
    try:
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, WORDS * 8)
        shared = mmap.mmap(fd, WORDS * 8)  # keeps a descriptor of its own, by which readers find it
        os.close(fd)
    except OSError as error:
        log.info("requests are counted, but nobody can read it: %s", explain(error))
        shared = mmap.mmap(-1, WORDS * 8)
    words = memoryview(shared).cast("Q")
    words[0] = VERSION
    return words


def note(words: memoryview, kind: int, nanoseconds: int) -> None:
    """Note how long a request took."""
    at = TIMES + kind * BUCKETS
    words[at] += nanoseconds
    words[at + min(nanoseconds.bit_length() or 1, BUCKETS - 1)] += 1


def read(pid: int) -> Snapshot | None:
    """Return the counters of daemon `pid`; None if it is gone, another user's, or of an older version."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return None  # the process has ended, or is not readable
    for name in names:
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):  # closed since
            if os.readlink(path) in _FOUND:
                with open(path, "rb") as file:
                    return _snapshot(file.read(WORDS * 8))
    return None


def _snapshot(data: bytes) -> Snapshot | None:
    if len(data) < WORDS * 8:
        return None
    words = struct.unpack(f"={WORDS}Q", data)
    if words[0] != VERSION:
        return None
    requests = {kind: count for kind, count in enumerate(words[COUNTS:TIMES]) if count}
    times = {}
    for kind in requests:
        at = TIMES + kind * BUCKETS
        times[kind] = words[at], words[at + 1 : at + BUCKETS]
    return Snapshot(words[RECEIVED], words[SENT], requests, times)
