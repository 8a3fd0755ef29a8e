"""Link pages: packed entries (frame, order, flags) of index-contiguous runs, encoded in bulk.

    link  index 512: | 2^9 at 40000 | 2^0 at 51 | 2^0 at 52 |      indices 512, 1024, 1025

A link tells the index of its first entry only; the others follow from the sizes before them. So a
jump in the index begins a new link, and a link can be read without any other. With `align`, links
also begin where an aligned group of indices would not fit whole (row 43), so that a loader gets
batches that begin on round indices: 448 of 504 (of PKRAM's 510) entries for base pages, 504 for huge.

Kernel: mm/pkram.c (struct pkram_link, pkram_add_link), patches 4, 5, 33 and 43
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
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
from pkramfs.pkram.page import check_pfn, expect_flags, expect_unused, publish, read_page, seal_array, unseal
from pkramfs.spans import U64
from pkramfs.units import MAX_ORDER, PAGE_SHIFT, PAGE_SIZE

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

_HEAD_WORDS = LINK.size // 8
_PAGE_WORDS = PAGE_SIZE // 8
_GROUPS = ((0, 64, 64), (9, 4096, 8))
"""Row 43: entries of this order at an index that is a multiple of the second come in groups of the third."""


def encode(pfn: U64, order: U8, flags: int = 0) -> U64:
    """Entries of naturally aligned blocks."""
    low = order.astype(np.uint64) | np.uint64(flags << ENTRY_FLAGS_SHIFT)
    return (pfn << np.uint64(ENTRY_PFN_SHIFT)) | low


def decode(entries: U64) -> tuple[U64, U8, U8]:
    """(pfn, order, flags) of entries."""
    order = (entries & np.uint64(ENTRY_ORDER_MASK)).astype(np.uint8)
    flags = ((entries >> np.uint64(ENTRY_FLAGS_SHIFT)) & np.uint64(ENTRY_FLAGS_MASK)).astype(np.uint8)
    return entries >> np.uint64(ENTRY_PFN_SHIFT), order, flags


def sizes(order: U8) -> U64:
    """Pages of blocks of these orders."""
    return np.uint64(1) << order.astype(np.uint64)


def split_runs(index: U64, pfn: U64, count: U64) -> tuple[U64, U64, U8]:
    """Runs of pages as the fewest naturally aligned blocks: (index, pfn, order) by index.

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

    def emit(chosen: npt.NDArray[np.bool_], order: int) -> None:
        size = one << np.uint64(order)
        parts.append((index[chosen], pfn[chosen], np.full(int(chosen.sum()), order, dtype=np.uint8)))
        index[chosen] += size
        pfn[chosen] += size
        left[chosen] -= size

    for order in range(MAX_ORDER):
        bit = (pfn >> np.uint64(order) & one).astype(bool) & ~stopped
        room = left >= one << np.uint64(order)
        stopped |= bit & ~room
        emit(bit & room, order)
    _emit_largest(index, pfn, left, stopped, parts)
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
    which = np.repeat(np.arange(len(pfn)), blocks.astype(np.int64))
    before = np.repeat(np.cumsum(blocks) - blocks, blocks.astype(np.int64))
    offset = (np.arange(total, dtype=np.uint64) - before) << np.uint64(MAX_ORDER)
    parts.append((index[which] + offset, pfn[which] + offset, np.full(total, MAX_ORDER, dtype=np.uint8)))
    taken = blocks << np.uint64(MAX_ORDER)
    index += taken
    pfn += taken
    left -= taken


def join_blocks(index: U64, pfn: U64, order: U8) -> tuple[U64, U64, U64]:
    """Blocks by index as the fewest runs (index, pfn, count): the reverse of `split_runs`."""
    if not len(index):
        return index, pfn, np.empty(0, dtype=np.uint64)
    size = sizes(order)
    fresh = np.ones(len(index), dtype=bool)
    fresh[1:] = (index[1:] != index[:-1] + size[:-1]) | (pfn[1:] != pfn[:-1] + size[:-1])
    first = np.flatnonzero(fresh)
    return index[first], pfn[first], np.add.reduceat(size, first)


def break_links(index: U64, order: U8, capacity: int = LINK_CAPACITY, *, align: bool = False) -> tuple[I64, I64]:
    """Where links begin and how many entries each has, for blocks given by index."""
    if not len(index):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    jumps = np.flatnonzero(index[1:] != index[:-1] + sizes(order[:-1])) + 1
    edges = np.concatenate(([0], jumps, [len(index)])).astype(np.int64)
    if align:
        starts = np.fromiter(_aligned_starts(index, order, capacity, edges), dtype=np.int64)
    elif capacity >= len(index):
        starts = edges[:-1]
    else:
        starts = _plain_starts(edges, capacity)
    return starts, np.diff(np.append(starts, len(index)))


