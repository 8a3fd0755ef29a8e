"""The preserved-page table of a node: a sparse tree of bitmaps over physical memory.

    level     entry covers   an entry is                                   page of 512 entries covers
    root      512 GiB        0 | page of the next level                    256 TiB
    upper     1 GiB          0 | FULL | page of the next level             512 GiB
    lower     2 MiB          0 | FULL | page and slot of a 64-byte bitmap  1 GiB
    bitmap    512 pages      one bit each; 64 bitmaps share a page

The geometry is that of an x86 page table, as in PKRAM, but runs are stored as high up as they fit:
a node of contiguous memory costs a handful of pages whatever its size. The table is built once, at
the end of a save, and then never changes; it hangs off its node, so that the view of all preserved
memory is the union of the nodes' tables and is right in every later kernel, too (D3).

Kernel: mm/pkram_pagetable.c, patches 9 and 17
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import TABLE_FULL, TABLE_SLOT_MASK
from pkramfs.pkram.page import check_pfn
from pkramfs.spans import U64, Spans
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

ENTRIES = 512
BITMAP_BYTES = ENTRIES // 8
SLOTS = PAGE_SIZE // BITMAP_BYTES
LOWER, UPPER = ENTRIES, ENTRIES * ENTRIES
"""Pages that an entry of the lower and of the upper level covers."""
ROOT = UPPER * ENTRIES

Allocate = Callable[[int], U64]


@dataclass(frozen=True)
class _Plan:
    """What a table for some spans holds, before it has pages. Numbers are units of each level."""

    full_upper: Spans
    full_lower: Spans
    partial: U64
    lower_pages: U64
    upper_pages: U64

    @property
    def pages(self) -> int:
        return 1 + len(self.upper_pages) + len(self.lower_pages) + -(-len(self.partial) // SLOTS)


def _plan(spans: Spans) -> _Plan:
    full_upper = spans.inward(UPPER)
    full_lower = spans.inward(LOWER) - full_upper.scale(UPPER // LOWER)
    partial = _numbers(spans.outward(LOWER) - spans.inward(LOWER))
    lower_pages = _numbers(spans.outward(UPPER) - full_upper)
    return _Plan(full_upper, full_lower, partial, lower_pages, _numbers(spans.outward(ROOT)))


def _numbers(spans: Spans) -> U64:
    """Every number of a (small) set."""
    counts = spans.counts.astype(np.int64)
    within = np.arange(spans.total, dtype=np.uint64) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.uint64)
    return np.repeat(spans.starts, counts) + within


def build(ram: Ram, spans: Spans, allocate: Allocate) -> tuple[int, int, U64]:
    """Write the table of `spans` and of its own pages; returns (root pfn, checksum, all table pages).

    `allocate(n)` gives n more zeroed pages outside of `spans`. Listing the table's own pages can
    need another page, so pages are added until they suffice.
    """
    pages = np.empty(0, dtype=np.uint64)
    while True:
        whole = spans | Spans.from_runs(pages, np.ones_like(pages))
        plan = _plan(whole)
        if plan.pages <= len(pages):
            break
        pages = np.concatenate((pages, allocate(plan.pages - len(pages))))
    _write(ram, whole, plan, pages)
    return int(pages[0]), checksum(ram, int(pages[0])), pages


def _write(ram: Ram, spans: Spans, plan: _Plan, pages: U64) -> None:
    ends = np.cumsum([1, len(plan.upper_pages), len(plan.lower_pages)])
    root, upper, lower, bitmaps = np.split(pages, ends)
    for pfn in pages.tolist():
        ram.zero(pfn)
    _link(ram, root, np.zeros(1, dtype=np.uint64), plan.upper_pages, upper)
    _link(ram, upper, plan.upper_pages, plan.lower_pages, lower)
    _fill(ram, upper, plan.upper_pages, plan.full_upper)
    _fill(ram, lower, plan.lower_pages, plan.full_lower)
    if not len(plan.partial):
        return
    slot = np.arange(len(plan.partial), dtype=np.uint64)
    holder = bitmaps[slot // np.uint64(SLOTS)]
    entry = holder << np.uint64(PAGE_SHIFT) | slot % np.uint64(SLOTS)
    ram.u64[_places(lower, plan.lower_pages, plan.partial)] = entry
    bits = _bitmaps(spans, plan.partial).view("<u8").reshape(-1, BITMAP_BYTES // 8)
    at = (holder << np.uint64(PAGE_SHIFT - 3)) + slot % np.uint64(SLOTS) * np.uint64(BITMAP_BYTES // 8)
    ram.u64[at[:, None] + np.arange(BITMAP_BYTES // 8, dtype=np.uint64)] = bits


def _places(pages: U64, numbers: U64, units: U64) -> U64:
    """Word numbers in RAM of the entries of `units`, in table pages that stand for `numbers`."""
    which = np.searchsorted(numbers, units // np.uint64(ENTRIES))
    return (pages[which] << np.uint64(PAGE_SHIFT - 3)) + units % np.uint64(ENTRIES)


def _link(ram: Ram, parents: U64, numbers: U64, children: U64, child_pages: U64) -> None:
    ram.u64[_places(parents, numbers, children)] = child_pages << np.uint64(PAGE_SHIFT)


def _fill(ram: Ram, pages: U64, numbers: U64, full: Spans) -> None:
    """Mark whole stretches FULL, cut where a table page ends."""
    for start, end in full:
        while start < end:
            stop = min(end, (start // ENTRIES + 1) * ENTRIES)
            place = int(_places(pages, numbers, np.array([start], dtype=np.uint64))[0])
            ram.u64[place : place + stop - start] = TABLE_FULL
            start = stop


def _bitmaps(spans: Spans, blocks: U64) -> npt.NDArray[np.uint8]:
    """The 512-bit maps of partly preserved 2 MiB blocks, packed."""
    inside = spans & Spans.from_runs(blocks, np.ones_like(blocks)).scale(LOWER)
    # A span may run over several blocks; at block borders the running sum of edges is right anyway.
    flat = np.zeros(len(blocks) * ENTRIES + 1, dtype=np.int8)
    cut = _cut_at_blocks(inside)
    which = np.searchsorted(blocks, cut[0] // np.uint64(LOWER)).astype(np.int64) * ENTRIES
    np.add.at(flat, which + (cut[0] % np.uint64(LOWER)).astype(np.int64), 1)
    np.add.at(flat, which + (cut[1] - cut[0] // np.uint64(LOWER) * np.uint64(LOWER)).astype(np.int64), -1)
    return np.packbits(np.cumsum(flat[:-1], dtype=np.int8).astype(bool), bitorder="little")


def _cut_at_blocks(spans: Spans) -> tuple[U64, U64]:
    """Starts and ends of spans, cut at every 2 MiB border."""
    step = np.uint64(LOWER)
    first, last = spans.starts // step, (spans.ends - np.uint64(1)) // step
    pieces = (last - first + np.uint64(1)).astype(np.int64)
    block = np.repeat(first, pieces) + (
        np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    ).astype(np.uint64)
    starts = np.maximum(np.repeat(spans.starts, pieces), block * step)
    return starts, np.minimum(np.repeat(spans.ends, pieces), (block + np.uint64(1)) * step)


def _children(ram: Ram, pages: U64, numbers: U64) -> tuple[U64, U64]:
    """(unit, entry) of every entry that is not 0 in table pages that stand for `numbers`."""
    if not len(pages):
        return pages, pages
    base = (pages << np.uint64(PAGE_SHIFT - 3))[:, None] + np.arange(ENTRIES, dtype=np.uint64)
    entries = ram.u64[base]
    row, column = np.nonzero(entries)
    return numbers[row] * np.uint64(ENTRIES) + column.astype(np.uint64), entries[row, column]


def _descend(ram: Ram, units: U64, entries: U64) -> tuple[U64, U64, Spans]:
    """Split entries into (units with a child, the children's pages) and the FULL units."""
    full = entries == np.uint64(TABLE_FULL)
    pages = entries[~full] >> np.uint64(PAGE_SHIFT)
    if len(pages):
        for edge in (int(pages.min()), int(pages.max())):
            check_pfn(ram, edge, "PageTable", "entry")
    if (entries[~full] & np.uint64(PAGE_SIZE - 1 & ~TABLE_SLOT_MASK)).any():
        raise FormatError("PageTable", "entry", found="unknown bits", expected="a page and a slot")
    return units[~full], entries[~full], Spans.from_runs(units[full], np.ones(int(full.sum()), dtype=np.uint64))


def read(ram: Ram, root: int) -> Spans:
    """Every page that the table names."""
    return _walk(ram, root)[0]


def checksum(ram: Ram, root: int) -> int:
    """XXH3-64 of all table pages, in walking order."""
    digest = xxhash.xxh3_64()
    for pfn in _walk(ram, root)[1].tolist():
        digest.update(ram.page(pfn))
    return digest.intdigest()


def _walk(ram: Ram, root: int) -> tuple[Spans, U64]:
    """(pages named, table pages in walking order)."""
    check_pfn(ram, root, "PageTable", "root")
    shift = np.uint64(PAGE_SHIFT)
    pages = [np.array([root], dtype=np.uint64)]
    units, entries = _children(ram, pages[0], np.zeros(1, dtype=np.uint64))
    found = Spans()
    for covers in (ROOT, UPPER):
        units, entries, full = _descend(ram, units, entries)
        found = found | full.scale(covers)
        pages.append(entries >> shift)
        units, entries = _children(ram, pages[-1], units)
    units, entries, full = _descend(ram, units, entries)
    found = found | full.scale(LOWER)
    pages.append(np.unique(entries >> shift))
    return found | _read_bitmaps(ram, units, entries), np.concatenate(pages)


def _read_bitmaps(ram: Ram, units: U64, entries: U64) -> Spans:
    if not len(units):
        return Spans()
    at = (entries >> np.uint64(PAGE_SHIFT) << np.uint64(PAGE_SHIFT - 3)) + (
        entries & np.uint64(TABLE_SLOT_MASK)
    ) * np.uint64(BITMAP_BYTES // 8)
    words = ram.u64[at[:, None] + np.arange(BITMAP_BYTES // 8, dtype=np.uint64)]
    bits = np.unpackbits(words.view(np.uint8).reshape(-1), bitorder="little").astype(bool)
    runs = Spans.from_mask(bits)
    starts, ends = _cut_at_blocks(runs)
    block = units[(starts // np.uint64(LOWER)).astype(np.int64)] * np.uint64(LOWER)
    first = starts // np.uint64(LOWER) * np.uint64(LOWER)
    return Spans.from_arrays(block + starts - first, block + ends - first)


def any_preserved(ram: Ram, root: int, start: int, end: int) -> bool:
    """Whether a page that holds any byte of the physical range [start, end) is named by the table.

    Bounds are byte addresses and are aligned outwards; only what covers the range is descended into.

    Kernel: pkram_has_preserved_pages()
    """
    first, last = start >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT
    return end > start and bool(read_range(ram, root, first, last))


def read_range(ram: Ram, root: int, first: int, last: int) -> Spans:
    """The pages of [first, last) that the table names, reading no more of it than covers them."""
    check_pfn(ram, root, "PageTable", "root")
    pages, numbers = np.array([root], dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    found = Spans()
    for covers in (ROOT, UPPER, LOWER):
        units, entries = _children(ram, pages, numbers)
        inside = (units >= np.uint64(first // covers)) & (units <= np.uint64(max(last - 1, 0) // covers))
        numbers, entries, full = _descend(ram, units[inside], entries[inside])
        found = found | full.scale(covers)
        pages = entries >> np.uint64(PAGE_SHIFT)
    return (found | _read_bitmaps(ram, numbers, entries)).clip(first, last)


def next_hole_below(ram: Ram, root: int, limit: int, count: int) -> int | None:
    """First page of the highest `count` pages in a row below page `limit` of which the table names none.

    Walks down one GiB at a time, so a hole near the top is found without reading the rest (D25: the
    kernel's search stepped one page at a time).
    """
    top = edge = limit
    while edge > 0:
        edge = max(0, (edge - 1) // UPPER * UPPER)
        # The stretch above may continue a hole that begins here, so it is looked at again with this one.
        hole = read_range(ram, root, edge, top).gaps(edge, top).first_fit(count, top_down=True)
        if hole is not None:
            return hole
        top = min(limit, edge + count)
    return None
