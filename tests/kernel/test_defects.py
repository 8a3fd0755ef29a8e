# SPDX-License-Identifier: GPL-2.0-or-later
"""Defects of the series that cannot happen here, by their numbers; pkramfs(7) lists them all."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pkramfs.errors import ConflictError, PkramError, StaleError
from pkramfs.kernel import crash, loading, nvram, placement
from pkramfs.kernel.loading import Request
from pkramfs.kernel.nvram import ImageInfo, Pending
from pkramfs.kernel.segments import destinations
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.pkram import parallel, superblock
from pkramfs.pkram.streams import pagewriter
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_PAGES, GIB, MIB

PIECES = 40_000
"""Single pages, no two of them neighbours: several batches for a load."""


@pytest.fixture
def many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every worker several slices of a save of PIECES."""
    monkeypatch.setattr(pagewriter, "_SLICE", 1000)


def scattered(lab: Any) -> tuple[Frames, tuple[U64, U64, U64]]:
    """Make a tree of PIECES runs; return its frames, and the columns that a save takes."""
    kernel = lab.up()
    frames = Frames(kernel.ram, kernel.leases, new_tree_id())
    runs = frames.allocate(2 * PIECES)
    pages = np.concatenate([np.arange(start, start + count, 2, dtype=np.uint64) for start, count in runs])[:PIECES]
    return frames, (np.arange(PIECES, dtype=np.uint64), pages, np.ones(PIECES, dtype=np.uint64))


def save_columns(lab: Any, name: bytes, frames: Frames, columns: tuple[U64, U64, U64]) -> None:
    with lab.up().store.prepare_save(name, tree_id=frames.tree_id, frames=frames) as save:
        with save.object() as stream:
            stream.save_runs(*columns)
        save.finish()


def loaded_columns(lab: Any, name: bytes) -> list[list[int]]:
    with lab.up().store.prepare_load(name) as load:
        (stream,) = load
        return [column.tolist() for column in stream.load_runs()]


def load_half(lab: Any, name: bytes) -> None:
    """Load a node, and fail to insert the first batch of its pages."""
    with pytest.raises(RuntimeError), lab.up().store.prepare_load(name) as load:
        for stream in load:
            index, _, _ = next(stream.batches())
            assert 0 < len(index) < PIECES, "there is more to load"
            raise RuntimeError("the insert failed")


def test_d11_pages_of_a_batch_that_could_not_be_inserted_are_not_lost(make_lab: Any) -> None:
    lab = make_lab(GIB, name="scattered")
    frames, columns = scattered(lab)
    save_columns(lab, b"a", frames, columns)
    load_half(lab, b"a")
    assert loaded_columns(lab, b"a") == [column.tolist() for column in columns]
    lab.cycle()
    assert loaded_columns(lab, b"a") == [column.tolist() for column in columns]


def test_d12_no_number_of_bans_is_too_many(lab: Any, tmp_path: Path) -> None:
    """Ban more than 34 ranges: the original's table is full then, and drops bans with a line in the log."""
    piece = tmp_path / "piece"
    piece.write_bytes(b"x" * 4096)
    start, step = 60 * MIB, 64 * 4096
    places = [(str(piece), start + number * step) for number in range(300)]
    lab.load(syscall="load", segments=places)
    banned = lab.up().banned()
    assert len(banned) >= 300
    for number in range(14):
        lab.preserve(f"node{number}", 1500, seed=number)
    assert not lab.up().store.preserved() & banned
    lab.execute(poison=True)
    assert all(lab.intact(f"node{number}") for number in range(14))


def test_d13_a_segment_over_the_super_block_is_refused(lab: Any, tmp_path: Path) -> None:
    piece = tmp_path / "piece"
    piece.write_bytes(b"x")
    with pytest.raises(ConflictError) as refused:
        lab.load(syscall="load", segments=[(str(piece), lab.up().info.super_pfn * 4096)])
    assert "belongs to the super block and region list" in refused.value.conflicts[0]
    kernel = lab.up()
    frames = Frames(kernel.ram, kernel.leases, new_tree_id())
    frames.allocate((kernel.leases.counts()["free"] - 1) * BLOCK_PAGES)
    for size in range(1, 5):  # hardly any hole is left: what we choose ourselves is not over it either
        loaded = lab.load(f"builtin:{size}M").loaded
        assert not destinations(loaded.segments) & kernel.info.reserve_pages


