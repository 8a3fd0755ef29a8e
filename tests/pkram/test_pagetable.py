"""The preserved-page table against the set it was built from."""

import random

import numpy as np
import pytest

from pkramfs.pkram import pagetable
from pkramfs.spans import Spans


@pytest.mark.parametrize("seed", range(60))
def test_reads_back_what_was_built(ram, frames, seed):
    rng = random.Random(seed)
    top = rng.choice((2000, 1 << 15, 1 << 26, 1 << 33))
    spans = Spans(
        (a, a + rng.choice((1, 2, 63, 512, 4000, 300000, 1 << 20)))
        for a in (rng.randrange(40000, 40000 + top) for _ in range(rng.randint(0, 40)))
    )
    root, digest, pages = pagetable.build(ram, spans, frames.allocate_pages)
    assert pagetable.read(ram, root) == spans | Spans.from_runs(pages, np.ones_like(pages))
    assert pagetable.checksum(ram, root) == digest


def test_contiguous_memory_costs_a_handful_of_pages(ram, frames):
    spans = Spans([(1 << 20, (1 << 20) + 100 * (1 << 18))])
    _, _, pages = pagetable.build(ram, spans, frames.allocate_pages)
    assert len(pages) < spans.total * 0.0001
    assert len(pages) <= 6


def test_a_fragmented_block_is_one_bitmap(ram, frames):
    spans = Spans((a, a + 1) for a in range(1 << 20, (1 << 20) + 512, 2))
    root, _, pages = pagetable.build(ram, spans, frames.allocate_pages)
    assert pagetable.read(ram, root) - Spans.from_runs(pages, np.ones_like(pages)) == spans
