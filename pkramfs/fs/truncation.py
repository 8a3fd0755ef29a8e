# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that files give up: truncation, holes, and clearing the rest of pages that stay.

    size 5000        page 0 |================|  page 1 |===.............|   the dots are zeros

An operation that shrinks a file, or punches a hole into it, frees whole pages and clears the freed part of pages that
stay. So the last page is zeros beyond the end of its file, and growing a file only changes its size.

Pages that fallocate gave to a file and that were not written yet are *unwritten*: they read as zeros and count as a
hole (SEEK_HOLE) until they are written or freed.

Kernel: mm/truncate.c, mm/shmem.c (shmem_undo_range)
"""

from pkramfs.fs.core import Core
from pkramfs.fs.inode import Inode
from pkramfs.fs.pagecache import END, PageMap
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

Buffer = bytes | memoryview

_IN_PAGE = PAGE_SIZE - 1
_ZEROS = memoryview(bytes(PAGE_SIZE))


class Truncation(Core):
    """See the module's page."""

    def _resize(self, inode: Inode, size: int) -> None:
        """Change the size of a file: give pages back unless it grows, count bytes."""
        if size == inode.size and not self._has_pages_behind(inode):
            return
        if size <= inode.size:
            self._trim(inode, size)
        self.ledger.add_bytes(size - inode.size)
        inode.size = size
        self._touch(inode)

    def _has_pages_behind(self, inode: Inode) -> bool:
        """Return True if a file has pages behind its end, from fallocate(2): as in tmpfs a truncation to the size
        that it has frees them."""
        return inode.pages is not None and bool(inode.pages.between((inode.size + _IN_PAGE) >> PAGE_SHIFT, END))

    def _trim(self, inode: Inode, size: int) -> None:
        """Give back the pages beyond a size, and clear the rest of the last one that remains."""
        if inode.pages is None:
            return
        self._free_pages(inode, inode.pages, (size + _IN_PAGE) >> PAGE_SHIFT)
        self._mark_written(inode, (size + _IN_PAGE) >> PAGE_SHIFT, END)
        if size & _IN_PAGE:
            self.clear(inode, size, (size | _IN_PAGE) + 1)
        if not inode.pages.count:
            inode.pages = None

    def clear(self, inode: Inode, start: int, end: int) -> None:
        """Zero bytes of one page, if it is there."""
        index, pages = start >> PAGE_SHIFT, inode.pages
        if pages is None or start >= end:
            return
        for _, pfn, _ in pages.between(index, index + 1):
            if self.sums is not None:
                self.sums.clear(inode, index)
            address = ((pfn - index) << PAGE_SHIFT) + start
            maybe_hole = pages.backed is not None
            if self.journal is None:
                self.zero(address, end - start, maybe_hole=maybe_hole)
            else:
                self.journal.clear(inode, start, end, address, maybe_hole=maybe_hole)

    def clear_behind(self, inode: Inode, end: int) -> None:
        """Zero the bytes of pages between the size of a file and `end`."""
        pages, at = inode.pages, inode.size
        if pages is None:
            return
        for index, _, count in pages.between(at >> PAGE_SHIFT, (end + _IN_PAGE) >> PAGE_SHIFT):
            for page in range(index, index + count):
                self.clear(inode, max(page << PAGE_SHIFT, at), (page + 1) << PAGE_SHIFT)

    def zero(self, address: int, size: int, *, maybe_hole: bool) -> None:
        """Zero bytes of one page of RAM; if it is `maybe_hole`, touch it only if it does not read as zeros."""
        if not maybe_hole or any(self._peek(address, address + size)):
            self.ram.bytes[address : address + size] = _ZEROS[:size]

    def _make_hole(self, inode: Inode, start: int, end: int) -> None:
        """Free the whole pages of a range, and clear its parts of other pages."""
        if inode.pages is None:
            return
        first, last = (start + _IN_PAGE) >> PAGE_SHIFT, end >> PAGE_SHIFT
        if first > last:
            self.clear(inode, start, end)
        else:
            self._free_pages(inode, inode.pages, first, last)
            self._mark_written(inode, first, last)
            self.clear(inode, start, first << PAGE_SHIFT)
            self.clear(inode, last << PAGE_SHIFT, end)

    def _mark_unwritten(self, inode: Inode, runs: list[tuple[int, int]]) -> None:
        """Note pages that were allocated and never written: they read as zeros, and count as a hole."""
        there = inode.unwritten or PageMap()
        before = there.runs
        for index, count in runs:
            there.insert(index, index, count)
            if self.journal is not None:
                self.journal.reserve(inode, index, count)
        self.ledger.add_unwritten(there.runs - before)
        inode.unwritten = there if there.count else None

    def _mark_written(self, inode: Inode, first: int, last: int) -> None:
        """Note that the pages [first, last) are no longer unwritten: they are written, or gone.

        That may split a run in two, which a save has to write. If there is no room for another run, the file loses all
        its unwritten runs; its pages then count as data.
        """
        there = inode.unwritten
        if there is None:
            return
        before = there.runs
        if there.remove(first, last) and self.journal is not None:
            self.journal.use(inode, first, last)
        self.ledger.add_unwritten(there.runs - before)
        if there.runs > before and not self._has_room_to_grow():
            self.ledger.add_unwritten(-there.runs)
            inode.unwritten = None
            if self.journal is not None:
                self.journal.use(inode, 0, END)
        if not there.count:
            inode.unwritten = None

    def _has_room_to_grow(self) -> bool:
        """Hold more frames for the save if it needs them; return True if there are enough."""
        try:
            self.ledger.grow()
        except OSError:
            return False
        return True

    def _peek(self, start: int, stop: int) -> Buffer:
        """Return bytes of RAM for which the host may have no memory, without touching the mapping."""
        first, last = start >> PAGE_SHIFT, (stop + _IN_PAGE) >> PAGE_SHIFT
        return self.ram.peek(first, last - first)[start - (first << PAGE_SHIFT) : stop - (first << PAGE_SHIFT)]
