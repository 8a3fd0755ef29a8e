# SPDX-License-Identifier: GPL-2.0-or-later
"""Attributes of an inode in the kernel's bytes: the Translator of the filter.

It has the methods of translate.Translator, so that the same handlers answer pyfuse3 and the device. A time is split
into seconds and nanoseconds; all else is packed as it is. The three answers repeat the list of fields on purpose:
one pack() without a tuple in between is on the path of every lookup and getattr.

Kernel: include/uapi/linux/fuse.h (fuse_attr, fuse_entry_out, fuse_attr_out), fs/fuse/inode.c
"""

import functools
import os
from collections.abc import Callable, Iterable
from struct import Struct

from pkramfs.fs.inode import BLOCKS_PER_PAGE, Inode
from pkramfs.fs.limits import StatFs
from pkramfs.fs.namespace import DOTDOT
from pkramfs.fs.tree import Tree
from pkramfs.fuse import wire
from pkramfs.fuse.translate import FOREVER, WRITTEN
from pkramfs.units import PAGE_SIZE

_FOREVER = int(FOREVER)
_SECOND, _KEEP_CACHE = 10**9, wire.KEEP_CACHE
_DEV, _PLUS = 0xFFFFFFFF, wire.ENTRY_OF_LISTING.size
_pack_entry, _pack_attributes, _pack_opened = wire.ENTRY.pack, wire.ATTRIBUTES.pack, wire.OPENED.pack
_VALID, _DEVICE = Struct("<QQQII"), Struct("<III")
"""Parts of wire.ENTRY that are mostly the same: generation and how long it is good; device, block size, flags."""
_PLAIN = _DEVICE.pack(0, PAGE_SIZE, 0)
_ABSENT = wire.ENTRY.pack(0, 0, _FOREVER, *(0,) * 19)


