# SPDX-License-Identifier: GPL-2.0-or-later
"""The lease table: who owns each page block."""

import contextlib
import os

import pytest

from pkramfs.errors import ExhaustedError
from pkramfs.machine import leases as leases_module
from pkramfs.machine import locks, mounts
from pkramfs.machine.leases import Leases, new_tree_id
from pkramfs.machine.ram import Ram
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, TIB


def test_blocks_come_in_one_piece(leases):
    assert leases.lease(300, 5) == Spans([(1, 6)])
    assert leases.lease(301, 3, align=8) == Spans([(8, 11)])
    assert leases.blocks_of(300) == Spans([(1, 6)])
    assert leases.counts() == {"free": 55, "kernel": 1, "hole": 0, "reserve": 0, "tree": 8}


def test_a_fragmented_table_gives_the_largest_pieces(leases):
    leases.lease(300, 63)
    leases.release(300, Spans([(2, 4), (10, 20), (30, 33)]))
    assert leases.free_blocks() == 15
    assert leases.lease(301, 12) == Spans([(10, 20), (30, 32)])
    assert leases.free_blocks() == 3


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


def test_a_dead_process_leaves_free_memory(ram_path):
    """Between lease and use, and after use: whoever dies holds nothing, because its lock is gone."""
    directory = os.path.dirname(ram_path)
    ram = Ram(ram_path, 64 * BLOCK_SIZE, create=True)
    table = Leases(ram, 1, 64, lambda: locks.held(f"{directory}/tables"))
    table.ids[0] = 1
    for used in (False, True):
        child = os.fork()
        if not child:
            mounts.claim(directory, 0x400)
            blocks = table.lease(0x400, 7)
            if used:
                ram.words(int(blocks.starts[0]) * BLOCK_PAGES)[:] = 9
            os._exit(0)
        os.waitpid(child, 0)
        assert table.tree_ids() == {0x400}
        assert table.sweep(lambda: mounts.live_ids(directory)) == 7
        assert table.counts()["free"] == 63
        assert ram.data_spans() == Spans([(1, 2)])
    ram.close()


def test_the_living_are_not_swept(ram_path):
    directory = os.path.dirname(ram_path)
    ram = Ram(ram_path, 64 * BLOCK_SIZE, create=True)
    table = Leases(ram, 1, 64, contextlib.nullcontext)
    held = mounts.claim(directory, 0x400)
    table.lease(0x400, 7)
    assert table.sweep(lambda: mounts.live_ids(directory)) == 0
    held.release()
    assert table.sweep(lambda: mounts.live_ids(directory)) == 7
    ram.close()


def test_a_long_sweep_lets_others_at_the_table(ram_path, monkeypatch):
    monkeypatch.setattr(leases_module, "_SWEEP_BLOCKS", 10)
    ram, entered = Ram(ram_path, 64 * BLOCK_SIZE, create=True), []

    @contextlib.contextmanager
    def lock():
        entered.append(True)
        yield

    table = Leases(ram, 1, 64, lock)
    table.ids[0] = 1
    table.ids[1:40:2], table.ids[2:40:2] = 500, 501
    assert table.sweep(lambda: {501}) == 20
    assert len(entered) == 3  # to find them, and for two slices
    assert table.blocks_of(501).total == 19 and table.counts()["free"] == 44
    ram.close()


def test_what_another_swept_and_leased_meanwhile_is_left_alone(ram_path):
    ram, entered = Ram(ram_path, 64 * BLOCK_SIZE, create=True), []

    @contextlib.contextmanager
    def lock():
        entered.append(True)
        if len(entered) == 2:
            table.ids[4:6] = 600
            ram.words(4 * BLOCK_PAGES)[:] = 9
        yield

    table = Leases(ram, 1, 64, lock)
    table.ids[1:9] = 500
    assert table.sweep(lambda: ()) == 6
    assert table.blocks_of(600) == Spans([(4, 6)]) and table.tree_ids() == {600}
    assert ram.words(4 * BLOCK_PAGES).all()
    ram.close()


def test_memory_goes_back_before_the_lock_is_taken(ram_path):
    """Giving back may take seconds; the table is locked for a store."""
    ram, backed = Ram(ram_path, 64 * BLOCK_SIZE, create=True), []

    @contextlib.contextmanager
    def lock():
        backed.append(bool(ram.data_spans(BLOCK_PAGES)))
        yield

    table = Leases(ram, 1, 64, lock)
    table.ids[1:3] = 500
    ram.words(BLOCK_PAGES)[:] = 9
    table.release(500, Spans([(1, 3)]))
    assert backed == [False]
    ram.close()


def test_a_16_tib_table_is_read_without_being_filled(ram_path):
    blocks = 16 * TIB // BLOCK_SIZE
    ram = Ram(ram_path, 16 * TIB, create=True)
    table = Leases(ram, 1, blocks, contextlib.nullcontext)
    table.ids[:33] = 1
    table.ids[::600_000] = 700  # pages of the table far apart
    assert table.blocks_of(700).total == 14
    assert table.counts() == {"free": blocks - 46, "kernel": 32, "hole": 0, "reserve": 0, "tree": 14}
    assert table.free_blocks() == blocks - 46
    assert table.lease(701, 400_000).total == 400_000
    assert table.tree_ids() == {700, 701}
    table.sweep(lambda: ())
    assert table.counts()["tree"] == 0
    assert ram.backed <= 400_000 * 8 + 20 * PAGE_SIZE
    ram.close()
