# SPDX-License-Identifier: GPL-2.0-or-later
"""One method for each kind of request, from pyfuse3's arguments to the tree's and back.

Handlers are ordinary functions; net.request makes the coroutine that pyfuse3 wants and the net below
it. They never wait, so each request is atomic and the answer may be a view of RAM or an object that
is used again for the next answer.

`rm big; cp other .` works on a full tmpfs. Here the memory of a deleted file is freed by the kernel's
FORGET, which it sends after other requests. So a request that found no room waits, for a limited time and
outside the handler, for the next FORGET, as long as there are deleted inodes that no program has open.

A write that does not fit whole fails with ENOSPC instead of a short count: behind the writeback cache no
program reads the count, and the rest would be lost silently. A program that calls close or fsync gets the
error, which the kernel keeps with the inode (errseq). For other programs the tree records the loss.

References: an inode that is named in an answer to look-up, create, mknod, mkdir, symlink, link or
readdir (but for `.` and `..`) is remembered by the tree; the kernel gives that back with FORGET.

FLUSH, FSYNC and FSYNCDIR are answered ENOSYS once, and the kernel does not ask again: it has
written what is dirty before it asks, and RAM is as durable as this gets.

Kernel: fs/fuse/dir.c, fs/fuse/file.c, fs/fuse/readdir.c
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from pkramfs.fs.failure import fail
from pkramfs.fs.inode import ROOT, Inode
from pkramfs.fs.namespace import DOTDOT
from pkramfs.fs.rules import DIRECT, INO_MASK, WRITING
from pkramfs.fs.tree import Tree
from pkramfs.fuse import doors
from pkramfs.fuse.memory import Spare
from pkramfs.fuse.net import commit, request, told, waiting
from pkramfs.fuse.replies import Replies
from pkramfs.fuse.translate import Asker, Translator, file_size_limit
from pkramfs.units import PAGE_SIZE, pages

log = logging.getLogger(__name__)

_FORGET_SECONDS, _ENOUGH, _FORGET_MANY = 0.1, 1 << 60, 64
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


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
        self.tree, self.generation = tree, generation
        self.ready: Callable[[], None] = _nothing
        self.writer_gone: Callable[[], None] = _nothing
        self.room: Callable[[], int] = lambda: _ENOUGH
        self.data_lost: Callable[[], None] = _nothing
        self.taking: Callable[[int, Callable[[], Any]], Any] = lambda _, act: act()  # see brake
        self.cache = doors.Cache()
        self.answer_with(Translator(tree, generation))
        self._forgot: trio.Event | None = None
        self._hopeless: set[int] = set()
        self._direct: dict[int, int] = {}
        self.spare = Spare()

    def answer_with(self, translator: Translator | Replies) -> None:
        """Make handlers answer through this translator: pyfuse3's, or the kernel's own."""
        self.translate = cast(Translator, translator)
        self.entry, self._attributes = self.translate.entry, self.translate.attributes

    def may_forget(self) -> bool:
        """Return True if a FORGET would free deleted inodes, and is worth waiting for."""
        orphans = self.tree.orphans
        if not orphans or self._hopeless == orphans.keys():
            return False
        return any(not self.tree.inodes[ino].opens for ino in orphans)

    async def wait_for_room(self) -> None:
        """Wait until the kernel forgets something; if it does not, do not wait for these orphans again."""
        waited = set(self.tree.orphans)
        if self._forgot is None:
            self._forgot = trio.Event()
        with trio.move_on_after(_FORGET_SECONDS, shield=True) as waiting:  # otherwise the request would get no answer
            await self._forgot.wait()
        if waiting.cancelled_caught:
            self._hopeless = waited

    def init(self) -> None:
        self.ready()

    def drop_attributes(self) -> None:
        """Make the kernel ask for the attributes of every file again."""
        for inode in self.tree.inodes.values():
            if inode.lookups:
                self.cache.drop_attributes(inode.ino)

    def named(self, inode: Inode) -> EntryAttributes:
        """Count a reference of the kernel, and return the answer that gives it."""
        self.tree.remember(inode)
        return self.entry(inode)

    # -- names ----------------------------------------------------------------------------------

    @request
    def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = self.tree.lookup(parent, name)
        return self.translate.absent() if inode is None else self.named(inode)

    async def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        self.forgotten(inodes)
        with contextlib.suppress(FUSEError):  # nobody waits for an answer
            commit(self)

    def forgotten(self, inodes: Sequence[tuple[int, int]]) -> None:
        """Take back references that the kernel has given up: pairs of an inode number and a count."""
        for at, (number, count) in enumerate(inodes, 1):
            try:
                self.tree.forget(number, count, closed=True)
                if at % _FORGET_MANY == 0:
                    self.tree.commit()  # it has room for some, and frees memory for others
            except Exception:  # nobody waits for an answer; the others must be forgotten too
                log.exception("forget(%d, %d) failed", number, count)
        if self._forgot is not None:
            self._forgot.set()
            self._forgot = None

    @request
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        self.spare.expect()
        return self.named(self.tree.mknod(parent, name, mode, rdev, ctx))

    @request
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        self.spare.expect()
        return self.named(self.tree.mkdir(parent, name, mode, ctx))

    @request
    def symlink(self, parent: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        self.spare.expect()
        return self.named(self.tree.symlink(parent, name, target, ctx))

    @request
    def link(self, inode: int, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        self.spare.expect()
        return self.named(self.tree.link(inode, parent, name))

    @request
    def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self.tree.unlink(parent, name)

    @request
    def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self.tree.rmdir(parent, name)

    @request
    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: RequestContext
    ) -> None:
        self.tree.rename(parent, name, new_parent, new_name, flags, ctx)

    @request
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self.tree.readlink(inode)

    # -- listing --------------------------------------------------------------------------------

    @request
    def opendir(self, inode: int, ctx: RequestContext, flags: int = os.O_RDONLY) -> int:
        return self.tree.opendir(inode, flags)  # pyfuse3 does not pass on the flags

    @request
    def readdir(self, handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        reply, entry = pyfuse3.readdir_reply, self.entry
        for name, inode, place in self.tree.readdir(handle, start):
            if not reply(token, name, entry(inode), place):
                return
            if place > 2 and name != DOTDOT:  # nor for `.`
                self.tree.remember(inode)

    @request
    def releasedir(self, handle: int) -> None:
        pass

    # -- attributes -----------------------------------------------------------------------------

    @request
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self.tree.inode(inode))

    @request
    def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, handle: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        return self.change(
            inode,
            attr.st_mode & 0o7777 if fields.update_mode else None,
            attr.st_uid if fields.update_uid else None,
            attr.st_gid if fields.update_gid else None,
            attr.st_size if fields.update_size else None,
            attr.st_atime_ns if fields.update_atime else None,
            attr.st_mtime_ns if fields.update_mtime else None,
            attr.st_ctime_ns if fields.update_ctime else None,
            ctx,
        )

    def change(
        self,
        number: int,
        mode: int | None,
        uid: int | None,
        gid: int | None,
        size: int | None,
        atime: int | None,
        mtime: int | None,
        ctime: int | None,
        ctx: Any,
        *,
        touch: bool = False,
    ) -> EntryAttributes:
        """Serve SETATTR: attributes given as None stay. `touch`: both times are the current time, not chosen ones."""
        if size is None and mode is None and uid is None and gid is None:
            if atime is None and mtime is None:
                return self._attributes(self.tree.set_nothing(number, ctime, Asker(ctx)))
            # What follows each write-back, and goes before each deletion.
            return self._attributes(self.tree.set_times(number, atime, mtime, ctime, touch=touch))
        who, known = Asker(ctx), self.tree.inode(number)
        # chown(2) of a file comes with ctime. Without, overlayfs gives its copy the owner, bits and all, or the size,
        # and keeps capabilities: for truncate(2) the kernel takes them away itself.
        keep = known.is_file and ctime is None
        if size is not None and mtime is None:
            # A truncate to the same size: the kernel has not changed its times of the file.
            mtime, ctime = known.mtime, known.ctime if ctime is None else ctime
        changed = self.tree.setattr(
            number, mode=mode, uid=uid, gid=gid, size=size, atime=atime, mtime=mtime, ctime=ctime, caller=who, keep=keep
        )
        return self._attributes(changed)

    @request
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        return self.translate.statfs(self.tree.statfs(), self.room())

    @waiting
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if name == doors.SPARSIFY and self.tree.inode(inode).writers:  # the kernel has asked who may read alone
            return b"%d" % await self._sparsify_all(inode)
        if not name.startswith(doors.EXTENTS):
            return self.tree.getxattr(inode, name)
        if self.tree.inode(inode).writers:
            await self.cache.drop(inode)  # what was not written back is no hole either
        return doors.listing(self.tree.extents(inode, doors.parse_start(name)))

    @request
    def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return self.tree.listxattr(inode, Asker(ctx))

    @waiting
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        if name.startswith(doors.PREFIX):
            await self._order(inode, name, value)
        else:
            await self._setxattr(inode, name, value, ctx)

    @request
    def _setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext, flags: int = 0) -> None:
        self.spare.expect()
        self.tree.setxattr(inode, name, value, flags, Asker(ctx))

    async def _order(self, inode: int, name: bytes, value: bytes) -> None:
        """Carry out the command that an attribute stands for."""
        if name == doors.PUNCH:
            place = await self._range(inode, value)
            await self.cache.drop(inode)
            await self._punch(inode, *place)
            await self.cache.drop(inode)
        elif name == doors.ALLOCATE:
            if (later := await self._allocate(inode, *await self._range(inode, value))) is not None:
                await later
            self.cache.drop_attributes(inode)
        elif name == doors.SPARSIFY:
            await self._sparsify_all(inode)
        else:
            raise FUSEError(errno.EOPNOTSUPP)

    async def _sparsify_all(self, inode: int) -> int:
        """Turn the zero pages of a file into holes, and return their number."""
        windows = doors.windows(self.tree.extents(inode, allocated=True))
        found = await doors.in_turn(lambda *window: self._sparsify(inode, *window), windows)
        self.cache.drop_attributes(inode)
        return found

    @request
    def _range(self, inode: int, value: bytes) -> tuple[int, int]:
        offset, length = doors.parse_range(value)
        self.tree.file_range(inode, offset, length)
        return offset, length

    @request
    def _punch(self, inode: int, offset: int, length: int) -> None:
        self.tree.punch(inode, offset, length)

    @request
    def _allocate(self, inode: int, offset: int, length: int) -> Any:
        self.spare.expect()
        return self.taking(pages(length) + 1, lambda: self.tree.allocate(inode, offset, length, keep_size=True))

    @request
    def _sparsify(self, inode: int, first: int, last: int) -> int:
        return self.tree.sparsify(inode, first, last)

    @request
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self.tree.removexattr(inode, name)

    # -- content --------------------------------------------------------------------------------

    @request
    def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        known = self.tree.inode(inode)
        # Reading the caller from /proc is slow, and not needed: the kernel announces a write (see change).
        cut = flags & os.O_TRUNC and (known.mode & 0o6000 or known.xattrs)
        handle = self.tree.open_inode(known, flags, Asker(ctx) if cut else ROOT)
        self._count_direct(handle, 1)
        if handle & WRITING:
            known.sent = False
            self.cache.drop_attributes(inode)  # they are for ever, and from now on blocks come without a word
        return self.translate.opened(handle)

    @request
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        self.spare.expect()
        inode = self.tree.create(parent, name, mode, ctx)
        return self._opened_anew(inode, flags, ctx)

    def _opened_anew(self, inode: Inode, flags: int, ctx: RequestContext) -> tuple[FileInfo, EntryAttributes]:
        """Open a new file; the answer names and describes it."""
        handle = self.tree.open_inode(inode, flags & ~os.O_TRUNC, ctx)
        self._count_direct(handle, 1)
        opened = self.translate.opened(handle), self.named(inode)
        self.translate.guessed.discard(inode.ino)  # every close makes the kernel ask for the blocks again
        return opened

    @request
    def read(self, handle: int, offset: int, size: int) -> bytes:
        return cast(bytes, self.tree.read(handle, offset, size))  # or a view of RAM, which is sent without a copy

    @request
    def write(self, handle: int, offset: int, data: bytes, cached: bool | None = None) -> int:
        """Store data that the kernel writes back (`cached`), or that a program writes directly and is answered at once.

        pyfuse3 does not tell which; then a write is direct if only programs with O_DIRECT can write to the file.
        """
        # With the writeback cache the kernel owns mtime and sends it when it has written back; a late
        # WRITE must not overwrite what it, or utimensat, has set before. It says, too, when a write takes
        # set-id bits away (setattr); the write-back of a mapping does not.
        written = 0
        try:
            self.spare.expect()
            written = self.tree.write(handle, offset, data, stamp=False)
            if written != len(data):
                raise fail(errno.ENOSPC)
        except Exception as error:
            if isinstance(error, MemoryError):
                self.spare.let_go()
            if self._is_cached(handle) if cached is None else cached:
                self.tree.lose(handle, offset + written, offset + len(data), told(error))
                self.data_lost()
            raise
        return written

    def _is_cached(self, handle: int) -> bool:
        """Return True if a WRITE may be a write-back."""
        number = handle & INO_MASK
        return not handle & DIRECT or self._direct.get(number) != self.tree.inode(number).writers

    # -- what pyfuse3 has no request for ----------------------------------------------------------

    @request
    def tmpfile(self, parent: int, mode: int, flags: int, ctx: RequestContext) -> tuple[FileInfo, EntryAttributes]:
        self.spare.expect()
        inode = self.tree.tmpfile(parent, mode, ctx, linkable=not flags & os.O_EXCL)
        return self._opened_anew(inode, flags, ctx)

    @request
    def fallocate(self, handle: int, mode: int, offset: int, length: int, pid: int) -> None:
        self.spare.expect()
        if mode & ~(_KEEP_SIZE | _PUNCH_HOLE):
            raise fail(errno.EOPNOTSUPP)
        if mode & _PUNCH_HOLE:
            self.tree.punch(handle, offset, length, stamp=False)  # for times see write
        else:
            if mode & _KEEP_SIZE and offset + length > max(self.tree.inode(handle).size, file_size_limit(pid)):
                raise fail(errno.EFBIG)  # else the kernel has looked
            self.tree.allocate(handle, offset, length, keep_size=bool(mode & _KEEP_SIZE), stamp=False)

    @request
    def copy(self, source: int, offset: int, target: int, place: int, length: int) -> int:
        self.spare.expect()
        return self.tree.copy(source, offset, target, place, length)

    @request
    def seek(self, handle: int, offset: int, whence: int) -> int:
        return self.tree.seek(handle, offset, whence)

    @waiting
    async def seek_behind_writers(self, handle: int, offset: int, whence: int) -> int:
        """Seek while a program may write: the kernel may have pages that have not arrived.

        What we have as data is data, so only a hole can be wrong, and the end. The kernel writes back where the answer
        stands on one, and then we look again.
        """
        inode, step = self.tree.inode(handle), PAGE_SIZE
        while True:
            found = self._sought(handle, offset, whence)
            if whence == os.SEEK_DATA or found is None:
                if found == offset:
                    return found
                start = offset & -PAGE_SIZE
                await self.cache.drop(inode.ino, start, 0 if found is None else found - start)
                return self.tree.seek(handle, offset, whence)
            # The end may be somewhere else, too: dirty pages anywhere behind it say where.
            await self.cache.drop(inode.ino, found & -PAGE_SIZE, step if found < inode.size else 0)
            if self._sought(handle, offset, whence) == found:
                return found
            step *= 4

    def _sought(self, handle: int, offset: int, whence: int) -> int | None:
        """Return the result of `seek`, or None."""
        try:
            return self.tree.seek(handle, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    @request
    def set_flags(self, inode: int, flags: int) -> None:
        # The kernel owns ctime of files, and does not change it here: it would only be another one later.
        self.tree.set_flags(inode, flags, stamp=not self.tree.inode(inode).is_file)
        self.cache.drop_attributes(inode)

    # -- the end of use ---------------------------------------------------------------------------

    @request
    def release(self, handle: int) -> None:
        self.tree.release(handle)
        self._count_direct(handle, -1)
        if handle & WRITING:
            self._writer_gone(handle & INO_MASK)

    def _count_direct(self, handle: int, change: int) -> None:
        """Count the handles that can write to a file only directly (O_DIRECT)."""
        if handle & DIRECT and handle & WRITING:
            number = handle & INO_MASK
            self._direct[number] = self._direct.get(number, 0) + change
            if not self._direct[number]:
                del self._direct[number]

    def _writer_gone(self, number: int) -> None:
        inode = self.tree.inodes.get(number)
        if number in self.translate.guessed and (inode is None or not inode.writers):
            self.translate.guessed.discard(number)
            self.cache.drop_attributes(number)
        self.writer_gone()

    @request
    def flush(self, handle: int) -> NoReturn:
        raise FUSEError(errno.ENOSYS)

    @request
    def fsync(self, handle: int, datasync: bool) -> NoReturn:
        raise FUSEError(errno.ENOSYS)

    @request
    def fsyncdir(self, handle: int, datasync: bool) -> NoReturn:
        raise FUSEError(errno.ENOSYS)


def _nothing() -> None:
    """Do nothing."""
