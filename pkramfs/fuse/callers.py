# SPDX-License-Identifier: GPL-2.0-or-later
"""The system call in which a thread waits for an answer, read from /proc, because FUSE does not tell.

A thread that waits for the daemon is inside a system call, and /proc/PID/syscall shows the call with its arguments.
/proc/PID/fdinfo shows the position of the file, and whether it is open to append. Neither changes while the thread
waits: other threads that use the same descriptor wait for the same lock.

The answer is None if it cannot be known: the thread has ended or is in another pid namespace, Yama or the rights of
another user forbid the access, or the call has no place or length of its own (io_uring, splice, asynchronous I/O).

Kernel: fs/proc/base.c (proc_pid_syscall, proc_pid_schedstat), fs/proc/fd.c (seq_show), include/uapi/linux/fs.h
(RWF_APPEND)
"""

import errno
import os
import struct

_MACHINE = os.uname().machine
_READING = {
    "x86_64": {0, 8, 17, 19, 295, 327},
    "aarch64": {62, 63, 65, 67, 69, 286},
}.get(_MACHINE, set())
"""The numbers of lseek, read, readv, pread64, preadv and preadv2 (asm/unistd.h)."""
_WRITE, _PWRITE, _WRITEV, _PWRITEV, _PWRITEV2 = {
    "x86_64": (1, 18, 20, 296, 328),
    "aarch64": (64, 68, 66, 70, 287),
}.get(_MACHINE, (-2,) * 5)
_RWF_APPEND = 0x10
_LARGEST = 0x7FFFF000
"""Bytes that one call writes at most (MAX_RW_COUNT)."""
_VECTORS = 1024
_BIT63 = 1 << 63


class Call:
    """A call that writes `count` bytes, 0 if it only reads."""

    __slots__ = ("_append", "_fd", "_pid", "_start", "count")

    def __init__(self, pid: int, fd: int = -1, count: int = 0, start: int | None = None, *, append: bool = False):
        self._pid, self._fd, self._start, self._append = pid, fd, start, append
        self.count = count

    def place(self, size: int | None) -> int | None:
        """Return the offset of the bytes in a file of that size; None if it cannot be read, or `size` is not known."""
        try:
            with open(f"/proc/{self._pid}/fdinfo/{self._fd}", "rb", buffering=0) as file:
                _, position, _, flags, *_ = file.read(64).split()
        except (OSError, ValueError):
            return None
        if self._append or int(flags, 8) & os.O_APPEND:
            return size
        return int(position) if self._start is None else self._start


def look(pid: int) -> Call | None:
    """Return the call of a thread; raise BlockingIOError while it has not begun to wait."""
    try:
        with open(f"/proc/{pid}/syscall", "rb", buffering=0) as file:
            number, *words = file.read(256).split()
    except (OSError, ValueError):  # ValueError: the thread has just ended
        return None
    if number == b"running":
        raise BlockingIOError(errno.EAGAIN, "it is running", f"/proc/{pid}/syscall")
    arguments = [int(word, 16) for word in words]
    return _understood(pid, int(number), arguments)


def run_time(pid: int) -> int | None:
    """Return the nanoseconds for which a thread has run; None if it has ended, or the kernel does not count them."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb", buffering=0) as file:
            return int(file.read(64).split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _understood(pid: int, number: int, arguments: list[int]) -> Call | None:
    """Return the call of that number."""
    if number in _READING:
        return Call(pid)
    if number not in (_WRITE, _PWRITE, _WRITEV, _PWRITEV, _PWRITEV2):
        return None
    fd, buffer, length, start, _, flags = arguments[:6]
    count = length if number in (_WRITE, _PWRITE) else _vector(pid, buffer, length)
    if count is None:
        return None
    placed = number not in (_WRITE, _WRITEV) and not (number == _PWRITEV2 and start & _BIT63)  # -1: current
    append = number == _PWRITEV2 and bool(flags & _RWF_APPEND)
    return Call(pid, fd & 0xFFFFFFFF, min(count, _LARGEST), start if placed else None, append=append)


def _vector(pid: int, buffer: int, length: int) -> int | None:
    """Return the bytes of a vector of buffers (iovec); None if it cannot be read."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            raw = os.pread(file.fileno(), min(length, _VECTORS) * 16, buffer)
        return sum(size for _, size in struct.iter_unpack("=QQ", raw)) if len(raw) == length * 16 else None
    except (OSError, OverflowError, struct.error):
        return None
