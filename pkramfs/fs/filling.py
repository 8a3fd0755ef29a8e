# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames for holes: before a write, and for fallocate.

`huge=` of a mount says how many are taken at once:

    never, advise   the pages that are asked for           (madvise never reaches a FUSE daemon)
    always          whole 2 MiB of the file, aligned, where all of them are a hole
    within_size     the same, if those 2 MiB end within the size that the file has or gets

A *huge page* is 512 pages of a file in 512 frames, both aligned: one entry of order 9 when it is preserved.
It has no mark: a hole punched into it leaves ordinary pages, as when tmpfs splits a huge page.
If no huge page is free, small pages are taken. (tmpfs did the same; since Linux 6.14 it tries all
orders in between. Here a preserve joins adjacent pages to the largest orders.)

The part of a huge page beyond the end of its file holds zeros that nobody reads, but it counts against
size=. These *tails* are freed before a caller gets ENOSPC, and when the file is cut, like everything beyond its
end. (Tails of a restored tree are freed only when the file is cut.)

New frames have no memory of the host; the host allocates it when they are written. If they are not written at
once (fallocate, the rest of a huge page, pages that a write covers in part) the host allocates it now (`back`),
so that every frame of a file has memory.

Kernel: mm/shmem.c (shmem_huge_global_enabled, shmem_alloc_and_add_folio, shmem_unused_huge_shrink)
"""

import errno
from collections.abc import Iterator

from pkramfs.fs.attributes import Attributes
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import Inode
from pkramfs.fs.pagecache import PageMap, Run
from pkramfs.fs.records import RUN_BYTES
from pkramfs.journal.log import GROWTH, LESS
from pkramfs.units import BLOCK_ORDER, BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, pages, round_down, round_up

Hole = tuple[int, int]
"""(first page index, pages)"""
Frames = list[tuple[int, int]]
"""(first pfn, pages)"""

HUGE = ("never", "always", "within_size", "advise")


class Filling(Attributes):
    """See the module's page."""

    huge = "never"

    def _fill_holes(self, inode: Inode, first: int, last: int, end: int, *, back: bool) -> list[Run]:
        """Give every page in [first, last) a frame of zeros, all or none, and return the new runs.

        The runs (index, pfn, count) are in order of index; huge pages may begin before `first` and end behind `last`.

        Without `back` the caller writes all of them at once, and frees those that it cannot write.
        """
        if self.preservation.frozen:
            raise fail(errno.EROFS)
        try:
            return self._fill(inode, first, last, end, back)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self.tails:
                raise
        self._give_back_tails()
        return self._fill(inode, first, last, end, back)

    def _fill(self, inode: Inode, first: int, last: int, end: int, back: bool) -> list[Run]:
        holes = _holes(inode.pages, first, last)
        huge = self._huge_holes(inode, first, last, end) if self.huge != "never" else []
        self.ledger.grow()
        supply = self._take_huge(huge) if huge else []
        if supply:
            holes = _without(holes, huge)
        try:
            frames = self._take(holes, beside=supply)
            try:
                if back:
                    self._back(frames)
                self._change(room=GROWTH + RUN_BYTES * (len(holes) + len(frames) + len(huge) + len(supply)))
            except BaseException:
                self._return(frames)
                raise
        except BaseException:
            self._return(supply)
            raise
        if supply:
            self._note_tail(inode, huge, end)
            return sorted(self._insert(inode, huge, supply) + self._insert(inode, holes, frames))
        return self._insert(inode, holes, frames)

    def _take(self, holes: list[Hole], order: int = 0, beside: Frames | None = None) -> Frames:
        """Take frames for holes; raise ENOSPC unless they fit together with `beside` others, not counted yet."""
        total = _total(holes)
        self.limits.require_pages(total + _total(beside) if beside else total)
        return self.frames.allocate(total, order) if total else []

    def _back(self, frames: Frames) -> None:
        """Make the host allocate memory for frames; raise ENOSPC if it has none."""
        for pfn, count in frames:
            self.ram.back_run(pfn, count)

    def _return(self, frames: Frames) -> None:
        if frames:
            self.frames.free(*zip(*frames, strict=True))

    def _insert(self, inode: Inode, holes: list[Hole], frames: Frames) -> list[Run]:
        """Put frames into holes, count them, and return the runs that were made."""
        if inode.pages is None:
            inode.pages = PageMap()
        there = inode.pages
        if self.sums is not None:
            for hole in holes:
                self.sums.fill(inode, *hole)
        before, held = there.runs, there.count
        one = len(holes) == len(frames) == 1
        made = [(holes[0][0], *frames[0])] if one else list(_distribute(holes, frames))
        for run in made:
            there.insert(*run)
        if self.journal is not None:
            self.journal.put(inode, made)
        self.ledger.add_pages(there.count - held, there.runs - before)
        return made

    # -- huge pages -----------------------------------------------------------------------------

    def block_size(self, inode: Inode) -> int:
        """Return st_blksize: that of a huge page, if the first 2 MiB of the file may be one."""
        wanted = self.huge == "always" or (self.huge == "within_size" and pages(inode.size) >= BLOCK_PAGES)
        return BLOCK_SIZE if wanted and inode.is_file else PAGE_SIZE

    def _huge_holes(self, inode: Inode, first: int, last: int, end: int) -> list[Hole]:
        """Return the holes of whole huge pages that huge= wants to be filled where [first, last) is written."""
        if self.huge not in ("always", "within_size"):
            return []
        low, high = round_down(first, BLOCK_PAGES), round_up(last, BLOCK_PAGES)
        if self.huge == "within_size":
            high = min(high, round_down(pages(max(end, inode.size)), BLOCK_PAGES))
        found = []
        for start, count in _holes(inode.pages, low, high):
            begin, stop = round_up(start, BLOCK_PAGES), round_down(start + count, BLOCK_PAGES)
            if begin < stop:
                found.append((begin, stop - begin))
        return found

    def _take_huge(self, holes: list[Hole]) -> Frames:
        """Take huge pages for these holes, backed; none if they do not fit, or if memory is in pieces."""
        frames: Frames = []
        try:
            frames = self._take(holes, BLOCK_ORDER)
            if not any(pfn % BLOCK_PAGES or count % BLOCK_PAGES for pfn, count in frames):
                self._back(frames)
                return frames
        except OSError as error:
            if error.errno != errno.ENOSPC or self.tails:
                self._return(frames)
                raise  # freeing tails may make room for another try
        self._return(frames)
        return []

    def _note_tail(self, inode: Inode, huge: list[Hole], end: int) -> None:
        """Note a file whose last huge page goes on behind its end, unless fallocate put pages there."""
        past = pages(max(end, inode.size))
        if sum(huge[-1]) > past and not (inode.pages is not None and inode.pages.between(past, sum(huge[-1]) + 1)):
            self.tails.add(inode.ino)

    def _give_back_tails(self) -> None:
        """Free the tails of all huge pages."""
        while self.tails:
            inode = self.inodes[self.tails.pop()]
            if inode.pages is not None:
                self._change(room=LESS)
                self._free_pages(inode, inode.pages, pages(inode.size))
            self.commit()  # the freed pages are needed at once


def _total(runs: list[tuple[int, int]]) -> int:
    return runs[0][1] if len(runs) == 1 else sum(count for _, count in runs)


def _holes(pages: PageMap | None, first: int, last: int) -> list[Hole]:
    if pages is None:
        return [(first, last - first)] if first < last else []
    return pages.holes(first, last)


def _without(holes: list[Hole], gone: list[Hole]) -> list[Hole]:
    """Return holes less those in `gone`, which cover whole ones or their ends; both in order."""
    left: list[Hole] = []
    for start, count in holes:
        stop = start + count
        for begin, size in gone:
            if start < begin + size and begin < stop:
                if start < begin:
                    left.append((start, begin - start))
                start = min(begin + size, stop)
        if start < stop:
            left.append((start, stop - start))
    return left


def _distribute(holes: list[Hole], frames: Frames) -> Iterator[Run]:
    """Yield the runs that fill holes with frames, cutting whichever is longer."""
    supply = iter(frames)
    pfn, left = 0, 0
    for start, size in holes:
        index, end = start, start + size
        while index < end:
            if not left:
                pfn, left = next(supply)
            count = min(left, end - index)
            yield index, pfn, count
            index, pfn, left = index + count, pfn + count, left - count
