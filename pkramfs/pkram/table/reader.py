# SPDX-License-Identifier: GPL-2.0-or-later
"""The preserved-page table of a node: a sparse tree of bitmaps over physical memory. Reading it.

    level     entry covers   an entry is                                   page of 512 entries covers
    root      512 GiB        0 | page of the next level                    256 TiB
    upper     1 GiB          0 | FULL | page of the next level             512 GiB
    lower     2 MiB          0 | FULL | page and slot of a 64-byte bitmap  1 GiB
    bitmap    512 pages      one bit each; 64 bitmaps share a page

The geometry is that of an x86 page table, as in PKRAM, but runs are stored as high up as they fit:
a node of contiguous memory costs a handful of pages whatever its size. The table hangs off its node
and never changes once the node is published, so the view of all preserved memory is the union of
the nodes' tables and is right in every later kernel, too (D3).

A reader trusts nothing: every table page must be memory, may occur once only, and may stand for no
address above the end of RAM, which bounds whatever damage can make a reader do. Questions about a
range read only what they need. Bounds given in bytes are aligned outwards: a range that begins in
the middle of a page includes the page, which the original overlooks.

A command and the daemons of a kexec read the same tables again and again. A small one that was read before is not
taken apart again: its pages are read and their checksum is compared, so that damage is found as before.

Kernel: mm/pkram_pagetable.c, patches 9 and 17
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import TABLE_FULL, TABLE_SLOT_MASK
from pkramfs.pkram.page import check_pfn
from pkramfs.spans import U64, Spans, distinct
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

ENTRIES = 512
BITMAP_WORDS = ENTRIES // 64
SLOTS = PAGE_SIZE // (BITMAP_WORDS * 8)
LOWER, UPPER = ENTRIES, ENTRIES * ENTRIES
"""Pages that an entry of the lower and of the upper level covers."""
ROOT = UPPER * ENTRIES

FULL = np.uint64(TABLE_FULL)
_STEP = 64 * UPPER
"""Pages that a question about a long range looks at in one step: 64 GiB."""
_WORD = np.arange(BITMAP_WORDS, dtype=np.uint64)
_SMALL = 64
"""Most pages of a table that is remembered."""


@dataclass(frozen=True)
class Walk:
    """All that a table says: pages named, its own pages in walking order, their checksum."""

    spans: Spans
    pages: U64
    checksum: int


_known: OrderedDict[tuple[int, int], Walk] = OrderedDict()
"""Small tables that were read last, by the size of RAM and their root; those of _KNOWN trees at most."""
_KNOWN = 1024


def walk(ram: Ram, root: int) -> Walk:
    """Read a whole table; FormatError for anything that cannot be."""
    key = ram.pages, root
    found = _known.get(key)
    if found is not None and _digest(ram, found.pages) == found.checksum:
        return found
    found = _walk(ram, root)
    if len(found.pages) <= _SMALL:
        _known[key] = found
        while len(_known) > _KNOWN:
            _known.popitem(last=False)
    return found


def _walk(ram: Ram, root: int) -> Walk:
    check_pfn(ram, root, "PageTable", "root")
    units = np.zeros(1, dtype=np.uint64)
    pages = [np.array([root], dtype=np.uint64)]
    found = Spans()
    for covers in (ROOT, UPPER, LOWER):
        units, entries, full = _children(ram, pages[-1], units, covers)
        found = found | full.scale(covers)
        pages.append(entries >> np.uint64(PAGE_SHIFT))
    found = found | read_bitmaps(ram, units, entries)
    pages[-1] = distinct(pages[-1])
    own = np.concatenate(pages)
    if len(distinct(own)) != len(own):
        raise FormatError("PageTable", "entry", pfn=root, found="a table page named twice", expected="each once")
    if found and int(found.ends[-1]) > ram.pages:
        end = int(found.ends[-1])
        raise FormatError("PageTable", "pages", pfn=root, found=f"pfn {end - 1:x}", expected=f"below {ram.pages:x}")
    own.flags.writeable = False
    return Walk(found, own, _digest(ram, own))


def _digest(ram: Ram, pages: U64) -> int:
    """Return the XXH3-64 of table pages."""
    return xxhash.xxh3_64_intdigest(_fetch(ram, pages).tobytes())


def read(ram: Ram, root: int) -> Spans:
    """Return every page that the table names."""
    return walk(ram, root).spans


def checksum(ram: Ram, root: int) -> int:
    """Return the XXH3-64 of all table pages, in walking order."""
    return walk(ram, root).checksum


def any_preserved(ram: Ram, root: int, start: int, end: int) -> bool:
    """Return True if the table names a page that holds any byte of the physical range [start, end).

    Kernel: pkram_has_preserved_pages()
    """
    first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
    if end <= start:
        return False
    return any(read_range(ram, root, low, min(low + _STEP, last)) for low in range(first, last, _STEP))


def next_hole_below(ram: Ram, root: int, limit: int, count: int) -> int | None:
    """Return the first page of the highest `count` pages in a row below page `limit` of which the table names none.

    Walks downwards, many GiB at a time, so a hole near the top is found without reading the rest and
    the walk ends at the bottom (D21, D25: the kernel's search stepped one page at a time).
    """
    top = at = limit  # [at, top) is known to be free
    while at > 0:
        at = max(0, (at - 1) // _STEP * _STEP)
        spans = read_range(ram, root, at, top)
        hole = spans.gaps(at, top).first_fit(count, top_down=True)
        if hole is not None:
            return hole
        top = int(spans.starts[0]) if spans else top
    return None


def read_range(ram: Ram, root: int, start: int, end: int) -> Spans:
    """Return the pages of [start, end) that the table names, reading no more of it than covers them."""
    check_pfn(ram, root, "PageTable", "root")
    end = min(end, ram.pages)
    if end <= start:
        return Spans()
    units = np.arange(start // UPPER, (end - 1) // UPPER + 1, dtype=np.uint64)
    entries = upper_entries(ram, root, units)
    full = entries == FULL
    found = Spans.from_runs(units[full], np.ones(int(full.sum()), dtype=np.uint64)).scale(UPPER)
    below = ~full & (entries != 0)
    lower, entries, full_lower = _children(ram, entries[below] >> np.uint64(PAGE_SHIFT), units[below], LOWER)
    near = (lower >= np.uint64(start // LOWER)) & (lower <= np.uint64((end - 1) // LOWER))
    return (found | full_lower.scale(LOWER) | read_bitmaps(ram, lower[near], entries[near])).clip(start, end)


def upper_entries(ram: Ram, root: int, units: U64) -> U64:
    """Return the upper entries of 1 GiB `units`, 0 where there is no page for them."""
    roots = np.full(len(units), root, dtype=np.uint64)
    parents = gather(ram, roots, units // np.uint64(ENTRIES))
    _check_entries(ram, roots, parents, parents == 0, 0)
    pages = parents >> np.uint64(PAGE_SHIFT)
    entries = gather(ram, pages, units)
    _check_entries(ram, pages, entries, (entries == 0) | (entries == FULL), 0)
    return entries


def gather(ram: Ram, pages: U64, units: U64) -> U64:
    """Return the entry of each unit in the table page given for it, 0 where that page is 0."""
    found = np.zeros(len(units), dtype=np.uint64)
    there = pages != 0
    found[there] = ram.u64[places(pages[there], units[there])]
    return found


def _fetch(ram: Ram, pages: U64) -> U64:
    """Read whole table pages, one a row, not through the mapping: a damaged entry may lead to a hole."""
    words = np.empty((len(pages), ENTRIES), dtype=np.uint64)
    target = memoryview(words).cast("B")  # type: ignore[arg-type]
    edges = [0, *(np.flatnonzero(pages[1:] != pages[:-1] + np.uint64(1)) + 1).tolist(), len(pages)]
    for low, high in pairwise(edges):
        ram.read(int(pages[low]), target[low << PAGE_SHIFT : high << PAGE_SHIFT])
    return words


def places(pages: U64, units: U64) -> U64:
    """Return the word numbers in RAM of the entries of `units` in these table pages."""
    return (pages << np.uint64(PAGE_SHIFT - 3)) + units % np.uint64(ENTRIES)


def bitmap_places(entries: U64) -> U64:
    """Return the word numbers in RAM of the bitmaps that lower entries name, a row of 8 each."""
    slot = entries & np.uint64(TABLE_SLOT_MASK)
    first = (entries >> np.uint64(PAGE_SHIFT) << np.uint64(PAGE_SHIFT - 3)) + slot * np.uint64(BITMAP_WORDS)
    return first[:, None] + _WORD


def _children(ram: Ram, pages: U64, numbers: U64, covers: int) -> tuple[U64, U64, Spans]:
    """Return the entries of table pages that stand for `numbers`: (units, entries) with a child, and the FULL units."""
    if not len(pages):
        return pages, pages, Spans()
    entries = _fetch(ram, pages)
    row, column = np.nonzero(entries)
    units = numbers[row] * np.uint64(ENTRIES) + column.astype(np.uint64)
    entries = entries[row, column]
    if len(units) and int(units[-1] if len(pages) == 1 else units.max()) * covers >= ram.pages:
        raise FormatError(
            "PageTable", "entry", pfn=int(pages[row[-1]]), found="an entry above the end of RAM", expected="0 there"
        )
    full = entries == FULL if covers != ROOT else np.zeros(len(entries), dtype=bool)
    _check_entries(ram, pages[row], entries, full, TABLE_SLOT_MASK if covers == LOWER else 0)
    return units[~full], entries[~full], Spans.from_runs(units[full], np.ones(int(full.sum()), dtype=np.uint64))


def _check_entries(ram: Ram, holders: U64, entries: U64, fine: npt.NDArray[np.bool_], low: int) -> None:
    """Raise FormatError, naming the table page, unless entries are `fine` or pages of RAM with none but `low` bits."""
    pages = entries >> np.uint64(PAGE_SHIFT)
    bad = (entries & np.uint64(PAGE_SIZE - 1 & ~low) != 0) | (pages == 0) | (pages >= np.uint64(ram.pages))
    bad &= ~fine
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        expected = f"0, full, or a page from 1 to {ram.pages - 1:x}" + (" and a slot" if low else "")
        raise FormatError(
            "PageTable", "entry", pfn=int(holders[place]), found=f"{int(entries[place]):#x}", expected=expected
        )


def read_bitmaps(ram: Ram, blocks: U64, entries: U64) -> Spans:
    """Return the pages of 2 MiB `blocks` whose lower entries name bitmaps."""
    if not len(blocks):
        return Spans()
    pages, row = np.unique(entries >> np.uint64(PAGE_SHIFT), return_inverse=True)
    first = (entries & np.uint64(TABLE_SLOT_MASK)) * np.uint64(BITMAP_WORDS)
    return spans_of_bits(blocks, _fetch(ram, pages)[row[:, None], first[:, None] + _WORD])


def spans_of_bits(blocks: U64, bits: U64) -> Spans:
    """Return the pages that bitmaps (a row of 8 words for each 2 MiB block) have set."""
    flags = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8).reshape(-1), bitorder="little")
    padded = np.zeros((len(blocks), ENTRIES + 2), dtype=np.int8)
    padded[:, 1:-1] = flags.reshape(len(blocks), ENTRIES)
    row, column = np.nonzero(np.diff(padded, axis=1))
    edges = blocks[row] * np.uint64(LOWER) + column.astype(np.uint64)
    return Spans.from_arrays(edges[::2], edges[1::2])


def bits_of_spans(spans: Spans) -> tuple[U64, U64]:
    """Return the 2 MiB blocks that spans touch, ascending, and a bitmap (8 words) for each."""
    starts, ends, block = _cut_at_blocks(spans)
    fresh = np.ones(len(block), dtype=bool)
    fresh[1:] = block[1:] != block[:-1]
    blocks, row = block[fresh], np.cumsum(fresh) - 1
    edges = np.zeros((len(blocks), ENTRIES + 1), dtype=np.int8)
    base = block * np.uint64(LOWER)
    edges[row, (starts - base).astype(np.int64)] = 1
    edges[row, (ends - base).astype(np.int64)] = -1
    flags: npt.NDArray[np.int8] = np.cumsum(edges[:, :ENTRIES], axis=1, dtype=np.int8)
    return blocks, np.packbits(flags.view(np.uint8), axis=1, bitorder="little").view("<u8")


def _cut_at_blocks(spans: Spans) -> tuple[U64, U64, U64]:
    """Return (starts, ends, block) of spans cut at every 2 MiB border."""
    step, one = np.uint64(LOWER), np.uint64(1)
    first = spans.starts // step
    pieces = ((spans.ends - one) // step - first + one).astype(np.int64)
    within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    block = np.repeat(first, pieces) + within.astype(np.uint64)
    starts = np.maximum(np.repeat(spans.starts, pieces), block * step)
    return starts, np.minimum(np.repeat(spans.ends, pieces), (block + one) * step), block
