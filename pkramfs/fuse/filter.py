# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests read from the device and answered there, in front of pyfuse3 and libfuse.

    kernel ──request──▶ read ──▶ Requests ──▶ Operations ──▶ write ──reply──▶ kernel
                         │           │
                         │           └─ a request that has to wait (room, the kernel's cache): a task answers later
                         └─ the device is gone: pyfuse3 sees this, too, and ends its loop

pyfuse3 waits for something to read, and is not woken while all requests can be answered here. This saves the cost of
libfuse, pyfuse3 and a coroutine for each request, and allows requests that they do not know. They stay a complete path:
without a filter (`-o fuse=pyfuse3`) they get every request, and the same Operations serve it.

The changes of a request are committed before it is answered (fs/journal), in one place: where the reply is written.

No request ends the mount, and none is left without an answer:

    shorter than a header, or of another length than it says     no answer is possible, or EINVAL
    an unknown opcode                                            ENOSYS, and the kernel does not ask again
    cut, or a name without an end                                EINVAL
    INTERRUPT                                                    ENOSYS: no request waits for long
    a reply to an aborted request                                is dropped: no program waits for it
    a reply that the kernel refuses                              EIO in its place
    a change that cannot be committed                            ENOSPC in its place

Kernel: fs/fuse/dev.c (fuse_dev_do_read, fuse_dev_do_write)
"""

import contextlib
import errno
import logging
import os
import struct
from collections.abc import Callable
from time import perf_counter_ns
from types import CoroutineType
from typing import Any

import trio
from pyfuse3 import FUSEError

from pkramfs.errors import MachineError
from pkramfs.fuse import counters, wire
from pkramfs.fuse.again import Again
from pkramfs.fuse.handshake import MAX_WRITE
from pkramfs.fuse.net import commit_again
from pkramfs.fuse.requests import Requests
from pkramfs.fuse.stream import LARGE, Stream
from pkramfs.fuse.wire import HEADER, REPLY, Header, Op
from pkramfs.machine.piped import Piped

log = logging.getLogger(__name__)

ROOM = MAX_WRITE + (1 << 16)
"""Bytes of the longest request: a WRITE, of a MiB where an older daemon has made the mount."""
_RECEIVED, _SENT, _PAGE = counters.RECEIVED, counters.SENT, counters.PAGE
_NOTHING = (0,) * 9
_FLAGS = HEADER.size + 20
"""Where in a WRITE its flags are."""
_readv, _write, _unpack, _pack = os.readv, os.write, HEADER.unpack_from, REPLY.pack  # once for each request
_HEADER, _AGAIN = HEADER.size, (errno.EAGAIN, errno.EINTR, errno.ENOENT)
"""Errors of reading after which one reads again: who asked was killed."""
_DEAD = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET)
_NAMELESS = (Op.FORGET, Op.BATCH_FORGET)
_NOT_AWAITED = (errno.ENOENT, *_DEAD)

Spawn = Callable[..., object]
"""What starts a task: nursery.start_soon"""


RESENT = 1 << 63
"""Bit of the number of a request that the kernel sends again, and of its reply."""


class Filter:
    """Reads requests from the descriptor `fd` and answers them there."""

    def __init__(self, requests: Requests, fd: int, spawn: Spawn) -> None:
        self.operations, self.fd, self._spawn, self._requests = requests.operations, fd, spawn, requests
        self.waiting = 0
        """Requests that are answered later: they need the scheduler."""
        self._table, self._commit = requests.table, requests.tree.commit
        self.words = counters.make()
        self._counts = self.words[counters.COUNTS : counters.TIMES]
        self._buffer = bytearray(b"\1") * ROOM  # touched: a death in the middle of a page fault would lose a request
        self._view, self._into = memoryview(self._buffer), [self._buffer]
        self._stream = Stream(self._buffer, requests.tree.ram)
        self.operations.cache.device = fd

    @property
    def requests(self) -> int:
        """Return how many requests were read so far."""
        return sum(self._counts)

    def serve(self) -> bool:
        """Read one request, if there is one, and answer it; return False when the device is gone."""
        streams = self._stream.left
        try:
            length = self._stream.take(self.fd) if streams else _readv(self.fd, self._into)
        except OSError as error:
            if error.errno in _AGAIN:
                return True
            if error.errno in _DEAD:
                return False
            raise
        if length < _HEADER:
            return length > 0
        header = _unpack(self._buffer)
        if streams and self._streamed(header, length):
            return True
        if header[0] == length:
            try:  # noqa: SIM105 - a context manager would cost more than counting
                self._counts[header[1]] += 1
            except IndexError:
                pass  # an opcode that nobody knows
            if length >= _PAGE:
                self.words[_RECEIVED] += length
                if length > LARGE and header[1] == Op.WRITE:
                    self._look_for_stream(header)
            self.answer(header, self._view[_HEADER:length])
        else:
            self._reply_error(header[2], errno.EINVAL)
        return True

    def _look_for_stream(self, header: Header) -> None:
        """Take the next requests through a pipe after a large WRITE from the page cache."""
        if self._buffer[_FLAGS] & wire.WRITE_CACHE and not header[2] & RESENT:
            self._stream.expect()

    def _streamed(self, header: Header, length: int) -> bool:
        """Serve a large WRITE whose data are still in the pipe; return True if they were stored.

        Otherwise the whole request is in the buffer, to be served like any other.
        """
        if length <= LARGE:
            self._stream.missed()
            return False
        data = self._stream.data(length)
        if header[1] == Op.WRITE and header[0] == length and not header[2] & RESENT:  # else it may have been done
            handle, offset, size, flags, *_ = wire.WRITE.unpack_from(self._buffer, _HEADER)
            if flags & wire.WRITE_CACHE and size == len(data) and self._stored(handle, offset, data):
                self._counts[Op.WRITE] += 1
                self.words[_RECEIVED] += length
                self._reply(header[2], wire.COUNT.pack(size, 0))
                self._stream.expect()
                return True
        self._stream.left = 0
        data.fetch()
        return False

    def _stored(self, handle: int, offset: int, data: Piped) -> bool:
        """Return True if all of it was stored. The usual path meets the same obstacle, and reports it."""
        try:
            self.operations.spare.expect()
            return self._requests.tree.write(handle, offset, data, stamp=False) == len(data)
        except Exception:
            return False

    def serve_timed(self) -> bool:
        """Serve a request likewise, and note how long that took."""
        HEADER.pack_into(self._buffer, 0, *_NOTHING)
        began = perf_counter_ns()
        there = self.serve()
        took, kind = perf_counter_ns() - began, HEADER.unpack_from(self._buffer)[1]
        if 0 < kind < counters.KINDS:
            counters.note(self.words, kind, took)
        return there

    def rest(self) -> None:
        """Do the work that waited until no request is there."""
        with contextlib.suppress(OSError, MemoryError):  # the notes stay, and no answer depends on them
            self._requests.tree.tell()

    def answer(self, header: Header, body: memoryview) -> None:
        """Serve a request that was read."""
        method = self._table.get(header[1])
        if method is None:
            self._reply_error(header[2], errno.ENOSYS)
            return
        try:
            found = method(header, body)
        except OSError as error:
            code = error.errno or errno.EIO
            if code == errno.ENOSPC and self.operations.may_forget():
                self._uncommitted(0)  # commits its changes, and clears what it cut, before others write there
                self._later(self._when_there_is_room, header, bytes(body))
                return
        except FUSEError as error:
            code = error.errno
        except (struct.error, ValueError):
            code = errno.EINVAL
        except MemoryError:
            self.operations.spare.let_go()
            code = errno.ENOMEM
        except Exception:
            log.exception("request %s of inode %d failed", header[1], header[3])
            code = errno.EIO
        else:
            kind = found.__class__
            if kind is bytes:
                self._reply(header[2], found)
            elif kind is int:
                self._reply_error(header[2], -found)
            elif kind is CoroutineType:
                self._later(self._when_it_is_done, header, found)
            elif found is not None:
                self._reply(header[2], found)
            else:
                self._uncommitted(header[2])
            return
        if header[1] not in _NAMELESS:
            self._reply_error(header[2], code)
        else:
            self._uncommitted(0)

    # -- after another daemon --------------------------------------------------------------------

    def resume(self, done: dict[int, int], *, suspect: bool, well: Callable[[], object]) -> None:
        """Make the kernel send again the requests that another daemon has read and not answered.

        The requests in `done` were done (see Journal), and are answered from their results. There is one such
        request, or several if a daemon died during a takeover, too: each daemon does others first. All other
        requests were not done. If they are `suspect` they are refused, because one of them may have killed the
        daemons before. `well` is called when all of them are answered.
        """
        self._well: Callable[[], object] | None = well
        self._done = {number | RESENT: made for number, made in done.items()}
        self._suspect, self._again = suspect, Again(self._requests)
        self.answer = self._answer_again  # type: ignore[method-assign]
        try:
            os.write(self.fd, wire.RESEND)
        except OSError as error:
            reason = "Linux 6.9 can send requests again, this kernel cannot" if error.errno == errno.EINVAL else error
            raise MachineError(f"cannot take a mount over: {reason}") from None

    def _answer_again(self, header: Header, body: memoryview) -> None:
        """Serve a request that may have been sent before."""
        number = header[2]
        found = self._again.answer(header, body, self._done[number]) if number in self._done else None
        if found is not None:
            self._reply(number, found)
        elif number & RESENT and self._suspect:
            self._send_error(number, errno.EIO)
        else:
            if not number & RESENT and self._well is not None:
                well, self._well = self._well, None
                well()
            Filter.answer(self, header, body)

    # -- answering later ------------------------------------------------------------------------

    def _later(self, work: Callable[..., Any], header: Header, what: Any) -> None:
        """Start a task that finishes a request that has to wait."""
        self.waiting += 1
        self._spawn(work, header, what)

    async def _when_there_is_room(self, header: Header, body: bytes) -> None:
        """Serve a request again that found no room, after the kernel has freed some."""
        try:
            await self.operations.wait_for_room()
        finally:
            self.waiting -= 1
            self.answer(header, memoryview(body))

    async def _when_it_is_done(self, header: Header, work: Any) -> None:
        """Answer with the result of a handler that waits."""
        try:
            found = await work
        except FUSEError as error:
            self._reply_error(header[2], error.errno)
        except trio.Cancelled:
            self._reply_error(header[2], errno.EIO)
            raise
        except OSError as error:
            self._reply_error(header[2], error.errno or errno.EIO)
        except MemoryError:
            self.operations.spare.let_go()
            self._reply_error(header[2], errno.ENOMEM)
        except Exception:
            log.exception("request %s of inode %d failed", header[1], header[3])
            self._reply_error(header[2], errno.EIO)
        else:
            self._reply(header[2], found)
        finally:
            self.waiting -= 1

    # -- replies --------------------------------------------------------------------------------

    def _reply(self, number: int, body: Any) -> None:
        """Answer with bytes, or several buffers."""
        try:
            self._commit(number)
        except (OSError, MemoryError) as error:
            if code := commit_again(self.operations, error, number):
                self._send_error(number, code)
                return
        try:
            if body.__class__ is bytes and len(body) < 4096:
                _write(self.fd, _pack(16 + len(body), 0, number) + body)
            else:
                self.words[_SENT] += os.writev(self.fd, (_pack(16 + len(body), 0, number), body))
        except OSError as error:
            if error.errno not in _NOT_AWAITED:
                log.warning("the kernel refuses a reply: %s", error.strerror)
                self._send_error(number, errno.EIO)

    def _reply_error(self, number: int, code: int) -> None:
        """Answer with an errno. A refused request may have changed something, too."""
        self._send_error(number, self._uncommitted(0) or code)

    def _uncommitted(self, number: int) -> int:
        """Commit the changes of the request with this number; return 0, or the errno if that fails."""
        try:
            self._commit(number)
        except (OSError, MemoryError) as error:
            return commit_again(self.operations, error, number)
        return 0

    def _send_error(self, number: int, code: int) -> None:
        try:
            _write(self.fd, _pack(16, -code, number))
        except OSError as error:
            if error.errno not in _NOT_AWAITED:
                log.warning("the kernel refuses an error: %s", error.strerror)
