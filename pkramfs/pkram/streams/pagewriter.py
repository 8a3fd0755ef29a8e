# SPDX-License-Identifier: GPL-2.0-or-later
"""The page stream of an object, being written: runs or blocks of frames to rows, rows to links.

    save_runs(index, pfn, count)    ─► aligned blocks ─┐
    save_pages(index, pfn, order)   ────── as they are ┴─► links

Any number of threads may save pages of one object at once (rows 32-34). Small calls are collected
until they fill 64 links, so a file of one page does not cost a link of its own (D30); whoever fills
them up writes them, outside of the lock. Links carry their index, so the order in which they were
added, which happens under the lock, does not matter to a reader.

Memory does not grow with the saved pages: the given arrays are worked through in slices.

Kernel: mm/pkram.c (pkram_save_file_page), patches 4, 5, 32 to 34
"""

import errno
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pkramfs.errors import FormatError, PkramError
from pkramfs.machine.frames import Run
from pkramfs.pkram import parallel
from pkramfs.pkram.format import ENTRY_HUGE, LINK_CAPACITY
from pkramfs.pkram.frameset import Extent, FrameSet
from pkramfs.pkram.relocate import touched
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.streams import link, linkreader, scattered
from pkramfs.pkram.streams.columns import Columns, as_columns, as_numbers
from pkramfs.pkram.streams.completeness import Completeness
from pkramfs.pkram.streams.indices import Indices
from pkramfs.pkram.streams.link import BATCH, Rows
from pkramfs.pkram.streams.linkreader import INDEX_MAX
from pkramfs.pkram.streams.linkwriter import LinkWriter
from pkramfs.pkram.streams.runs import all_runs
from pkramfs.spans import U64
from pkramfs.units import BLOCK_ORDER, MAX_ORDER

_COLLECT = BATCH * LINK_CAPACITY
"""Blocks that are collected before links are taken for them."""
_SLICE = scattered.SLICE
"""Runs of a call that one thread works on at once: whole links, if each is one page."""


