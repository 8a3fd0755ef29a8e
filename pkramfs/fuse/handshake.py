# SPDX-License-Identifier: GPL-2.0-or-later
"""INIT: kernel and daemon agree on features, which this module chooses instead of libfuse.

    kernel ──INIT──▶ read it, choose, answer ──▶ kernel
                          │
                          └─ the same INIT, through a socket pair ─▶ libfuse
                                        its answer is dropped; from then on it reads /dev/fuse

libfuse and pyfuse3 do not let a file system choose all features of FUSE. These are chosen here:

    HANDLE_KILLPRIV_V2   the kernel need not ask for security.capability before each write
                         (20 times the speed of small cached writes)
    DONT_MASK            the daemon applies the umask, except where a default ACL replaces it
    CACHE_SYMLINKS       a link's target is asked for once
    PARALLEL_DIROPS      look-ups in one directory do not wait for each other

and no AUTO_INVAL_DATA: only the kernel changes files, so its pages stay valid.

Nor ASYNC_DIO. With it the kernel drops cached pages before an asynchronous O_DIRECT write (libaio, io_uring), but not
again when the write is done. A page that another process reads meanwhile stays in the cache with the old data, and the
next buffered write of one byte writes the stale page over the direct write. Without the feature the kernel waits for
each such write, as for a synchronous one, and then drops the pages again.

`Operations.init` is called while libfuse works on its INIT, before anything else is read: there
the real descriptor takes the place of the socket, by dup2. (Later would be too late: trio would go on
waiting for the socket.) libfuse's answer then reaches the kernel with a number that it never gave,
and is dropped. The same way a new daemon can take over the connection of an old one.

Kernel: fs/fuse/inode.c (fuse_send_init, process_init_reply), fs/fuse/file.c (fuse_aio_complete),
        mm/filemap.c (generic_file_direct_write), include/uapi/linux/fuse.h
"""

import os
import socket
import struct
from typing import NamedTuple

from pkramfs.errors import MachineError

FUSE_INIT = 26
MAJOR, MINOR = 7, 36
"""The protocol that we speak: old enough for every libfuse 3.10 and later."""
MAX_PAGES = 255
"""Pages of a request: one less than fit a pipe of a MiB, see stream."""
MAX_WRITE = MAX_PAGES << 12
MAX_BACKGROUND = 64

ASYNC_READ, ATOMIC_O_TRUNC, EXPORT_SUPPORT, BIG_WRITES, DONT_MASK = 1 << 0, 1 << 3, 1 << 4, 1 << 5, 1 << 6
DO_READDIRPLUS, WRITEBACK_CACHE, PARALLEL_DIROPS = 1 << 13, 1 << 16, 1 << 18
POSIX_ACL, MAX_PAGES_FLAG, CACHE_SYMLINKS = 1 << 20, 1 << 22, 1 << 23
HANDLE_KILLPRIV_V2, INIT_EXT = 1 << 28, 1 << 30
HAS_RESEND = 1 << 7
"""Of the second word: the kernel (Linux 6.9) can send again what was not answered. It does so unasked, too."""
ALLOW_IDMAP = 1 << 8
"""Of the second word: only requests that make something say who asks, and mounts may be idmapped."""

NEEDED = ATOMIC_O_TRUNC | BIG_WRITES | DONT_MASK | DO_READDIRPLUS | WRITEBACK_CACHE | MAX_PAGES_FLAG
WANTED = NEEDED | ASYNC_READ | EXPORT_SUPPORT | PARALLEL_DIROPS | POSIX_ACL | CACHE_SYMLINKS
WANTED |= HANDLE_KILLPRIV_V2
"""Kernels before 5.11 lack the last: without it, and without its forerunner, they drop set-id bits themselves."""

_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extension, padding
_INIT = struct.Struct("<IIII")  # major, minor, max_readahead, flags; then what later kernels added
_INIT_REST = 48
_REPLY = struct.Struct("<IiQ")  # length, error, unique
_INIT_REPLY = struct.Struct("<IIIIHHIIHHII24x")
_ROOM = 1 << 17


class Init(NamedTuple):
    """The kernel's INIT request."""

    unique: int
    minor: int
    max_readahead: int
    flags: int
    more: int = 0
    """Features that need INIT_EXT."""


def read_init(fd: int) -> Init:
    """Return the first request of a new connection."""
    request = os.read(fd, _ROOM)
    _, opcode, unique, *_ = _HEADER.unpack_from(request)
    major, minor, readahead, flags = _INIT.unpack_from(request, _HEADER.size)
    if opcode != FUSE_INIT or major != MAJOR:
        raise MachineError(f"/dev/fuse speaks another protocol: request {opcode}, version {major}.{minor}")
    missing = NEEDED & ~flags
    if missing:
        raise MachineError(f"this kernel's FUSE ({major}.{minor}) is too old: it lacks features {missing:#x}")
    place = _HEADER.size + _INIT.size
    more = int.from_bytes(request[place : place + 4], "little") if flags & INIT_EXT else 0
    return Init(unique, minor, readahead, flags, more)


def choose(offered: int) -> int:
    """Return the features to use, of those that the kernel offers."""
    return offered & WANTED


def answer(init: Init, wanted: int = 0) -> bytes:
    """Return the reply to the kernel; `wanted` are features of the second word."""
    more = wanted & init.more if init.flags & INIT_EXT else 0
    body = _INIT_REPLY.pack(
        MAJOR,
        min(MINOR, init.minor),
        init.max_readahead,
        choose(init.flags) | (INIT_EXT if more else 0),
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        MAX_WRITE,
        1,  # nanoseconds
        MAX_PAGES,
        0,
        more,
        0,
    )
    return _REPLY.pack(_REPLY.size + len(body), 0, init.unique) + body


def request(init: Init) -> bytes:
    """Return an INIT for libfuse as the kernel would send it."""
    body = _INIT.pack(MAJOR, min(MINOR, init.minor), init.max_readahead, init.flags & ~INIT_EXT) + bytes(_INIT_REST)
    return _HEADER.pack(_HEADER.size + len(body), FUSE_INIT, 1, 0, 0, 0, 0, 0, 0) + body


class Handshake:
    """Between the mount and the first request: `fd` is for libfuse, until `complete`."""

    def __init__(self, device: int, wanted: int = 0) -> None:
        init = read_init(device)
        os.write(device, answer(init, wanted))
        self._introduce(device, init)

    @classmethod
    def again(cls, device: int, init: Init) -> "Handshake":
        """Return a Handshake for a connection on which another process has already answered INIT."""
        one = cls.__new__(cls)
        one._introduce(device, init)
        return one

    def _introduce(self, device: int, init: Init) -> None:
        """Send INIT to libfuse."""
        self.device, self.init = device, init
        theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._ours.send(request(init))
        self.fd = theirs.detach()

    def complete(self) -> None:
        """Put the device in the socket's place. Call it from Operations.init."""
        os.set_blocking(self.device, False)
        os.dup2(self.device, self.fd, inheritable=False)
        os.close(self.device)
        self.device = -1
        self._ours.close()
