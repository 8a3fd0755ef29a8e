# SPDX-License-Identifier: GPL-2.0-or-later
"""Ranges of files: where data and holes are, and copies from one file to another.

    seek     the next data or hole from an offset on, found without a walk over all runs of the file
    copy     run by run, from frames to frames; a hole in the source becomes a hole in the target

A copy takes at most MOST bytes at once, so that other requests are answered in between: a short count, with which
copy_file_range(2) may come back at any time.

Kernel: mm/filemap.c (mapping_seek_hole_data), fs/read_write.c (vfs_copy_file_range)
"""

import errno
import os

from pkramfs.fs.data import Data, written
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import Inode
from pkramfs.fs.pagecache import Run
from pkramfs.fs.protection import refuse_space
from pkramfs.fs.rules import MAX_SIZE
from pkramfs.units import PAGE_SHIFT, pages

MOST = 64 << 20
"""Bytes of one copy: some 20 ms."""
_WINDOW = 256


class Ranges(Data):
    """The operations on ranges; the argument is an inode number or handle."""

    def seek(self, number: int, offset: int, whence: int) -> int:
        """Return the first byte from `offset` on in data (SEEK_DATA) or a hole (SEEK_HOLE), or raise ENXIO."""
        inode = self.inode(number)
        if not inode.is_file:
            raise fail(errno.EINVAL)
        if not 0 <= offset < inode.size:
            raise fail(errno.ENXIO)
        first, last = offset >> PAGE_SHIFT, pages(inode.size)
        if whence == os.SEEK_DATA:
            run = _first_run(inode, first, last)
            if run is None:
                raise fail(errno.ENXIO)
            return max(offset, run[0] << PAGE_SHIFT)
        if whence != os.SEEK_HOLE:
            raise fail(errno.EINVAL)
        return min(max(offset, _first_hole(inode, first, last) << PAGE_SHIFT), inode.size)

    def copy(self, source: int, offset: int, target: int, place: int, size: int) -> int:
        """Copy bytes between files, or within one where they do not overlap, and return how many."""
        giver, taker = self.inode(source), self.inode(target)
        if not (giver.is_file and taker.is_file) or offset < 0 or place < 0:
            raise fail(errno.EINVAL)
        refuse_space(taker, punch=False)
        size = min(size, MOST, giver.size - offset, MAX_SIZE - place)
        if size <= 0:
            return 0
        self._read_time(giver)
        at, end = offset, offset + size
        sums = self.sums
        if sums is not None and (sums.table.doubted or sums.damaged):
            sums.require(giver, offset >> PAGE_SHIFT, pages(end))
        view = self._viewer(giver, offset >> PAGE_SHIFT, pages(end))
        for index, pfn, count in written(giver, offset >> PAGE_SHIFT, pages(end)):
            start, stop = max(index << PAGE_SHIFT, offset), min((index + count) << PAGE_SHIFT, end)
            self._copy_hole(taker, place + at - offset, place + start - offset)
            base = (pfn - index) << PAGE_SHIFT
            try:
                done = self.write(target, place + start - offset, view(base + start, base + stop), stamp=False)
            except OSError:
                if start == offset:
                    raise
                return start - offset
            at = start + done
            if at < stop:
                return at - offset
        self._copy_hole(taker, place + at - offset, place + size)
        return size

    def _copy_hole(self, inode: Inode, start: int, end: int) -> None:
        """Make [start, end) a hole, beyond the end of the file too."""
        if start >= end:
            return
        self._change()
        self._make_hole(inode, start, end)
        self.losses.written(inode.ino, start, end, max(inode.size, end))
        if end > inode.size:
            self._resize(inode, end)


def _first_run(inode: Inode, first: int, last: int) -> Run | None:
    """Return the first run with data in [first, last)."""
    step = _WINDOW
    while first < last:
        runs = written(inode, first, min(first + step, last))
        if runs:
            return runs[0]
        first, step = first + step, step * 4
    return None


def _first_hole(inode: Inode, first: int, last: int) -> int:
    """Return the first page in [first, last) without data, `last` if there is none."""
    step = _WINDOW
    while first < last:
        stop = min(first + step, last)
        for index, _, count in written(inode, first, stop):
            if index > first:
                return first
            first = index + count
        if first < stop:
            return first
        step *= 4
    return last