class PageWriter:
    """The pages of one object. `count` frames are named so far; `relocated` are the runs that hold copies."""

    def __init__(
        self,
        frames: SaveFrames,
        named: FrameSet,
        links: LinkWriter,
        completeness: Completeness,
        *,
        strict: bool,
        align: bool,
    ) -> None:
        self._frames, self._named, self._links, self._completeness = frames, named, links, completeness
        self._strict, self._align = strict, align
        self._lock = threading.Lock()
        self._collected: list[Rows] = []
        self._waiting = 0
        self._chains: list[U64] = []
        self._indices = Indices()
        self.count = 0
        self.relocated: list[Run] = []

    def save_runs(self, index: Any, pfn: Any, count: Any) -> None:
        """Preserve runs of frames: arrays (u64) of first index, first pfn and pages; from any thread.

        Frames are not copied unless they are banned. They become the fewest naturally aligned
        blocks, or one entry each in a strict save. Errors: EINVAL (not memory, index too large),
        EEXIST (a frame or an index is saved twice; told here or by `finish`), ENOMEM.

        Kernel: pkram_save_file_page()
        """
        columns = as_columns(index, pfn, count)
        if not len(columns[0]):
            return
        extent, dense = self._check_indices(columns)
        if self._frames.banned:
            self._named.expect_memory(columns[1], columns[2], extent)
        else:
            self._name(columns[1], columns[2], extent)

        def work(number: int) -> Rows:
            index, pfn, count = _part(columns, number)
            if self._frames.banned:
                return link.run_rows(*self._relocate(index, pfn, count), strict=self._strict)
            return link.run_rows(index, pfn, count, strict=self._strict, dense=dense[number])

        self._each(work, len(columns[0]))

    def _relocate(self, index: U64, pfn: U64, count: U64) -> Columns:
        """Copy the banned pages of runs elsewhere, name all frames, and return runs without banned pages."""
        index, pfn, count, copies = self._frames.relocate(index, pfn, count)
        with self._lock:
            self.relocated += copies
        self._name(pfn, count)
        return index, pfn, count

    def _each(self, work: Callable[[int], Rows], runs: int) -> None:
        """Make rows of every slice of a call, on all CPUs, and add their links in the order of slices."""

        def write(number: int) -> U64 | None:
            blocks = work(number)
            if steps == 1 and blocks.entries < _COLLECT:
                self._collect(blocks)
                return None
            return self._write_pages(blocks)

        steps = -(-runs // _SLICE)
        with self._completeness.required():
            chains = parallel.each(write, steps)
        with self._lock:
            self._chains += [links for links in chains if links is not None and len(links)]

    def save_pages(self, index: Any, pfn: Any, order: Any) -> None:
        """Preserve blocks as they are: arrays of index, pfn (aligned to the order) and order 0 to 18.

        An order-9 block is marked as a huge page. Blocks that touch banned memory are relocated and
        come back in pieces. Errors as in `save_runs`.

        Kernel: pkram_save_file_page() with a compound page
        """
        numbers = as_numbers(order)
        if (numbers > MAX_ORDER).any():
            raise PkramError(f"the order of a block to preserve is above {MAX_ORDER}", errno.EINVAL)
        orders = numbers.astype(np.uint8)
        columns = as_columns(index, pfn, np.broadcast_to(np.uint64(1), len(orders)))
        if not len(orders):
            return
        if (orders == orders[0]).all() and not self._frames.banned:
            self._save_equal(*columns[:2], int(orders[0]))
        else:
            self._save_mixed(as_columns(index, pfn, link.sizes(orders)), orders)

    def _save_equal(self, index: U64, pfn: U64, order: int) -> None:
        """Preserve blocks of one order: those that continue each other as one row, for they are many and do."""
        if int(np.bitwise_or.reduce(pfn)) & ((1 << order) - 1):
            raise _unaligned()
        columns = link.join_equal(index, pfn, order)
        self._name(columns[1], columns[2], self._check_indices(columns)[0])

        def work(number: int) -> Rows:
            index, pfn, count = _part(columns, number)
            orders = np.full(len(pfn), order, dtype=np.uint8)
            return link.rows(index, pfn, orders, _flags(orders), count >> np.uint64(order))

        self._each(work, len(columns[0]))

    def _save_mixed(self, columns: Columns, orders: link.U8) -> None:
        """Preserve blocks of any order, of which some may have to be relocated."""
        if (columns[1] & (columns[2] - np.uint64(1))).any():
            raise _unaligned()
        hit = touched(self._frames.banned, columns[1], columns[2])
        if not hit.any():
            self._save_in_place(columns, orders)
            return
        with self._completeness.required():
            self.save_runs(*(column[hit] for column in columns))
            if not hit.all():
                self._save_in_place(as_columns(*(column[~hit] for column in columns)), orders[~hit])

    def _save_in_place(self, columns: Columns, orders: link.U8) -> None:
        """Preserve blocks of any order where they are."""
        self._name(columns[1], columns[2], self._check_indices(columns)[0])

        def work(number: int) -> Rows:
            index, pfn, _ = _part(columns, number)
            order = orders[number * _SLICE : (number + 1) * _SLICE]
            return link.rows(index, pfn, order, _flags(order))

        self._each(work, len(orders))

    def _check_indices(self, columns: Columns) -> tuple[Extent, list[bool]]:
        """Check that no index is too large; PkramError (EINVAL) otherwise.

        Return the extent of the counts, and for each slice True if it has only single pages with consecutive indices.
        """

        def work(number: int) -> tuple[Extent, bool]:
            index, _, count = _part(columns, number)
            with self._links.benches.lend() as bench:
                extent = scattered.extent(count, bench)
                dense = extent.most == 1 and scattered.dense(index, bench)
            high = max(int(index[0]), int(index[-1])) if dense else int(index.max())
            if max(high, extent.most) > INDEX_MAX or (extent.most > 1 and int((index + count).max()) > INDEX_MAX):
                raise PkramError("the index of a page to preserve is too large", errno.EINVAL)
            return extent, dense

        extents, dense = zip(*parallel.each(work, -(-len(columns[0]) // _SLICE)), strict=True)
        return Extent.together(list(extents)), list(dense)

    def _name(self, pfn: U64, count: U64, extent: Extent | None = None) -> None:
        try:
            total = self._named.add(pfn, count, extent)
        except PkramError as error:
            if self._named.refused:
                self._completeness.fail(error)
            raise
        with self._lock:
            self.count += total

    def _collect(self, blocks: Rows) -> None:
        """Keep the blocks of small calls until there are enough for 64 links: copies, for arrays are the caller's."""
        blocks = replace(blocks, index=blocks.index.copy(), pfn=blocks.pfn.copy(), repeat=blocks.repeat.copy())
        with self._lock:
            self._collected.append(blocks)
            self._waiting += blocks.entries
            if self._waiting < _COLLECT:
                return
            full, self._collected, self._waiting = self._collected, [], 0
        self._write(_together(full))

    def _write(self, blocks: Rows) -> None:
        """Write links of blocks, and add them to the stream."""
        links = self._write_pages(blocks)
        with self._lock:
            self._chains.append(links)

    def _write_pages(self, blocks: Rows) -> U64:
        """Write links of the page stream, and note which indices they name."""
        self._indices.add(blocks)
        return self._links.write(blocks, align=self._align)

    # -- the end -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write links of the collected rows."""
        if self._collected:
            full, self._collected = self._collected, []
            self._write(_together(full))

    def finish(self) -> U64:
        """Chain all links; return their pfns, in order. PkramError (EEXIST) if an index was saved twice."""
        links = self._chain_all()
        if self._indices.doubtful:
            self._expect_each_index_once(links)
        return links

    def _chain_all(self) -> U64:
        """Hang the chains of all calls behind one another."""
        for before, after in itertools.pairwise(self._chains):
            self._links.hang(before, after)
        return np.concatenate(self._chains) if self._chains else np.empty(0, dtype=np.uint64)

    def _expect_each_index_once(self, links: U64) -> None:
        """Read the links back, as a load does; PkramError (EEXIST) if an index has two pages."""
        ends, allowed = (int(links[0]), int(links[-1])), self._frames.spans()
        found = linkreader.read(
            self._frames.ram,
            0,
            ("pages_head", ends[0]),
            ends[1],
            len(links),
            generation=self._links.generation,
            allowed=allowed,
        )
        try:
            all_runs(found)
        except FormatError:
            raise PkramError("an index was saved twice", errno.EEXIST) from None


def _flags(order: link.U8) -> link.U8:
    """Return the flags of entries of these orders."""
    return np.where(order == BLOCK_ORDER, ENTRY_HUGE, 0).astype(np.uint8)


def _unaligned() -> PkramError:
    return PkramError("a block to preserve is not aligned to its order", errno.EINVAL)


def _part(columns: Columns, number: int) -> Columns:
    """Return one slice of a call."""
    index, pfn, count = (column[number * _SLICE : (number + 1) * _SLICE] for column in columns)
    return index, pfn, count


def _together(parts: list[Rows]) -> Rows:
    """Merge the rows of many calls, by index."""
    if len(parts) == 1:
        return parts[0]
    index = np.concatenate([part.index for part in parts])
    by_index = np.argsort(index, kind="stable")
    return Rows(
        index[by_index],
        np.concatenate([part.pfn for part in parts])[by_index],
        np.concatenate([part.order for part in parts])[by_index],
        np.concatenate([part.flags for part in parts])[by_index],
        np.concatenate([part.repeat for part in parts])[by_index],
        all(part.single for part in parts),
    )
