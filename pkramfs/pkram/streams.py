"""The two streams of an object: bytes of any length, and pages by index. How they are written.

    bytes   write(b"…") write(b"…")        ─► frames, filled to the brim ─► links
    pages   save_runs(index, pfn, count)    ─► aligned blocks              ─► links

Any number of threads may save pages of one object at once (rows 32-34). Small calls are collected
until they fill 64 links, so a file of one page does not cost a link of its own (D30); whoever fills
them up writes them, outside of the lock. Links carry their index, so the order in which they were
added, which happens under the lock, does not matter to a reader. The byte stream belongs to one
thread.

Memory does not grow with what is saved: arrays that are given are worked through in slices.

Kernel: mm/pkram.c (pkram_write, pkram_save_file_page, pkram_add_link), patches 4, 5, 6, 32 to 34
"""

import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from pkramfs.errors import FormatError, PkramError
from pkramfs.pkram import chain, link, parallel, singles
from pkramfs.pkram.arena import Arena
from pkramfs.pkram.chain import INDEX_MAX
from pkramfs.pkram.format import ENTRY_HUGE, LINK_CAPACITY, NEXT, OBJECT, OBJECT_MAGIC, OTHER
from pkramfs.pkram.indices import Indices
from pkramfs.pkram.link import BATCH, Rows
from pkramfs.pkram.marks import Extent, Marks
from pkramfs.pkram.page import write_page
from pkramfs.pkram.relocate import Run, touched
from pkramfs.pkram.runs import all_runs
from pkramfs.spans import U64
from pkramfs.units import BLOCK_ORDER, MAX_ORDER, PAGE_SHIFT, PAGE_SIZE, pages

Columns = tuple[U64, U64, U64]

_FLUSH = 1 << 20
"""Bytes that the byte stream collects before it takes frames for them."""
_COLLECT = BATCH * LINK_CAPACITY
"""Blocks that the page stream collects before it takes links for them."""
_SLICE = singles.SLICE
"""Runs of a call that one thread works on at once: whole links, if each is one page."""


