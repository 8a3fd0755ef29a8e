# SPDX-License-Identifier: GPL-2.0-or-later
"""Page-block leases: the owner of each 2 MiB of RAM, one word a block, in a table in RAM.

    block      0     1      2    3        4        5
    word       HOLE  KERNEL FREE a3f1…    a3f1…    RESERVE

A word is 0 (free), one of the kernel's three, or the *tree id* of a mount: a random number that is
never used twice. The table does not say whether a tree's block is live or preserved, because that
follows: it is preserved if a published node names the id, live if the id's lock is held, and free
otherwise. So saving, freeing and taking over a tree are one store each, whatever the size, and the
next `sweep` takes back the blocks of a dead daemon.

Words change only under the table lock. A leased block reads as zeros until its owner writes: `lease`
punches the blocks that it hands out, `release` and `sweep` punch those that they take back. Only
backed pages of the table are read (a page that was never written is 512 free blocks), so that the
cost depends on the memory in use, not on the size of RAM.

A word authorises destruction, so it is never trusted alone. A tree id carries a check of its own
(`is_tree_id`) that tells a flipped bit from a dead owner; and `lease` never hands out blocks that
`guarded` names, whatever the table says. The other witnesses (nodes, the kernel's own ranges) are
asked in kernel/ownership.py.

Kernel: include/linux/mmzone.h (pageblocks), mm/page_isolation.c; patches 28 to 31 (deferred work)
"""

import binascii
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import numpy as np

from pkramfs.errors import ExhaustedError
from pkramfs.machine.policy import Policy
from pkramfs.machine.ram import Ram
from pkramfs.spans import U64, Spans, among, distinct
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, format_size

FREE, KERNEL, HOLE, RESERVE = 0, 1, 2, 3
FIRST_TREE_ID = 256
STATES = {FREE: "free", KERNEL: "kernel", HOLE: "hole", RESERVE: "reserve"}

_WORDS = PAGE_SIZE // 8
_CHECK_BITS, _CHECK_START = 16, 0x1D0F
"""A tree id is 47 random bits above their CRC-16, which detects every flip of up to three bits."""
_SWEEP_BLOCKS = 512
"""Blocks that `sweep` frees before it drops the table lock for others: punching 1 GiB in use took 0.18 s."""


def new_tree_id() -> int:
    """Return a tree id that was never used: 47 random bits, not all of them 0, and their check."""
    number = 1 + secrets.randbelow((1 << 63 - _CHECK_BITS) - 1)
    return number << _CHECK_BITS | _check_of(number)


def is_tree_id(word: int) -> bool:
    """Return True if `new_tree_id` may have made a word: its check matches.

    Releases before this check made all 63 bits at random: only nodes and locks prove their ids.
    """
    return FIRST_TREE_ID <= word < 1 << 63 and _check_of(word >> _CHECK_BITS) == word & (1 << _CHECK_BITS) - 1


def _check_of(number: int) -> int:
    return binascii.crc_hqx(number.to_bytes(8, "big"), _CHECK_START)