def _plain_starts(edges: I64, capacity: int) -> I64:
    """Cut every stretch between edges after each `capacity` entries."""
    links = -(-np.diff(edges) // capacity)
    before = np.repeat(np.cumsum(links) - links, links)
    starts: I64 = np.repeat(edges[:-1], links) + (np.arange(int(links.sum())) - before) * capacity
    return starts


def _aligned_starts(index: U64, order: U8, capacity: int, edges: I64) -> Iterator[int]:
    """Row 43: also begin a link at an aligned index whose group would not fit in the rest of the link."""
    aligned = [
        (np.flatnonzero((order == wanted) & (index % np.uint64(step) == 0)), capacity - group)
        for wanted, step, group in _GROUPS
    ]
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        at = start
        while at < end:
            yield at
            stop = min(at + capacity, end)
            for places, full in aligned:
                first = int(np.searchsorted(places, at + full, side="right"))
                if first < len(places):
                    stop = min(stop, int(places[first]))
            at = stop


def write_links(
    ram: Ram, pages: U64, index: U64, entries: U64, starts: I64, counts: I64, generation: int
) -> None:
    """Fill link pages, chain them in order and seal them. `pages` has one zeroed pfn for each link."""
    if not len(pages):
        return
    at = pages << np.uint64(PAGE_SHIFT - 3)
    words = ram.u64
    words[at] = LINK_MAGIC
    following = np.append(pages[1:], np.uint64(0))
    words[at + np.uint64(2)] = seal_array(following, (at << np.uint64(3)) + np.uint64(NEXT))
    words[at + np.uint64(3)] = seal_array(np.zeros_like(pages), (at << np.uint64(3)) + np.uint64(OTHER))
    words[at + np.uint64(4)] = generation
    words[at + np.uint64(5)] = index[starts]
    words[at + np.uint64(6)] = counts.astype(np.uint64)
    _store_entries(ram, at, entries, starts, counts)
    body = ram.bytes
    for pfn in pages.tolist():
        begin = pfn << PAGE_SHIFT
        ram.u64[(begin >> 3) + 1] = xxhash.xxh3_64_intdigest(body[begin + COVERED : begin + PAGE_SIZE], seed=pfn)


def hang(ram: Ram, pfn: int, following: int) -> None:
    """Chain another stream of links behind link page `pfn`."""
    publish(ram, pfn, NEXT, following)


def _store_entries(ram: Ram, at: U64, entries: U64, starts: I64, counts: I64) -> None:
    """Whole links as slices where pages are neighbours, what is left one link at a time."""
    whole = 0
    while whole < len(at):
        full = int(counts[whole])
        end = whole + 1
        while end < len(at) and counts[end] == full and at[end] == at[end - 1] + np.uint64(_PAGE_WORDS):
            end += 1
        rows = end - whole
        target = ram.u64[int(at[whole]) : int(at[whole]) + rows * _PAGE_WORDS].reshape(rows, _PAGE_WORDS)
        first = int(starts[whole])
        target[:, _HEAD_WORDS : _HEAD_WORDS + full] = entries[first : first + rows * full].reshape(rows, full)
        whole = end


def read_links(ram: Ram, head: int, tail: int, links: int, generation: int) -> tuple[U64, U64, U64]:
    """All of a stream's (index, entry) and its link pages, every page checked.

    Returns (index of each entry, entries, link pfns). FormatError for a chain that is longer or
    shorter than the object says, that has a cycle, or whose last page is not `tail`.
    """
    pages: list[int] = []
    bounds: list[tuple[int, int]] = []
    pfn = head
    while pfn:
        if len(pages) >= links:
            raise FormatError("Link", "next", pfn=pfn, found="one more link", expected=f"{links} in the stream")
        page = read_page(ram, pfn, LINK, LINK_MAGIC)
        if not 0 < page.count <= LINK_CAPACITY:
            raise FormatError("Link", "count", pfn=pfn, found=page.count, expected=f"1 to {LINK_CAPACITY}")
        if page.generation != generation:
            raise FormatError("Link", "generation", pfn=pfn, found=page.generation, expected=generation)
        expect_flags("Link", pfn, page.flags)
        expect_unused(ram, pfn, "Link", OTHER, "other")
        pages.append(pfn)
        bounds.append((page.index, page.count))
        pfn = unseal(page.next, (pfn << PAGE_SHIFT) + NEXT, "Link", "next")
    if len(pages) != links or (pages and pages[-1] != tail):
        raise FormatError("Object", "links", found=f"{len(pages)} links", expected=f"{links}, ending at {tail:x}")
    if not pages:
        empty = np.empty(0, dtype=np.uint64)
        return empty, empty, empty
    return _gather(ram, np.array(pages, dtype=np.uint64), np.array(bounds, dtype=np.uint64))


def _gather(ram: Ram, pages: U64, bounds: U64) -> tuple[U64, U64, U64]:
    """Entries of checked link pages and the index of each."""
    counts = bounds[:, 1].astype(np.int64)
    firsts = np.cumsum(counts) - counts
    at = np.repeat((pages << np.uint64(PAGE_SHIFT - 3)) + np.uint64(_HEAD_WORDS), counts)
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(firsts, counts)
    entries = ram.u64[at + within.astype(np.uint64)]
    size = np.uint64(1) << (entries & np.uint64(ENTRY_ORDER_MASK))
    before = np.cumsum(size) - size
    return np.repeat(bounds[:, 0] - before[firsts], counts) + before, entries, pages


def check_entries(ram: Ram, entries: U64, record: str) -> None:
    """FormatError unless every entry is an aligned block of this RAM."""
    pfn, order, _ = decode(entries)
    bad = (order > MAX_ORDER) | (pfn == 0)
    size = np.uint64(1) << np.minimum(order, MAX_ORDER).astype(np.uint64)
    bad |= (pfn & (size - np.uint64(1))) != 0
    if bad.any():
        found = int(entries[np.flatnonzero(bad)[0]])
        raise FormatError(record, "entry", found=f"{found:#x}", expected="an aligned block of order 0 to 18")
    if len(pfn):
        check_pfn(ram, int((pfn + size).max()) - 1, record, "entry")