class ObjectWriter:
    """One object being saved. Use it in a `with`: leaving finishes it.

    Where a call fails after a part of it was done (no memory, a page named twice), or the `with` is left by an
    exception, the object is incomplete for good: every further call raises, and so does `Save.finish`.
    """

    def __init__(self, arena: Arena, marks: Marks, generation: int, *, strict: bool, align: bool) -> None:
        self._arena, self._ram, self._marks, self._generation = arena, arena.ram, marks, generation
        self._strict, self._align = strict, align
        self._buffer, self._byte_runs, self._length = bytearray(), list[Run](), 0
        self._digest = xxhash.xxh3_64()
        self._lock = threading.Lock()
        self._collected: list[Rows] = []
        self._waiting = 0
        self._chains: list[U64] = []
        self._benches = parallel.Workbenches(singles.Bench)
        self._indices = Indices()
        self._failure: BaseException | None = None
        self.page_count = 0
        self.moved: list[Run] = []
        self.values: dict[str, int] | None = None
        """The object record's fields, once finished."""

    def __enter__(self) -> "ObjectWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._failure = self._failure or error

    @contextmanager
    def _all_of_it(self) -> Iterator[None]:
        """What fails in here leaves half of itself behind, and a node must not say that it was all."""
        try:
            yield
        except BaseException as error:
            self._failure = self._failure or error
            raise

    def give_up(self) -> None:
        """The save was discarded: take no frames for this object any more."""
        self._failure = self._failure or PkramError("its node is not being saved any more", errno.EINVAL)

    def _expect_open(self) -> None:
        if self.values is not None:
            raise PkramError("the object is finished, nothing can be added to it", errno.EINVAL)
        self._expect_whole()

    def _expect_whole(self) -> None:
        if self._failure is not None:
            code = getattr(self._failure, "errno", None) or errno.EINVAL
            raise PkramError(f"an object to preserve is incomplete: {self._failure}", code) from self._failure

    # -- bytes -----------------------------------------------------------------------------------

    def write(self, data: Any) -> int:
        """Append bytes to the byte stream; returns how many. PkramError (ENOMEM) if memory is out."""
        self._expect_open()
        view = memoryview(data).cast("B")
        self._buffer += view
        self._length += len(view)
        self._digest.update(view)
        if len(self._buffer) >= _FLUSH:
            with self._all_of_it():
                self._flush_bytes(len(self._buffer) // PAGE_SIZE * PAGE_SIZE)
        return len(view)

    def _flush_bytes(self, size: int) -> None:
        done = 0
        for start, count in self._arena.take(pages(size)):
            part = memoryview(self._buffer)[done : min(done + count * PAGE_SIZE, size)]
            self._ram.fill(start << PAGE_SHIFT, part)
            done += len(part)
            part.release()
            self._byte_runs.append((start, count))
        del self._buffer[:size]

    # -- pages -----------------------------------------------------------------------------------

    def save_runs(self, index: Any, pfn: Any, count: Any) -> None:
        """Preserve runs of frames: arrays (u64) of first index, first pfn and pages; from any thread.

        Frames are not copied unless they are banned. They become the fewest naturally aligned
        blocks, or one entry each in a strict save. Errors: EINVAL (not memory, index too large),
        EEXIST (a frame or an index is saved twice; told here or by `finish`), ENOMEM.

        Kernel: pkram_save_file_page()
        """
        self._expect_open()
        columns = _columns(index, pfn, count)
        if not len(columns[0]):
            return
        extent, dense = self._check_indices(columns)
        if self._arena.banned:
            self._marks.expect_memory(columns[1], columns[2], extent)
        else:
            self._name(columns[1], columns[2], extent)

        def work(number: int) -> Rows:
            index, pfn, count = _part(columns, number)
            if self._arena.banned:
                return self._rows(*self._move_out(index, pfn, count))
            return self._rows(index, pfn, count, dense=dense[number])

        self._each(work, len(columns[0]))

    def _move_out(self, index: U64, pfn: U64, count: U64) -> Columns:
        """Runs of which no page is banned: what was has been copied; and name them."""
        index, pfn, count, copies = self._arena.move_out(index, pfn, count)
        with self._lock:
            self.moved += copies
        self._name(pfn, count)
        return index, pfn, count

    def _rows(self, index: U64, pfn: U64, count: U64, *, dense: bool = False) -> Rows:
        """Runs as rows: of the fewest aligned blocks, or of single pages in a strict save."""
        if dense or int(count.max()) == 1:  # counts that are known to be 1 are not read again
            return link.single_rows(index, pfn, dense=dense)
        if self._strict:
            return link.rows(index, pfn, np.zeros(len(pfn), dtype=np.uint8), repeat=count)
        return link.rows(*link.split_runs(index, pfn, count))

    def _each(self, work: Callable[[int], Rows], runs: int) -> None:
        """Make rows of every slice of a call, on all CPUs, and add what they become in the order of slices."""

        def write(number: int) -> U64 | None:
            blocks = work(number)
            if steps == 1 and blocks.entries < _COLLECT:
                self._collect(blocks)
                return None
            return self._write_pages(blocks)

        steps = -(-runs // _SLICE)
        with self._all_of_it():
            chains = parallel.each(write, steps)
        with self._lock:
            self._chains += [links for links in chains if links is not None and len(links)]

    def save_pages(self, index: Any, pfn: Any, order: Any) -> None:
        """Preserve blocks as they are: arrays of index, pfn (aligned to the order) and order 0 to 18.

        An order-9 block is marked as a huge page. Blocks that touch banned memory are moved and
        come back in pieces. Errors as in `save_runs`.

        Kernel: pkram_save_file_page() with a compound page
        """
        self._expect_open()
        numbers = _numbers(order)
        if (numbers > MAX_ORDER).any():
            raise PkramError(f"the order of a block to preserve is above {MAX_ORDER}", errno.EINVAL)
        orders = numbers.astype(np.uint8)
        columns = _columns(index, pfn, np.broadcast_to(np.uint64(1), len(orders)))
        if not len(orders):
            return
        if (orders == orders[0]).all() and not self._arena.banned:
            self._save_equal(*columns[:2], int(orders[0]))
        else:
            self._save_mixed(_columns(index, pfn, link.sizes(orders)), orders)

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
        """Preserve blocks of any order, of which some may have to be moved."""
        if (columns[1] & (columns[2] - np.uint64(1))).any():
            raise _unaligned()
        hit = touched(self._arena.banned, columns[1], columns[2])
        if not hit.any():
            self._save_unmoved(columns, orders)
            return
        with self._all_of_it():
            self.save_runs(*(column[hit] for column in columns))
            if not hit.all():
                self._save_unmoved(_columns(*(column[~hit] for column in columns)), orders[~hit])

    def _save_unmoved(self, columns: Columns, orders: link.U8) -> None:
        """Preserve blocks of any order where they are."""
        self._name(columns[1], columns[2], self._check_indices(columns)[0])

        def work(number: int) -> Rows:
            index, pfn, _ = _part(columns, number)
            order = orders[number * _SLICE : (number + 1) * _SLICE]
            return link.rows(index, pfn, order, _flags(order))

        self._each(work, len(orders))

    def _check_indices(self, columns: Columns) -> tuple[Extent, list[bool]]:
        """EINVAL for an index that is too large.

        Returns the counts' extent, and for each slice whether it is single pages whose indices follow one another.
        """

        def work(number: int) -> tuple[Extent, bool]:
            index, _, count = _part(columns, number)
            with self._benches.lend() as bench:
                extent = singles.extent(count, bench)
                dense = extent.most == 1 and singles.dense(index, bench)
            high = max(int(index[0]), int(index[-1])) if dense else int(index.max())
            if max(high, extent.most) > INDEX_MAX or (extent.most > 1 and int((index + count).max()) > INDEX_MAX):
                raise PkramError("the index of a page to preserve is too large", errno.EINVAL)
            return extent, dense

        extents, dense = zip(*parallel.each(work, -(-len(columns[0]) // _SLICE)), strict=True)
        return Extent.together(list(extents)), list(dense)

    def _name(self, pfn: U64, count: U64, extent: Extent | None = None) -> None:
        try:
            total = self._marks.add(pfn, count, extent)
        except PkramError as error:
            if self._marks.refused:
                self._failure = self._failure or error
            raise
        with self._lock:
            self.page_count += total

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
        return self._write_links(blocks, align=self._align)

    def _write_links(self, blocks: Rows, *, align: bool) -> U64:
        """Write one chain of links that nothing names yet; their pfns."""
        if blocks.single and not align and len(blocks.index) <= singles.SLICE:
            with self._benches.lend() as bench:
                return singles.write(self._ram, blocks, self._arena.pages, self._generation, bench)
        where = link.plan(blocks, align=align)
        places = self._arena.pages(len(where.starts))
        link.write_links(self._ram, places, blocks, where, self._generation)
        return places

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write what was collected and chain the links; the object is complete. PkramError if a part of it is missing.

        Kernel: pkram_finish_save_obj()
        """
        if self.values is not None:
            return
        self._expect_whole()
        with self._all_of_it():
            self._finish()

    def _finish(self) -> None:
        if self._buffer:
            self._flush_bytes(len(self._buffer))
        if self._collected:
            full, self._collected = self._collected, []
            self._write(_together(full))
        byte_links, page_links = self._finish_bytes(), self._chain_pages()
        if self._indices.doubtful:
            self._expect_each_index_once(page_links)
        self.values = {
            "generation": self._generation,
            "pages_head": int(page_links[0]) if len(page_links) else 0,
            "pages_tail": int(page_links[-1]) if len(page_links) else 0,
            "bytes_head": int(byte_links[0]) if len(byte_links) else 0,
            "bytes_tail": int(byte_links[-1]) if len(byte_links) else 0,
            "data_length": self._length,
            "data_checksum": self._digest.intdigest(),
            "page_count": self.page_count,
            "page_links": len(page_links),
            "byte_links": len(byte_links),
        }

    def _finish_bytes(self) -> U64:
        if not self._byte_runs:
            return np.empty(0, dtype=np.uint64)
        runs = np.array(self._byte_runs, dtype=np.uint64)
        pfn, count = runs[:, 0].copy(), runs[:, 1].copy()
        index = np.cumsum(count) - count
        return self._write_links(self._rows(index, pfn, count), align=False)

    def _chain_pages(self) -> U64:
        """Hang the chains of all calls behind one another."""
        for before, after in itertools.pairwise(self._chains):
            link.hang(self._ram, int(before[-1]), int(after[0]))
        return np.concatenate(self._chains) if self._chains else np.empty(0, dtype=np.uint64)

    def _expect_each_index_once(self, links: U64) -> None:
        """EEXIST if an index has two pages: the links are read back, as a load does."""
        ends, allowed = (int(links[0]), int(links[-1])), self._arena.spans()
        found = chain.read(
            self._ram, 0, ("pages_head", ends[0]), ends[1], len(links), generation=self._generation, allowed=allowed
        )
        try:
            all_runs(found)
        except FormatError:
            raise PkramError("an index was saved twice", errno.EEXIST) from None

    def write_record(self, pfn: int, following: int) -> None:
        """Write the object's own page, naming the next object."""
        if self.values is None:
            raise AssertionError("the object was not finished")
        write_page(self._ram, pfn, OBJECT, {NEXT: 0, OTHER: 0}, magic=OBJECT_MAGIC, object=following, **self.values)


def _flags(order: link.U8) -> link.U8:
    """The flags of entries of these orders."""
    return np.where(order == BLOCK_ORDER, ENTRY_HUGE, 0).astype(np.uint8)


def _unaligned() -> PkramError:
    return PkramError("a block to preserve is not aligned to its order", errno.EINVAL)


def _part(columns: Columns, number: int) -> Columns:
    """One slice of a call."""
    index, pfn, count = (column[number * _SLICE : (number + 1) * _SLICE] for column in columns)
    return index, pfn, count


def _columns(index: Any, pfn: Any, count: Any) -> Columns:
    """Three columns of one length as arrays; EINVAL if they are not."""
    first, second, third = map(_numbers, (index, pfn, count))
    if not len(first) == len(second) == len(third):
        raise PkramError("index, pfn and count are not of one length", errno.EINVAL)
    return first, second, third


def _numbers(column: Any) -> U64:
    """A column as an array; EINVAL for what is no integer. Below zero it becomes too large, which is refused later."""
    array = np.asarray(column)
    if array.dtype.kind not in "iu" and array.size:
        raise PkramError("index, pfn, count and order must be integers of up to 64 bits", errno.EINVAL)
    return array.astype(np.uint64, copy=False).reshape(-1)


def _together(parts: list[Rows]) -> Rows:
    """Rows of many calls as one, by index."""
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
