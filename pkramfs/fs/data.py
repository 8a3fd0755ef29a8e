# SPDX-License-Identifier: GPL-2.0-or-later
"""File content: reading, writing, truncating, holes; all of it slices of RAM.

Two invariants make holes and growth free of cost:

* A newly allocated frame reads as zeros, so a write touches only the bytes that it writes.
* Beyond the end of a file its last page is zeros (see truncation). So growing only changes the size, and a
  shrink followed by growth shows zeros.

A hole is read from one static block of zeros. RAM is not touched, because reading a hole of a shared
mapping would make the host allocate the page. A range that one run covers is read as a view
of RAM without a copy; the caller must be done with it before the next change of the tree. If the daemon may be
replaced, the view is mapped first: a daemon that is killed while the kernel faults in pages of a reply would have
answered with EIO.

A write first takes all frames that it needs, then passes the gate, then copies run by run. If the frames
do not all fit, the write is split at a page until a part fits: a short count, as in write(2),
and ENOSPC only if not one byte could be written.

Kernel: mm/filemap.c (generic_perform_write), mm/shmem.c (shmem_file_read_iter, shmem_fallocate)
"""

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pkramfs.errors import ExhaustedError
from pkramfs.fs import clock
from pkramfs.fs.failure import fail
from pkramfs.fs.filling import Filling
from pkramfs.fs.inode import FSETID, ROOT, Caller, Inode, capable
from pkramfs.fs.pagecache import END, PageMap, Run
from pkramfs.fs.protection import refuse_open, refuse_space
from pkramfs.fs.records import RUN_BYTES
from pkramfs.fs.rules import DIRECT, INO_MASK, MAX_SIZE, UNNOTED, WRITING
from pkramfs.journal.log import LESS
from pkramfs.machine.piped import Piped
from pkramfs.machine.piped import store as store_piped
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

Buffer = bytes | memoryview
Store = Callable[[int, Any], None]
Viewer = Callable[[int, int], Buffer]

_ZEROS = memoryview(bytes(1 << 20))
_IN_PAGE = PAGE_SIZE - 1
_PIECE = 256
_MARKS = os.O_NOATIME | os.O_DIRECT
_LOOK_SHIFT = 10
"""log2 of the pages of a restored file that are looked at together."""


