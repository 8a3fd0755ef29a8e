# SPDX-License-Identifier: GPL-2.0-or-later
"""Each kind of request: parse its bytes, call the handler of Operations, return the answer as bytes.

    header · body  ──▶  Operations.lookup(parent, name, who asks)  ──▶  the body of a reply

There is one method for each opcode. They make no decisions: Operations is the one class of handlers, for pyfuse3 as
well. The result of a method is written behind the header of a reply: bytes, a tuple of them, or
None where the kernel expects no reply. A handler that waits is a coroutine, and then so is the answer. A request that
is too short raises struct.error, and ValueError if a name in it has no end.

The opcodes that are missing in the table are answered ENOSYS, which the kernel remembers.

Kernel: fs/fuse/dir.c, fs/fuse/file.c, fs/fuse/readdir.c, fs/fuse/xattr.c
"""

import errno
import inspect
import os
import types
from collections.abc import Awaitable, Callable, Collection
from struct import Struct
from typing import Any, cast

from pkramfs.fs import acl, clock, protection
from pkramfs.fs.failure import fail
from pkramfs.fs.limits import INLINE_TARGET
from pkramfs.fs.ranges import MOST
from pkramfs.fs.rules import INO_MASK, UNNOTED, WRITING
from pkramfs.fuse import doors, wire
from pkramfs.fuse.brake import Brake
from pkramfs.fuse.operations import Operations
from pkramfs.fuse.replies import Replies
from pkramfs.fuse.translate import capable, status_fields, supplementary_groups
from pkramfs.fuse.wire import Header, Op
from pkramfs.units import pages

Answer = Any
"""bytes, a tuple of buffers, None, a negative errno, or a coroutine that returns bytes"""
Method = Callable[[Header, memoryview], Answer]

MAX_READ = 1 << 20
_GETFLAGS, _SETFLAGS, _FSGETXATTR, _FSSETXATTR = 0x80086601, 0x40086602, 0x801C581F, 0x401C5820
_XFLAGS = {protection.IMMUTABLE: 0x8, protection.APPEND: 0x10, protection.NOATIME: 0x40, protection.NODUMP: 0x80}
"""Flags of FS_IOC_GETFLAGS and of FS_IOC_FSGETXATTR."""
_USUAL = frozenset((b"security.capability\0", acl.ACCESS + b"\0", acl.DEFAULT + b"\0"))
"""What the kernel asks of each file before its first write, and of each that ls(1) lists: hardly one has it."""
_NO_DATA = -errno.ENODATA
_SECOND = 10**9
_STAMPED = wire.FATTR_MTIME | wire.FATTR_CTIME
_PUNCH_HOLE = 2
_UNKNOWN, _NOBODY = 0xFFFFFFFF, 65534


class Context:
    """The caller of a request, with the fields of pyfuse3.RequestContext.

    Where mounts may be idmapped, only requests that make an inode carry the caller's ids; for others /proc is read when
    a rule needs them. A caller that is gone never counts as root.
    """

    __slots__ = ("_gid", "_uid", "pid", "umask")

    def __init__(self, header: Header, umask: int = 0) -> None:
        self._uid, self._gid, self.pid = header[4], header[5], header[6]
        self.umask = umask

    @property
    def uid(self) -> int:
        """Return the user."""
        if self._uid == _UNKNOWN:
            self._uid, self._gid = _ids(self.pid)
        return self._uid

    @property
    def gid(self) -> int:
        """Return the group."""
        if self._gid == _UNKNOWN:
            self._uid, self._gid = _ids(self.pid)
        return self._gid

    @property
    def groups(self) -> Collection[int]:
        """Return the supplementary groups, read from /proc."""
        return supplementary_groups(self.pid)

    def capable(self, capability: int) -> bool:
        """Return True if the calling thread has a capability by /proc; if that cannot be read, if it is root."""
        return capable(self.pid, capability) if self.pid else self.uid == 0


def _ids(pid: int) -> tuple[int, int]:
    """Return the file system uid and gid of a process."""
    try:
        uids, gids = status_fields(pid, b"Uid", b"Gid")  # real, effective, saved, for files
        return uids[3], gids[3]
    except OSError:
        return _NOBODY, _NOBODY


