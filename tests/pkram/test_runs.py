# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams across every border that the code has: steps, slices and strides are made small, and memory is fragmented."""

import errno
import random

import numpy as np
import pytest

from pkramfs.errors import ExhaustedError, FormatError, PkramError, PkramfsError
from pkramfs.pkram import format, parallel
from pkramfs.pkram.page import unseal
from pkramfs.pkram.streams import link, linkreader, pagewriter, runs, scattered
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT

from .conftest import TREE

SHAPES = ("row", "apart", "jumps", "pairs", "back", "huge")


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (linkreader, "READ", 3),
        (linkreader, "_MOST", 5),
        (linkreader, "_GROWTH", 2),
        (runs, "STEP", 2),
        (runs, "BATCH", 1),
        (link, "WRITE", 2),
        (link, "_benches", parallel.Workbenches(lambda: link.Links(2))),
        (scattered, "WRITE", 2),
        (scattered, "SLICE", 2 * format.LINK_CAPACITY),
        (pagewriter, "_SLICE", 2 * format.LINK_CAPACITY),
        (pagewriter, "_COLLECT", 600),
    ):
        monkeypatch.setattr(module, name, value)


def in_pieces(frames, rng: random.Random) -> list[int]:
    """Take all memory, and give back every second page of a part of it; pages that may be preserved."""
    taken: list[int] = []
    for size in (4096, 64, 1):
        while True:
            try:
                taken += [pfn for start, count in frames.allocate(size) for pfn in range(start, start + count)]
            except ExhaustedError:
                break
    taken.sort()
    holes = taken[-3000:][:: rng.choice((2, 3))]
    frames.free(holes, [1] * len(holes))
    return taken[:-3000]