class Data(Filling):
    """The operations on content; the argument is an inode number or handle."""

    # -- handles --------------------------------------------------------------------------------

    def open(self, number: int, flags: int = os.O_RDONLY, caller: Caller = ROOT) -> int:
        """Open a file and return its handle. O_TRUNC is honoured; the kernel has checked access."""
        return self.open_inode(
            self.inodes.get(number & INO_MASK) or self._find_asleep(number & INO_MASK), flags, caller
        )

    def open_inode(self, inode: Inode, flags: int, caller: Caller) -> int:
        """Open an inode as `open` does."""
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing and self.preservation.frozen:
            raise fail(errno.EROFS)
        if inode.flags:
            refuse_open(inode, flags)
        if flags & os.O_TRUNC and inode.is_file:
            self._truncate_on_open(inode, caller)
        inode.opens += 1
        if writing:
            inode.writers += 1
            self.writing[inode.ino] = inode
            if caller.uid:
                inode.unprivileged = True
        if self.journal is not None:
            self.journal.opened(inode, late=not writing)
        return handle_for(inode.ino, flags)

    def _truncate_on_open(self, inode: Inode, caller: Caller) -> None:
        """Truncate a file for O_TRUNC, which unlike truncate(2) sets the times even of an empty file."""
        self._change(inode, room=LESS)
        self._resize(inode, 0)
        self.losses.cut(inode.ino, 0)
        if inode.mode & 0o6000 or inode.xattrs:  # otherwise the caller's identity is not needed
            self._drop_privileges(inode, caller, keep_set_id=capable(caller, FSETID))
        inode.mtime = inode.ctime = clock.now()

    # -- reading --------------------------------------------------------------------------------

    def read(self, number: int, offset: int, size: int) -> Buffer:
        """Return up to `size` bytes at `offset`, fewer at the end of the file. The answer may be a view of RAM."""
        inode = self.inodes.get(number & INO_MASK) or self._find_asleep(number & INO_MASK)
        if inode.entries is not None:
            raise fail(errno.EISDIR)
        end = min(offset + size, inode.size)
        if not number & UNNOTED:
            self._read_time(inode)
        if end <= offset:
            return b""
        pages = inode.pages
        if pages is None:
            return zeros(end - offset)
        first, last = offset >> PAGE_SHIFT, (end + _IN_PAGE) >> PAGE_SHIFT
        sums = self.sums
        if sums is not None and (sums.table.doubted or sums.damaged):
            sums.require(inode, first, last)
        runs, view = pages.between(first, last), self._viewer(inode, first, last)
        if view == self._peek:
            return self._gather(runs, offset, end, view)
        if len(runs) == 1 and runs[0][2] == last - first:
            start = (runs[0][1] << PAGE_SHIFT) + (offset & _IN_PAGE)
            if self.journal is not None:
                self.ram.map(start, end - offset)
            return self.ram.bytes[start : start + end - offset]
        return self._gather(runs, offset, end, view) if runs else zeros(end - offset)

    def _viewer(self, inode: Inode, first: int, last: int) -> Viewer:
        """Return the reader of pages [first, last): in place if the host has memory for all of them."""
        pages = inode.pages
        if pages is not None and pages.backed is not None and not self._backed(pages, first, last):
            return self._peek
        return self._view

    def _view(self, start: int, stop: int) -> Buffer:
        return self.ram.bytes[start:stop]

    def _backed(self, pages: PageMap, first: int, last: int) -> bool:
        """Return True if the host has memory for all frames in [first, last) of a restored file, or gives it now."""
        known = pages.backed or set()
        try:
            for piece in range(first >> _LOOK_SHIFT, ((last - 1) >> _LOOK_SHIFT) + 1):
                if piece not in known:
                    self._back_runs(pages.between(piece << _LOOK_SHIFT, (piece + 1) << _LOOK_SHIFT))
                    known.add(piece)
                    pages.backed = known
        except ExhaustedError:
            return self._has_room(pages.between(first, last))
        return True

    def _has_room(self, runs: list[Run]) -> bool:
        """Return True if the host has memory for these frames, or allocates it now."""
        try:
            self._back_runs(runs)
        except ExhaustedError:
            return False
        return True

    def _back_runs(self, runs: list[Run]) -> None:
        for _, pfn, count in runs:
            self.ram.back_run(pfn, count)

    def _gather(self, runs: list[Run], offset: int, end: int, view: Viewer) -> bytes:
        """Join pieces of several runs and the holes between them."""
        pieces: list[Buffer] = []
        at = offset
        for index, pfn, count in runs:
            start, stop = index << PAGE_SHIFT, min((index + count) << PAGE_SHIFT, end)
            if start > at:
                pieces.append(zeros(start - at))
                at = start
            base = (pfn - index) << PAGE_SHIFT
            pieces.append(view(base + at, base + stop))
            at = stop
        if at < end:
            pieces.append(zeros(end - at))
        return b"".join(pieces)

    # -- writing --------------------------------------------------------------------------------

    def write(self, number: int, offset: int, data: Any, *, stamp: bool = True) -> int:
        """Write bytes, which may be Piped, at `offset`; return the number written, less than all if room is short.

        Without `stamp` times and set-id bits stay: the kernel owns them and will set them.
        """
        inode = self.inodes.get(number & INO_MASK) or self._find_asleep(number & INO_MASK)
        if not inode.is_file:
            raise fail(errno.EISDIR if inode.entries is not None else errno.EINVAL)
        view = data if data.__class__ is Piped else memoryview(data)
        if offset + len(view) > MAX_SIZE:
            if offset >= MAX_SIZE:
                raise fail(errno.EFBIG)
            view = view[: MAX_SIZE - offset]
        return self._write(inode, offset, view, stamp) if len(view) else 0

    def _write(self, inode: Inode, offset: int, view: memoryview | Piped, stamp: bool) -> int:
        size = len(view)
        end = offset + size
        if self.sums is not None and self.sums.before_write(inode, offset, end):
            self._change(room=LESS)
            self.sums.tell(inode, offset, end)
            self.commit()
            self.sums.drop(inode, offset, end)
        try:
            runs, store, into_holes = self._runs_for_writing(inode, offset, end)
        except OSError as error:
            middle = ((offset >> PAGE_SHIFT) + ((end + _IN_PAGE) >> PAGE_SHIFT)) >> 1
            cut = (middle << PAGE_SHIFT) - offset
            if error.errno != errno.ENOSPC or cut <= 0:
                raise
            return self._write_part(inode, offset, view, cut, stamp)
        if end > inode.size and self.journal is not None and not into_holes:
            self.journal.log.note_growing(inode.ino, end)
        if view.__class__ is Piped:
            store = store_piped
        try:
            for index, pfn, count in runs:
                base = (pfn - index) << PAGE_SHIFT
                start, stop = max(index << PAGE_SHIFT, offset), min((index + count) << PAGE_SHIFT, end)
                store(base + start, view[start - offset : stop - offset])
        except OSError:
            self._take_back(inode, offset, end, into_holes=into_holes)
            raise
        if inode.unwritten is not None:
            self._mark_written(inode, offset >> PAGE_SHIFT, (end + _IN_PAGE) >> PAGE_SHIFT)
        if end > inode.size:
            self.ledger.add_bytes(end - inode.size)
            inode.size = end
            if self.journal is not None and not into_holes:  # else the frames were noted, and with them all this
                self.journal.wrote(inode)
        if self.losses.files:
            self.losses.written(inode.ino, offset, end, inode.size)
        if self.sums is not None:
            self.sums.stored(inode, offset, end)
        if stamp:
            if inode.mode & 0o6000 or inode.xattrs:
                self._drop_privileges(inode, ROOT, keep_set_id=inode.opens > 0 and not inode.unprivileged)
                self._touch(inode)
            inode.mtime = inode.ctime = clock.now()
            if self.journal is not None:
                self.journal.wrote(inode)
        return size

    def _take_back(self, inode: Inode, offset: int, end: int, *, into_holes: bool) -> None:
        """Free the frames of a write again, because the host had no memory for them."""
        if into_holes and inode.pages is not None:
            self._free_pages(inode, inode.pages, offset >> PAGE_SHIFT, (end + _IN_PAGE) >> PAGE_SHIFT)
            inode.pages = inode.pages if inode.pages.count else None
        else:
            self._trim(inode, inode.size)

    def _write_part(self, inode: Inode, offset: int, view: memoryview | Piped, cut: int, stamp: bool) -> int:
        """Write the first `cut` bytes, and as much of the rest as fits."""
        written = self._write(inode, offset, view[:cut], stamp)
        if written < cut:
            return written
        try:
            return written + self._write(inode, offset + cut, view[cut:], stamp)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return written

    def _runs_for_writing(self, inode: Inode, offset: int, end: int) -> tuple[list[Run], Store, bool]:
        """Fill the holes of a range, pass the gate, and return its runs, how to store there, and True if all was holes.

        The host has not allocated memory yet for frames that fill holes.
        """
        first, last = offset >> PAGE_SHIFT, (end + _IN_PAGE) >> PAGE_SHIFT
        pages = inode.pages
        runs: list[Run] = []
        if pages is not None:
            runs = pages.between(first, last)
            if pages.backed is not None and runs and not self._backed(pages, first, last):
                raise fail(errno.ENOSPC)
            if len(runs) == 1 and runs[0][2] == last - first:
                self._change(room=LESS)
                return runs, self.ram.overwrite, False
        made = self._fill_holes(inode, first, last, end, back=bool(runs))
        store = self.ram.fill if made else self.ram.overwrite
        if len(made) == 1 and made[0][0] == first and made[0][2] == last - first:
            return made, store, True
        assert inode.pages is not None
        return inode.pages.between(first, last), store, bool(made) and not runs

    def lose(self, number: int, offset: int, end: int, error: int = errno.EIO) -> None:
        """Note that bytes of a file, which a program has written, could not be stored; see lost."""
        inode = self.inodes.get(number & INO_MASK)
        if inode is not None and inode.is_file:
            self.losses.note(inode.ino, offset, end, error)

    # -- shrinking, growing, holes --------------------------------------------------------------

    def allocate(self, number: int, offset: int, size: int, *, keep_size: bool = False, stamp: bool = True) -> None:
        """Give a range its pages now (fallocate), with memory of the host, so that no write there runs out of it;
        ENOSPC if they do not all fit. For `stamp` see `write`."""
        inode = self.file_range(number, offset, size)
        refuse_space(inode, punch=False)
        end = offset + size
        first, last = offset >> PAGE_SHIFT, (end + _IN_PAGE) >> PAGE_SHIFT
        holes = inode.pages.holes(first, last) if inode.pages is not None else [(first, last - first)]
        if inode.pages is not None and inode.pages.backed is not None:
            self._back_runs(inode.pages.between(first, last))
        self._expect_records(RUN_BYTES * len(holes))
        self._fill_holes(inode, first, last, end, back=True)
        self._mark_unwritten(inode, holes)
        if keep_size:
            self.tails.discard(inode.ino)  # pages behind the end were asked for
        if end > inode.size and not keep_size:
            self._resize(inode, end)
        if stamp:
            inode.mtime = inode.ctime = clock.now()
            self._touch(inode)

    def punch(self, number: int, offset: int, size: int, *, stamp: bool = True) -> None:
        """Make a range a hole: it reads as zeros, and the host gets whole pages back. For `stamp` see `write`."""
        inode = self.file_range(number, offset, size)
        refuse_space(inode, punch=True)
        end = offset + size
        self._change(room=LESS)
        self._make_hole(inode, offset, end)
        self.losses.written(inode.ino, offset, end, inode.size)
        if stamp:
            inode.mtime = inode.ctime = clock.now()
            self._touch(inode)

    def sparsify(self, number: int, first: int = 0, last: int = END) -> int:
        """Give back the pages of a file in [first, last) that are all zeros; return their number."""
        inode = self.inode(number)
        if inode.pages is None:
            return 0
        if self.sums is not None:
            for index, _, count in inode.pages.between(first, last):
                self.sums.require(inode, index, index + count)
        empty = [
            (index + start - pfn, index + end - pfn)
            for index, pfn, count in _pieces(inode.pages.between(first, last))
            for start, end in self._zeros(pfn, count)
        ]
        if empty:
            self._expect_records(2 * RUN_BYTES * len(empty))
            self._change()
        for start, end in empty:
            self._free_pages(inode, inode.pages, start, end)
            self._mark_written(inode, start, end)
        return sum(end - start for start, end in empty)

    def _zeros(self, pfn: int, count: int) -> Spans:
        """Find the frames among `count` from pfn that are all zeros, without touching untouched ones."""
        touched = self.ram.data_spans(pfn, pfn + count)
        found = touched.gaps(pfn, pfn + count)
        for start, end in touched:
            empty = ~self.ram.words(start, end - start).reshape(end - start, -1).any(axis=1)
            found = found | Spans.from_mask(empty, start)
        return found

    def extents(self, number: int, start: int = 0, *, allocated: bool = False) -> Iterator[tuple[int, int]]:
        """Yield (offset, size) of the parts of a file from `start` on that are no hole: what SEEK_DATA would find, or
        whatever is `allocated`."""
        inode = self.inode(number)
        last = (inode.size + _IN_PAGE) >> PAGE_SHIFT
        find = inode.pages.between if allocated and inode.pages is not None else partial(written, inode)
        runs = find(start >> PAGE_SHIFT, last)
        begin = end = start
        for index, _, count in runs:
            if index << PAGE_SHIFT > end:
                if begin < end:
                    yield begin, end - begin
                begin = index << PAGE_SHIFT
            end = min((index + count) << PAGE_SHIFT, inode.size)
        if begin < end:
            yield begin, end - begin

    def file_range(self, number: int, offset: int, size: int) -> Inode:
        """Return the file if it can have such a range, or raise as fallocate(2): EISDIR, ENODEV, EINVAL, EFBIG."""
        inode = self.inode(number)
        if inode.entries is not None:
            raise fail(errno.EISDIR)
        if not inode.is_file:
            raise fail(errno.ENODEV)
        if offset < 0 or size <= 0:
            raise fail(errno.EINVAL)
        if offset + size > MAX_SIZE:
            raise fail(errno.EFBIG)
        return inode


def handle_for(ino: int, flags: int) -> int:
    """Return the handle of an inode that is opened with these flags; see core."""
    handle = ino if flags & os.O_ACCMODE == os.O_RDONLY else ino | WRITING
    if flags & _MARKS:
        handle |= (UNNOTED if flags & os.O_NOATIME else 0) | (DIRECT if flags & os.O_DIRECT else 0)
    return handle


def written(inode: Inode, first: int, last: int) -> list[Run]:
    """Return the runs of a file in [first, last) that hold data; pages that were only allocated count as holes."""
    if inode.pages is None:
        return []
    runs = inode.pages.between(first, last)
    if inode.unwritten is None:
        return runs
    found: list[Run] = []
    for index, pfn, count in runs:
        for at, size in inode.unwritten.holes(index, index + count):
            found.append((at, pfn + at - index, size))
    return found


def zeros(size: int) -> Buffer:
    """Return bytes of a hole."""
    return _ZEROS[:size] if size <= len(_ZEROS) else bytes(size)


def _pieces(runs: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield runs in pieces that fit the processor's cache."""
    for index, pfn, count in runs:
        for at in range(0, count, _PIECE):
            yield index + at, pfn + at, min(_PIECE, count - at)
