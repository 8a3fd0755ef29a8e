# SPDX-License-Identifier: GPL-2.0-or-later
"""Link pages: packed entries (frame, order, flags) of index-contiguous runs, and how they are made.

    link  index 512: | 2^9 at 40000 | 2^0 at 51 | 2^0 at 52 |      indices 512, 1024, 1025

A link has the index of its first entry only; the others follow from the sizes before them. So a
jump in the index begins a new link, and a link can be read without any other. With `align`, links
also begin where an aligned group of indices would not fit whole (row 43), so that a loader gets
batches that begin on round indices: 448 of 504 (of PKRAM's 510) entries for base pages, 504 for huge.

The input is *rows*: row k stands for repeat[k] blocks of one order that follow one
another in index and in memory. Where links begin is computed on rows; entries are made for 64 links
at a time, which fit into the L2 cache, so memory does not grow with the saved pages.

Kernel: mm/pkram.c (struct pkram_link, pkram_add_link), patches 4, 5, 33 and 43
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from pkramfs.machine.ram import Ram
from pkramfs.pkram import parallel
from pkramfs.pkram.format import (
    COVERED,
    ENTRY_FLAGS_MASK,
    ENTRY_FLAGS_SHIFT,
    ENTRY_ORDER_MASK,
    ENTRY_PFN_SHIFT,
    LINK,
    LINK_CAPACITY,
    LINK_MAGIC,
    NEXT,
    OTHER,
)
from pkramfs.pkram.page import seal_array, write_word
from pkramfs.spans import U64, distinct
from pkramfs.units import MAX_ORDER, PAGE_SHIFT, PAGE_SIZE

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

BATCH = 64
"""Links whose entries are read in one step: 252 KiB."""
WRITE = 256
"""Links that are made in one step: 1 MiB. With 64, threads were in each other's way at the lock of the file: 83 ms
for the 200 MiB of 100 GiB, with 32 even 155, where to write as much without any work takes 74, and so does this."""
HEAD_WORDS = LINK.size // 8
PAGE_WORDS = PAGE_SIZE // 8
_COLUMN = np.arange(LINK_CAPACITY, dtype=np.uint64)
_STEP = np.uint64(1 << ENTRY_PFN_SHIFT)
_GROUPS = {0: (64, 64), 9: (4096, 8)}
"""Row 43: entries of this order, at an index that is a multiple of the first, come in groups of the second."""


def encode(pfn: U64, order: U8, flags: int = 0) -> U64:
    """Return the entries of naturally aligned blocks."""
    low = order.astype(np.uint64) | np.uint64(flags << ENTRY_FLAGS_SHIFT)
    return (pfn << np.uint64(ENTRY_PFN_SHIFT)) | low


def decode(entries: U64) -> tuple[U64, U8, U8]:
    """Return (pfn, order, flags) of entries."""
    order = (entries & np.uint64(ENTRY_ORDER_MASK)).astype(np.uint8)
    flags = ((entries >> np.uint64(ENTRY_FLAGS_SHIFT)) & np.uint64(ENTRY_FLAGS_MASK)).astype(np.uint8)
    return entries >> np.uint64(ENTRY_PFN_SHIFT), order, flags


def sizes(order: U8) -> U64:
    """Return the number of pages of blocks of these orders."""
    return np.uint64(1) << order.astype(np.uint64)


def split_runs(index: U64, pfn: U64, count: U64) -> tuple[U64, U64, U8]:
    """Cut runs of pages into the fewest naturally aligned blocks: return (index, pfn, order) by index.

    All runs are cut at once, one order at a time: first the rising orders that bring a run to its
    largest alignment, then blocks of the largest order, then the falling ones of the rest.
    """
    alone = count == 1
    if alone.all():
        return index, pfn, np.zeros(len(pfn), dtype=np.uint8)
    parts = [(index[alone], pfn[alone], np.zeros(int(alone.sum()), dtype=np.uint8))]
    index, pfn, left = index[~alone].copy(), pfn[~alone].copy(), count[~alone].copy()
    stopped = np.zeros(len(pfn), dtype=bool)
    one = np.uint64(1)

    # Every round takes a block from the front of the chosen runs: index and pfn move on, what is left shrinks.
    def emit(chosen: npt.NDArray[np.bool_], order: int) -> None:
        size = one << np.uint64(order)
        parts.append((index[chosen], pfn[chosen], np.full(int(chosen.sum()), order, dtype=np.uint8)))
        index[chosen] += size
        pfn[chosen] += size
        left[chosen] -= size

    # Rising orders: a run whose pfn has this bit set is aligned to the order and to none above, so it gives a
    # block of it, unless too little is left; then (stopped) the falling orders take the rest.
    for order in range(MAX_ORDER):
        bit = (pfn >> np.uint64(order) & one).astype(bool) & ~stopped
        room = left >= one << np.uint64(order)
        stopped |= bit & ~room
        emit(bit & room, order)
    _emit_largest(index, pfn, left, stopped, parts)
    # Falling orders: the bits of what is left, largest first, are the blocks that remain.
    for order in reversed(range(MAX_ORDER)):
        emit((left >> np.uint64(order) & one).astype(bool), order)
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    by_index = np.argsort(joined[0], kind="stable")
    return joined[0][by_index], joined[1][by_index], joined[2][by_index]


def _emit_largest(
    index: U64, pfn: U64, left: U64, stopped: npt.NDArray[np.bool_], parts: list[tuple[U64, U64, U8]]
) -> None:
    """Take as many blocks of the largest order as fit from every run that is aligned to it."""
    blocks = np.where(stopped, np.uint64(0), left >> np.uint64(MAX_ORDER))
    total = int(blocks.sum())
    if not total:
        return
    # One element for each block: the run it belongs to, and its number within that run times its size.
    which = np.repeat(np.arange(len(pfn)), blocks.astype(np.int64))
    before = np.repeat(np.cumsum(blocks) - blocks, blocks.astype(np.int64))
    offset = (np.arange(total, dtype=np.uint64) - before) << np.uint64(MAX_ORDER)
    parts.append((index[which] + offset, pfn[which] + offset, np.full(total, MAX_ORDER, dtype=np.uint8)))
    taken = blocks << np.uint64(MAX_ORDER)
    index += taken
    pfn += taken
    left -= taken


def join_runs(index: U64, pfn: U64, count: U64) -> tuple[U64, U64, U64]:
    """Join runs, given by index, into the fewest runs."""
    fresh = np.ones(len(index), dtype=bool)
    fresh[1:] = (index[1:] != index[:-1] + count[:-1]) | (pfn[1:] != pfn[:-1] + count[:-1])
    if fresh.all():
        return index, pfn, count
    first = np.flatnonzero(fresh)
    return index[first], pfn[first], np.add.reduceat(count, first)


def join_equal(index: U64, pfn: U64, order: int) -> tuple[U64, U64, U64]:
    """Join blocks of one order, in the given sequence, into runs (index, pfn, count)."""
    size = np.uint64(1 << order)
    fresh = (index[1:] - index[:-1] != size) | (pfn[1:] - pfn[:-1] != size)
    first = np.append(0, np.flatnonzero(fresh) + 1)
    return index[first], pfn[first], np.diff(np.append(first, len(pfn))).astype(np.uint64) << np.uint64(order)


def join_blocks(index: U64, pfn: U64, order: U8) -> tuple[U64, U64, U64]:
    """Join blocks, given by index, into the fewest runs (index, pfn, count): the reverse of `split_runs`."""
    return join_runs(index, pfn, sizes(order))


@dataclass(frozen=True)
class Rows:
    """Blocks to write: row k is repeat[k] blocks of 2**order[k] pages, one after the other.

    `single` says that all are one page each, which `singles` writes; `dense` that indices follow one another, too.
    """

    index: U64
    pfn: U64
    order: U8
    flags: U8
    repeat: I64
    single: bool = False
    dense: bool = False

    @property
    def entries(self) -> int:
        """Return the number of entries that the rows become."""
        return len(self.index) if self.single else int(self.repeat.sum())

    @property
    def pages(self) -> U64:
        """Return the pages of each row."""
        repeat = self.repeat.view(np.uint64)
        return sizes(self.order) * repeat if self.order.any() else repeat


def rows(index: U64, pfn: U64, order: U8, flags: U8 | None = None, repeat: U64 | None = None) -> Rows:
    """Return rows of one block each, or of `repeat` blocks."""
    flags = np.zeros(len(index), dtype=np.uint8) if flags is None else flags
    counts = np.broadcast_to(np.int64(1), len(index)) if repeat is None else repeat.astype(np.int64)
    return Rows(index, pfn, order, flags, counts)


def single_rows(index: U64, pfn: U64, *, dense: bool) -> Rows:
    """Return rows of one page each."""
    none, once = np.broadcast_to(np.uint8(0), len(pfn)), np.broadcast_to(np.int64(1), len(pfn))
    return Rows(index, pfn, none, none, once, single=True, dense=dense)


def run_rows(index: U64, pfn: U64, count: U64, *, strict: bool, dense: bool = False) -> Rows:
    """Return runs as rows of the fewest naturally aligned blocks, or of single pages in a strict save.

    `dense` says that all runs are single pages whose indices follow one another.
    """
    if dense or int(count.max()) == 1:  # counts that are known to be 1 are not read again
        return single_rows(index, pfn, dense=dense)
    if strict:
        return rows(index, pfn, np.zeros(len(pfn), dtype=np.uint8), repeat=count)
    return rows(*split_runs(index, pfn, count))


@dataclass(frozen=True)
class Plan:
    """Where links begin among the entries of rows, how many entries each has, and its first index."""

    offsets: I64
    starts: I64
    counts: I64
    index: U64


def plan(blocks: Rows, capacity: int = LINK_CAPACITY, *, align: bool = False) -> Plan:
    """Cut rows into links: after every jump of the index, after `capacity` entries, and as row 43 wants it."""
    # offsets[k]: number of the first entry of row k among all entries. edges: rows behind a jump of the index.
    offsets = np.zeros(len(blocks.repeat) + 1, dtype=np.int64)
    np.cumsum(blocks.repeat, out=offsets[1:])
    jumps = np.flatnonzero(blocks.index[1:] != blocks.index[:-1] + blocks.pages[:-1]) + 1
    edges = np.concatenate(([0], jumps, [len(blocks.index)])).astype(np.int64) if len(blocks.index) else jumps[:0]
    if align and len(edges):
        starts = np.concatenate([_aligned_starts(blocks, offsets, a, b, capacity) for a, b in pairwise(edges.tolist())])
    else:
        starts = plain_starts(offsets[edges], capacity)
    # The row in which each link begins, and from it the link's first index.
    row = np.searchsorted(offsets, starts, side="right") - 1
    index = blocks.index[row] + ((starts - offsets[row]).astype(np.uint64) << blocks.order[row].astype(np.uint64))
    return Plan(offsets, starts, np.diff(np.append(starts, offsets[-1])), index)


def plain_starts(edges: I64, capacity: int) -> I64:
    """Cut every stretch between edges after each `capacity` entries."""
    links = -(-np.diff(edges) // capacity)
    before = np.repeat(np.cumsum(links) - links, links)
    starts: I64 = np.repeat(edges[:-1], links) + (np.arange(int(links.sum())) - before) * capacity
    return starts


def _aligned_starts(blocks: Rows, offsets: I64, first: int, last: int, capacity: int) -> I64:
    """Apply row 43 to rows without a jump: return where links begin, each ending before a group that would not fit."""
    start, end = int(offsets[first]), int(offsets[last])
    orders = distinct(blocks.order[first:last])
    if len(orders) > 1:
        return np.fromiter(_mixed_starts(blocks, offsets, first, last, capacity), dtype=np.int64)
    order = int(orders[0])
    if order not in _GROUPS or int(blocks.index[first]) % (1 << order):
        return plain_starts(np.array([start, end]), capacity)
    step, group = _GROUPS[order]
    ahead = -int(blocks.index[first]) % step >> order  # entries before the first aligned one
    whole = ahead + (capacity - ahead) // group * group
    starts = np.arange(start + whole, end, capacity // group * group)
    return np.concatenate(([start], starts)).astype(np.int64)


def _mixed_starts(blocks: Rows, offsets: I64, first: int, last: int, capacity: int) -> Iterator[int]:
    """Yield where links begin if orders change on the way: entry by entry, for such rows are few."""
    part = slice(first, last)
    order = np.repeat(blocks.order[part], blocks.repeat[part])
    index = blocks.index[first] + np.cumsum(sizes(order)) - sizes(order)
    base, end = int(offsets[first]), int(offsets[last] - offsets[first])
    aligned = [
        (np.flatnonzero((order == wanted) & (index % np.uint64(step) == 0)), capacity - group)
        for wanted, (step, group) in _GROUPS.items()
    ]
    at = 0
    while at < end:
        yield base + at
        stop = min(at + capacity, end)
        for where, full in aligned:
            place = int(np.searchsorted(where, at + full, side="right"))
            if place < len(where):
                stop = min(stop, int(where[place]))
        at = stop


def expand(blocks: Rows, offsets: I64, first: int, last: int) -> U64:
    """Return the entries first … last-1 of all that rows stand for."""
    low = int(np.searchsorted(offsets, first, side="right")) - 1
    high = int(np.searchsorted(offsets, last, side="left"))
    part = slice(low, high)
    entries = _entries(blocks, part)
    if first == offsets[low] and len(entries) == last - first:
        return entries
    step = sizes(blocks.order[part]) << np.uint64(ENTRY_PFN_SHIFT)
    entries[0] += np.uint64(first - int(offsets[low])) * step[0]
    if len(entries) == last - first:
        return entries
    # The part of each row that is needed, and the position of each entry within its row: shape (last - first,).
    repeat = np.minimum(offsets[low + 1 : high + 1], last) - np.maximum(offsets[part], first)
    within = np.arange(last - first, dtype=np.uint64) - np.repeat(np.cumsum(repeat) - repeat, repeat).astype(np.uint64)
    return np.repeat(entries, repeat) + within * np.repeat(step, repeat)


def _entries(blocks: Rows, part: slice) -> U64:
    """Return the first entry of each of some rows."""
    entries = blocks.pfn[part] << np.uint64(ENTRY_PFN_SHIFT)
    if blocks.order[part].any() or blocks.flags[part].any():
        entries |= blocks.order[part]
        entries |= blocks.flags[part].astype(np.uint64) << np.uint64(ENTRY_FLAGS_SHIFT)
    return entries


class Links:
    """A buffer for links that are being made, and the bytes that the checksum of each covers."""

    def __init__(self, number: int) -> None:
        self.words = np.zeros((number, PAGE_WORDS), dtype=np.uint64)
        whole = memoryview(self.words).cast("B")  # type: ignore[arg-type]
        self.bytes = whole
        self.covered = [whole[at + COVERED : at + PAGE_SIZE] for at in range(0, len(whole), PAGE_SIZE)]

    @cached_property
    def ahead(self) -> U64:
        """Return what single pages in a row add to the first entry of full links, shape (links, 512).

        Made when it is first needed, for it is as large as the buffer.
        """
        found: I64 = np.arange(len(self.words))[:, None] * LINK_CAPACITY + np.arange(PAGE_WORDS) - HEAD_WORDS
        return found.view(np.uint64) * _STEP

    def write(self, ram: Ram, pages: U64, heads: U64) -> None:
        """Seal the first len(pages) links, whose entries are there, and copy them to their pages."""
        words = self.words[: len(pages)]
        words[:, :HEAD_WORDS] = heads
        digests = map(xxhash.xxh3_64_intdigest, self.covered, pages.tolist())
        words[:, 1] = np.fromiter(digests, np.uint64, len(pages))
        edges = [0, *(np.flatnonzero(pages[1:] != pages[:-1] + np.uint64(1)) + 1).tolist(), len(pages)]
        for low, high in pairwise(edges):
            ram.write(int(pages[low]), self.bytes[low * PAGE_SIZE : high * PAGE_SIZE])


_benches = parallel.Workbenches(lambda: Links(WRITE))


def write_links(ram: Ram, pages: U64, blocks: Rows, where: Plan, generation: int) -> None:
    """Make link pages, chained in order and sealed. `pages` has one pfn for each link.

    Links are made in a buffer that stays in the cache and written from there: memory that is touched
    for the first time costs far more than the arithmetic, and through a mapping most of all.
    """
    heads = headers(pages, where, generation)

    def write(batch: int) -> None:
        part = slice(batch * WRITE, (batch + 1) * WRITE)
        with _benches.lend() as links:
            _lay_out_batch(links, blocks, where, part)
            links.write(ram, pages[part], heads[part])

    parallel.each(write, -(-len(pages) // WRITE), threads=None if len(pages) > 2 * WRITE else 1)


def headers(pages: U64, where: Plan, generation: int) -> U64:
    """Return the headers of links, a row each, but for the checksum."""
    heads, address = np.zeros((len(pages), HEAD_WORDS), dtype=np.uint64), pages << np.uint64(PAGE_SHIFT)
    heads[:, 0] = LINK_MAGIC
    heads[:, 2] = seal_array(np.append(pages[1:], np.uint64(0)), address + np.uint64(NEXT))
    heads[:, 3] = seal_array(np.zeros_like(pages), address + np.uint64(OTHER))
    heads[:, 4], heads[:, 5], heads[:, 6] = generation, where.index, where.counts
    return heads


def _lay_out_batch(links: Links, blocks: Rows, where: Plan, part: slice) -> None:
    """Fill the entries of the links of a batch."""
    starts, counts = where.starts[part], where.counts[part]
    first, last = int(starts[0]), int(starts[-1] + counts[-1])
    low = int(np.searchsorted(where.offsets, first, side="right")) - 1
    if last <= where.offsets[low + 1]:
        _lay_out_row(links, blocks, low, starts - where.offsets[low], counts)
    else:
        _lay_out(links.words[: len(counts), HEAD_WORDS:], expand(blocks, where.offsets, first, last), counts)


def _lay_out_row(links: Links, blocks: Rows, row: int, starts: I64, counts: I64) -> None:
    """Fill a batch from one row of blocks, which is an arithmetic progression; memory without gaps is much quicker."""
    here, words = slice(row, row + 1), links.words[: len(counts)]
    step = sizes(blocks.order[here]) << np.uint64(ENTRY_PFN_SHIFT)
    base = _entries(blocks, here) + starts.astype(np.uint64) * step
    if step[0] == _STEP and (counts[:-1] == LINK_CAPACITY).all():
        np.add(links.ahead[: len(words)], base[0], out=words)
    else:
        np.add(base[:, None], _COLUMN * step, out=words[:, HEAD_WORDS:])
    for short in np.flatnonzero(counts < LINK_CAPACITY).tolist():
        words[short, HEAD_WORDS + counts[short] :] = 0


def _lay_out(rows: U64, entries: U64, counts: I64) -> None:
    """Put entries into the rows of a batch: at once where all but the last are equally full."""
    full, number = int(counts[0]), len(counts)
    if (counts[:-1] == full).all():
        head = entries[: full * (number - 1)]
        rows[:-1, :full], rows[:-1, full:] = head.reshape(number - 1, full), 0
        rows[-1, : counts[-1]], rows[-1, counts[-1] :] = entries[len(head) :], 0
        return
    rows[:] = 0
    rows[np.arange(LINK_CAPACITY) < counts[:, None]] = entries


def hang(ram: Ram, pfn: int, following: int) -> None:
    """Chain another stream of links behind link page `pfn`."""
    write_word(ram, pfn, NEXT, following)
