# SPDX-License-Identifier: GPL-2.0-or-later
"""Objects: what comes back, in how many links, at what cost, and what is refused."""

import errno
import random
import threading
import tracemalloc

import numpy as np
import pytest

from pkramfs.errors import ExhaustedError, PkramError
from pkramfs.pkram import format
from pkramfs.pkram.store import estimate
from pkramfs.pkram.streams import link, pagewriter
from pkramfs.spans import Spans

from .conftest import TREE


def only(load):
    (reader,) = load
    return reader


def save(store, frames, runs, name=b"n", **words):
    """One object of runs (index, pfn, count), each in a call of its own."""
    with store.prepare_save(name, tree_id=TREE, frames=frames, **words) as saving:
        with saving.object() as writer:
            for run in runs:
                writer.save_runs(*([value] for value in run))
        return saving, saving.finish()


def rows(*columns):
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.few(32)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_whatever_is_saved_comes_back(ram, store, frames, seed, strict, align):
    rng = random.Random(seed)
    ((start, count),) = frames.allocate(6000)
    runs, index, pfn = [], 0, start
    while pfn < start + count:
        size = min(rng.choice((1, 1, 2, 7, 64, 511, 512, 1300)), start + count - pfn)
        runs.append((index, pfn, size))
        index, pfn = index + size + rng.choice((0, 0, 0, 1, 10_000)), pfn + size + rng.choice((0, 0, 1, 3))
    order = list(runs)
    rng.shuffle(order)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, strict=strict, align=align) as saving:
        with saving.object() as writer:
            while order:
                some, order = order[: (size := rng.choice((1, 3, 50)))], order[size:]
                writer.save_runs(*zip(*some, strict=True))
        saving.finish()
    expected = rows(*link.join_runs(*(np.array(c, dtype=np.uint64) for c in zip(*runs, strict=True))))
    with store.prepare_load(b"n") as load:
        reader = only(load)
        assert rows(*reader.load_runs()) == expected
        blocks = reader.load_pages()
        by_index = np.argsort(blocks[0])
        assert rows(*link.join_blocks(*(column[by_index] for column in blocks))) == expected
        assert not strict or not blocks[2].any()


def test_d30_small_calls_share_links(store, frames):
    """D30: in the original every file costs a link of its own."""
    ((start, _),) = frames.allocate(1000)
    before = frames.used_pages
    save(store, frames, [(number, start + number * 2 % 999, 1) for number in range(999)])
    assert frames.used_pages - before < 12


_SHAPES = {"row": (1, 0), "apart": (2, 0), "pairs": (4, 1)}
"""How far apart the blocks of a stretch are, and their order."""


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("shapes", ["row", "apart", "row row", "apart apart", "apart row apart", "pairs apart row"])
def test_shapes_are_read_alike_whatever_comes_before_them(wide_store, wide_frames, shapes, backwards):
    """Each stretch is 70 links: batches of one shape and batches where two meet, in and out of order."""
    stretches, index, pfn = [], 0, 1 << 20
    for step, order in map(_SHAPES.__getitem__, shapes.split()):
        number = np.arange(70 * format.LINK_CAPACITY, dtype=np.uint64)
        stretches.append((index + (number << order), pfn + number * step, np.full(len(number), order, dtype=np.uint8)))
        index, pfn = index + (len(number) << order), pfn + len(number) * step
    with wide_store.prepare_save(b"n", tree_id=TREE, frames=wide_frames) as saving:
        with saving.object() as writer:
            for stretch in reversed(stretches) if backwards else stretches:
                writer.save_pages(*stretch)
        saving.finish()
    expected = link.join_blocks(*(np.concatenate(column) for column in zip(*stretches, strict=True)))
    with wide_store.prepare_load(b"n") as load:
        for found, wanted in zip(only(load).load_runs(), expected, strict=True):
            assert np.array_equal(found, wanted)


