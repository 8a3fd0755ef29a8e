# SPDX-License-Identifier: GPL-2.0-or-later
"""The preserved-page table against the set it was built from."""

import random

import numpy as np
import pytest

from pkramfs.pkram.table import reader as pagetable
from pkramfs.pkram.table import writer as tablewriter
from pkramfs.spans import Spans


@pytest.mark.few(24)
@pytest.mark.parametrize("seed", range(60))
def test_reads_back_what_was_built(wide, wide_frames, seed):
    rng = random.Random(seed)
    top = rng.choice((2000, 1 << 15, 1 << 26, 1 << 30))
    spans = Spans(
        (a, a + rng.choice((1, 2, 63, 512, 4000, 300000, 1 << 20)))
        for a in (rng.randrange(40000, 40000 + top) for _ in range(rng.randint(0, 40)))
    )
    root, digest, pages = tablewriter.build(wide, spans, wide_frames.allocate_pages)
    assert pagetable.read(wide, root) == spans | Spans.from_runs(pages, np.ones_like(pages))
    assert pagetable.checksum(wide, root) == digest


def test_contiguous_memory_costs_a_handful_of_pages(wide, wide_frames):
    spans = Spans([(1 << 20, (1 << 20) + 100 * (1 << 18))])
    _, _, pages = tablewriter.build(wide, spans, wide_frames.allocate_pages)
    assert len(pages) < spans.total * 0.0001
    assert len(pages) <= 6


def test_a_fragmented_block_is_one_bitmap(wide, wide_frames):
    spans = Spans((a, a + 1) for a in range(1 << 20, (1 << 20) + 512, 2))
    root, _, pages = tablewriter.build(wide, spans, wide_frames.allocate_pages)
    assert pagetable.read(wide, root) - Spans.from_runs(pages, np.ones_like(pages)) == spans


@pytest.mark.few(16)
@pytest.mark.parametrize("seed", range(40))
def test_range_queries_agree_with_the_set(wide, wide_frames, seed):
    rng = random.Random(seed)
    top = rng.choice((1 << 14, 1 << 20, 1 << 27))
    spans = Spans(
        (a, a + rng.choice((1, 5, 512, 1 << 18)))
        for a in (rng.randrange(1 << 15, (1 << 15) + top) for _ in range(rng.randint(1, 30)))
    )
    root, _, pages = tablewriter.build(wide, spans, wide_frames.allocate_pages)
    whole = spans | Spans.from_runs(pages, np.ones_like(pages))
    edges = [*whole.starts.tolist(), *whole.ends.tolist()]
    for _ in range(20):
        first = max(0, rng.choice(edges) + rng.randint(-600, 600))
        last = first + rng.choice((1, 3, 512, 1 << 19))
        assert pagetable.read_range(wide, root, first, last) == whole.clip(first, last)
        assert pagetable.any_preserved(wide, root, first << 12, last << 12) == whole.overlaps(first, last)
    for count in (1, 7, 512, 5000):
        limit = rng.choice(edges) + rng.randint(0, 600)
        expected = whole.gaps(0, limit).first_fit(count, top_down=True)
        assert pagetable.next_hole_below(wide, root, limit, count) == expected


def test_bounds_inside_a_page_count_the_page(wide, wide_frames):
    """Facts 10.5: frames 1, 2, 3 and 7; the original skips the page in which a range begins."""
    base = 1 << 20
    spans = Spans([(base + 1, base + 4), (base + 7, base + 8)])
    root, _, _ = tablewriter.build(wide, spans, wide_frames.allocate_pages)
    at = base << 12
    assert not pagetable.any_preserved(wide, root, at + 0x4000, at + 0x7000)
    assert pagetable.any_preserved(wide, root, at + 0x3FFF, at + 0x4000)
    assert not pagetable.any_preserved(wide, root, at + 0x4000, at + 0x4000)
