# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests read from the device through a pipe, while large WRITEs follow one another.

The kernel puts references to the pages of a WRITE into a pipe, from where they are copied to their frames: one copy
less (machine/piped). The daemon needed 0.80 of the time for new files, and 0.87 for existing ones. The gain is for data
of the page cache only, because pages of an O_DIRECT write are copied into the pipe; and for large WRITEs in sequence,
because any other request has to be read from the pipe again. So a stream begins behind a large WRITE and ends soon
after the last one.

A pipe that any user may have holds 256 pieces, and a request may be a header and as many pages as INIT has allowed:
MAX_WRITE is 255 pages. If an earlier daemon of the mount has allowed more, the kernel refuses (EINVAL)
before it removes a request from its queue.

Kernel: fs/fuse/dev.c (fuse_dev_splice_read, fuse_ref_folio), fs/pipe.c (pipe_set_size)
"""

import contextlib
import errno
import fcntl
import logging
import os
import weakref

from pkramfs.fuse import wire
from pkramfs.fuse.handshake import MAX_WRITE
from pkramfs.machine.piped import Piped
from pkramfs.machine.ram import Ram
from pkramfs.units import PAGE_SIZE

log = logging.getLogger(__name__)

LARGE = 1 << 18
"""Bytes of a WRITE that is worth it."""
_PATIENCE = 4
"""Other requests that a stream survives."""
_SIZE = MAX_WRITE + PAGE_SIZE
_HEAD = wire.HEADER.size + wire.WRITE.size


class Stream:
    """The pipe of one filter, and whether it is used: while `left` is not 0."""

    def __init__(self, buffer: bytearray, ram: Ram) -> None:
        self.left = 0
        self._ram, self._view = ram, memoryview(buffer)
        self._head = [self._view[:_HEAD]]
        self._ends: tuple[int, int] | None = None
        self._usable = ram.sparse

    def expect(self) -> None:
        """Take the next requests through the pipe: a large WRITE has just come."""
        if self._usable:
            if self._ends is None:
                self._open()
            self.left = _PATIENCE if self._usable and self._ends is not None else 0

    def missed(self) -> None:
        """Note that another request came."""
        self.left -= 1

    def take(self, fd: int) -> int:
        """Read one request into the pipe, then the head of a large one, or all, into the buffer; return its length."""
        assert self._ends is not None
        try:
            length = os.splice(fd, self._ends[1], _SIZE)
        except OSError as error:
            if error.errno == errno.EINVAL:
                self._usable, self.left = False, 0
                raise BlockingIOError(errno.EAGAIN, "read it the usual way") from None
            raise
        if length > LARGE:
            os.readv(self._ends[0], self._head)
        elif length:
            os.readv(self._ends[0], [self._view])
        return length

    def data(self, length: int) -> Piped:
        """Return what is in the pipe of a request of so many bytes, whose place in the buffer is behind the head."""
        assert self._ends is not None
        return Piped(self._ends[0], self._view[_HEAD:length], self._ram)

    def _open(self) -> None:
        """Make the pipe, if that can be now; without room for the largest request it must not be used."""
        try:
            self._ends = os.pipe2(os.O_CLOEXEC)
        except OSError as error:  # no descriptor is left, or a user has too many pipes: the data come the usual way
            log.info("no stream: %s", error.strerror)
            return
        weakref.finalize(self, _close, self._ends)
        try:
            fcntl.fcntl(self._ends[1], fcntl.F_SETPIPE_SZ, _SIZE)
        except OSError as error:  # a user with many pipes gets no more large ones
            log.info("no streams: %s", error.strerror)
            self._usable = False


def _close(ends: tuple[int, int]) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)