class Leases:
    """The lease table at page `table_pfn`, for `blocks` page blocks; `guarded()` are those that are never leased."""

    def __init__(
        self,
        ram: Ram,
        table_pfn: int,
        blocks: int,
        lock: Callable[[], AbstractContextManager[None]],
        guarded: Callable[[], Spans] = Spans,
    ) -> None:
        self.ram, self.table_pfn, self.blocks, self._lock, self._guarded = ram, table_pfn, blocks, lock, guarded
        start = table_pfn * _WORDS
        self.ids: U64 = ram.u64[start : start + blocks]
        """The table itself, shape (blocks,). Reading a word in a hole makes the host back its page."""

    def _pieces(self) -> Iterator[tuple[int, U64]]:
        """Yield (first block, words) for each backed stretch of the table."""
        pages = -(-self.blocks // _WORDS)
        for start, end in self.ram.data_spans(self.table_pfn, self.table_pfn + pages):
            first = (start - self.table_pfn) * _WORDS
            yield first, self.ids[first : (end - self.table_pfn) * _WORDS]

    def _where(self, keep: Callable[[U64], object]) -> Spans:
        """Return the blocks of backed table pages for whose words `keep` is true."""
        return Spans.union(Spans.from_mask(keep(words), first) for first, words in self._pieces())

    def taken(self) -> Spans:
        """Return the blocks that are not free."""
        return self._where(lambda words: words != FREE)

    def free_blocks(self) -> int:
        """Return the number of free blocks: what `taken` leaves, without finding out which they are."""
        return self.blocks - sum(int(np.count_nonzero(words)) for _, words in self._pieces())  # FREE is 0

    def blocks_of(self, tree_id: int) -> Spans:
        """Return the blocks that one owner holds."""
        return self._where(lambda words: words == np.uint64(tree_id))

    def trees(self) -> Spans:
        """Return the blocks that any tree holds."""
        return self._where(lambda words: words >= FIRST_TREE_ID)

    def tree_ids(self) -> set[int]:
        """Return every tree id that holds a block."""
        return {word for word in self.words() if word >= FIRST_TREE_ID}

    def words(self) -> dict[int, int]:
        """Return every word in the table but 0, and how often it occurs."""
        found: dict[int, int] = {}
        for _, words in self._pieces():
            for word, count in zip(*np.unique(words, return_counts=True), strict=True):
                found[int(word)] = found.get(int(word), 0) + int(count)
        found.pop(FREE, None)
        return found

    def others_in(self, blocks: Spans, owner: int) -> tuple[int, int] | None:
        """Return the first of `blocks` that `owner` does not hold, and its word; None if it holds all."""
        for start, end in blocks.clip(0, self.blocks):
            wrong = self.ids[start:end] != np.uint64(owner)
            if wrong.any():
                block = start + int(np.argmax(wrong))
                return block, int(self.ids[block])
        return None

    def page_of(self, block: int) -> int:
        """Return the page of the table that has the word of a block."""
        return self.table_pfn + block // _WORDS

    def counts_in(self, parts: dict[int, Spans]) -> dict[int, dict[str, int]]:
        """Count the blocks of each part by owner: free, tree, kernel; holes are not counted."""
        taken, trees, holes = self.taken(), self.trees(), self._where(lambda words: words == HOLE)
        found = {}
        for part, blocks in parts.items():
            owned, leased, absent = ((spans & blocks).total for spans in (taken, trees, holes))
            found[part] = {"free": blocks.total - owned, "tree": leased, "kernel": owned - leased - absent}
        return found

    def counts(self) -> dict[str, int]:
        """Count blocks by state: free, kernel, hole, reserve, tree."""
        found = dict.fromkeys((*STATES.values(), "tree"), 0)
        for owner, count in self.words().items():
            found[STATES.get(owner, "tree")] += count
        found["free"] = self.blocks - sum(count for state, count in found.items() if state != "free")
        return found

    def lease(self, tree_id: int, count: int, *, align: int = 1, policy: Policy | None = None) -> Spans:
        """Lease `count` free blocks, in one piece if possible; raise ExhaustedError, and lease nothing, if too few."""
        with self._lock():
            free = self.taken().gaps(0, self.blocks) - self._guarded()
            shares = [(free, min(count, free.total))] if policy is None else policy.shares(free, count)
            if (room := sum(share for _, share in shares)) < count:
                where = f" for mpol={policy.text}" if policy else ""
                raise ExhaustedError(
                    f"RAM is full{where}: {format_size(count * BLOCK_SIZE)} wanted, "
                    f"{format_size(room * BLOCK_SIZE)} free"
                )
            chosen = Spans()
            for blocks, share in shares:
                if share:
                    chosen = chosen | _choose(blocks - chosen if chosen else blocks, share, align)
            back(self.ram, self.table_pfn, chosen)
            self.ram.punch(chosen.scale(BLOCK_PAGES))
            self._set(chosen, tree_id)
        return chosen

    def release(self, tree_id: int, blocks: Spans) -> None:
        """Give blocks of one owner back; raise AssertionError if they are not its own."""
        if blocks - self.blocks_of(tree_id):
            raise AssertionError(f"tree {tree_id:x} releases page blocks that it does not own")
        self.ram.punch(blocks.scale(BLOCK_PAGES))  # this takes long, and nobody else touches them: no lock yet
        with self._lock():
            self._set(blocks, FREE)

    def sweep(self, keep: Callable[[], Iterable[int]]) -> int:
        """Free every block whose tree id `keep()`, called under the lock, does not name; return how many."""
        with self._lock():
            kept = np.array(sorted(keep()), dtype=np.uint64)
            dead = self._where(lambda words: (words >= FIRST_TREE_ID) & ~among(words, kept))
            ids = self._owners(dead)
        swept = 0
        for low in range(0, dead.total, _SWEEP_BLOCKS):
            with self._lock():
                swept += self._free_dead(_slice(dead, low, low + _SWEEP_BLOCKS), ids)
        return swept

    def correct(self, blocks: Spans, owner: int) -> None:
        """Write damaged words anew; blocks that become free are punched. The caller holds the lock."""
        if owner == FREE:
            self.ram.punch(blocks.scale(BLOCK_PAGES))
        self._set(blocks, owner)

    def _owners(self, blocks: Spans) -> U64:
        """Return the owners of `blocks`, each once."""
        empty = np.empty(0, dtype=np.uint64)
        return distinct(np.concatenate([empty, *(distinct(self.ids[start:end]) for start, end in blocks)]))

    def _free_dead(self, blocks: Spans, ids: U64) -> int:
        """Free those of `blocks` that `ids` still own, and count them: others may have swept and leased some."""
        # One mask for each range of blocks: the words that still name a dead owner.
        masks = [(start, among(self.ids[start:end], ids)) for start, end in blocks]
        still = Spans(run for start, mask in masks for run in Spans.from_mask(mask, start))
        self.ram.punch(still.scale(BLOCK_PAGES))
        self._set(still, FREE)
        return still.total

    def _set(self, blocks: Spans, owner: int) -> None:
        for start, end in blocks:
            self.ids[start:end] = owner


def back(ram: Ram, table_pfn: int, blocks: Spans) -> None:
    """Back the table pages of `blocks`, so that their words can be stored; raise ExhaustedError if the host is full."""
    for start, end in blocks.outward(_WORDS):
        ram.back_run(table_pfn + start, end - start)


def _choose(free: Spans, count: int, align: int) -> Spans:
    """Choose the lowest range that holds `count` blocks, else the largest ranges first."""
    start = free.first_fit(count, align)
    if start is None and align > 1:
        start = free.first_fit(count)
    if start is not None:
        return Spans([(start, start + count)])
    chosen, left = [], count
    for piece in np.argsort(-free.counts.astype(np.int64), kind="stable").tolist():
        first, size = int(free.starts[piece]), min(int(free.counts[piece]), left)
        chosen.append((first, first + size))
        left -= size
        if not left:
            break
    return Spans(chosen)


def _slice(blocks: Spans, low: int, high: int) -> Spans:
    """Return the part of a set whose numbers, counted in order, are the `low`th to the one before the `high`th."""
    # before: numbers of the set below each range; skip, size: where its part begins and ends. Shape: (ranges,).
    counts = blocks.counts.astype(np.int64)
    before = np.cumsum(counts) - counts
    skip, size = (np.clip(limit - before, 0, counts).astype(np.uint64) for limit in (low, high))
    return Spans.from_arrays(blocks.starts + skip, blocks.starts + size)
