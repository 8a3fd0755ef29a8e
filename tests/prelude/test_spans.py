# SPDX-License-Identifier: GPL-2.0-or-later
"""Spans against Python's own sets."""

from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pkramfs.spans import Spans, first_place

TOP = 48
RANGES = st.lists(st.tuples(st.integers(0, TOP), st.integers(0, 8)).map(lambda r: (r[0], r[0] + r[1])), max_size=8)


def numbers(ranges):
    return {n for a, b in ranges for n in range(a, b)}


@given(RANGES, RANGES, st.sampled_from((0, 64)))
def test_set_operations(a, b, few):
    left, right = Spans(a), Spans(b)
    with patch("pkramfs.spans._FEW", few):  # 0: as if each set were large
        assert numbers(left) == numbers(a)
        assert numbers(left | right) == numbers(a) | numbers(b)
        assert numbers(left & right) == numbers(a) & numbers(b)
        assert numbers(left - right) == numbers(a) - numbers(b)
        assert left - right == Spans((n, n + 1) for n in numbers(a) - numbers(b))
        assert left.total == len(numbers(a))
        assert (left == right) == (numbers(a) == numbers(b))


@given(st.lists(RANGES, max_size=4))
def test_many_sets_are_joined_as_one_by_one(parts):
    assert numbers(Spans.union(map(Spans, parts))) == set().union(*map(numbers, parts))


@given(st.lists(st.integers(0, TOP)))
def test_a_set_of_numbers_in_any_order(found):
    assert numbers(Spans.from_numbers(found)) == set(found)


def test_a_place_lies_in_one_of_ranges_that_touch():
    starts, ends = np.array([[2, 5, 9], [5, 9, 10]], dtype=np.uint64)
    assert first_place(starts, ends, 4) == first_place(starts, ends, 4, top_down=True) == 5
    assert first_place(starts, ends, 5) is None
    assert first_place(starts, ends, 1, 4) == 4 and first_place(starts, ends, 1, 4, top_down=True) == 8


@given(RANGES)
def test_spans_are_sorted_and_apart(a):
    spans = Spans(a)
    assert (spans.starts[1:] > spans.ends[:-1]).all()
    assert (spans.ends > spans.starts).all()


@given(RANGES, st.integers(0, TOP), st.integers(0, TOP))
def test_queries(a, start, end):
    spans, wanted = Spans(a), set(range(start, end))
    assert spans.overlaps(start, end) == bool(wanted & numbers(a))
    assert spans.covers(start, end) == (wanted <= numbers(a))
    assert numbers(spans.clip(start, end)) == numbers(a) & wanted
    assert numbers(spans.gaps(start, end)) == wanted - numbers(a)
    assert (start in spans) == (start in numbers(a))


@given(RANGES, st.integers(1, 6))
def test_units(a, unit):
    spans, found = Spans(a), numbers(a)
    assert numbers(spans.scale(unit)) == {n * unit + k for n in found for k in range(unit)}
    assert numbers(spans.outward(unit)) == {n // unit for n in found}
    assert numbers(spans.inward(unit)) == {n for n in range(2 * TOP) if all(n * unit + k in found for k in range(unit))}


@given(RANGES, st.integers(1, 6), st.integers(1, 5))
def test_first_fit(a, count, align):
    spans, found = Spans(a), numbers(a)
    places = [n for n in range(0, 2 * TOP, align) if all(n + k in found for k in range(count))]
    assert spans.first_fit(count, align) == (places[0] if places else None)
    assert spans.first_fit(count, align, top_down=True) == (places[-1] if places else None)


@given(st.lists(st.booleans(), max_size=40))
def test_masks(mask):
    assert numbers(Spans.from_mask(mask, 5)) == {n + 5 for n, flag in enumerate(mask) if flag}
