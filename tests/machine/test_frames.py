# SPDX-License-Identifier: GPL-2.0-or-later
"""The page allocator against a set of pages that knows nothing of runs."""

import contextlib
import errno
import os
import random
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkramfs.errors import ExhaustedError
from pkramfs.machine.frames import Frames, FreeRuns
from pkramfs.machine.leases import Leases
from pkramfs.machine.ram import Ram
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE, GIB, MAX_ORDER, TIB

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


def test_what_another_had_meanwhile_counts_as_unmapped(ram, leases, frames):
    (run,) = frames.allocate(BLOCK_PAGES)
    ram.fill(run[0] * 4096, memoryview(b"x"))
    ram.map(run[0] * 4096, 1)
    assert ram._is_mapped(run[0] * 4096, 1)
    leases.release(TREE, leases.blocks_of(TREE))  # as another process does it, after a kexec
    Frames(ram, leases, TREE).allocate(63 * BLOCK_PAGES)
    assert not ram._is_mapped(run[0] * 4096, 1)


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


@pytest.mark.few(12)
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


def punched(ram, frames):
    """Whether every page that is leased and free has no memory of the host behind it."""
    return not (frames._free.spans() & ram.data_spans())


class AllocatorAgainstBitmap(RuleBasedStateMachine):
    """Two owners on one RAM, and one byte a page: 0 nobody's, 1 or 2 allocated by an owner."""

    BLOCKS = 24

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        directory = self.stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        self.ram = Ram(os.path.join(directory, "ram"), self.BLOCKS * BLOCK_SIZE, create=True)
        self.stack.callback(self.ram.close)
        self.leases = Leases(self.ram, 1, self.BLOCKS, contextlib.nullcontext)
        self.leases.ids[0] = 1
        self.owners = {number: Frames(self.ram, self.leases, 1000 + number) for number in (1, 2)}
        self.bitmap = np.zeros(self.BLOCKS * BLOCK_PAGES, dtype=np.uint8)
        self.held = {1: 0, 2: 0}

    def teardown(self):
        self.stack.close()

    @rule(
        owner=st.sampled_from((1, 2)),
        count=st.one_of(st.integers(1, 40), st.integers(1, 5000)),
        order=st.sampled_from((0, 0, 3, 9, 11, MAX_ORDER)),
    )
    def allocate(self, owner, count, order):
        frames, before = self.owners[owner], self.owners[owner].used_pages
        try:
            runs = frames.allocate(count, order)
        except ExhaustedError as error:
            assert error.errno == errno.ENOSPC and frames.used_pages == before
            room = self.leases.counts()["free"] * BLOCK_PAGES + frames.free_pages - self.held[owner]
            assert count > room, "refused though there was room"
            return
        assert sum(size for _, size in runs) == count
        for start, size in runs:
            assert not self.bitmap[start : start + size].any(), "handed out twice"
            assert not self.ram.data_spans(start, start + size), "not punched, so perhaps not zero"
            self.bitmap[start : start + size] = owner
            self.ram.words(start)[0] = self.ram.words(start + size - 1)[0] = owner

    @precondition(lambda self: self.bitmap.any())
    @rule(data=st.data(), owner=st.sampled_from((1, 2)))
    def free(self, data, owner):
        mine = Spans.from_mask(self.bitmap == owner)
        if not mine:
            return
        low = data.draw(st.integers(0, len(self.bitmap) - 1))
        size = data.draw(st.one_of(st.integers(1, 10), st.integers(1, 6000)))
        runs = list(mine.clip(low, low + size)) or list(mine)[:1]
        self.owners[owner].free([a for a, _ in runs], [b - a for a, b in runs])
        for start, end in runs:
            self.bitmap[start:end] = 0

    @rule(owner=st.sampled_from((1, 2)), pages=st.integers(0, 1500))
    def hold(self, owner, pages):
        with contextlib.suppress(ExhaustedError):
            self.owners[owner].hold(pages)
            self.held[owner] = pages

    @rule(owner=st.sampled_from((1, 2)))
    def be_taken_over(self, owner):
        used = Spans.from_mask(self.bitmap == owner)
        heir = Frames(self.ram, self.leases, 1000 + owner)
        heir.adopt(used)
        self.owners[owner], self.held[owner] = heir, 0

    @rule(owner=st.sampled_from((1, 2)))
    def die(self, owner):
        self.leases.sweep(lambda: {1003 - owner})
        self.bitmap[self.bitmap == owner] = 0
        self.owners[owner], self.held[owner] = Frames(self.ram, self.leases, 1000 + owner), 0

    @invariant()
    def agrees(self):
        for owner, frames in self.owners.items():
            assert frames.used() == Spans.from_mask(self.bitmap == owner)
            assert frames.used_pages == (self.bitmap == owner).sum()
            assert frames.free_pages >= frames.held_pages == self.held[owner]
            assert punched(self.ram, frames)
        assert not (self.owners[1].leases.blocks_of(1001) & self.leases.blocks_of(1002))