def test_d14_early_boot_takes_no_preserved_page() -> None:
    hardware = FirmwareMap.default(256 * MIB, nodes=2, seed=5)
    image = ImageInfo("builtin", "builtin", "1", 4 * MIB, 2 * MIB, 16 * MIB, True)
    chance = np.random.default_rng(1)
    for generation in range(100):
        pages = np.unique(chance.integers(BLOCK_PAGES, 65536, 30).astype(np.uint64))
        preserved = Spans.from_arrays(pages, pages + np.uint64(1)) & hardware.usable
        placed, early = placement.arrange(hardware, Pending(nvram.KEXEC, generation, "ro", image), preserved)
        assert not placement.blocks_of(placed.spans) & preserved
        assert not early.free_spans() & preserved.scale(4096)


@pytest.mark.usefixtures("many_slices")
def test_d16_the_number_of_cpus_changes_nothing(make_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save with one CPU: the original starts no worker then, and waits for it."""
    lab, found = make_lab(GIB, name="cpus"), []
    frames, columns = scattered(lab)
    for cpus in (1, 2, 3, 4, 16, 17, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        assert 1 <= parallel.workers() <= 16
        save_columns(lab, b"a", frames, columns)
        with lab.up().store.prepare_load(b"a") as load:
            (stream,) = load
            found.append([column.tobytes() for column in (*stream.load_runs(), *stream.load_pages())])
        lab.up().store.withdraw(b"a")
    assert found[0][:3] == [column.tobytes() for column in columns]
    assert all(answer == found[0] for answer in found)


def test_d20_a_failed_load_leaks_nothing(make_lab: Any) -> None:
    lab = make_lab(GIB, name="scattered")
    kernel = lab.up()
    before = kernel.leases.counts()
    save_columns(lab, b"a", *scattered(lab))
    leased, backed = kernel.leases.counts(), kernel.ram.data_spans()
    load_half(lab, b"a")
    assert (kernel.leases.counts(), kernel.ram.data_spans()) == (leased, backed)
    kernel.store.withdraw(b"a")
    kernel.sweep()
    assert kernel.leases.counts() == before


@pytest.mark.usefixtures("many_slices")
def test_d23_two_saves_at_once_do_not_mix(make_lab: Any) -> None:
    """Run two saves with several workers each; the original's wait for one completion that both share."""
    lab = make_lab(GIB, name="two")
    trees = {name: scattered(lab) for name in (b"a", b"b")}
    threads = [threading.Thread(target=save_columns, args=(lab, name, *tree)) for name, tree in trees.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {node.name for node in lab.up().store.nodes()} == set(trees)
    lab.cycle()
    for name, (_, columns) in trees.items():
        assert loaded_columns(lab, name) == [column.tolist() for column in columns]


def test_what_one_object_fails_at_ends_the_whole_save(lab: Any) -> None:
    kernel = lab.up()
    frames = Frames(kernel.ram, kernel.leases, new_tree_id())
    ((pfn, count),) = frames.allocate(100)
    with (
        pytest.raises(RuntimeError),
        kernel.store.prepare_save(b"a", tree_id=frames.tree_id, frames=frames) as save,
    ):
        with save.object() as stream:
            stream.save_runs(*(np.array([value], np.uint64) for value in (0, pfn, count)))
        with save.object():
            raise RuntimeError("a worker failed")
    assert kernel.store.find(b"a") is None
    assert frames.used_pages == 100


def test_d26_a_crash_kernel_does_not_say_that_it_preserved(lab: Any) -> None:
    lab.cycle(append="ro crashkernel=32M")
    loading.load(lab.machine, Request("builtin:8M"), panic=True)
    with lab.machine.lifecycle(shared=False):
        dead = crash.panic(lab.machine)
    frames = Frames(dead.ram, dead.leases, new_tree_id())
    with pytest.raises(PkramError) as refused, dead.store.prepare_save(b"a", tree_id=frames.tree_id, frames=frames):
        pass
    assert refused.value.errno == errno.ENODEV


@pytest.mark.usefixtures("damaged")
def test_d31_a_super_block_is_good_once(lab: Any) -> None:
    lab.preserve("a", 100)
    old = lab.up().info.super_pfn
    kernel = lab.cycle("builtin:4M")
    assert kernel.info.old_super_pfn == old
    assert not any(kernel.ram.peek(old)), "consumed, then freed"
    superblock.consume(kernel.ram, kernel.info.super_pfn)
    with pytest.raises(StaleError):
        superblock.check(kernel.ram, kernel.info.super_pfn, kernel.machine.hardware().usable)


def test_d32_nothing_saved_is_no_error(lab: Any) -> None:
    lab.cycle()
    log = lab.machine.dmesg()
    assert "is empty" in log
    assert "invalid" not in log