def test_100_gib_in_a_row_take_a_few_pages(wide_store, wide_frames):
    _, node = save(wide_store, wide_frames, [(0, 1 << 20, 100 << 18)])
    assert node.pages - (100 << 18) < 10
    with wide_store.prepare_load(b"n") as load:
        assert rows(*only(load).load_runs()) == [(0, 1 << 20, 100 << 18)]


@pytest.mark.parametrize("order", range(19))
def test_every_order_is_one_entry(wide_store, wide_frames, order):
    with wide_store.prepare_save(b"n", tree_id=TREE, frames=wide_frames) as saving:
        with saving.object() as writer:
            writer.save_pages([3 << order], [5 << 20], [order])
        saving.finish()
    with wide_store.prepare_load(b"n") as load:
        assert rows(*only(load).load_pages()) == [(3 << order, 5 << 20, order)]


def test_huge_pages_are_marked(ram, store, frames):
    ((start, _),) = frames.allocate(2048, order=9)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.save_pages([0, 512, 1024], [start, start + 512, start + 1024], [9, 9, 3])
        saving.finish()
    with store.prepare_load(b"n") as load:
        head = only(load).record.pages_head
    entries = ram.words(head)[8:11]
    assert link.decode(entries)[2].tolist() == [format.ENTRY_HUGE, format.ENTRY_HUGE, 0]


@pytest.mark.parametrize(
    ("index", "pfn", "count", "code"),
    [
        ([0], [0], [1], errno.EINVAL),
        ([0], [5], [0], errno.EINVAL),
        ([0], [1 << 15], [1], errno.EINVAL),
        ([0], [(1 << 15) - 1], [2], errno.EINVAL),
        ([0], [5], [2**64 - 3], errno.EINVAL),
        ([2**63], [5], [1], errno.EINVAL),
        ([2**64 - 1], [5], [1], errno.EINVAL),
        ([0, 1], [5], [1], errno.EINVAL),
    ],
)
@pytest.mark.parametrize("banned", [Spans(), Spans([(5, 7)])], ids=["free", "banned"])
def test_runs_that_cannot_be_are_refused(store, frames, index, pfn, count, code, banned):
    frames.allocate(100)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, banned=banned) as saving:
        writer = saving.object()
        with pytest.raises(PkramError) as caught:
            writer.save_runs(*(np.array(column, dtype=np.uint64) for column in (index, pfn, count)))
        assert caught.value.errno == code


def test_blocks_that_cannot_be_are_refused(store, frames):
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        writer = saving.object()
        for pfn, order in ((513, 9), (512, 19), (0, 0)):
            with pytest.raises(PkramError) as caught:
                writer.save_pages([0], [pfn], [order])
            assert caught.value.errno == errno.EINVAL


# -- bans ------------------------------------------------------------------------------------------


def fill(ram, start, count):
    for page in range(count):
        ram.words(start + page)[:] = page + 1


def contents(ram, store):
    with store.prepare_load(b"n") as load:
        runs = rows(*only(load).load_runs())
    return {index + k: int(ram.words(pfn + k)[5]) for index, pfn, count in runs for k in range(count)}


@pytest.mark.parametrize("strict", [False, True])
def test_a_banned_huge_page_comes_back_in_the_largest_pieces(ram, store, frames, strict):
    """Row 15. Facts 10.4: an order-9 page at 0x200 against ban [0x3ff, 0x3ff] is banned."""
    ((start, _),) = frames.allocate(512, order=9)
    fill(ram, start, 512)
    with store.prepare_save(
        b"n", tree_id=TREE, frames=frames, banned=Spans([(start + 511, start + 512)]), strict=strict
    ) as saving:
        with saving.object() as writer:
            writer.save_pages([0], [start], [9])
        node = saving.finish()
    with store.prepare_load(b"n") as load:
        orders = sorted(only(load).load_pages()[2].tolist())
    assert orders == ([0] * 512 if strict else [0, *range(9)])
    assert node.relocated == 1 and contents(ram, store) == {n: n + 1 for n in range(512)}


