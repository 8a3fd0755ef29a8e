"""The page allocator against a set of pages that knows nothing of runs."""

import random

import numpy as np
import pytest

from pkramfs.errors import ExhaustedError
from pkramfs.machine.frames import Frames
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

TREE = 0xABCDEF


@pytest.fixture
def frames(ram, leases):
    return Frames(ram, leases, TREE)


def pages_of(runs):
    return {page for start, count in runs for page in range(start, start + count)}


def test_a_request_is_one_run_in_fresh_memory(frames):
    assert [count for _, count in frames.allocate(1000)] == [1000]
    assert frames.used_pages == 1000


def test_runs_are_zero_filled_after_reuse(ram, frames):
    (run,) = frames.allocate(8)
    ram.words(*run)[:] = 7
    frames.free([run[0]], [run[1]])
    runs = frames.allocate(BLOCK_PAGES)
    assert all(not ram.words(*r).any() for r in runs)


def test_order_aligns(frames):
    frames.allocate(3)
    runs = frames.allocate(2 * BLOCK_PAGES, order=9)
    assert sum(c for _, c in runs) == 2 * BLOCK_PAGES
    assert all(start % BLOCK_PAGES == 0 for start, _ in runs)


def test_full_ram_takes_nothing(frames):
    with pytest.raises(ExhaustedError):
        frames.allocate(64 * BLOCK_PAGES)
    assert frames.used_pages == 0
    assert sum(c for _, c in frames.allocate(63 * BLOCK_PAGES)) == 63 * BLOCK_PAGES


def test_held_pages_are_for_the_save(frames):
    frames.hold(100)
    with pytest.raises(ExhaustedError):
        frames.allocate(63 * BLOCK_PAGES - 99)
    frames.allocate(63 * BLOCK_PAGES - 100)
    with pytest.raises(ExhaustedError):
        frames.allocate(1)
    assert pages_of(frames.allocate(100, held=True))


def test_free_blocks_go_back(frames, leases):
    (run,) = frames.allocate(60 * BLOCK_PAGES)
    frames.free([run[0]], [run[1]])
    assert leases.counts()["tree"] < 60
    assert frames.free_pages == leases.counts()["tree"] * BLOCK_PAGES


def test_adopt_takes_over_what_another_left(ram, leases, frames):
    kept = frames.allocate(700)
    frames.allocate(300)
    heir = Frames(ram, leases, TREE)
    heir.adopt(Spans((s, s + c) for s, c in kept))
    assert heir.used_pages == 700
    assert not pages_of(heir.allocate(500)) & pages_of(kept)


@pytest.mark.parametrize("seed", range(30))
def test_against_a_set(frames, leases, seed):
    rng, owned = random.Random(seed), []
    taken: set[int] = set()
    for _ in range(200):
        if owned and rng.random() < 0.45:
            runs = owned.pop(rng.randrange(len(owned)))
            frames.free(np.array([s for s, _ in runs]), np.array([c for _, c in runs]))
            taken -= pages_of(runs)
            continue
        count = rng.choice((1, 1, 2, 5, 64, 511, 512, 2000))
        try:
            runs = frames.allocate(count, order=rng.choice((0, 0, 4, 9)))
        except ExhaustedError:
            continue
        pages = pages_of(runs)
        assert len(pages) == count and not pages & taken
        taken |= pages
        owned.append(runs)
        if rng.random() < 0.3 and count > 2:  # give back the middle of what was taken
            start, size = runs[0]
            if size > 2:
                frames.free([start + 1], [size - 2])
                taken -= set(range(start + 1, start + size - 1))
                owned[-1] = [(start, 1), (start + size - 1, 1), *runs[1:]]
    assert frames.used_pages == len(taken)
    assert {p for a, b in frames.used() for p in range(a, b)} == taken
