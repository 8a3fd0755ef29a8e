# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows 32 to 34: several writers on one object, each in chunks of its own; readers side by side."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pkramfs.errors import PkramError

from .conftest import TREE

WORKERS, CHUNKS, PAGES = 4, 40, 37


def test_chunks_of_several_writers_make_one_stream(store, frames):
    ((start, count),) = frames.allocate(CHUNKS * PAGES)
    chunks = [(number * PAGES, start + number * PAGES) for number in range(CHUNKS)]
    random.Random(0).shuffle(chunks)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer, ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda chunk: writer.save_runs([chunk[0]], [chunk[1]], [PAGES]), chunks))
        saving.finish()
    with store.prepare_load(b"n") as load:
        (reader,) = load
        with ThreadPoolExecutor(WORKERS) as pool:
            answers = list(pool.map(lambda _: [c.tolist() for c in reader.load_runs()], range(WORKERS)))
    assert answers == [[[0], [start], [count]]] * WORKERS


def test_one_writer_of_a_frame_wins_and_the_other_hears_of_it(store, frames):
    ((start, _),) = frames.allocate(64)
    gate, refused = threading.Barrier(2), []

    def write(first: int) -> None:
        gate.wait(60)
        try:
            writer.save_runs([first], [start], [64])
        except PkramError as error:
            refused.append(str(error))

    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        writer = saving.object()
        threads = [threading.Thread(target=write, args=(first,)) for first in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert refused == ["a frame was saved twice"]
    assert store.nodes() == []


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("align", [False, True])
def test_alignment_and_strictness_change_the_links_not_the_pages(store, frames, strict, align):
    runs = frames.allocate(3000)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, strict=strict, align=align) as saving:
        with saving.object() as writer:
            writer.save_runs([10], [runs[0][0]], [runs[0][1]])
        saving.finish()
    with store.prepare_load(b"n") as load:
        (reader,) = load
        index, pfn, order = reader.load_pages()
        assert [c.tolist() for c in reader.load_runs()] == [[10], [runs[0][0]], [3000]]
    assert (len(pfn) == 3000) == strict and (not strict or order.max() == 0)
    assert int(index[0]) == 10