def shaped(rng: random.Random, shape: str, index: int, pfn: int) -> list[tuple[int, int, int]]:
    """Runs (index, pfn, count) of one shape, with some 20 to 3000 entries."""
    number = rng.randrange(20, 60) if shape == "jumps" else rng.randrange(100, 3000)  # a link for each jump
    if shape == "row":
        return [(index, pfn, number)]
    if shape == "huge":
        pfn, index = -(-pfn // 512) * 512, -(-index // 512) * 512
        return [(index + 512 * n, pfn + 512 * n, 512) for n in range(3)]
    step = {"apart": 2, "jumps": 1, "pairs": 3, "back": 2}[shape]
    size = 2 if shape == "pairs" else 1
    skip = rng.choice((2, 10_000)) if shape == "jumps" else size
    found = [(index + skip * n, pfn + step * n, size) for n in range(number // step)]
    if shape == "back":
        places = [run[1] for run in found]
        found = [(at, place, count) for (at, _, count), place in zip(found, reversed(places), strict=True)]
    return found


def entries_by_hand(ram, record) -> list[tuple[int, int, int]]:
    """(index, pfn, order) of a page stream, link by link, entry by entry."""
    found, pfn = [], record.pages_head
    while pfn:
        words = ram.words(pfn).tolist()
        index = words[5]
        for entry in words[8 : 8 + words[6]]:
            found.append((index, entry >> 12, entry & 0x1F))
            index += 1 << (entry & 0x1F)
        pfn = unseal(words[2], (pfn << PAGE_SHIFT) + format.NEXT, "Link", "next")
    return found


def pages_of(rows) -> dict[int, int]:
    """Which frame each index has, from rows of (index, pfn, count)."""
    return {index + n: pfn + n for index, pfn, count in rows for n in range(count)}


@pytest.mark.few(10)
@pytest.mark.parametrize("fragmented", [False, True])
@pytest.mark.parametrize("words", [{}, {"strict": True}, {"align": True}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_shape_it_comes_back(ram, store, frames, small_steps, seed, words, fragmented) -> None:
    rng = random.Random(seed)
    print("seed", seed)
    if fragmented:
        free = in_pieces(frames, rng)
    else:
        free = [pfn for start, count in frames.allocate(20_000) for pfn in range(start, start + count)]
    parts, index, pfn = [], 0, free[0]
    while pfn + 6000 < free[-1]:
        part = shaped(rng, rng.choice(SHAPES), index, pfn)
        parts.append(part)
        index = max(at + count for at, _, count in part) + rng.choice((0, 0, 5))
        pfn = max(at + count for _, at, count in part) + rng.choice((0, 0, 3))
    wanted = pages_of([run for part in parts for run in part])
    rng.shuffle(parts) if rng.random() < 0.5 else None
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, **words) as saving:
        with saving.object() as writer:
            for part in parts:
                columns = [np.array(column, dtype=np.uint64) for column in zip(*part, strict=True)]
                if len({count for _, _, count in part}) == 1 and part[0][2] in (1, 512) and rng.random() < 0.6:
                    order = part[0][2].bit_length() - 1
                    writer.save_pages(*columns[:2], np.full(len(part), order, dtype=np.uint8))
                else:
                    writer.save_runs(*columns)
                for column in columns:
                    column[:] = 7  # the arrays are ours again
        saving.finish()
    with store.prepare_load(b"n") as load:
        (reader,) = load
        by_hand = entries_by_hand(ram, reader.record)
        loaded = list(zip(*(column.tolist() for column in reader.load_runs()), strict=True))
        blocks = [column.tolist() for column in reader.load_pages()]
    assert pages_of((at, place, 1 << order) for at, place, order in by_hand) == wanted
    assert pages_of(loaded) == wanted
    assert list(zip(*blocks, strict=True)) == by_hand
    assert loaded == sorted(loaded)
    again = link.join_runs(*(np.array(column, dtype=np.uint64) for column in zip(*loaded, strict=True)))
    assert len(again[0]) == len(loaded), "runs that continue each other are one"


@pytest.mark.parametrize("seed", range(18))
def test_entries_set_to_anything_in_streams_of_every_shape(ram, store, frames, small_steps, seed) -> None:
    """With a checksum that fits: an error that names the place, or what the entries say by hand."""
    rng = random.Random(seed)
    print("seed", seed)
    ((start, _),) = frames.allocate(6000)
    part = shaped(rng, SHAPES[seed % len(SHAPES)], 0, start)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, strict=rng.random() < 0.5) as saving:
        with saving.object() as writer:
            writer.save_runs(*(np.array(column, dtype=np.uint64) for column in zip(*part, strict=True)))
        saving.finish()
    with store.prepare_load(b"n") as load:
        (reader,) = load
        pfn = reader.record.pages_head
    words = ram.words(pfn)
    for _ in range(12):
        word = 8 + rng.randrange(min(int(words[6]), 504))
        before = int(words[word])
        near = [before + (1 << 12), before - (1 << 12), before | 1, before | 0x20, before | 0x1F, 0, 1 << 12]
        words[word] = np.uint64(rng.choice([*near, rng.getrandbits(64), int(words[8 + rng.randrange(2)])]) % 2**64)
        words[1] = np.uint64(linkreader.xxhash.xxh3_64_intdigest(ram.page(pfn)[format.COVERED :], pfn))
        try:
            with store.prepare_load(b"n") as load:
                (reader,) = load
                found = pages_of(zip(*(column.tolist() for column in reader.load_runs()), strict=True))
                assert found == pages_of((i, p, 1 << o) for i, p, o in entries_by_hand(ram, reader.record))
        except PkramfsError:
            pass
        words[word] = np.uint64(before)
        words[1] = np.uint64(linkreader.xxhash.xxh3_64_intdigest(ram.page(pfn)[format.COVERED :], pfn))
    with store.prepare_load(b"n") as load:
        (reader,) = load
        assert pages_of(zip(*(c.tolist() for c in reader.load_runs()), strict=True)) == pages_of(part)


@pytest.mark.parametrize("banned", [False, True])
def test_a_call_that_is_refused_half_way_is_no_node(ram, store, frames, small_steps, banned) -> None:
    ((start, _),) = frames.allocate(3000)
    pfn = np.arange(start, start + 6000, 2, dtype=np.uint64)
    pfn[-1] = ram.pages + 5
    before = frames.used_pages
    words = {"banned": Spans([(start, start + 10)])} if banned else {}
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, **words) as saving:
        writer = saving.object()
        for _ in range(2):
            with pytest.raises(PkramError) as caught:
                writer.save_runs(np.arange(3000, dtype=np.uint64), pfn, np.ones(3000, dtype=np.uint64))
            assert caught.value.errno == errno.EINVAL
        if not banned:  # where pages are moved, all is looked at before any of it is named
            with pytest.raises(PkramError, match="incomplete: ") as caught:
                writer.save_runs([9000], [start], [1])
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(PkramError) as caught:
                saving.finish()
            assert caught.value.errno == errno.EINVAL
    assert frames.used_pages == before and not list(store.nodes())


def test_pages_that_meet_where_two_links_meet_are_one_run(ram, store, frames) -> None:
    """Full links of pages apart, but the last of each goes on in the first of the next."""
    ((start, _),) = frames.allocate(6000)
    place = np.arange(4 * format.LINK_CAPACITY, dtype=np.uint64)
    pfn = np.uint64(start) + place * np.uint64(2) - place // np.uint64(format.LINK_CAPACITY)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.save_runs(place, pfn, np.ones_like(place))
        saving.finish()
    with store.prepare_load(b"n") as load:
        (reader,) = load
        index, _, count = reader.load_runs()
    assert len(index) == len(place) - 3 and count.max() == 2 and int(count.sum()) == len(place)


@pytest.mark.parametrize("order", [0, 4])
@pytest.mark.parametrize("where", ["at 0", "beyond the end", "not aligned"])
def test_a_link_of_blocks_that_cannot_be_is_named(ram, store, frames, order, where) -> None:
    ((start, _),) = frames.allocate(6000)
    pfn = np.uint64(-(-start // 16) * 16) + (np.arange(100, dtype=np.uint64) << np.uint64(order))
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.save_pages(np.arange(100, dtype=np.uint64) << np.uint64(order), pfn, np.full(100, order, np.uint8))
        saving.finish()
    with store.prepare_load(b"n") as load:
        (reader,) = load
        head = reader.record.pages_head
    wrong = {"at 0": 0, "beyond the end": ram.pages - (50 << order), "not aligned": int(pfn[0]) + 3}[where]
    words = ram.words(head)
    good = words.copy()
    words[8:108] = (np.uint64(wrong) + (np.arange(100, dtype=np.uint64) << np.uint64(order))) << np.uint64(12) | order
    words[1] = np.uint64(linkreader.xxhash.xxh3_64_intdigest(ram.page(head)[format.COVERED :], head))
    with pytest.raises(FormatError) as caught:
        store.prepare_load(b"n")
    expected = ("Link", "entry", head) if where != "not aligned" or order else ("Object", "pages", None)
    assert (caught.value.record, caught.value.field) == expected[:2]
    assert expected[2] in (None, caught.value.pfn)
    words[:] = good