@pytest.mark.few(8)
@pytest.mark.parametrize("seed", range(20))
def test_nothing_of_a_node_lies_in_banned_memory(ram, store, frames, seed):
    rng = random.Random(seed)
    ((start, count),) = frames.allocate(1500)
    fill(ram, start, count)
    banned = Spans((a, a + rng.choice((1, 5, 200, 700))) for a in (start + rng.randrange(4000) for _ in range(6)))
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, banned=banned) as saving:
        with saving.object() as writer:
            writer.write(rng.randbytes(20_000))
            writer.save_runs([0, 2000], [start, start + 1000], [1000, 500])
        node = saving.finish()
    moved = Spans((a, a + n) for a, n in saving.relocated)
    assert not store.pages_of(node) & banned
    assert moved.total == node.relocated == (Spans([(start, start + count)]) & banned).total
    assert contents(ram, store) == {n if n < 1000 else n + 1000: n + 1 for n in range(1500)}


def test_where_everything_is_banned_there_is_no_memory(ram, store, frames):
    ((start, count),) = frames.allocate(10)
    used = frames.used_pages
    with pytest.raises(PkramError) as caught:
        save(store, frames, [(0, start, count)], banned=Spans([(0, ram.pages)]))
    assert caught.value.errno == errno.ENOMEM
    assert frames.used_pages == used


# -- running out of memory ----------------------------------------------------------------------------


class Stingy:
    """Frames that are to be had so many times only."""

    def __init__(self, frames, times):
        self.frames, self.left = frames, times

    def allocate(self, count, order=0, *, held=False):
        if not self.left:
            raise ExhaustedError("RAM is full")
        self.left -= 1
        return self.frames.allocate(count, order, held=held)

    def free(self, starts, counts):
        self.frames.free(starts, counts)


def test_d18_enomem_at_any_allocation_leaves_nothing(store, frames):
    """D18: the original keeps a lock on the way out; D20: and a page."""
    ((start, _),) = frames.allocate(700)
    used = frames.used_pages
    banned = Spans([(start + 5, start + 9)])
    for times in range(100):
        try:
            with store.prepare_save(b"n", tree_id=TREE, frames=Stingy(frames, times), banned=banned) as saving:
                with saving.object() as writer:
                    writer.write(b"x" * 5000)
                    writer.save_runs([0, 900], [start, start + 300], [300, 400])
                saving.finish()
            break
        except PkramError as error:
            assert error.errno == errno.ENOMEM
            assert frames.used_pages == used and store.nodes() == []
    assert times > 4 and store.find(b"n") is not None


def _pages_apart(frames):
    ((start, _),) = frames.allocate(1500)
    page = np.arange(start, start + 1500, 2, dtype=np.uint64)
    return page - np.uint64(start), page, np.ones_like(page)


def _lose_bytes(writer, frames, runs):
    writer.write(bytes(2 << 20))


def _lose_links(writer, frames, runs):
    for _ in range(100):
        writer.save_runs(*(np.tile(column, 100) for column in runs))


def _lose_the_last_links(writer, frames, runs):
    writer.save_runs(*runs)
    writer.finish()


def _lose_copies(writer, frames, runs):
    writer.save_pages(runs[0], runs[1], np.where(runs[0] % 4 == 0, 1, 0))


def _leave(writer, frames, runs):
    with writer:
        writer.save_runs(*runs)
        raise PkramError("the program thought better of it", errno.ENOMEM)