class Replies:
    """Packs the answers of one mount."""

    def __init__(self, tree: Tree, generation: int = 0) -> None:
        self._tree, self._root, self._generation = tree, tree.root, generation
        self.guessed: set[int] = set()
        self._known = _VALID.pack(generation, _FOREVER, _FOREVER, 0, 0)
        self.hold(int(WRITTEN * _SECOND))

    def hold(self, nanoseconds: int) -> None:
        """Make the attributes of files with writers valid for so many nanoseconds, less than a second."""
        self._held = nanoseconds
        self._written = _VALID.pack(self._generation, _FOREVER, 0, 0, nanoseconds)

    def _blocks(self, inode: Inode) -> int:
        """Return the blocks of a file, at least a page if the kernel may hold data of it (see translate)."""
        pages = inode.pages
        if pages is not None and pages.count:
            return pages.count * BLOCKS_PER_PAGE
        if inode.writers:
            self.guessed.add(inode.ino)
            return BLOCKS_PER_PAGE
        return inode.blocks if inode.target is not None else 0

    def entry(self, inode: Inode) -> bytes:
        """Return the answer that names `inode`, and describes it."""
        atime, mtime, ctime = inode.atime, inode.mtime, inode.ctime
        inode.sent = not inode.writers
        valid, nanoseconds = (_FOREVER, 0) if inode.sent else (0, self._held)
        return _pack_entry(
            inode.ino,
            0 if inode is self._root else self._generation,
            _FOREVER,
            valid,
            0,
            nanoseconds,
            inode.ino,
            inode.size,
            self._blocks(inode),
            atime // _SECOND,
            mtime // _SECOND,
            ctime // _SECOND,
            atime % _SECOND,
            mtime % _SECOND,
            ctime % _SECOND,
            inode.mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.rdev & _DEV,
            PAGE_SIZE if self._tree.huge == "never" else self._tree.block_size(inode),
            0,
        )

    def listing(self, reply: bytearray, room: int, entries: Iterable[tuple[bytes, Inode, int]]) -> int:
        """Put names into a buffer, each with its `entry`, as far as there is room; return where they end.

        The kernel gets a reference to each inode that it does not know yet. For inodes that it knows, and for `.` and
        `..`, only the name is sent: attributes would make it forget that there is no ACL, and ask again. This code runs
        for each file of an `ls`: fields that many files share are packed once, the name together with the rest, and
        equal times are divided once.
        """
        at, remember, plain = 0, self._tree.remember, self._tree.huge == "never"
        for name, inode, cookie in entries:
            length = len(name)
            after = at + _PLUS + length + 7 & ~7
            if after > room:
                break
            ino, mode = inode.ino, inode.mode
            if (inode.sent and inode.lookups and inode.entries is None) or cookie <= 2 or name == DOTDOT:
                _short_line(length)(reply, at, ino, cookie, length, mode >> 12, name)
                at = after
                continue
            atime, mtime, ctime = inode.atime, inode.mtime, inode.ctime
            valid, device, pages, blocks = self._known, _PLAIN, inode.pages, 0
            remember(inode)
            if inode.writers:
                valid, blocks = self._written, self._blocks(inode)
            elif pages is not None:
                blocks = pages.count * BLOCKS_PER_PAGE
            elif inode.target is not None:
                blocks = inode.blocks
            inode.sent = valid is self._known
            if inode.rdev or not plain:
                device = _DEVICE.pack(inode.rdev & _DEV, PAGE_SIZE if plain else self._tree.block_size(inode), 0)
            looked = changed = second = ctime // _SECOND
            looked_rest = changed_rest = rest = ctime % _SECOND
            if mtime != ctime:
                changed, changed_rest = mtime // _SECOND, mtime % _SECOND
            if atime != ctime:
                looked, looked_rest = atime // _SECOND, atime % _SECOND
            _line(length)(
                reply, at, ino, valid, ino, inode.size, blocks, looked, changed, second, looked_rest, changed_rest,
                rest, mode, inode.nlink, inode.uid, inode.gid, device, ino, cookie, length, mode >> 12, name,
            )  # fmt: skip
            at = after
        return at

    def attributes(self, inode: Inode) -> bytes:
        """Return the answer that describes `inode`."""
        atime, mtime, ctime = inode.atime, inode.mtime, inode.ctime
        inode.sent = not inode.writers
        valid, nanoseconds = (_FOREVER, 0) if inode.sent else (0, self._held)
        return _pack_attributes(
            valid,
            nanoseconds,
            0,
            inode.ino,
            inode.size,
            self._blocks(inode),
            atime // _SECOND,
            mtime // _SECOND,
            ctime // _SECOND,
            atime % _SECOND,
            mtime % _SECOND,
            ctime % _SECOND,
            inode.mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.rdev & _DEV,
            PAGE_SIZE if self._tree.huge == "never" else self._tree.block_size(inode),
            0,
        )

    def statx(self, inode: Inode) -> bytes:
        """Return the answer that describes `inode`, with its birth if that is known."""
        valid, nanoseconds = (0, self._held) if inode.writers else (_FOREVER, 0)
        return wire.STATX.pack(
            valid,
            nanoseconds,
            0,
            wire.STATX_BASIC | (wire.STATX_BTIME if inode.btime else 0),
            PAGE_SIZE if self._tree.huge == "never" else self._tree.block_size(inode),
            0,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.mode,
            0,
            inode.ino,
            inode.size,
            self._blocks(inode),
            0,
            *_split(inode.atime),
            *_split(inode.btime),
            *_split(inode.ctime),
            *_split(inode.mtime),
            os.major(inode.rdev),
            os.minor(inode.rdev),
            0,
            0,
        )

    def absent(self) -> bytes:
        """Return the answer that there is no such name, which the kernel may remember."""
        return _ABSENT

    def opened(self, handle: int) -> bytes:
        """Return the answer that a file is open, whose pages the kernel may keep."""
        return _pack_opened(handle, _KEEP_CACHE, 0)

    def statfs(self, found: StatFs, room: int) -> bytes:
        """Return the answer to statfs(2), of which `room` pages are to be had."""
        free, size = found.blocks_free, found.block_size
        return wire.STATFS.pack(
            found.blocks, free, min(free, room), found.files, found.files_free, size, found.name_max, size, 0
        )


@functools.cache
def _line(length: int) -> Callable[..., None]:
    """Return a packer of wire.ENTRY_OF_LISTING and a name of so many bytes, padded to a multiple of 8."""
    return Struct(f"<Q32sQQQqqqIIIIIII12sQQII{length}s{-length % 8}x").pack_into


@functools.cache
def _short_line(length: int) -> Callable[..., None]:
    """Return a packer of a name alone, without attributes."""
    return Struct(f"<{wire.ENTRY.size}xQQII{length}s{-length % 8}x").pack_into


def _split(time_ns: int) -> tuple[int, int, int]:
    """Split a time into seconds, nanoseconds and the reserved field."""
    return time_ns // _SECOND, time_ns % _SECOND, 0
