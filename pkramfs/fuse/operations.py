# SPDX-License-Identifier: GPL-2.0-or-later
"""One method for each kind of request: from pyfuse3's words to the tree's and back.

Handlers are ordinary functions; `_request` makes the coroutine that pyfuse3 wants and the net below
it. They never wait, so each request is atomic and the answer may be a view of RAM or an object that
is used again for the next answer.

    OSError           its errno
    ENOSPC            once more, when the kernel has let go of what was just deleted (see below)
    anything else     EIO, the traceback in the daemon's log; the mount lives on

`rm big; cp other .` works on a full tmpfs. Here the memory of a deleted file comes back with the
kernel's FORGET, which it sends after other requests. So a request that found no room waits, bounded
and outside the handler, for the next FORGET while deleted inodes are left that nobody has open.

A write that did not fit whole is ENOSPC, not a short count: behind the writeback cache nobody reads
the count, and the rest would be lost in silence. The error reaches the program at close or fsync, if it
asks: the kernel keeps it with the inode (errseq). For those that do not ask the tree remembers what is lost.

References: an inode that is named in an answer to look-up, create, mknod, mkdir, symlink, link or
readdir (but for `.` and `..`) gets one `lookups`; the kernel gives them back with FORGET.

FLUSH, FSYNC and FSYNCDIR are answered ENOSYS once, and the kernel does not ask again: it has
written what is dirty before it asks, and RAM is as durable as this gets.

Kernel: fs/fuse/dir.c, fs/fuse/file.c, fs/fuse/readdir.c
"""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from pkramfs.fs.attributes import without_set_id
from pkramfs.fs.core import DIRECT, INO_MASK, WRITING
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import Inode
from pkramfs.fs.namespace import DOTDOT
from pkramfs.fs.tree import Tree
from pkramfs.fuse import doors
from pkramfs.fuse.translate import Asker, Translator

log = logging.getLogger(__name__)

_FORGET_SECONDS = 0.1
_ENOUGH = 1 << 60

P = ParamSpec("P")
T = TypeVar("T")


