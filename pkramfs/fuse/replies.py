# SPDX-License-Identifier: GPL-2.0-or-later
"""Attributes of an inode as the kernel wants them, in bytes: the Translator of what the filter answers.

It has the methods of translate.Translator, so that the same handlers answer pyfuse3 and the device. A time is split
into seconds and nanoseconds, and that is all there is to do. The three answers repeat the list of fields on purpose:
one pack() without a tuple in between is on the path of every lookup and getattr.

Kernel: include/uapi/linux/fuse.h (fuse_attr, fuse_entry_out, fuse_attr_out), fs/fuse/inode.c
"""

import os

from pkramfs.fs.inode import BLOCKS_PER_PAGE, Inode
from pkramfs.fs.limits import StatFs
from pkramfs.fs.tree import Tree
from pkramfs.fuse import wire
from pkramfs.fuse.translate import FOREVER, WRITTEN
from pkramfs.units import PAGE_SIZE

_FOREVER, _HALF = int(FOREVER), int(WRITTEN * 10**9)
_SECOND = 10**9
_DEV = 0xFFFFFFFF
_pack_listing = wire.ENTRY_OF_LISTING.pack_into
_ABSENT = wire.ENTRY.pack(0, 0, _FOREVER, *(0,) * 19)


class Replies:
    """Packs the answers of one mount."""

    def __init__(self, tree: Tree, generation: int = 0) -> None:
        self._tree, self._root, self._generation = tree, tree.root, generation
        self.guessed: set[int] = set()

    def _blocks(self, inode: Inode) -> int:
        """Return the blocks of a file: at least a page of one that may have data which we have not seen (translate)."""
        blocks = inode.blocks
        if not blocks and inode.writers:
            self.guessed.add(inode.ino)
            return BLOCKS_PER_PAGE
        return blocks

    def entry(self, inode: Inode) -> bytes:
        """Return the answer that names `inode`, and describes it."""
        atime, mtime, ctime = inode.atime, inode.mtime, inode.ctime
        valid, nanoseconds = (0, _HALF) if inode.writers else (_FOREVER, 0)
        return wire.ENTRY.pack(
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

    def plus_into(self, reply: bytearray, at: int, inode: Inode, node: int, cookie: int, length: int) -> None:
        """Put into a listing what `entry` says of an inode, and where it goes on; a `node` of 0 names nothing."""
        atime, mtime, ctime, ino, mode = inode.atime, inode.mtime, inode.ctime, inode.ino, inode.mode
        valid, nanoseconds, pages = _FOREVER, 0, inode.pages
        if inode.writers:
            valid, nanoseconds = 0, _HALF
        if pages is not None and pages.count:
            blocks = pages.count * BLOCKS_PER_PAGE
        else:
            blocks = self._blocks(inode) if inode.writers or inode.target is not None else 0
        seconds = changed = ctime // _SECOND
        rest = changed_rest = ctime % _SECOND
        if mtime != ctime:
            changed, changed_rest = mtime // _SECOND, mtime % _SECOND
        _pack_listing(
            reply,
            at,
            node,
            self._generation,
            _FOREVER,
            valid,
            0,
            nanoseconds,
            ino,
            inode.size,
            blocks,
            atime // _SECOND,
            changed,
            seconds,
            atime % _SECOND,
            changed_rest,
            rest,
            mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.rdev & _DEV,
            PAGE_SIZE if self._tree.huge == "never" else self._tree.block_size(inode),
            0,
            ino,
            cookie,
            length,
            mode >> 12,
        )

    def attributes(self, inode: Inode) -> bytes:
        """Return the answer that describes `inode`."""
        atime, mtime, ctime = inode.atime, inode.mtime, inode.ctime
        valid, nanoseconds = (0, _HALF) if inode.writers else (_FOREVER, 0)
        return wire.ATTRIBUTES.pack(
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
        valid, nanoseconds = (0, _HALF) if inode.writers else (_FOREVER, 0)
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
        return wire.OPENED.pack(handle, wire.KEEP_CACHE, 0)

    def statfs(self, found: StatFs, room: int) -> bytes:
        """Return the answer to statfs(2), of which `room` pages are to be had."""
        free, size = found.blocks_free, found.block_size
        return wire.STATFS.pack(
            found.blocks, free, min(free, room), found.files, found.files_free, size, found.name_max, size, 0
        )


def _split(time_ns: int) -> tuple[int, int, int]:
    """Split a time into seconds, nanoseconds and the reserved field."""
    return time_ns // _SECOND, time_ns % _SECOND, 0
