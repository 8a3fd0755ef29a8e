# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl punch, allocate, sparsify, extents: holes in files on a mount.

Write permission for the file is enough; no machine is needed. Operations that fallocate(2) can do on the mount are left
to it. Where it cannot (fuse=pyfuse3), and for the rest, orders go through extended attributes (fuse/doors.py), so a
file on another file system is refused before it is given one.

Kernel: fallocate(2), lseek(2) SEEK_DATA, fallocate(1) --dig-holes
"""

import argparse
import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator

from pkramfs.cli import arguments, render
from pkramfs.cli.render import Column
from pkramfs.errors import ErrnoError, UsageError
from pkramfs.units import PAGE_SIZE, format_size, plural

_PREFIX = b"user.pkramfs."
_NOT_OURS = (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_BLOCK = 512
"""Bytes that st_blocks counts by."""


def act_punch(args: argparse.Namespace) -> None:
    """Run `pkramctl punch FILE OFFSET LENGTH`."""
    fd = _open(args.file, os.O_RDWR)
    try:
        os.fsync(fd)  # so that the daemon need not wait for the kernel's writing back
        before = os.fstat(fd).st_blocks
        if not _allocated(fd, args.file, _PUNCH_HOLE | _KEEP_SIZE, args):
            _order(fd, args.file, b"punch", b"%d:%d" % (args.offset, args.length))
            _touch(fd)
        _say(args, args.file, before - os.fstat(fd).st_blocks, "given back")
    finally:
        os.close(fd)


def act_allocate(args: argparse.Namespace) -> None:
    """Run `pkramctl allocate FILE OFFSET LENGTH [--keep-size]`."""
    with contextlib.suppress(OSError):  # _open says why
        before = os.stat(args.file)  # a file that is open for writing counts one page at least
    fd = _open(args.file, os.O_RDWR)
    try:
        if not _allocated(fd, args.file, _KEEP_SIZE if args.keep_size else 0, args):
            _order(fd, args.file, b"allocate", b"%d:%d" % (args.offset, args.length))
            end = args.offset + args.length
            if end > before.st_size and not args.keep_size:
                os.ftruncate(fd, end)  # the kernel owns the size of a file that it caches
            _touch(fd)
        _say(args, args.file, os.fstat(fd).st_blocks - before.st_blocks, "allocated")
    finally:
        os.close(fd)


def act_sparsify(args: argparse.Namespace) -> None:
    """Run `pkramctl sparsify PATH…`."""
    files = pages = 0
    for path in args.paths:
        for file in _files(path):
            fd = _open(file, os.O_RDWR)
            try:
                os.fsync(fd)  # the daemon sees only data that were written back
                files, pages = files + 1, pages + _sparsified(fd, file)
            finally:
                os.close(fd)
    _say(args, plural(files, "file"), pages * PAGE_SIZE // _BLOCK, "of zeros given back")


def _sparsified(fd: int, path: str) -> int:
    """Make holes of a file's zeros, and return how many pages that were. One that has none does not change."""
    try:
        return int(os.getxattr(fd, _PREFIX + b"sparsify"))
    except OSError as error:
        raise ErrnoError(f"{path}: {os.strerror(error.errno or 0)}", error.errno) from None


def act_extents(args: argparse.Namespace) -> None:
    """Run `pkramctl extents FILE`."""
    fd = _open(args.file, os.O_RDONLY)
    try:
        os.fsync(fd)
        found = list(_extents(fd))
    finally:
        os.close(fd)
    if arguments.wants_json(args):
        render.emit_json([{"offset": offset, "length": length} for offset, length in found])
    elif found:
        render.table([Column("OFFSET", figures=True), Column("LENGTH", figures=True)], found)
    else:
        render.say(f"{args.file} is one hole")


def _open(path: str, flags: int) -> int:
    """Open a regular file on a pkramfs mount; raise UsageError for anything else."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UsageError(f"{path} is not a regular file")
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.getxattr(fd, _PREFIX + b"extents")
    except OSError as error:
        os.close(fd)
        if error.errno in _NOT_OURS:
            raise UsageError(f"{path} is not on a pkramfs mount: use fallocate(1)") from None
        raise
    return fd


def _allocated(fd: int, path: str, mode: int, args: argparse.Namespace) -> bool:
    """Call fallocate(2); return False if the mount has none."""
    from pkramfs.mounting import syscalls

    try:
        syscalls.fallocate(fd, mode, args.offset, args.length)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise ErrnoError(f"{path}: {os.strerror(error.errno or 0)}", error.errno) from None
    return True


def _order(fd: int, path: str, what: bytes, value: bytes) -> None:
    try:
        os.setxattr(fd, _PREFIX + what, value)
    except OSError as error:
        raise ErrnoError(f"{path}: {os.strerror(error.errno or 0)}", error.errno) from None


def _touch(fd: int) -> None:
    """Set the times of a modified file, through the kernel, which owns the times of a file that it caches."""
    try:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, time.time_ns()))
    except PermissionError:
        os.utime(fd)  # a user with write permission who is not the owner may set both to now


def _files(path: str) -> Iterator[str]:
    """Yield a file, or all regular files below a directory on the same mount."""
    if not os.path.isdir(path):
        yield path
        return
    device = os.stat(path).st_dev
    for directory, names, files in os.walk(path, onerror=_raise):
        names[:] = [name for name in sorted(names) if os.lstat(os.path.join(directory, name)).st_dev == device]
        for name in sorted(files):
            place = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(place).st_mode):
                yield place


def _raise(error: OSError) -> None:
    raise error


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Yield all extents; an attribute holds some thousands at a time."""
    start = 0
    while True:
        lines = os.getxattr(fd, _PREFIX + b"extents.%d" % start).split()
        for line in lines:
            offset, _, length = line.partition(b":")
            yield int(offset), int(length)
            start = int(offset) + int(length)
        if not lines:
            return


def _say(args: argparse.Namespace, what: str, blocks: int, done: str) -> None:
    if arguments.wants_json(args):
        render.emit_json({"bytes": blocks * _BLOCK})
    else:
        render.say(f"{what}: {format_size(max(blocks, 0) * _BLOCK)} {done}")
