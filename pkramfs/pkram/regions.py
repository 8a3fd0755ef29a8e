# SPDX-License-Identifier: GPL-2.0-or-later
"""The region list: every preserved range, for a kernel that has no allocator yet.

The old kernel builds it at its end, from all nodes' page tables, the super block and the list's own
pages; early boot reads it with nothing but array views and frees it once boot is done. It is a chain of
single pages, because fragmented memory may not have one large block. The first page's `previous` names
the last, so that a walk from the top of memory can begin there.

The list contains its own pages, and to list these can need another page: `build` allocates until both
agree, where PKRAM estimates once and may lose the tail (D8).

Kernel: mm/pkram.c (struct pkram_region_list), patches 10, 12 and 13
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NEXT, OTHER, REGIONS, REGIONS_CAPACITY, REGIONS_MAGIC
from pkramfs.pkram.page import check_pfn, expect_flags, read_page, read_word, seal_page, write_page
from pkramfs.spans import U64, Spans
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

_HEAD_WORDS = REGIONS.size // 8


def pages_needed(ranges: int) -> int:
    """Return the number of pages of a list of this many ranges (at least one)."""
    return max(1, -(-ranges // REGIONS_CAPACITY))


def build(ram: Ram, spans: Spans, allocate: Callable[[int], U64], *, generation: int = 0) -> int:
    """Write the list of `spans` (pages) and of its own pages; return the first page's pfn.

    `allocate(n)` returns the pfns of n more pages outside of `spans`, or raises. Raise ExhaustedError, and write
    nothing, if the host has no memory for them.
    """
    pages = np.empty(0, dtype=np.uint64)
    while True:
        whole = spans | Spans.from_numbers(pages)
        missing = pages_needed(len(whole)) - len(pages)
        if missing <= 0:
            break
        pages = np.concatenate((pages, np.asarray(allocate(missing), dtype=np.uint64)))
    ram.back(Spans.from_numbers(pages))
    _write(ram, whole, pages.tolist(), generation)
    return int(pages[0])


def _write(ram: Ram, spans: Spans, pages: list[int], generation: int) -> None:
    filled = pages[: pages_needed(len(spans))]
    for number, pfn in enumerate(pages):
        first = number * REGIONS_CAPACITY
        part = slice(first, first + REGIONS_CAPACITY)
        starts, counts = spans.starts[part], spans.counts[part]
        before = pages[number - 1] if number else filled[-1]
        after = pages[number + 1] if number + 1 < len(pages) else 0
        write_page(
            ram,
            pfn,
            REGIONS,
            {NEXT: after, OTHER: before},
            magic=REGIONS_MAGIC,
            generation=generation,
            count=len(starts),
            regions=len(spans),
            pages=spans.total,
        )
        # Regions are pairs of words: byte address and byte size. Shape: (2 * regions,).
        words = ram.words(pfn)[_HEAD_WORDS : _HEAD_WORDS + 2 * len(starts)]
        words[0::2], words[1::2] = starts << np.uint64(PAGE_SHIFT), counts << np.uint64(PAGE_SHIFT)
        seal_page(ram, pfn)


def read(ram: Ram, head: int, usable: Spans | None = None) -> Spans:
    """Return the pages that the list contains; raise FormatError for anything invalid."""
    base, size = [], []
    found = list(_walk(ram, head))
    for pfn, page in found:  # a column of addresses and one of sizes from each page
        words = ram.words(pfn)[_HEAD_WORDS : _HEAD_WORDS + 2 * page.count]
        base.append(words[0::2].copy())
        size.append(words[1::2].copy())
    _check_previous(ram, [pfn for pfn, page in found if page.count], [pfn for pfn, _ in found])
    spans = _ranges(ram, np.concatenate(base), np.concatenate(size), head)
    for pfn, page in found:
        for field, counted in (("regions", sum(map(len, base))), ("pages", spans.total)):
            if getattr(page, field) != counted:
                raise FormatError("Regions", field, pfn=pfn, found=getattr(page, field), expected=counted)
        if page.generation != found[0][1].generation:
            raise FormatError("Regions", "generation", pfn=pfn, found=page.generation, expected=found[0][1].generation)
    if usable is not None and (outside := spans - usable):
        raise FormatError(
            "Regions", "region", pfn=head, found=f"pfn {int(outside.starts[0]):x}", expected="usable memory"
        )
    return spans


def pages_of(ram: Ram, head: int) -> U64:
    """Return the pfns of the list's own pages, in order."""
    return np.array([pfn for pfn, _ in _walk(ram, head)], dtype=np.uint64)


def _walk(ram: Ram, head: int) -> Iterator[tuple[int, Any]]:
    """Yield each page of the list and its record."""
    if not head:
        raise FormatError("Regions", "pfn", found="none", expected="a region list")
    pfn, seen = head, set[int]()
    while pfn:
        if pfn in seen:
            raise FormatError("Regions", "next", pfn=pfn, found="a page met before", expected="an end")
        seen.add(pfn)
        page = read_page(ram, pfn, REGIONS, REGIONS_MAGIC)
        if page.count > REGIONS_CAPACITY:
            raise FormatError("Regions", "count", pfn=pfn, found=page.count, expected=f"at most {REGIONS_CAPACITY}")
        expect_flags("Regions", pfn, page.flags)
        yield pfn, page
        pfn = read_word(ram, pfn, NEXT, "Regions", "next")


def _check_previous(ram: Ram, filled: list[int], pages: list[int]) -> None:
    """Check that each page names the one before it, and the first one the last that is not empty."""
    for pfn, before in zip(pages, [*filled[-1:], *pages], strict=False):
        found = read_word(ram, pfn, OTHER, "Regions", "previous")
        if found != before:
            raise FormatError("Regions", "previous", pfn=pfn, found=f"pfn {found:x}", expected=f"pfn {before:x}")


def _ranges(ram: Ram, base: U64, size: U64, head: int) -> Spans:
    """Check order, alignment and bounds of byte ranges; return them as pages."""
    # One element for each region of the whole list; `ends < base` catches a sum that wrapped around.
    ends = base + size
    mask = np.uint64(PAGE_SIZE - 1)
    if ((base | size) & mask).any() or not size.all() or (ends < base).any():
        raise FormatError("Regions", "region", pfn=head, found="a range of no whole pages", expected="pages")
    if (base[1:] <= ends[:-1]).any():
        raise FormatError("Regions", "region", pfn=head, found="ranges out of order", expected="ascending, apart")
    if len(ends):
        check_pfn(ram, int(ends[-1] >> np.uint64(PAGE_SHIFT)) - 1, "Regions", "region", head)
    return Spans.from_arrays(base >> np.uint64(PAGE_SHIFT), ends >> np.uint64(PAGE_SHIFT))
