# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes: saved whole or never, loaded without being consumed, withdrawn by one store."""

import errno
import random

import numpy as np
import pytest

from pkramfs.errors import FormatError, PkramError
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans

from .conftest import TREE


def save(store, frames, name=b"shmem-a", data=b"hello", runs=()):
    index = 0
    with store.prepare_save(name, tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.write(data)
        with saving.object() as writer:
            for pfn, count in runs:
                writer.save_runs([index], [pfn], [count])
                index += count
        return saving.finish()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3_000_000])
def test_bytes_come_back(store, frames, size):
    data = random.Random(size).randbytes(size)
    save(store, frames, data=data)
    with store.prepare_load(b"shmem-a") as load:
        first, second = load
        assert first.read(10) + first.read() == data
        assert second.read() == b""
        assert len(second.load_runs()[0]) == 0


def test_pages_come_back_as_runs(store, frames):
    runs = frames.allocate(1000) + frames.allocate(7)
    save(store, frames, runs=runs)
    with store.prepare_load(b"shmem-a") as load:
        _, second = load
        index, pfn, count = second.load_runs()
    assert int(count.sum()) == 1007 and index[0] == 0
    assert Spans.from_runs(pfn, count) == Spans((a, a + n) for a, n in runs)


def test_a_node_is_published_last(store, frames):
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.write(b"x")
        assert store.nodes() == []
        with pytest.raises(PkramError) as caught:
            store.prepare_load(b"n")
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(PkramError) as caught:
            store.prepare_save(b"n", tree_id=TREE, frames=frames)
        assert caught.value.errno == errno.EEXIST
    assert store.nodes() == [] and frames.used_pages == 0, "left without finish: discarded"


def test_loading_twice_finds_the_node_twice(store, frames):
    save(store, frames)
    for _ in range(2):
        with store.prepare_load(b"shmem-a") as load:
            assert next(iter(load)).read() == b"hello"
    assert [node.name for node in store.nodes()] == [b"shmem-a"]


def test_withdrawing_leaves_the_others(store, frames):
    for name in (b"a", b"b", b"c"):
        save(store, frames, name)
    store.withdraw(b"b")
    assert [node.name for node in store.nodes()] == [b"c", b"a"]
    with pytest.raises(PkramError) as caught:
        store.withdraw(b"b")
    assert caught.value.errno == errno.ENOENT


def test_names_have_limits(store, frames):
    with pytest.raises(PkramError) as caught:
        store.prepare_save(b"x" * 256, tree_id=TREE, frames=frames)
    assert caught.value.errno == errno.ENAMETOOLONG
    save(store, frames, b"x" * 255)
    assert store.nodes()[0].name == b"x" * 255


def test_switched_off_means_enodev(ram, frames):
    store = Store(ram, None, lambda: None)
    for call in (store.nodes, lambda: store.prepare_load(b"a"), lambda: save(store, frames)):
        with pytest.raises(PkramError) as caught:
            call()
        assert caught.value.errno == errno.ENODEV


def test_metadata_and_data_make_the_node(store, frames):
    runs = frames.allocate(100)
    node = save(store, frames, runs=runs)
    metadata = store.metadata_pages(b"shmem-a")
    assert (metadata | Spans((a, a + n) for a, n in runs)) == store.pages_of(node) == frames.used()
    store.withdraw(b"shmem-a")
    frames.free(metadata.starts, metadata.counts)
    assert frames.used_pages == 100


def test_banned_frames_are_moved(ram, store, frames):
    ((pfn, count),) = frames.allocate(100)
    for page in range(count):
        ram.words(pfn + page)[:] = page + 1
    banned = Spans([(pfn + 10, pfn + 20), (pfn + 50, pfn + 51)])
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, banned=banned) as saving:
        with saving.object() as writer:
            writer.save_runs([0], [pfn], [count])
        node = saving.finish()
    assert sum(size for _, size in saving.relocated) == 11 == node.relocated
    assert not store.pages_of(node) & banned
    with store.prepare_load(b"n") as load:
        index, found, size = next(iter(load)).load_runs()
    pages = np.concatenate([np.arange(p, p + n) for p, n in zip(found.tolist(), size.tolist(), strict=True)])
    assert [int(ram.words(p)[7]) for p in pages.tolist()] == list(range(1, 101))
    assert index[0] == 0


def test_a_frame_is_saved_once(store, frames):
    ((pfn, _),) = frames.allocate(10)
    with pytest.raises(PkramError, match="twice"):
        save(store, frames, runs=[(pfn, 4), (pfn + 3, 2)])


@pytest.mark.few(24)
@pytest.mark.parametrize("seed", range(80))
def test_a_flipped_bit_never_passes(ram, store, frames, damaged, seed):
    """D15: whatever bit of a node's metadata flips, loading says so and the node stays."""
    rng = random.Random(seed)
    runs = frames.allocate(3) + frames.allocate(600)
    save(store, frames, data=rng.randbytes(9000), runs=runs)
    pages = [p for a, b in store.metadata_pages(b"shmem-a") for p in range(a, b)] + [9]
    at = rng.choice(pages) * 4096 + rng.randrange(4096)
    ram.bytes[at] ^= 1 << rng.randrange(8)
    try:
        with store.prepare_load(b"shmem-a") as load:
            first, second = load
            seen = (first.read(), Spans.from_runs(*second.load_runs()[1:]))
    except FormatError:
        return
    # only bytes that mean nothing may pass: the end of the last byte page
    rng = random.Random(seed)
    assert seen == (rng.randbytes(9000), Spans((a, a + n) for a, n in runs))
