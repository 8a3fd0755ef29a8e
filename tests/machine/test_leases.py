"""The lease table: who owns each page block."""

import pytest

from pkramfs.errors import ExhaustedError
from pkramfs.machine.leases import new_tree_id
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES


def test_blocks_come_in_one_piece(leases):
    assert leases.lease(300, 5) == Spans([(1, 6)])
    assert leases.lease(301, 3, align=8) == Spans([(8, 11)])
    assert leases.blocks_of(300) == Spans([(1, 6)])
    assert leases.counts() == {"free": 55, "kernel": 1, "hole": 0, "reserve": 0, "tree": 8}


def test_a_fragmented_table_gives_the_largest_pieces(leases):
    leases.lease(300, 63)
    leases.release(300, Spans([(2, 4), (10, 20), (30, 33)]))
    assert leases.lease(301, 12) == Spans([(10, 20), (30, 32)])


def test_too_little_takes_nothing(leases):
    with pytest.raises(ExhaustedError, match="RAM is full"):
        leases.lease(300, 64)
    assert leases.tree_ids() == set()


def test_only_the_owner_releases(leases):
    leases.lease(300, 2)
    with pytest.raises(AssertionError):
        leases.release(301, Spans([(1, 2)]))


def test_sweep_frees_the_dead_and_zeroes(ram, leases):
    leases.lease(300, 2)
    leases.lease(301, 2)
    ram.words(BLOCK_PAGES)[:] = 1
    assert leases.sweep(lambda: {301}) == 2
    assert leases.tree_ids() == {301}
    assert not ram.words(BLOCK_PAGES).any()


def test_tree_ids_are_new():
    ids = {new_tree_id() for _ in range(1000)}
    assert len(ids) == 1000 and min(ids) >= 256 and max(ids) < 1 << 63
