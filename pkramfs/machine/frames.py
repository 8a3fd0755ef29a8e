# SPDX-License-Identifier: GPL-2.0-or-later
"""The page allocator of one owner, inside the page blocks that it leased.

Free memory is a set of *runs* (first pfn, count), found by their start, by their end and by size
class, all in dictionaries: to take or free a run costs a few look-ups whatever its length, and
neighbours join at once. Nobody else allocates in an owner's blocks, so there is no lock.

    class 0: runs of 1 page    class 1: 2-3 pages    class 2: 4-7 pages    …

A request takes a run of the smallest class that surely fits: usually one run, several if memory is
fragmented. Blocks are leased ahead in growing batches and given back when wholly free, except a small
stock (both in proportion to RAM: an idle mount must not starve others).

A class is a dictionary used as a stack, because `popitem` is the only cheap way to a member: a search
for the first member steps over all that were deleted before it (100,000 frees, then allocations,
would be quadratic).

A free frame reads as zeros: leased blocks arrive punched, and `free` punches what it takes.
`hold` keeps some frames for the owner's own save: a full RAM must not prevent preserving.
A `policy` (mpol=) names the NUMA nodes from which new blocks come.

Kernel: mm/page_alloc.c (buddy lists by order), mm/folio batches; rows 35 and 36 (work in bulk)
"""

from typing import Any

import numpy as np

from pkramfs.errors import ExhaustedError
from pkramfs.machine.leases import Leases
from pkramfs.machine.policy import Policy
from pkramfs.machine.ram import Ram
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_PAGES, MAX_ORDER, PAGE_SHIFT, round_up

Run = tuple[int, int]
"""Frames that follow one another: the first pfn, and how many."""

_CLASSES = 40
_AHEAD_MAX, _AHEAD_SHARE = 64, 32
"""Most page blocks that are leased ahead of need: a number, and a part of RAM."""
_STOCK_MAX, _STOCK_SHARE = 16, 128
"""Most wholly free blocks that are kept instead of given back: a number, and a part of RAM."""
_TRIES = 16
"""Runs of one class that are searched for an aligned place before a larger class is cut."""
_FLOOR_FOR_SAVE = 0.25
"""Part of the host's reserve that frames held for a save must leave (`Ram.room`)."""


def pfns_of(runs: list[Run]) -> U64:
    """Return the pfns of runs, one by one, in their order."""
    empty = np.empty(0, dtype=np.uint64)
    return np.concatenate([empty, *(np.arange(start, start + count, dtype=np.uint64) for start, count in runs)])


def spans_of(runs: list[Run]) -> Spans:
    """Return the pages of runs as a set."""
    return Spans((start, start + count) for start, count in runs)


