# SPDX-License-Identifier: GPL-2.0-or-later
"""Row 15: what is banned is copied elsewhere, in bulk, in the largest pieces, and nothing else is."""

import random

import numpy as np
import pytest

from pkramfs.pkram import relocate
from pkramfs.pkram.relocate import relocate_banned, touched
from pkramfs.pkram.streams import link
from pkramfs.spans import Spans

from .conftest import TREE


class Counting:
    """Frames that count how often they are asked."""

    def __init__(self, frames):
        self.frames, self.calls = frames, 0

    def allocate(self, count, order=0, *, held=False):
        self.calls += 1
        return self.frames.allocate(count, order, held=held)

    def free(self, starts, counts):
        self.frames.free(starts, counts)


def columns(rows):
    return tuple(np.array(column, dtype=np.uint64) for column in zip(*rows, strict=True))


def stamp(ram, rows):
    """Mark each page with its index."""
    for index, pfn, count in rows:
        for k in range(count):
            ram.words(pfn + k)[:] = index + k + 1


def read(ram, found):
    return {
        index + k: (pfn + k, int(ram.words(pfn + k)[511]))
        for index, pfn, count in zip(*(column.tolist() for column in found), strict=True)
        for k in range(count)
    }


@pytest.mark.few(16)
@pytest.mark.parametrize("seed", range(60))
def test_every_page_keeps_its_index_and_contents(ram, frames, seed):
    rng = random.Random(seed)
    ((start, total),) = frames.allocate(3000)
    rows, index, pfn = [], rng.randrange(5), start
    while pfn < start + total:
        count = min(rng.choice((1, 1, 3, 15, 16, 17, 200, 600)), start + total - pfn)
        rows.append((index, pfn, count))
        index, pfn = index + count + rng.choice((0, 0, 9)), pfn + count + rng.choice((0, 0, 2))
    rng.shuffle(rows)
    stamp(ram, rows)
    banned = Spans((a, a + rng.choice((1, 1, 4, 100, 900))) for a in rng.sample(range(start, start + 5000), 12))
    used, before = frames.used_pages, read(ram, columns(rows))
    *found, copies = relocate_banned(ram, frames, *columns(rows), banned)
    after = read(ram, found)
    assert {index: content for index, (_, content) in after.items()} == {index: index + 1 for index in before}
    homes = Spans((a, a + n) for a, n in copies)
    for index, (home, _) in after.items():
        assert home not in banned
        assert (home == before[index][0]) == (before[index][0] not in banned)
        assert home == before[index][0] or home in homes
    moved = sum(home in banned for home, _ in before.values())
    assert homes.total == moved == frames.used_pages - used
    if moved:
        assert (found[0][1:] >= found[0][:-1]).all(), "by index"


def test_ten_thousand_runs_are_moved_in_one_step(ram, frames):
    """No request and no copy for each run."""
    ((start, _),) = frames.allocate(20_000)
    pfn = start + 2 * np.arange(10_000, dtype=np.uint64)
    index, count = np.arange(10_000, dtype=np.uint64), np.ones(10_000, dtype=np.uint64)
    ram.words(start, 20_000).reshape(-1, 512)[::2, 7] = index
    asked = Counting(frames)
    banned = Spans([(start, start + 9000), (start + 9001, start + 20_000)])
    found_index, found, size, copies = relocate_banned(ram, asked, index, pfn, count, banned)
    assert asked.calls == 1 and len(copies) == 1
    assert (found_index == index).all() and (size == 1).all()
    assert (ram.u64.reshape(-1, 512)[found.astype(np.int64), 7] == index).all()


@pytest.mark.parametrize("strict", [False, True])
def test_huge_pages_stay_huge(ram, store, frames, strict):
    """The original brings back as base pages what was moved, and so does strict."""
    frames.allocate(3)  # so that what is allocated next begins anywhere
    ((start, _),) = frames.allocate(2048, order=9)
    stamp(ram, [(0, start, 2048)])
    banned = Spans([(start + 512, start + 1536), (start + 5, start + 6)])
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, banned=banned, strict=strict) as saving:
        with saving.object() as writer:
            writer.save_pages([0, 512, 1024, 1536], start + 512 * np.arange(4), [9] * 4)
        assert saving.finish().relocated == 1025
    with store.prepare_load(b"n") as load:
        (reader,) = load
        index, pfn, order = reader.load_pages()
        assert read(ram, (index, pfn, link.sizes(order))).keys() == set(range(2048))
    large = order[np.isin(index, [512, 1024, 1536])]
    assert large.tolist() == ([0, 0, 9] if strict else [9, 9, 9])


def test_the_ban_table_is_a_set_of_ranges():
    """Facts 10.4, ends inclusive there and exclusive here."""
    assert Spans([(100, 200), (300, 400)]) | Spans([(200, 300)]) == Spans([(100, 400)])
    two = Spans([(62, 71)]) | Spans([(50, 61)])
    assert len(two) == 2 and two | Spans([(61, 62)]) == Spans([(50, 71)])
    banned = Spans([(0x3FF, 0x400)])
    runs = columns([(0, 0x200, 512), (600, 0x400, 512), (0, 0x1FF, 1), (0, 0x3FF, 1)])
    assert touched(banned, runs[1], runs[2]).tolist() == [True, False, False, True]


def test_frames_go_back_if_a_copy_fails(ram, frames, monkeypatch):
    runs, used = frames.allocate(50), frames.used_pages

    def fail(*_):
        raise OSError("the host is out of memory")

    monkeypatch.setattr(relocate, "_copy", fail)
    with pytest.raises(OSError, match="out of memory"):
        relocate_banned(ram, frames, *columns([(0, *runs[0])]), Spans([(0, ram.pages)]) - Spans([(20_000, 30_000)]))
    assert frames.used_pages == used


def test_copies_are_free_again_after_a_withdrawal(ram, store, frames):
    """What a node uses for itself and the copies; the data stay the owner's."""
    ((start, count),) = frames.allocate(100)
    data = Spans([(start, start + count)])
    banned = Spans([(start + 10, start + 40)])
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, banned=banned) as saving:
        with saving.object() as writer:
            writer.write(b"x" * 9000)
            writer.save_runs([0], [start], [count])
        node = saving.finish()
    own = store.pages_of(node) - data
    assert own == frames.used() - data
    store.withdraw(b"n")
    frames.free(own.starts, own.counts)
    assert frames.used() == data
