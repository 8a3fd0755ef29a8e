# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of frames against the simplest model: a dictionary from file page to frame."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkramfs.fs import pagecache
from pkramfs.fs.pagecache import END, LEAF_RUNS, PageMap

STEPS = st.lists(
    st.tuples(st.sampled_from(["insert", "remove", "empty"]), st.integers(0, 60), st.integers(0, 25), st.booleans()),
    max_size=60,
)


def check(pages: PageMap, model: dict[int, int]) -> None:
    found = {}
    before = -1
    for index, pfn, count in pages:
        assert index > before and count > 0
        before = index + count - 1
        found |= {index + k: pfn + k for k in range(count)}
    assert found == model
    assert pages.count == len(model)
    assert list(pages.firsts) == [leaf[0] for leaf in pages.leaves[1:]]
    assert pages.runs == sum(map(len, pages.leaves)) // 3
    assert all(len(leaf) <= (pagecache.LEAF_RUNS + 1) * 3 for leaf in pages.leaves)


@pytest.mark.parametrize("leaf", [2, 3, 1024])
@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_a_map_is_a_dictionary(leaf: int, steps) -> None:
    pagecache.LEAF_RUNS, kept = leaf, LEAF_RUNS
    try:
        pages, model, frame = PageMap(), {}, 1000
        for action, first, size, contiguous in steps:
            last = first + size
            if action == "insert":
                for index, count in pages.holes(first, last):
                    frame = frame if contiguous else frame + 5
                    pages.insert(index, frame, count)
                    model |= {index + k: frame + k for k in range(count)}
                    frame += count
            else:
                if action == "empty":
                    first, last = 0, 100
                gone = pages.remove(first, END if action == "empty" else last)
                assert all(count for _, count in gone)
                expected = [model.pop(k) for k in range(first, last) if k in model]
                assert [pfn + k for pfn, count in gone for k in range(count)] == expected
            check(pages, model)
            inside = {i + k: p + k for i, p, n in pages.between(first, last) for k in range(n)}
            assert inside == {k: v for k, v in model.items() if first <= k < last}
    finally:
        pagecache.LEAF_RUNS = kept


def test_runs_that_continue_each_other_are_one() -> None:
    pages = PageMap()
    for index in (0, 1, 4, 3, 2):
        pages.insert(index, 100 + index, 1)
    assert list(pages) == [(0, 100, 5)]
    assert pages.runs == 1


def test_a_map_from_its_bytes() -> None:
    pages = PageMap()
    for index in range(3 * LEAF_RUNS):
        pages.insert(index, 10 + 2 * index, 1)
    raw = b"".join(pages.leaves)
    again = PageMap(raw, pages.count)
    assert list(again) == list(pages)
    check(again, {k: 10 + 2 * k for k in range(3 * LEAF_RUNS)})


def test_a_run_costs_less_than_64_bytes() -> None:
    pages = PageMap()
    total = 50_000
    for index in range(total):
        pages.insert(index * 7919 % total * 2, index * 2 + 1, 1)
    assert pages.runs == total
    size = sum(map(sys.getsizeof, pages.leaves)) + sys.getsizeof(pages.firsts) + 32 * len(pages.firsts)
    assert size / total < 64
