"""Link pages: encoding, splitting into aligned blocks, where links begin."""

import random

import numpy as np
import pytest

from pkramfs.pkram import link


def u64(*values):
    return np.array(values, dtype=np.uint64)


@pytest.mark.parametrize(
    ("pfn", "order", "flags", "entry"),
    [(0x12345, 0, 0, 0x12345000), (0x40000, 9, 1, 0x40000029), (0x7FFFF, 0, 0x7F, 0x7FFFFFE0 - 0x1F + 0x1F)],
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