class Requests:
    """The requests of one mount."""

    def __init__(self, operations: Operations) -> None:
        self.operations, self.tree = operations, operations.tree
        self._replies, self._listing = Replies(self.tree, operations.generation), bytearray(MAX_READ + 8)
        operations.answer_with(self._replies)
        self._brake = Brake(self.tree, operations, self._replies)
        operations.taking = self._brake.taking
        self._handlers = {name: _plain(getattr(operations, name)) for name in dir(operations) if _is_handler(name)}
        hot = self._handlers  # the hot ones are not looked up by name
        self._do_lookup, self._do_getattr = hot["lookup"], hot["getattr"]
        self._do_open, self._do_create, self._do_release = hot["open"], hot["create"], hot["release"]
        self._do_read, self._do_write, self._do_unlink = hot["read"], hot["write"], hot["unlink"]
        self.table: dict[int, Method] = {op.value: getattr(self, f"_{op.name.lower()}") for op in Op if _has(op.name)}

    def _do(self, name: str, *args: Any) -> Answer:
        return self._handlers[name](*args)

    # -- names ----------------------------------------------------------------------------------

    def _lookup(self, header: Header, body: memoryview) -> Answer:
        return self._do_lookup(header[3], first_name(body, 0), None)

    def _forget(self, header: Header, body: memoryview) -> Answer:
        self.operations.forgotten(((header[3], wire.NUMBER.unpack_from(body)[0]),))

    def _batch_forget(self, header: Header, body: memoryview) -> Answer:
        count, _ = wire.COUNT.unpack_from(body)
        size = wire.FORGET_ONE.size
        some = body[wire.COUNT.size : wire.COUNT.size + min(count, len(body) // size) * size]
        self.operations.forgotten(list(wire.FORGET_ONE.iter_unpack(some[: len(some) // size * size])))

    def _mknod(self, header: Header, body: memoryview) -> Answer:
        mode, rdev, umask, _ = wire.MKNOD.unpack_from(body)
        return self._do("mknod", header[3], first_name(body, wire.MKNOD.size), mode, rdev, Context(header, umask))

    def _mkdir(self, header: Header, body: memoryview) -> Answer:
        mode, umask = wire.MKDIR.unpack_from(body)
        return self._do("mkdir", header[3], first_name(body, wire.MKDIR.size), mode, Context(header, umask))

    def _symlink(self, header: Header, body: memoryview) -> Answer:
        name, target = _names(body, 0)
        count = 1 if len(target) >= INLINE_TARGET else 0
        return self._brake.taking(count, lambda: self._do("symlink", header[3], name, target, Context(header)))

    def _link(self, header: Header, body: memoryview) -> Answer:
        (inode,) = wire.NUMBER.unpack_from(body)
        return self._do("link", inode, header[3], first_name(body, wire.NUMBER.size), Context(header))

    def _unlink(self, header: Header, body: memoryview) -> Answer:
        self._do_unlink(header[3], first_name(body, 0), None)
        return b""

    def _rmdir(self, header: Header, body: memoryview) -> Answer:
        self._do("rmdir", header[3], first_name(body, 0), None)
        return b""

    def _rename(self, header: Header, body: memoryview) -> Answer:
        (folder,) = wire.RENAME.unpack_from(body)
        return self._move(header, folder, 0, _names(body, wire.RENAME.size))

    def _rename2(self, header: Header, body: memoryview) -> Answer:
        folder, flags, _ = wire.RENAME2.unpack_from(body)
        return self._move(header, folder, flags, _names(body, wire.RENAME2.size))

    def _move(self, header: Header, folder: int, flags: int, names: tuple[bytes, bytes]) -> Answer:
        name, new_name = names
        self._do("rename", header[3], name, folder, new_name, flags, Context(header))
        return b""

    def _readlink(self, header: Header, body: memoryview) -> Answer:
        return self._do("readlink", header[3], None)

    # -- listing --------------------------------------------------------------------------------

    def _opendir(self, header: Header, body: memoryview) -> Answer:
        return wire.OPENED.pack(self._do("opendir", header[3], None, wire.OPEN.unpack_from(body)[0]), 0, 0)

    def _readdirplus(self, header: Header, body: memoryview) -> Answer:
        handle, start, size, *_ = wire.READ.unpack_from(body)
        end = self._replies.listing(self._listing, min(size, MAX_READ), self.tree.readdir(handle, start))
        return bytes(memoryview(self._listing)[:end])

    def _readdir(self, header: Header, body: memoryview) -> Answer:
        handle, start, size, *_ = wire.READ.unpack_from(body)
        reply: list[bytes] = []
        room = min(size, MAX_READ)
        for name, inode, cookie in self.tree.readdir(handle, start):
            room -= wire.DIRENT.size + len(name) + -len(name) % 8
            if room < 0:
                break
            reply += (wire.DIRENT.pack(inode.ino, cookie, len(name), inode.mode >> 12), name, bytes(-len(name) % 8))
        return b"".join(reply)

    def _releasedir(self, header: Header, body: memoryview) -> Answer:
        self._do("releasedir", wire.HANDLE.unpack_from(body)[0])
        return b""

    # -- attributes -----------------------------------------------------------------------------

    def _getattr(self, header: Header, body: memoryview) -> Answer:
        flags, handle = wire.GETATTR.unpack_from(body)
        if flags & wire.GETATTR_FH and handle & WRITING:  # write(2) asks like this, but not fstat(2)
            before = self._brake.ask(header[3], header[6])
            if before is not None:
                return self._getattr_after(before, header[3])
            with self._brake.resting():
                return self._do_getattr(header[3], None)
        return self._do_getattr(header[3], None)

    async def _getattr_after(self, before: Awaitable[None], number: int) -> bytes:
        await before
        return cast(bytes, self._do_getattr(number, None))

    def _setattr(self, header: Header, body: memoryview) -> Answer:
        valid, mtime, ctime, mns, cns = wire.STAMP.unpack_from(body)
        if valid & ~wire.FATTR_FH == _STAMPED:  # after each write-back
            number = header[3] | WRITING if valid & wire.FATTR_FH else header[3]
            inode = self.tree.set_times(number, None, mtime * _SECOND + mns, ctime * _SECOND + cns)
            return self._replies.attributes(inode)
        valid, _, handle, size, _, atime, mtime, ctime, ans, mns, cns, mode, _, uid, gid, _ = wire.SETATTR.unpack_from(
            body
        )
        # Of the times of files the kernel does not say "now": it sends its own, as ctime and mtime alike.
        both_now = valid & wire.FATTR_MTIME_NOW or (valid & _STAMPED == _STAMPED and (mtime, mns) == (ctime, cns))
        now = clock.now() if valid & (wire.FATTR_ATIME_NOW | wire.FATTR_MTIME_NOW) else 0
        return self.operations.change(
            handle if valid & wire.FATTR_FH and handle & INO_MASK == header[3] else header[3],
            mode & 0o7777 if valid & wire.FATTR_MODE else None,
            uid if valid & wire.FATTR_UID else None,
            gid if valid & wire.FATTR_GID else None,
            size if valid & wire.FATTR_SIZE else None,
            _time(valid & wire.FATTR_ATIME, valid & wire.FATTR_ATIME_NOW, atime, ans, now),
            _time(valid & wire.FATTR_MTIME, valid & wire.FATTR_MTIME_NOW, mtime, mns, now),
            ctime * _SECOND + cns if valid & wire.FATTR_CTIME else None,
            Context(header),
            touch=bool(valid & wire.FATTR_ATIME_NOW and both_now),
        )

    def _statfs(self, header: Header, body: memoryview) -> Answer:
        return self._do("statfs", None)

    def _getxattr(self, header: Header, body: memoryview) -> Answer:
        inode = self.tree.inodes.get(header[3])
        if inode is not None and inode.xattrs is None and bytes(body[8:]) in _USUAL and inode.target is None:
            return _NO_DATA
        size, _ = wire.GETXATTR.unpack_from(body)
        name = first_name(body, wire.GETXATTR.size)
        if name.startswith((doors.EXTENTS, doors.SPARSIFY)):
            return _sized_later(self._do("getxattr", header[3], name, None), size)
        return _sized(self.tree.getxattr(header[3], name), size)

    def _listxattr(self, header: Header, body: memoryview) -> Answer:
        size, _ = wire.GETXATTR.unpack_from(body)
        names = self._do("listxattr", header[3], Context(header))
        return _sized(b"\0".join((*names, b"")), size)

    def _setxattr(self, header: Header, body: memoryview) -> Answer:
        size, flags = wire.SETXATTR.unpack_from(body)
        name = first_name(body, wire.SETXATTR.size)
        start = wire.SETXATTR.size + len(name) + 1
        value = bytes(body[start : start + size])
        if len(value) != size:
            raise ValueError("a value that is cut")
        if name.startswith(doors.PREFIX):
            return _empty(self._do("setxattr", header[3], name, value, Context(header)))
        self._do("_setxattr", header[3], name, value, Context(header), flags)
        return b""

    def _removexattr(self, header: Header, body: memoryview) -> Answer:
        self._do("removexattr", header[3], first_name(body, 0), None)
        return b""

    # -- content --------------------------------------------------------------------------------

    def _open(self, header: Header, body: memoryview) -> Answer:
        self._brake.glance()
        return self._do_open(header[3], wire.OPEN.unpack_from(body)[0], Context(header))

    def _create(self, header: Header, body: memoryview) -> Answer:
        self._brake.glance()
        flags, mode, umask, _ = wire.CREATE.unpack_from(body)
        opened, entry = self._do_create(
            header[3], first_name(body, wire.CREATE.size), mode, flags, Context(header, umask)
        )
        return entry + opened

    def _read(self, header: Header, body: memoryview) -> Answer:
        handle, offset, size, _, _, flags, _ = wire.READ.unpack_from(body)
        if flags & os.O_NOATIME:  # which fcntl(2) may have set since
            handle |= UNNOTED
        return self._do_read(handle, offset, min(size, MAX_READ))

    def _write(self, header: Header, body: memoryview) -> Answer:
        handle, offset, size, flags, *_ = wire.WRITE.unpack_from(body)
        data = body[wire.WRITE.size :]
        if len(data) != size:
            raise ValueError("data that are cut")
        return wire.COUNT.pack(self._do_write(handle, offset, data, bool(flags & wire.WRITE_CACHE)), 0)

    def _release(self, header: Header, body: memoryview) -> Answer:
        self._do_release(wire.HANDLE.unpack_from(body)[0])
        return b""

    def _flush(self, header: Header, body: memoryview) -> Answer:
        return _empty(self._do("flush", wire.HANDLE.unpack_from(body)[0]))

    def _fsync(self, header: Header, body: memoryview) -> Answer:
        handle, flags, _ = wire.FSYNC.unpack_from(body)
        return _empty(self._do("fsync", handle, bool(flags & 1)))

    def _fsyncdir(self, header: Header, body: memoryview) -> Answer:
        handle, flags, _ = wire.FSYNC.unpack_from(body)
        return _empty(self._do("fsyncdir", handle, bool(flags & 1)))

    # -- what pyfuse3 has no request for ----------------------------------------------------------

    def _tmpfile(self, header: Header, body: memoryview) -> Answer:
        flags, mode, umask, _ = wire.CREATE.unpack_from(body)
        opened, entry = self._do("tmpfile", header[3], mode, flags, Context(header, umask))
        return entry + opened

    def _fallocate(self, header: Header, body: memoryview) -> Answer:
        handle, offset, length, mode, _ = wire.FALLOCATE.unpack_from(body)

        def act() -> Answer:
            self._do("fallocate", handle, mode, offset, length, header[6])
            return b""

        return act() if mode & _PUNCH_HOLE else self._brake.taking(pages(length) + 1, act)

    def _lseek(self, header: Header, body: memoryview) -> Answer:
        handle, offset, whence, _ = wire.LSEEK.unpack_from(body)
        if self.tree.inode(handle).writers:
            return _packed(wire.NUMBER, self._do("seek_behind_writers", handle, offset, whence))
        return wire.NUMBER.pack(self._do("seek", handle, offset, whence))

    def _copy_file_range(self, header: Header, body: memoryview) -> Answer:
        return self._copied(body, lambda count: wire.COUNT.pack(count, 0))

    def _copy_file_range_64(self, header: Header, body: memoryview) -> Answer:
        return self._copied(body, wire.NUMBER.pack)

    def _copied(self, body: memoryview, pack: Callable[[int], bytes]) -> Answer:
        source, offset, _, target, place, length, _ = wire.COPY.unpack_from(body)
        return self._brake.taking(
            pages(min(length, MOST)) + 1,
            lambda: pack(cast(int, self._do("copy", source, offset, target, place, length))),
        )

    def _statx(self, header: Header, body: memoryview) -> Answer:
        return self._replies.statx(self.tree.inode(header[3]))

    def _ioctl(self, header: Header, body: memoryview) -> Answer:
        """Serve FS_IOC_GETFLAGS and its like; the kernel makes ENOTTY of ENOSYS."""
        _, _, command, _, _, _ = wire.IOCTL.unpack_from(body)
        argument, inode, done = body[wire.IOCTL.size :], self.tree.inode(header[3]), wire.IOCTL_DONE.pack(0, 0, 0, 0)
        if command == _GETFLAGS:
            return done + wire.FLAGS.pack(inode.flags)
        if command == _FSGETXATTR:
            return done + wire.FSXATTR.pack(_translated(inode.flags, _XFLAGS), 0, 0, 0, 0)
        if command == _SETFLAGS:
            self._do("set_flags", inode.ino, wire.FLAGS.unpack_from(argument)[0])
            return done
        if command == _FSSETXATTR:
            flags, *others = wire.FSXATTR.unpack_from(argument)
            if any(others[:1] + others[2:]) or flags & ~sum(_XFLAGS.values()):
                raise fail(errno.EOPNOTSUPP)
            self._do("set_flags", inode.ino, _translated(flags, {new: old for old, new in _XFLAGS.items()}))
            return done
        raise fail(errno.ENOSYS)

    def _destroy(self, header: Header, body: memoryview) -> Answer:
        return b""


def _translated(flags: int, table: dict[int, int]) -> int:
    """Translate flags into other bits."""
    return sum(new for old, new in table.items() if flags & old)


def _packed(struct: Struct, waiting: Answer) -> Answer:
    """Return an awaitable answer that packs a number."""

    async def pack() -> bytes:
        return struct.pack(await waiting)

    return pack()


def _has(name: str) -> bool:
    return hasattr(Requests, f"_{name.lower()}")


def _is_handler(name: str) -> bool:
    return callable(getattr(Operations, name, None)) and not name.startswith("__")


def _plain(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return the plain function below a handler; return a handler that really waits as it is."""
    function = getattr(handler, "__wrapped__", None)
    if function is None or inspect.iscoroutinefunction(function):
        return handler
    return types.MethodType(function, cast(Any, handler).__self__)


def first_name(body: memoryview, start: int) -> bytes:
    """Return the name that begins there."""
    tail = bytes(body[start:] if start else body)
    return tail[: tail.index(0)]


def _names(body: memoryview, start: int) -> tuple[bytes, bytes]:
    """Return the two names, one behind the other."""
    first, second, _ = bytes(body[start:]).split(b"\0", 2)
    return first, second


def _time(given: int, now_given: int, seconds: int, nanoseconds: int, now: int) -> int | None:
    """Return a time of SETATTR in nanoseconds, None if it stays."""
    if not given and not now_given:
        return None
    return now if now_given else seconds * _SECOND + nanoseconds


def _sized(value: bytes, size: int) -> bytes:
    """Return a value to a caller with room for `size` bytes; to one with 0 its length."""
    if not size:
        return wire.COUNT.pack(len(value), 0)
    if len(value) > size:
        raise fail(errno.ERANGE)
    return value


async def _sized_later(waiting: Any, size: int) -> bytes:
    """Return `_sized` of an awaitable value."""
    return _sized(await waiting, size)


def _empty(waiting: Answer) -> Answer:
    """Return an empty answer (success), perhaps an awaitable one."""
    return _emptied(waiting) if inspect.iscoroutine(waiting) else b""


async def _emptied(waiting: Any) -> bytes:
    await waiting
    return b""