def _request(
    handler: Callable[Concatenate["Operations", P], T],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]:
    """Make a request handler of a function that raises OSError."""

    @functools.wraps(handler)
    async def request(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return handler(self, *args)  # type: ignore[call-arg]  # pyfuse3 names nothing
        except FUSEError:
            raise
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._may_forget():
                raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s%r failed", handler.__name__, _brief(args))
            raise FUSEError(errno.EIO) from None
        await self._wait_for_room()
        return await request(self, *args)  # type: ignore[call-arg]

    return request


def _waiting(
    handler: Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]:
    """The same net below a handler that waits, made of others that do not."""

    @functools.wraps(handler)
    async def request(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s%r failed", handler.__name__, _brief(args))
            raise FUSEError(errno.EIO) from None

    return request


def _brief(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments for the log, without file content."""
    return tuple(f"<{len(arg)} bytes>" if isinstance(arg, bytes) and len(arg) > 255 else arg for arg in args)


class Operations(pyfuse3.Operations):
    """The requests of one mount, answered by one tree.

    `ready` is called when the kernel has said INIT: from then on the mount answers. `writer_gone` is
    called after each close of a file that was open for writing, `data_lost` when a write-back was refused,
    `room` says how many pages are to be had. `generation` is what makes a file handle one of this tree:
    another tree has the same inode numbers.
    """

    supports_dot_lookup = True
    enable_writeback_cache = True
    enable_acl = True

    def __init__(self, tree: Tree, generation: int = 0) -> None:
        super().__init__()
        self.tree = tree
        self.ready: Callable[[], None] = _nothing
        self.writer_gone: Callable[[], None] = _nothing
        self.room: Callable[[], int] = lambda: _ENOUGH
        self.data_lost: Callable[[], None] = _nothing
        self.cache = doors.Cache()
        self._translate = Translator(tree, generation)
        self._entry = self._translate.entry
        self._root_entry = Translator(tree).entry  # of generation 0, as the kernel has made it: else it is stale
        self._opened = FileInfo(keep_cache=True)
        self._forgot: trio.Event | None = None
        self._hopeless: set[int] = set()
        self._direct: dict[int, int] = {}

    def _may_forget(self) -> bool:
        """Whether deleted inodes wait for nothing but a FORGET, and it is worth waiting, too."""
        orphans = self.tree.orphans
        if not orphans or self._hopeless == orphans.keys():
            return False
        return any(not inode.opens for inode, _ in orphans.values())

    async def _wait_for_room(self) -> None:
        """Until the kernel forgets something; if it does not, these orphans are not waited for again."""
        waited = set(self.tree.orphans)
        if self._forgot is None:
            self._forgot = trio.Event()
        with trio.move_on_after(_FORGET_SECONDS, shield=True) as waiting:  # or nobody would answer the request
            await self._forgot.wait()
        if waiting.cancelled_caught:
            self._hopeless = waited

    def init(self) -> None:
        self.ready()

    def drop_attributes(self) -> None:
        """Have the kernel ask for the attributes of every file again."""
        for inode in self.tree.inodes.values():
            if inode.lookups:
                self.cache.drop_attributes(inode.ino)

    def _named(self, inode: Inode) -> EntryAttributes:
        """The answer that gives the kernel a reference."""
        inode.lookups += 1
        return self._entry(inode)

    # -- names ----------------------------------------------------------------------------------

    @_request
    def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = self.tree.lookup(parent, name)
        if inode is self.tree.root:  # by `..`
            inode.lookups += 1
            return self._root_entry(inode)
        return self._translate.absent() if inode is None else self._named(inode)

    async def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        for number, count in inodes:
            try:
                self.tree.forget(number, count)
            except Exception:  # nobody waits for an answer; the others must be forgotten too
                log.exception("forget(%d, %d) failed", number, count)
        if self._forgot is not None:
            self._forgot.set()
            self._forgot = None

    @_request
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        return self._named(self.tree.mknod(parent, name, mode, rdev, ctx))

    @_request
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._named(self.tree.mkdir(parent, name, mode, ctx))

    @_request
    def symlink(self, parent: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._named(self.tree.symlink(parent, name, target, ctx))

    @_request
    def link(self, inode: int, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._named(self.tree.link(inode, parent, name))

    @_request
    def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self.tree.unlink(parent, name)

    @_request
    def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self.tree.rmdir(parent, name)

    @_request
    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: RequestContext
    ) -> None:
        self.tree.rename(parent, name, new_parent, new_name, flags, ctx)

    @_request
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self.tree.readlink(inode)

    # -- listing --------------------------------------------------------------------------------

    @_request
    def opendir(self, inode: int, ctx: RequestContext, flags: int = os.O_RDONLY) -> int:
        return self.tree.opendir(inode, flags)  # pyfuse3 does not pass on the flags

    @_request
    def readdir(self, handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        reply, entry = pyfuse3.readdir_reply, self._entry
        for name, inode, place in self.tree.readdir(handle, start):
            if not reply(token, name, entry(inode), place):
                return
            if place > 2 and name != DOTDOT:  # nor for `.`
                inode.lookups += 1

    @_request
    def releasedir(self, handle: int) -> None:
        pass

    # -- attributes -----------------------------------------------------------------------------

    @_request
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self.tree.inode(inode))

    @_request
    def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, handle: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if _only_times(fields):
            times = (
                attr.st_atime_ns if fields.update_atime else None,
                attr.st_mtime_ns if fields.update_mtime else None,
                attr.st_ctime_ns if fields.update_ctime else None,
            )
            return self._entry(self.tree.set_times(inode, *times))
        asker, known = Asker(ctx), self.tree.inode(inode)
        # A size without a time is a truncate to the same size: the kernel has not changed its times of the file.
        same = fields.update_size and not fields.update_mtime
        changed = self.tree.setattr(
            inode,
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else known.mtime if same else None,
            ctime=attr.st_ctime_ns if fields.update_ctime else known.ctime if same else None,
            caller=asker,
        )
        if changed.is_file and changed.mode & 0o6000 and ctx.uid and not _any(fields):
            mode = without_set_id(changed, asker) & 0o7777
            changed = self.tree.setattr(inode, mode=mode, ctime=changed.ctime, caller=asker)  # the write's is to come
        return self._entry(changed)

    @_request
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        return self._translate.statfs(self.tree.statfs(), self.room())

    @_waiting
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if not name.startswith(doors.EXTENTS):
            return self.tree.getxattr(inode, name)
        start = doors.parse_start(name)
        if self.tree.inode(inode).writers:
            await self.cache.drop(inode)  # what was not written back is no hole either
        return doors.listing(self.tree.extents(inode, start))

    @_request
    def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return self.tree.listxattr(inode, ctx)

    @_waiting
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        if name.startswith(doors.PREFIX):
            await self._order(inode, name, value)
        else:
            await self._setxattr(inode, name, value, ctx)

    @_request
    def _setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        self.tree.setxattr(inode, name, value, 0, Asker(ctx))

    async def _order(self, inode: int, name: bytes, value: bytes) -> None:
        """An attribute that is an order."""
        if name == doors.PUNCH:
            place = await self._range(inode, value)
            await self.cache.drop(inode)
            await self._punch(inode, *place)
            await self.cache.drop(inode)
        elif name == doors.ALLOCATE:
            await self._allocate(inode, *await self._range(inode, value))
            self.cache.drop_attributes(inode)
        elif name == doors.SPARSIFY:
            for first, last in await self._windows(inode):
                await self._sparsify(inode, first, last)
                await trio.lowlevel.checkpoint()
            self.cache.drop_attributes(inode)
        else:
            raise FUSEError(errno.EOPNOTSUPP)

    @_request
    def _range(self, inode: int, value: bytes) -> tuple[int, int]:
        offset, length = doors.parse_range(value)
        self.tree.file_range(inode, offset, length)
        return offset, length

    @_request
    def _punch(self, inode: int, offset: int, length: int) -> None:
        self.tree.punch(inode, offset, length)

    @_request
    def _allocate(self, inode: int, offset: int, length: int) -> None:
        self.tree.allocate(inode, offset, length, keep_size=True)

    @_request
    def _windows(self, inode: int) -> list[tuple[int, int]]:
        return list(doors.windows(self.tree.extents(inode)))

    @_request
    def _sparsify(self, inode: int, first: int, last: int) -> None:
        self.tree.sparsify(inode, first, last)

    @_request
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self.tree.removexattr(inode, name)

    # -- content --------------------------------------------------------------------------------

    @_request
    def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        handle = self.tree.open(inode, flags, Asker(ctx))
        self._count_direct(handle, 1)
        if handle & WRITING:
            self.cache.drop_attributes(inode)  # they are for ever, and from now on blocks come without a word
        return self._open(handle)

    def _open(self, handle: int) -> FileInfo:
        """The answer that a file is open, whose pages the kernel may keep."""
        opened = self._opened
        opened.fh = handle
        return opened

    @_request
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        inode = self.tree.create(parent, name, mode, ctx)
        handle = self.tree.open(inode.ino, flags & ~os.O_TRUNC, ctx)
        self._count_direct(handle, 1)
        opened = self._open(handle), self._named(inode)
        self._translate.guessed.discard(inode.ino)  # every close has the kernel ask for the blocks again
        return opened

    @_request
    def read(self, handle: int, offset: int, size: int) -> bytes:
        return cast(bytes, self.tree.read(handle, offset, size))  # or a view of RAM, which is sent as it is

    @_request
    def write(self, handle: int, offset: int, data: bytes, cached: bool | None = None) -> int:
        """Store what the kernel writes back (`cached`), or what a program writes directly, which is told at once.

        pyfuse3 does not say which; then it is direct if nobody but such programs can write to the file.
        """
        # With the writeback cache the kernel owns mtime and sends it when it has written back; a late
        # WRITE must not overwrite what it, or utimensat, has set before. It says, too, when a write takes
        # set-id bits away (setattr); the write-back of a mapping does not.
        written = 0
        try:
            written = self.tree.write(handle, offset, data, stamp=False)
            if written != len(data):
                raise fail(errno.ENOSPC)
        except OSError as error:
            if self._is_cached(handle) if cached is None else cached:
                self.tree.lose(handle, offset + written, offset + len(data), error.errno or errno.EIO)
                self.data_lost()
            raise
        return written

    def _is_cached(self, handle: int) -> bool:
        """Whether a WRITE may be a write-back."""
        number = handle & INO_MASK
        return not handle & DIRECT or self._direct.get(number) != self.tree.inode(number).writers

    @_request
    def release(self, handle: int) -> None:
        self.tree.release(handle)
        self._count_direct(handle, -1)
        if handle & WRITING:
            self._writer_gone(handle & INO_MASK)

    def _count_direct(self, handle: int, change: int) -> None:
        """Count those who can write to a file directly and not otherwise."""
        if handle & DIRECT and handle & WRITING:
            number = handle & INO_MASK
            self._direct[number] = self._direct.get(number, 0) + change
            if not self._direct[number]:
                del self._direct[number]

    def _writer_gone(self, number: int) -> None:
        inode = self.tree.inodes.get(number)
        if number in self._translate.guessed and (inode is None or not inode.writers):
            self._translate.guessed.discard(number)
            self.cache.drop_attributes(number)
        self.writer_gone()

    @_request
    def flush(self, handle: int) -> NoReturn:
        raise FUSEError(errno.ENOSYS)

    @_request
    def fsync(self, handle: int, datasync: bool) -> NoReturn:
        raise FUSEError(errno.ENOSYS)

    @_request
    def fsyncdir(self, handle: int, datasync: bool) -> NoReturn:
        raise FUSEError(errno.ENOSYS)


def _any(fields: SetattrFields) -> bool:
    """Whether a SETATTR sets anything. One that does not is the kernel's "somebody writes here who may not keep
    privileges": from root it is about capabilities, which the kernel removes itself, else about set-id bits."""
    return bool(
        fields.update_size
        or fields.update_mtime
        or fields.update_ctime
        or fields.update_atime
        or fields.update_mode
        or fields.update_uid
        or fields.update_gid
    )


def _only_times(fields: SetattrFields) -> bool:
    """Whether a SETATTR is what follows each write-back, and goes before each deletion: times and nothing else."""
    if fields.update_size or fields.update_mode or fields.update_uid or fields.update_gid:
        return False
    return bool(fields.update_ctime or fields.update_mtime or fields.update_atime)


def _nothing() -> None:
    """Nobody wants to know."""