AllocatorAgainstBitmap.TestCase.settings = settings(
    stateful_step_count=30, max_examples=settings.default.max_examples // 4
)
TestAllocatorAgainstBitmap = AllocatorAgainstBitmap.TestCase


@pytest.mark.parametrize("order", range(MAX_ORDER + 1))
def test_every_order_is_aligned_while_memory_allows(ram_path, order):
    ram = Ram(ram_path, 4 * GIB, create=True)
    leases = Leases(ram, 1, 4 * GIB // BLOCK_SIZE, contextlib.nullcontext)
    leases.ids[0] = 1
    frames = Frames(ram, leases, TREE)
    frames.allocate(1)
    frames.ram.check_room = lambda *_args, **_more: None  # the host need not have what is not touched
    runs = frames.allocate(2 << order, order)
    assert sum(size for _, size in runs) == 2 << order
    assert all(start % (1 << order) == 0 for start, _ in runs)
    ram.close()


def test_fragments_do_not_stand_in_for_huge_pages(frames):
    ((start, size),) = frames.allocate(4 * BLOCK_PAGES)
    frames.free(range(start, start + size, 2), [1] * (size // 2))
    assert [run % BLOCK_PAGES for run, _ in frames.allocate(2 * BLOCK_PAGES, 9)] == [0]


def test_fragments_do_where_nothing_else_is_left(frames):
    ((start, size),) = frames.allocate(63 * BLOCK_PAGES)
    frames.free(range(start, start + size, 2), [1] * (size // 2))
    assert sum(size for _, size in frames.allocate(2 * BLOCK_PAGES, 9)) == 2 * BLOCK_PAGES


def test_pages_freed_twice_are_noticed(frames):
    ((start, size),) = frames.allocate(8)
    with pytest.raises(AssertionError, match="1 pages are freed twice"):
        frames.free([start, start], [1, 1])
    frames.free([start], [2])
    with pytest.raises(AssertionError, match="freed twice"):
        frames.free([start], [2])
    assert frames.used_pages == size - 2


def test_one_who_freed_all_does_not_starve_others(ram, leases, frames):
    runs = frames.allocate(63 * BLOCK_PAGES)
    for start in range(runs[0][0], runs[0][0] + runs[0][1], 64):
        frames.free([start], [64])
    other = Frames(ram, leases, TREE + 1)
    assert sum(size for _, size in other.allocate(58 * BLOCK_PAGES)) == 58 * BLOCK_PAGES


def test_what_cannot_be_given_back_is_still_ours(frames, leases, monkeypatch):
    ((start, size),) = frames.allocate(60 * BLOCK_PAGES)

    def refuse(*_args):
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(leases, "release", refuse)
        with pytest.raises(OSError, match="no"):
            frames.free([start], [size])
    assert frames.used_pages == 0 and not frames.used()
    assert frames.allocate(60 * BLOCK_PAGES) == [(start, size)]


def test_the_save_may_use_the_last_room_of_the_host(frames, monkeypatch):
    frames.hold(10)
    monkeypatch.setattr(Ram, "room", lambda _ram, *, floor=1.0: 0 if floor == 1.0 else 1 << 20)
    with pytest.raises(ExhaustedError, match="no room behind RAM"):
        frames.allocate(1)
    assert frames.allocate(10, held=True)


def test_a_hundred_thousand_fragments_cost_a_few_steps_each():
    """Emptied from the front, the dictionaries would step 5,000,000,000 times over what is gone."""
    runs, size = FreeRuns(), 100_000
    for page in range(0, 2 * size, 2):
        runs.add(page, 1)
    assert {runs.take(1)[0] for _ in range(size)} == set(range(0, 2 * size, 2))
    assert len(runs) == runs.total == 0


def test_16_tib_are_allocated_without_touching_them(ram_path):
    ram = Ram(ram_path, 16 * TIB, create=True)
    leases = Leases(ram, 1, 16 * TIB // BLOCK_SIZE, contextlib.nullcontext)
    leases.ids[:33] = 1  # the table itself: 64 MiB, of which 0.4 % is ever written here
    frames = Frames(ram, leases, TREE)
    frames.ram.check_room = lambda *_args, **_more: None
    ((start, size),) = frames.allocate(1 << 28, MAX_ORDER)
    assert size == 1 << 28 and start % (1 << MAX_ORDER) == 0
    assert frames.used() == Spans([(start, start + size)])
    frames.free([start], [size])
    assert ram.backed <= 8 << 20
    ram.close()