@pytest.mark.parametrize("lose", [_lose_bytes, _lose_links, _lose_the_last_links, _lose_copies, _leave])
def test_an_object_that_is_incomplete_is_never_published(store, frames, lose):
    """A caller who goes on after ENOMEM would publish a node that names pages its links do not."""
    used = frames.used_pages
    runs = _pages_apart(frames)
    stingy, banned = Stingy(frames, 0), Spans([(int(runs[1][4]), int(runs[1][4]) + 1)] if lose is _lose_copies else [])
    with store.prepare_save(b"n", tree_id=TREE, frames=stingy, banned=banned) as saving:
        writer = saving.object()
        with pytest.raises(PkramError) as caught:
            lose(writer, frames, runs)
        assert caught.value.errno == errno.ENOMEM
        stingy.left = 100
        for call in (writer.finish, saving.finish, lambda: writer.write(b"x"), lambda: writer.save_runs(*runs)):
            with pytest.raises(PkramError, match=r"incomplete: \w") as caught:
                call()
            assert caught.value.errno == errno.ENOMEM
    assert store.nodes() == []
    assert frames.used_pages == used + 1500


def test_a_call_that_is_refused_at_once_leaves_the_object_whole(store, frames):
    runs = _pages_apart(frames)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            for bad in (([2**60], [5], [1]), ([0], [0], [1]), ([0, 1], [5], [1])):
                with pytest.raises(PkramError):
                    writer.save_runs(*bad)
            with pytest.raises(PkramError):
                writer.save_pages([0], [int(runs[1][0]) | 1], [1])
            writer.save_runs(*runs)
        saving.finish()
    with store.prepare_load(b"n") as load:
        assert rows(*only(load).load_runs()) == rows(*runs)


@pytest.mark.parametrize("bad", [[0.5], ["1"], [None], [2**64], [-1], np.array([-1]), np.array([1.0])])
@pytest.mark.parametrize("column", range(3))
def test_numbers_that_are_none_are_refused(store, frames, bad, column):
    """numpy would cut 0.5 to 0, and order 265 to 9."""
    ((start, _),) = frames.allocate(4)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            for call, good in ((writer.save_runs, ([0], [start], [1])), (writer.save_pages, ([0], [start], [0]))):
                columns = list(good)
                columns[column] = bad
                with pytest.raises(PkramError) as caught:
                    call(*columns)
                assert caught.value.errno == errno.EINVAL
            with pytest.raises(PkramError):
                writer.save_pages([0], [start], np.array([256]))
        saving.finish()
    with store.prepare_load(b"n") as load:
        assert only(load).data.total == 0 and start not in store.pages_of(load.node)


def test_nothing_is_added_to_what_is_finished(store, frames):
    """It would be named by the page table and by no link."""
    runs = _pages_apart(frames)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.write(b"bytes")
        for add in (lambda: writer.write(b"more"), lambda: writer.save_runs(*runs), lambda: writer.save_pages(*runs)):
            with pytest.raises(PkramError, match="finished") as caught:
                add()
            assert caught.value.errno == errno.EINVAL
        saving.finish()
    with store.prepare_load(b"n") as load:
        assert only(load).read() == b"bytes" and len(only(load).load_runs()[0]) == 0


def test_nothing_is_added_to_what_was_discarded(store, frames):
    """It would take frames that nobody gives back."""
    runs, used = _pages_apart(frames), frames.used_pages
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        writer = saving.object()
    for add in (lambda: writer.write(b"more"), lambda: writer.save_runs(*runs), writer.finish):
        with pytest.raises(PkramError, match="not being saved any more") as caught:
            add()
        assert caught.value.errno == errno.EINVAL
    assert frames.used_pages == used


