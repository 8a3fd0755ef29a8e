# SPDX-License-Identifier: GPL-2.0-or-later
"""Link pages: encoding, splitting into aligned blocks, where links begin."""

import random

import numpy as np
import pytest

from pkramfs.pkram.streams import link, scattered
from pkramfs.units import round_up


def u64(*values):
    return np.array(values, dtype=np.uint64)


@pytest.mark.parametrize(
    ("pfn", "order", "flags", "entry"),
    [(0x12345, 0, 0, 0x12345000), (0x40000, 9, 1, 0x40000029), (0x7FFFF, 0, 0x7F, 0x7FFFFFE0)],
)
def test_entries_are_encoded_as_pkram_does(pfn, order, flags, entry):
    entries = link.encode(u64(pfn), np.array([order], np.uint8), flags)
    assert entries.tolist() == [entry]
    assert [int(column[0]) for column in link.decode(entries)] == [pfn, order, flags]


@pytest.mark.parametrize(
    ("start", "count", "order", "align", "links"),
    [
        (0, 1000, 0, False, [(0, 510), (510, 490)]),
        (0, 1000, 0, True, [(0, 448), (448, 448), (896, 104)]),
        (10, 1200, 0, True, [(10, 502), (512, 448), (960, 250)]),
        (0, 1100, 9, True, [(0, 504), (258048, 504), (516096, 92)]),
    ],
)
def test_links_break_where_pkram_breaks_them(start, count, order, align, links):
    index = np.uint64(start) + (np.arange(count, dtype=np.uint64) << np.uint64(order))
    orders = np.full(count, order, np.uint8)
    singly = link.rows(index, index + np.uint64(1 << 20), orders)
    at_once = link.rows(index[:1], index[:1] + np.uint64(1 << 20), orders[:1], repeat=u64(count))
    for rows in (singly, at_once):
        plan = link.plan(rows, 510, align=align)
        assert list(zip(plan.index.tolist(), plan.counts.tolist(), strict=True)) == links


def links_of_pkram(index, order, capacity):
    """Row 43 entry by entry, as the kernel's loop has it: (first index, entries) of each link."""
    found, expected = [], None
    for at, size in zip(index, order, strict=True):
        room = capacity - found[-1][1] if found else 0
        group = {0: (64, 64), 9: (4096, 8)}.get(size)
        full = not room or (group is not None and at % group[0] == 0 and room < group[1])
        if full or at != expected:
            found.append([at, 0])
        found[-1][1] += 1
        expected = at + (1 << size)
    return [tuple(link) for link in found]


@pytest.mark.parametrize("capacity", [504, 510])
@pytest.mark.parametrize("seed", range(60))
def test_aligned_links_are_those_of_pkram_s_loop(capacity, seed):
    rng = random.Random(seed)
    index, order, at = [], [], rng.choice((0, 1, 63, 64, 4095, 4096, rng.randrange(1 << 20)))
    for _ in range(rng.randint(1, 6)):
        size, count = rng.choice((0, 0, 0, 9, 9, 3)), rng.randint(1, 1500)
        at = round_up(at + rng.choice((0, 0, 0, 1, 5000)), 1 << size)
        index += range(at, at + (count << size), 1 << size)
        order += [size] * count
        at = index[-1] + (1 << size)
    orders = np.array(order, np.uint8)
    plan = link.plan(link.rows(u64(*index), u64(*index) + np.uint64(1 << 20), orders), capacity, align=True)
    assert list(zip(plan.index.tolist(), plan.counts.tolist(), strict=True)) == links_of_pkram(index, order, capacity)


def test_a_jump_begins_a_link():
    plan = link.plan(link.rows(u64(0, 1, 5, 6, 9), u64(7, 8, 9, 10, 11), np.zeros(5, np.uint8)))
    assert (plan.index.tolist(), plan.counts.tolist()) == ([0, 5, 9], [2, 2, 1])


@pytest.mark.parametrize("seed", range(200))
def test_split_and_join_agree(seed):
    rng = random.Random(seed)
    index, pfn, rows = 0, 1, []
    for _ in range(rng.randint(1, 6)):
        index += rng.choice((0, 0, 3))
        pfn += rng.choice((0, 1, 5, 511, 300000))
        count = rng.choice((1, 2, 3, 511, 512, 513, rng.randint(1, 1 << 20)))
        rows.append((index, pfn, count))
        index, pfn = index + count, pfn + count
    runs = tuple(np.array(column, dtype=np.uint64) for column in zip(*rows, strict=True))
    blocks = link.split_runs(*runs)
    sizes = link.sizes(blocks[2])
    assert (blocks[1] % sizes == 0).all() and int(blocks[2].max()) <= 18
    joined, expected = link.join_blocks(*blocks), merged(rows)
    assert list(zip(*(c.tolist() for c in joined), strict=True)) == expected


def merged(rows):
    found = [list(rows[0])]
    for index, pfn, count in rows[1:]:
        last = found[-1]
        if last[0] + last[2] == index and last[1] + last[2] == pfn:
            last[2] += count
        else:
            found.append([index, pfn, count])
    return [tuple(row) for row in found]


@pytest.mark.parametrize(
    ("index", "dense"),
    [
        ([7], True),
        ([7, 8, 9], True),
        ([7, 9, 10], False),
        ([7, 7, 9], False),
        ([0, 2, 1, 3], False),
        ([0, 1, 1, 3], False),
        ([9, 8, 7], False),
        ([2**63 - 1, 2**63], False),
        ([2**64 - 1, 0], False),
        ([2**64 - 2, 2**64 - 1], True),
    ],
)
def test_indices_that_follow_one_another(index, dense):
    """Across 2^63 they do, but are too large either way."""
    assert scattered.dense(u64(*index), scattered.Bench()) is dense
