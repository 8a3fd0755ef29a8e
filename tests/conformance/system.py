# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls that Python's library lacks, raising OSError as its own do."""

import ctypes
import mmap
import os
import struct

AT_FDCWD = -100
AT_EMPTY_PATH, AT_SYMLINK_FOLLOW, AT_SYMLINK_NOFOLLOW = 0x1000, 0x400, 0x100
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT = 1, 2, 8, 16, 32
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
_libc.telldir.restype = ctypes.c_long
for _name, _types in {
    "fallocate": (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long),
    "telldir": (ctypes.c_void_p,),
    "readdir": (ctypes.c_void_p,),
    "closedir": (ctypes.c_void_p,),
    "rewinddir": (ctypes.c_void_p,),
    "seekdir": (ctypes.c_void_p, ctypes.c_long),
}.items():
    getattr(_libc, _name).argtypes = _types


def _bytes(path: str | bytes) -> bytes:
    return os.fsencode(path)


def _check(result: int) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def renameat2(old: str | bytes, new: str | bytes, flags: int) -> None:
    _check(_libc.renameat2(AT_FDCWD, _bytes(old), AT_FDCWD, _bytes(new), ctypes.c_uint(flags)))


def linkat(fd: int, old: str | bytes, new: str | bytes, flags: int) -> None:
    _check(_libc.linkat(fd, _bytes(old), AT_FDCWD, _bytes(new), flags))


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    _check(_libc.fallocate(fd, mode, offset, size))


def utimensat(path: str | bytes, access: tuple[int, int], change: tuple[int, int], flags: int = 0) -> None:
    """Times as (seconds, nanoseconds), UTIME_NOW and UTIME_OMIT included."""
    times = (ctypes.c_long * 4)(*access, *change)
    _check(_libc.utimensat(AT_FDCWD, _bytes(path), times, flags))


def keep_capabilities(mask: int) -> None:
    """Have these capabilities of those that are permitted, and no others."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, sets))
    low, high = sets[1] & mask & 0xFFFFFFFF, sets[4] & mask >> 32
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)))


def keep_over_setuid(keep: bool) -> None:
    """Have the next setuid(2) from root leave capabilities permitted (PR_SET_KEEPCAPS)."""
    _check(_libc.prctl(8, int(keep), 0, 0, 0))


def syncfs(fd: int) -> None:
    _check(_libc.syncfs(fd))


def sync_file_range(fd: int, offset: int, size: int, flags: int) -> None:
    _check(_libc.sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(size), flags))


def readahead(fd: int, offset: int, size: int) -> None:
    _check(_libc.readahead(fd, ctypes.c_long(offset), ctypes.c_long(size)))


def name_to_handle_at(path: str | bytes) -> bytes:
    """A struct file_handle."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 8 + 128)
    mount_id = ctypes.c_int()
    _check(_libc.name_to_handle_at(AT_FDCWD, _bytes(path), buffer, ctypes.byref(mount_id), 0))
    return buffer.raw


def open_by_handle_at(fd: int, handle: bytes, flags: int) -> int:
    return _check(_libc.open_by_handle_at(fd, handle, flags))


def inotify_init() -> int:
    return _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add_watch(fd: int, path: str | bytes, events: int) -> int:
    return _check(_libc.inotify_add_watch(fd, _bytes(path), events))


def statx(path: str | bytes, flags: int) -> list[str]:
    """The fields' mask, attributes and which of them are meant, in hex."""
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.statx(AT_FDCWD, _bytes(path), flags, 0xFFF, buffer))
    mask, _, attributes = struct.unpack_from("<IIQ", buffer)
    return [hex(number) for number in (mask, attributes, struct.unpack_from("<Q", buffer, 56)[0])]


def mount(source: str, target: str, fstype: str, data: str, flags: int = 0) -> None:
    _check(_libc.mount(_bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data)))


def umount(target: str) -> None:
    _check(_libc.umount2(_bytes(target), 0))


def getdents(fd: int, size: int = 1 << 16) -> list[tuple[int, bytes]]:
    """(d_off, d_name) of the entries that one call gives."""
    buffer = ctypes.create_string_buffer(size)
    end, at, found = _check(_libc.syscall(217, fd, buffer, size)), 0, []
    data = buffer.raw[:end]
    while at < end:
        _, place, length, _ = struct.unpack_from("<QqHB", data, at)
        found.append((place, data[at + 19 : at + length].split(b"\0")[0]))
        at += length
    return found


class DirStream:
    """opendir(3) with its places."""

    def __init__(self, path: str) -> None:
        self._stream = _libc.opendir(_bytes(path))
        _check(0 if self._stream else -1)

    def read(self) -> bytes | None:
        found = _libc.readdir(self._stream)
        return None if not found else ctypes.string_at(found + 19)

    def rest(self) -> list[bytes]:
        return list(iter(self.read, None))

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, place: int) -> None:
        _libc.seekdir(self._stream, place)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        _libc.closedir(self._stream)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL as the kernel wants it: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


class Aio:
    """An asynchronous write as libaio makes it."""

    _SETUP, _DESTROY, _EVENTS, SUBMIT = (206, 207, 208, 209) if os.uname().machine == "x86_64" else (0, 1, 4, 2)
    _PWRITE = 1

    def __init__(self) -> None:
        self._context = ctypes.c_ulong()
        _check(_libc.syscall(self._SETUP, 1, ctypes.byref(self._context)))

    def submit(self, fd: int, content: mmap.mmap) -> None:
        """Begin to write to the start of a file."""
        at = ctypes.addressof(ctypes.c_char.from_buffer(content))
        block = struct.pack("<QIIHhIQQqQII", 0, 0, 0, self._PWRITE, 0, fd, at, len(content), 0, 0, 0, 0)
        table = ctypes.byref(ctypes.c_char_p(block))
        _check(_libc.syscall(self.SUBMIT, self._context, ctypes.c_long(1), table))

    def wait(self) -> int:
        """What the write has returned."""
        event = ctypes.create_string_buffer(32)
        _check(_libc.syscall(self._EVENTS, self._context, ctypes.c_long(1), ctypes.c_long(1), event, None))
        return int(struct.unpack_from("<q", event, 16)[0])

    def close(self) -> None:
        _check(_libc.syscall(self._DESTROY, self._context))