@pytest.mark.parametrize(
    "calls",
    [
        [([0], [1]), ([0], [1])],
        [([5, 5], [1, 1])],
        [([0], [10]), ([9], [1])],
        [([3], [1]), ([0], [10])],
        [([0, 40], [20, 20]), ([10], [40])],
        [([0, 100, 50], [1, 1, 60])],
        [(range(600), [1] * 600), ([700, 599], [1, 1])],
        [(range(0, 600, 2), [1] * 300), (range(1, 601, 2), [1] * 300), ([600, 333], [1, 1])],
    ],
)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("collect", [2, 600], ids=["at once", "collected"])
def test_an_index_that_is_saved_twice_is_no_node(store, frames, monkeypatch, calls, strict, collect):
    """The original publishes it, and no load takes it."""
    monkeypatch.setattr(pagewriter, "_COLLECT", collect)
    ((start, _),) = frames.allocate(3000)
    used = frames.used_pages
    with store.prepare_save(b"n", tree_id=TREE, frames=frames, strict=strict) as saving:
        writer = saving.object()
        for index, count in calls:
            writer.save_runs(np.array(index), start + np.cumsum(count) - count, np.array(count))
            start += sum(count)
        for finish in (writer.finish, saving.finish):
            with pytest.raises(PkramError, match="an index was saved twice") as caught:
                finish()
            assert caught.value.errno == errno.EEXIST
    assert store.nodes() == [] and frames.used_pages == used


@pytest.mark.parametrize("seed", range(10))
def test_indices_in_any_order_are_taken(store, frames, monkeypatch, seed):
    """Pages in disorder, runs between runs, from several threads: each index once is enough."""
    monkeypatch.setattr(pagewriter, "_COLLECT", 50)
    rng = random.Random(seed)
    ((start, _),) = frames.allocate(2000)
    runs, index, pfn = [], rng.randrange(5), start
    while pfn < start + 1900:
        size = rng.choice((1, 1, 1, 2, 7, 60))
        runs.append((index, pfn, size))
        index, pfn = index + size + rng.choice((0, 0, 3)), pfn + size
    expected = rows(*link.join_runs(*(np.array(column, dtype=np.uint64) for column in zip(*runs, strict=True))))
    rng.shuffle(runs)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            parts = [runs[at : at + 60] for at in range(0, len(runs), 60)]
            threads = [threading.Thread(target=writer.save_runs, args=tuple(zip(*part, strict=True))) for part in parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        saving.finish()
    with store.prepare_load(b"n") as load:
        assert rows(*only(load).load_runs()) == expected


@pytest.mark.parametrize("seed", range(12))
def test_the_estimate_is_enough(store, frames, seed):
    rng = random.Random(seed)
    ((start, count),) = frames.allocate(20_000)
    runs, index, pfn = [], 0, start
    while pfn < start + count:
        size = min(rng.choice((1, 3, 126, 1022)), start + count - pfn)
        runs.append((index, pfn, size))
        index, pfn = index + size, pfn + size + 1
    before, data = frames.used_pages, rng.randbytes(rng.randrange(50_000))
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.write(data)
        with saving.object() as writer:
            writer.save_runs(*zip(*runs, strict=True))
        saving.finish()
    pages = sum(size for _, _, size in runs)
    assert frames.used_pages - before <= estimate(len(runs), len(data), pages)


# -- several threads -----------------------------------------------------------------------------------


def test_several_readers_take_batches_of_one_stream(store, frames):
    """Row 36, in order and by several readers at once."""
    ((start, count),) = frames.allocate(24_000)
    save(store, frames, [(0, start, 12_000), (20_000, start + 12_000, 12_000)], strict=True)
    with store.prepare_load(b"n") as load:
        reader = only(load)
        whole = rows(*reader.load_pages())
        assert [row for batch in reader.batches() for row in rows(*batch)] == whole
        taken, shared = [], reader.batches()

        def take():
            taken.extend(rows(*batch) for batch in shared)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(row for batch in taken for row in batch) == sorted(whole)
    assert len(whole) == count


def test_memory_does_not_grow_with_what_is_saved(wide_store, wide_frames):
    """A gigabyte of entries a page, and less than a few batches of them in memory at a time."""
    peaks = []
    for gib in (1, 8):
        tracemalloc.start()
        save(wide_store, wide_frames, [(0, 1 << 24, gib << 18)], name=b"%d" % gib, strict=True)
        with wide_store.prepare_load(b"%d" % gib) as load:
            only(load).load_runs()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        wide_store.withdraw(b"%d" % gib)
    assert peaks[1] < 16 << 20
