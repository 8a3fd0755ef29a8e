# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames that were named, each once, against a plain count."""

import collections
import random

import numpy as np
import pytest

from pkramfs.errors import PkramError
from pkramfs.pkram import parallel
from pkramfs.pkram.frameset import FrameSet
from pkramfs.spans import Spans

PAGES = 1 << 16


def calls(rng, runs):
    """Runs in calls of any size, as arrays."""
    rng.shuffle(runs)
    while runs:
        some, runs = runs[: (size := rng.choice((1, 2, 16, 17, 400)))], runs[size:]
        yield tuple(np.array(column, dtype=np.uint64) for column in zip(*some, strict=True))


@pytest.mark.parametrize("seed", range(80))
def test_a_frame_named_twice_is_noticed_and_only_then(seed):
    rng = random.Random(seed)
    runs, at = [], 1
    while at < PAGES - 3000:
        count = rng.choice((1, 1, 1, 2, 30, 64, 2000))
        runs.append((at, count))
        at += count + rng.choice((0, 0, 1, 500))
    if twice := seed % 2:
        start, count = rng.choice(runs)
        runs.append((start + rng.randrange(count), 1))
    marks = FrameSet(PAGES)
    try:
        for pfn, count in calls(rng, list(runs)):
            marks.add(pfn, count)
        found = marks.spans()
    except PkramError:
        assert twice
        return
    assert not twice
    assert found == Spans((a, a + n) for a, n in runs)


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 2), (3, 3), (16, 16), (17, 16), (64, 16)])
def test_d16_there_is_always_a_worker(cpus, threads):
    """Facts 10.7: the original starts CPUs - 1 workers, none where there is one CPU."""
    assert parallel.workers(cpus) == threads


@pytest.mark.parametrize(("size", "count"), [(1 << 18, 1), ((1 << 18) + 1, 2), (100 << 18, 100), (0, 0), (1, 1)])
def test_a_file_is_cut_into_chunks_of_a_gib(size, count):
    """Facts 10.8."""
    found = list(parallel.chunks(0, size))
    assert len(found) == count
    assert sum(end - start for start, end in found) == size
    assert [start % parallel.CHUNK_PAGES for start, _ in found] == [0] * count


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_position_is_worked_on_once(threads):
    seen = collections.Counter()
    answers = parallel.each(lambda n: (seen.update([n]), n * n)[1], 100, threads=threads)
    assert answers == [n * n for n in range(100)]
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("threads", [1, 4])
def test_d24_after_an_error_nothing_new_is_begun(threads):
    begun = []

    def work(number):
        begun.append(number)
        if number == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        parallel.each(work, 10_000, threads=threads)
    assert len(begun) < 10_000