class FreeRuns:
    """A set of free runs that joins neighbours. The caller never adds pages that are free already."""

    __slots__ = ("_classes", "_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._classes: list[dict[int, None]] = [{} for _ in range(_CLASSES)]
        self.total = 0

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, count: int) -> None:
        """Add a run, joined with its neighbours."""
        if start in self._starts:
            raise AssertionError(f"pages from pfn {start:x} are freed twice")
        self.total += count
        end = start + count
        before = self._ends.get(start)
        if before is not None:
            self._drop(before, start)
            start = before
        after = self._starts.get(end)
        if after is not None:
            self._drop(end, after)
            end = after
        self._insert(start, end)

    def _insert(self, start: int, end: int) -> None:
        self._starts[start], self._ends[end] = end, start
        self._classes[(end - start).bit_length() - 1][start] = None

    def _drop(self, start: int, end: int) -> None:
        del self._starts[start], self._ends[end], self._classes[(end - start).bit_length() - 1][start]

    def cut(self, run: int, start: int, count: int) -> None:
        """Take [start, start+count) out of the free run that begins at `run`."""
        end = self._starts[run]
        self._drop(run, end)
        self.total -= count
        if run < start:
            self._insert(run, start)
        if start + count < end:
            self._insert(start + count, end)

    def take(self, count: int) -> Run | None:
        """Take a run of exactly `count` pages, from the smallest class that surely has one; return None without one."""
        for runs in self._classes[(count - 1).bit_length() :]:
            if runs:
                return self._taken(_top(runs), count)
        for start in _tops(self._classes[count.bit_length() - 1]):  # this class may have it
            if self._starts[start] - start >= count:
                return self._taken(start, count)
        return None

    def _taken(self, run: int, count: int) -> Run:
        self.cut(run, run, count)
        return run, count

    def take_aligned(self, count: int, align: int) -> Run | None:
        """Take a run of `count` pages at a multiple of `align`: a close fit if found soon, or a sure one."""
        sure = (count + align - 2).bit_length()
        for runs in self._classes[count.bit_length() - 1 : sure]:
            for run in _tops(runs):
                start = round_up(run, align)
                if start + count <= self._starts[run]:
                    self.cut(run, start, count)
                    return start, count
        for runs in self._classes[sure:]:
            if runs:
                run = _top(runs)
                start = round_up(run, align)
                self.cut(run, start, count)
                return start, count
        return None

    def take_multiple(self, most: int, size: int) -> Run | None:
        """Take the longest run of aligned frames of `size` pages among the largest free runs, at most `most` pages."""
        for runs in reversed(self._classes[size.bit_length() - 1 :]):
            found: tuple[int, int, int] = (0, 0, 0)
            for run in _tops(runs):
                start = round_up(run, size)
                found = max(found, (min(self._starts[run] - start, most) // size * size, start, run))
            count, start, run = found
            if count > 0:
                self.cut(run, start, count)
                return start, count
        return None

    def take_largest(self, most: int) -> Run | None:
        """Take at most `most` pages of a run of the largest class."""
        for runs in reversed(self._classes):
            if runs:
                start = _top(runs)
                return self._taken(start, min(self._starts[start] - start, most))
        return None

    def spans(self) -> Spans:
        """Return all free runs as a set."""
        size = len(self._starts)
        return Spans.from_arrays(
            np.fromiter(self._starts.keys(), np.uint64, size), np.fromiter(self._starts.values(), np.uint64, size)
        )


def _top(runs: dict[int, None]) -> int:
    """Return the member that was added last."""
    start, _ = runs.popitem()
    runs[start] = None
    return start


def _tops(runs: dict[int, None]) -> list[int]:
    """Return the few members that were added last."""
    found = [runs.popitem()[0] for _ in range(min(_TRIES, len(runs)))]
    runs.update(dict.fromkeys(reversed(found)))
    return found


class Frames:
    """The frames of one owner (`tree_id`), allocated and freed in bulk."""

    def __init__(self, ram: Ram, leases: Leases, tree_id: int, policy: Policy | None = None) -> None:
        self.ram, self.leases, self.tree_id, self.policy = ram, leases, tree_id, policy
        self._free = FreeRuns()
        self._blocks = 0
        self._held = 0
        self._ahead = 1
        self._freed = 0
        """Pages freed since the last search for blocks to give back."""
        self._ahead_max = _part(leases.blocks, _AHEAD_SHARE, _AHEAD_MAX)
        self._stock = _part(leases.blocks, _STOCK_SHARE, _STOCK_MAX)

    @property
    def free_pages(self) -> int:
        """Return the number of free pages in leased blocks."""
        return self._free.total

    @property
    def free_runs(self) -> int:
        """Return the number of free runs in leased blocks."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Return the number of allocated pages."""
        return self._blocks * BLOCK_PAGES - self._free.total

    @property
    def held_pages(self) -> int:
        """Return the number of pages that only `allocate(held=True)` may use."""
        return self._held

    def room(self) -> int:
        """Return the number of pages that `allocate` could return now: free in RAM, and with room on the host."""
        free = self.leases.free_blocks() * BLOCK_PAGES + self._free.total - self._held
        return max(0, min(free, self.ram.room() >> PAGE_SHIFT))

    def hold(self, pages: int) -> None:
        """Keep `pages` free for the save, leasing blocks now. Raise ExhaustedError if there are too few."""
        if pages > self._held:
            self._ensure(pages)
        self._held = pages

    def allocate(self, count: int, order: int = 0, *, held: bool = False, last: bool = False) -> list[Run]:
        """Allocate runs of exactly `count` pages in all, few and large, zero-filled.

        With `order`, runs start at multiples of 2**order as far as memory allows. `held` frames are those kept for
        a save; `last` takes even the memory that the host leaves to others. Raise ExhaustedError (ENOSPC), and
        allocate nothing, if RAM or the host behind it is full.
        """
        if count <= 0:
            return []
        self.ram.check_room(count << PAGE_SHIFT, floor=0.0 if last else _FLOOR_FOR_SAVE if held else 1.0)
        order = min(order, MAX_ORDER)
        self._ensure(count + (0 if held else self._held), align=max(1, (1 << order) // BLOCK_PAGES))
        if order == 0:
            run = self._free.take(count)
            if run is not None:
                return [run]
        return self._gather(count, order)

    def _gather(self, count: int, order: int) -> list[Run]:
        """Gather aligned large runs first, then the largest of any kind."""
        runs = self._gather_aligned(count, 1 << order) if order else []
        count -= sum(size for _, size in runs)
        while count:
            run = self._free.take(count) or self._free.take_largest(count)
            if run is None:
                raise AssertionError("the free runs hold less than their total")
            runs.append(run)
            count -= run[1]
        return runs

    def _gather_aligned(self, count: int, size: int) -> list[Run]:
        """Gather aligned runs of `size` pages, or of multiples of it; lease fresh blocks if there are none."""
        runs: list[Run] = []
        leased = size < BLOCK_PAGES
        while count >= size:
            run = self._free.take_aligned(count // size * size, size) or self._free.take_multiple(count, size)
            if run is not None:
                runs.append(run)
                count -= run[1]
            elif leased or not self._lease_aligned(count // size * size, size):
                break
            else:
                leased = True
        return runs

    def _lease_aligned(self, count: int, size: int) -> bool:
        """Lease blocks because our own are too fragmented; return False if there are none."""
        try:
            self._lease_ahead(count // BLOCK_PAGES, align=size // BLOCK_PAGES)
        except ExhaustedError:
            return False  # fragments will do
        return True

    def allocate_pages(self, count: int, *, held: bool = False) -> U64:
        """Allocate `count` pages; return their pfns as an array."""
        return pfns_of(self.allocate(count, held=held))

    def _ensure(self, pages: int, *, align: int = 1) -> None:
        """Make sure that `pages` are free, leasing blocks ahead of need while RAM has plenty."""
        missing = pages - self._free.total
        if missing <= 0:
            return
        self._lease_ahead(-(-missing // BLOCK_PAGES), align=align)

    def _lease_ahead(self, need: int, *, align: int = 1) -> None:
        """Lease `need` blocks, and more while RAM has them."""
        try:
            self._lease(max(need, self._ahead), align=align)
            self._ahead = min(self._ahead * 2, self._ahead_max)
        except ExhaustedError:
            if need >= self._ahead:
                raise
            self._ahead = 1
            self._lease(need, align=align)

    def _lease(self, blocks: int, *, align: int = 1) -> None:
        for start, end in self.leases.lease(self.tree_id, blocks, align=align, policy=self.policy):
            self._free.add(start * BLOCK_PAGES, (end - start) * BLOCK_PAGES)
            self._blocks += end - start

    def free(self, starts: Any, counts: Any) -> None:
        """Give runs back (first pfns and counts); neighbours join, memory goes back to the host."""
        if len(starts) == 1:
            start, count = int(starts[0]), int(counts[0])
            self.ram.punch_run(start, count)
            self._free.add(start, count)
        else:
            count = self._free_many(Spans.from_runs(starts, counts), int(np.sum(counts)))
        self._freed += count
        # a search costs one pass over all runs, so it is done once for many frees
        enough = max(self._stock * BLOCK_PAGES, len(self._free) // 8)
        if self._freed >= enough and self._free.total - self._held > 2 * self._stock * BLOCK_PAGES:
            self._freed = 0
            self._give_back()

    def _free_many(self, spans: Spans, count: int) -> int:
        if spans.total != count:
            raise AssertionError(f"{count - spans.total} pages are freed twice")
        self.ram.punch(spans)
        for start, end in spans:
            self._free.add(start, end - start)
        return count

    def _give_back(self) -> None:
        """Release wholly free blocks beyond the stock."""
        free = self._free.spans()
        whole = free.inward(BLOCK_PAGES)
        keep = self._stock + -(-self._held // BLOCK_PAGES)
        surplus = _last(whole, whole.total - keep)
        if not surplus:
            return
        self.leases.release(self.tree_id, surplus)  # first, because it can fail
        # runs: the free run that contains each range of surplus blocks. Shape: (ranges,).
        pages = surplus.scale(BLOCK_PAGES)
        runs = free.starts[np.searchsorted(free.starts, pages.starts, side="right") - 1]
        for run, (start, end) in zip(runs.tolist(), pages, strict=True):
            self._free.cut(run, start, end - start)
        self._blocks -= surplus.total

    def adopt(self, used: Spans) -> None:
        """Take over the blocks that the tree id holds already; their pages outside of `used` are free."""
        blocks = self.leases.blocks_of(self.tree_id)
        pages = blocks.scale(BLOCK_PAGES)
        if used - pages:
            raise AssertionError(f"tree {self.tree_id:x} uses pages outside its page blocks")
        free = pages - used
        self.ram.punch(free)
        self._free, self._blocks = FreeRuns(), blocks.total
        for start, end in free:
            self._free.add(start, end - start)

    def used(self) -> Spans:
        """Return every allocated page."""
        return self.leases.blocks_of(self.tree_id).scale(BLOCK_PAGES) - self._free.spans()

    def release_all(self) -> None:
        """Give every block back: the tree has ended."""
        self.leases.release(self.tree_id, self.leases.blocks_of(self.tree_id))
        self._free, self._blocks, self._held = FreeRuns(), 0, 0


def _part(blocks: int, share: int, most: int) -> int:
    """Return a part of RAM's blocks, at least one and at most `most`."""
    return max(1, min(most, blocks // share))


def _last(blocks: Spans, count: int) -> Spans:
    """Return the highest `count` numbers of a set."""
    if count <= 0:
        return Spans()
    # The first `skip` numbers go: keep the ranges that end behind them, and cut the first of these. Shape: (ranges,).
    skip = blocks.total - count
    ends = np.cumsum(blocks.counts)
    keep = ends > skip
    starts = blocks.starts[keep].copy()
    starts[0] += np.uint64(skip) - (ends[keep][0] - blocks.counts[keep][0])
    return Spans.from_arrays(starts, blocks.ends[keep])
