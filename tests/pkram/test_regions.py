# SPDX-License-Identifier: GPL-2.0-or-later
"""The region list: how many pages it takes, read from either end, with nothing but RAM."""

import numpy as np
import pytest

from pkramfs.pkram import format, regions
from pkramfs.pkram.page import read_word
from pkramfs.spans import Spans


def scattered(count, first=1 << 20):
    starts = first + 2 * np.arange(count, dtype=np.uint64)
    return Spans.from_runs(starts, np.ones_like(starts))


@pytest.mark.parametrize(
    ("ranges", "count"),
    [(1, 1), (251, 1), (252, 2), (253, 2), (502, 2), (503, 2), (504, 3), (755, 3), (756, 4), (251 * 252, 252)],
)
def test_pages_of_a_list_with_itself_in_it(wide, wide_frames, ranges, count):
    """Facts 10.9 in our capacity of 252: 252 ranges and the list's own make 253, and those take two pages."""
    wide_frames.allocate(1)  # pages of the list follow one another, apart from what they list: one range more
    head = regions.build(wide, scattered(ranges), wide_frames.allocate_pages)
    pages = regions.pages_of(wide, head)
    assert len(pages) == count
    assert len(regions.read(wide, head)) == ranges + 1


def test_a_walk_from_the_top_begins_at_the_last_page(wide, wide_frames):
    """Facts 1.9: the first page's `previous` is the last page; the others' is the page before (D21)."""
    spans = scattered(1000)
    head = regions.build(wide, spans, wide_frames.allocate_pages)
    pages = [int(pfn) for pfn in regions.pages_of(wide, head)]
    assert [read_word(wide, pfn, format.OTHER, "Regions", "previous") for pfn in pages] == [pages[-1], *pages[:-1]]
    from_top, pfn = [], pages[-1]
    for _ in pages:
        count = format.REGIONS.read(wide.bytes, pfn << 12).count
        words = wide.words(pfn)[8 : 8 + 2 * count]
        from_top += [(int(b) >> 12, int(b + s) >> 12) for b, s in zip(words[0::2], words[1::2], strict=True)][::-1]
        pfn = read_word(wide, pfn, format.OTHER, "Regions", "previous")
    assert Spans(from_top) == regions.read(wide, head)
    assert from_top == sorted(from_top, reverse=True)


def test_reading_takes_no_memory_of_the_machine(wide, wide_frames):
    """Early boot has no allocator, and must not make holes real."""
    head = regions.build(wide, scattered(3000), wide_frames.allocate_pages)
    backed = wide.backed
    assert regions.read(wide, head, Spans([(1, wide.pages)])).total >= 3000
    assert wide.backed == backed


def test_no_room_for_the_list_is_said_by_the_allocator(wide, wide_frames):
    def none(count):
        raise MemoryError(f"{count} pages short")

    with pytest.raises(MemoryError, match="1 pages short"):
        regions.build(wide, scattered(3), none)
