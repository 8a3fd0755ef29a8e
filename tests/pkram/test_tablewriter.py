# SPDX-License-Identifier: GPL-2.0-or-later
"""The preserved-page table while it grows and shrinks, against a plain set of pages."""

import errno
import itertools
import random

import numpy as np
import pytest

from pkramfs.errors import PkramError
from pkramfs.pkram.table import reader as pagetable
from pkramfs.pkram.table.reader import LOWER, UPPER
from pkramfs.pkram.table.writer import TableWriter
from pkramfs.spans import Spans

BASE = 1 << 20


def pieces(rng: random.Random, spans: Spans, cuts: int) -> list[Spans]:
    """The same pages in several disjoint sets."""
    edges = sorted({rng.randrange(a, b + 1) for a, b in spans for _ in range(cuts)} | {e for s in spans for e in s})
    parts = [Spans([(a, b)]) & spans for a, b in itertools.pairwise(edges)]
    rng.shuffle(parts)
    return [part for part in parts if part]


@pytest.mark.few(20)
@pytest.mark.parametrize("seed", range(60))
def test_adding_and_removing_in_bulk(wide, wide_frames, seed):
    rng = random.Random(seed)
    top = rng.choice((2000, 1 << 14, 1 << 20, 1 << 28))
    spans = Spans(
        (a, a + rng.choice((1, 2, 63, LOWER, 5000, UPPER, UPPER + 77)))
        for a in (BASE + rng.randrange(top) // rng.choice((1, LOWER)) * 1 for _ in range(rng.randint(1, 12)))
    )
    table, model = TableWriter(wide, wide_frames.allocate_pages), Spans()
    for part in pieces(rng, spans, 3):
        table.add(part)
        model = model | part
        assert pagetable.read(wide, table.root) == model
    for part in pieces(rng, spans, 2):
        table.remove(part)
        model = model - part
        assert pagetable.read(wide, table.root) == model
    assert not wide.words(table.root).any(), "an empty table has no pages below its root"


@pytest.mark.parametrize("there", [(5, 6), (0, LOWER), (LOWER, 3 * LOWER), (0, UPPER), (0, UPPER + 5)])
@pytest.mark.parametrize("again", [(5, 6), (0, LOWER), (7, LOWER + 8), (0, UPPER), (UPPER - 1, UPPER + 2)])
def test_d19_a_page_that_is_there_is_not_added_again(wide, wide_frames, there, again):
    """The original panics. Here it is an error, and nothing has changed."""
    old, new = (Spans([(BASE + a, BASE + b)]) for a, b in (there, again))
    table = TableWriter(wide, wide_frames.allocate_pages)
    table.add(old)
    if not old & new:
        table.add(new)
        return
    before = pagetable.checksum(wide, table.root)
    with pytest.raises(PkramError) as caught:
        table.add(new)
    assert caught.value.errno == errno.EEXIST
    assert pagetable.checksum(wide, table.root) == before


def test_a_page_that_is_not_there_is_not_removed(wide, wide_frames):
    table = TableWriter(wide, wide_frames.allocate_pages)
    table.add(Spans([(BASE, BASE + UPPER)]))
    before = pagetable.checksum(wide, table.root)
    for wrong in ((BASE - 1, BASE + 1), (BASE + UPPER - 3, BASE + UPPER + 1), (5, 6)):
        with pytest.raises(PkramError) as caught:
            table.remove(Spans([wrong]))
        assert caught.value.errno == errno.ENOENT
    assert pagetable.checksum(wide, table.root) == before


def test_512_pages_one_by_one_are_a_full_entry(wide, wide_frames):
    """Facts 10.5: address 0x40201000 is GiB 1, block 1, bit 1; a full block needs no bitmap."""
    table = TableWriter(wide, wide_frames.allocate_pages)
    block = 0x40200
    for page in range(block, block + LOWER):
        table.add(Spans([(page, page + 1)]))
    upper = wide.words(int(wide.words(table.root)[0]) >> 12)
    lower = wide.words(int(upper[1]) >> 12)
    assert np.flatnonzero(lower).tolist() == [1]
    assert int(lower[1]) == pagetable.FULL
    table.remove(Spans([(0x40201, 0x40202)]))
    bitmap = wide.u64[pagetable.bitmap_places(lower[1:2])][0]
    assert int(bitmap[0]) == 2**64 - 1 - 2
    assert pagetable.read(wide, table.root).total == LOWER - 1


def test_memory_that_was_not_asked_for_is_refused(ram, frames):
    table = TableWriter(ram, frames.allocate_pages)
    for wrong in ((0, 2), (ram.pages - 1, ram.pages + 1)):
        with pytest.raises(PkramError) as caught:
            table.add(Spans([wrong]))
        assert caught.value.errno == errno.EINVAL


def test_pages_given_back_are_used_again(wide, wide_frames):
    table = TableWriter(wide, wide_frames.allocate_pages)
    odd = Spans((BASE + a, BASE + a + 1) for a in range(0, 200 * LOWER, 2))
    table.add(odd)
    used = wide_frames.used_pages
    for _ in range(3):
        table.remove(odd)
        table.add(odd)
    assert wide_frames.used_pages == used


@pytest.mark.parametrize("there", [(5, 9), (0, LOWER - 1), (0, LOWER), (0, UPPER)])
@pytest.mark.parametrize("more", [(9, 11), (LOWER - 1, LOWER), (8, 9), (LOWER, LOWER + 2), (UPPER, UPPER + 1), (4, 5)])
def test_a_few_pages_are_added_in_the_end_as_many_are(wide, wide_frames, there, more):
    """What a table is left to list of its own pages: the same entries, the same refusals."""
    first, last = (Spans([(BASE + a, BASE + b)]) for a, b in (there, more))
    tables = [TableWriter(wide, wide_frames.allocate_pages) for _ in range(2)]
    for table in tables:
        table.add(first)
    if first & last:
        with pytest.raises(PkramError) as caught:
            tables[0].close(iter([last, Spans()]).__next__)
        assert caught.value.errno == errno.EEXIST
        return
    tables[0].close(iter([last, Spans()]).__next__)
    tables[1].add(last)
    unit = np.array([BASE // LOWER], dtype=np.uint64)
    found = [pagetable.read(wide, table.root) for table in tables]
    assert found == [first | last] * 2
    full = [table._lower(unit, unit // np.uint64(LOWER))[0] == pagetable.FULL for table in tables]
    assert full[0] == full[1]
