# SPDX-License-Identifier: GPL-2.0-or-later
"""The preserved-page table while it grows: runs added and taken out in bulk.

    add     whole 1 GiB units ─► FULL in the upper level
            whole 2 MiB units ─► FULL in the lower level
            the rest          ─► bits of bitmaps; one that fills up becomes FULL and its slot is free

A table belongs to a node that is not visible yet, so nothing here needs an order of stores. Frames of a
node belong to one object only: adding a page twice is an error (PKRAM panics, D19),
and so is removing a page that is not in the table. Both are noticed before anything is changed.

All work is arrays of units; the only loops are over stretches of 1 GiB entries. Pages come from
`allocate(n)`, and the table can list its own pages: see `close`.

Kernel: mm/pkram_pagetable.c (pkram_add_identity_map, pkram_remove_identity_map), patch 9
"""

import errno
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pkramfs.errors import PkramError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.table import reader as pagetable
from pkramfs.pkram.table.reader import BITMAP_WORDS, ENTRIES, FULL, LOWER, SLOTS, UPPER, gather, places
from pkramfs.spans import U64, Spans, among, distinct
from pkramfs.units import PAGE_SHIFT

_SHIFT = np.uint64(PAGE_SHIFT)
_ONES = ~np.uint64(0)
_NONE = np.empty(0, dtype=np.uint64)


class TableWriter:
    """A table that grows. `pages` are those in use, `spare` those allocated and not in use."""

    def __init__(self, ram: Ram, allocate: Callable[[int], U64]) -> None:
        self.ram, self._allocate = ram, allocate
        self.spare = _NONE
        self._slots = _NONE
        self.root = int(self._take(1)[0])

    def add(self, spans: Spans) -> None:
        """Mark pages as preserved; if one is already, raise PkramError (EEXIST) and change nothing."""
        if not spans:
            return
        if int(spans.ends[-1]) > self.ram.pages or int(spans.starts[0]) == 0:
            raise PkramError(f"pages to preserve are outside of RAM: {spans}", errno.EINVAL)
        huge, whole, blocks, bits = _parts(spans)
        if pagetable.upper_entries(self.ram, self.root, huge).any():
            raise _twice(spans)
        units = _numbers(spans.outward(UPPER) - spans.inward(UPPER))
        entries = self._lower(np.concatenate((whole, blocks)), units)
        old, partial = entries[: len(whole)], entries[len(whole) :]
        there = (partial != 0) & (partial != FULL)
        before = np.zeros_like(bits)
        before[there] = self.ram.u64[pagetable.bitmap_places(partial[there])]
        if old.any() or (partial == FULL).any() or (before & bits).any():
            raise _twice(spans)
        self._ensure_lower(units)
        if len(huge):
            self._ensure_upper(huge)
            self.ram.u64[self._upper_places(huge)] = FULL
        if len(whole):
            self.ram.u64[self._lower_places(whole)] = FULL
        self._store_bits(blocks, partial, before | bits)

    def remove(self, spans: Spans) -> None:
        """Take pages out; if one is not in the table, raise PkramError (ENOENT) and change nothing."""
        if not spans:
            return
        if int(spans.ends[-1]) > self.ram.pages or self._missing(spans):
            raise PkramError(f"pages to release are not preserved: {spans}", errno.ENOENT)
        huge, whole, blocks, bits = _parts(spans)
        entries = pagetable.upper_entries(self.ram, self.root, huge)
        self.ram.u64[self._upper_places(huge[entries == FULL])] = 0
        split = huge[entries != FULL]  # 512 entries below are FULL, one by one
        whole = np.concatenate((whole, (split[:, None] * np.uint64(ENTRIES) + _column()).reshape(-1)))
        units = distinct(np.concatenate((whole, blocks)) // np.uint64(ENTRIES))
        self._open_full(units)
        if len(whole):
            self.ram.u64[self._lower_places(whole)] = 0
        partial = self._lower(blocks, units)
        before = np.full_like(bits, _ONES)
        there = partial != FULL
        before[there] = self.ram.u64[pagetable.bitmap_places(partial[there])]
        self._store_bits(blocks, np.where(there, partial, np.uint64(0)), before & ~bits)
        self._prune(units)

    def close(self, unlisted: Callable[[], Spans]) -> int:
        """Add the pages that `unlisted()` returns until it returns none, and return the checksum.

        Adding pages may need table pages, which `unlisted` then returns as well.
        """
        while spans := unlisted():
            if len(spans) > 1 or not self._add_few(int(spans.starts[0]), int(spans.ends[0])):
                self.add(spans)
        return pagetable.checksum(self.ram, self.root)

    def _add_few(self, start: int, end: int) -> bool:
        """Add pages of one 2 MiB block that has and keeps a bitmap, without arrays; return False for all others."""
        block, page = start // LOWER, self.root
        if (end - 1) // LOWER != block:
            return False
        for covers in (UPPER * ENTRIES, UPPER, LOWER):
            entry = self.ram.load((page << PAGE_SHIFT) + start // covers % ENTRIES * 8)
            if entry in (0, int(FULL)):
                return False
            page = entry >> PAGE_SHIFT
        place = pagetable.bitmap_places(np.array([entry], dtype=np.uint64))[0]
        bits, new = int.from_bytes(self.ram.u64[place].tobytes(), "little"), (1 << end - start) - 1 << start % LOWER
        if bits & new:
            raise _twice(Spans([(start, end)]))
        if bits | new == (1 << LOWER) - 1:
            return False
        self.ram.u64[place] = np.frombuffer((bits | new).to_bytes(LOWER // 8, "little"), dtype=np.uint64)
        return True

    def _missing(self, spans: Spans) -> bool:
        edge = int(spans.starts[0]), int(spans.ends[-1])
        return bool(spans - pagetable.read_range(self.ram, self.root, *edge))

    # -- finding and making table pages ------------------------------------------------------------

    def _take(self, count: int) -> U64:
        """Take zeroed pages for the table."""
        if count > len(self.spare):
            self.spare = np.concatenate((self.spare, self._allocate(count - len(self.spare))))
        taken, self.spare = self.spare[:count], self.spare[count:]
        return taken

    def _upper_places(self, units: U64) -> U64:
        roots = np.full(len(units), self.root, dtype=np.uint64)
        return places(gather(self.ram, roots, units // np.uint64(ENTRIES)) >> _SHIFT, units)

    def _lower_places(self, blocks: U64) -> U64:
        units = blocks // np.uint64(ENTRIES)
        return places(pagetable.upper_entries(self.ram, self.root, units) >> _SHIFT, blocks)

    def _lower(self, blocks: U64, units: U64) -> U64:
        """Return the lower entries of 2 MiB blocks; FULL below a full upper entry. `units` are the blocks' GiBs."""
        above = pagetable.upper_entries(self.ram, self.root, units)
        row = np.searchsorted(units, blocks // np.uint64(ENTRIES))
        full = above[row] == FULL
        entries = gather(self.ram, np.where(full, np.uint64(0), above[row] >> _SHIFT), blocks)
        entries[full] = FULL
        return entries

    def _ensure_upper(self, units: U64) -> None:
        """Make the upper pages of 1 GiB units that do not exist."""
        numbers = distinct(units // np.uint64(ENTRIES))
        roots = np.full(len(numbers), self.root, dtype=np.uint64)
        missing = numbers[gather(self.ram, roots, numbers) == 0]
        if len(missing):
            self.ram.u64[places(roots[: len(missing)], missing)] = self._take(len(missing)) << _SHIFT

    def _ensure_lower(self, units: U64) -> None:
        """Make the lower pages of 1 GiB units that do not exist."""
        self._ensure_upper(units)
        missing = units[pagetable.upper_entries(self.ram, self.root, units) == 0]
        if len(missing):
            self.ram.u64[self._upper_places(missing)] = self._take(len(missing)) << _SHIFT

    def _open_full(self, units: U64) -> None:
        """Give full 1 GiB units a lower page of full entries."""
        full = units[pagetable.upper_entries(self.ram, self.root, units) == FULL]
        if len(full):
            pages = self._take(len(full))
            self.ram.u64[(pages << np.uint64(PAGE_SHIFT - 3))[:, None] + _column()] = FULL
            self.ram.u64[self._upper_places(full)] = pages << _SHIFT

    # -- bitmaps -------------------------------------------------------------------------------------

    def _store_bits(self, blocks: U64, entries: U64, bits: U64) -> None:
        """Store bitmaps; `entries` are the blocks' present ones (0: none). Full and empty ones lose their slot."""
        if not len(blocks):
            return
        full, empty = (bits == _ONES).all(axis=1), ~bits.any(axis=1)
        keep = ~full & ~empty
        fresh = keep & (entries == 0)
        entries = entries.copy()
        entries[fresh] = self._take_slots(int(fresh.sum()))
        gone = entries[~keep & (entries != 0)]
        self.ram.u64[pagetable.bitmap_places(gone)] = 0
        self._slots = np.concatenate((gone, self._slots))
        self.ram.u64[pagetable.bitmap_places(entries[keep])] = bits[keep]
        entries[full], entries[empty] = FULL, 0
        self.ram.u64[self._lower_places(blocks)] = entries

    def _take_slots(self, count: int) -> U64:
        missing = count - len(self._slots)
        if missing > 0:
            pages = self._take(-(-missing // SLOTS))
            slots = (pages << _SHIFT)[:, None] + np.arange(SLOTS, dtype=np.uint64)
            self._slots = np.concatenate((self._slots, slots.reshape(-1)))
        taken, self._slots = self._slots[:count], self._slots[count:]
        return taken

    def _prune(self, units: U64) -> None:
        """Give back table pages of these 1 GiB units that are empty, and bitmap pages without a bitmap."""
        entries = pagetable.upper_entries(self.ram, self.root, units)
        below = (entries != 0) & (entries != FULL)
        empty = self._empty(entries[below] >> _SHIFT)
        self.ram.u64[self._upper_places(units[below][empty])] = 0
        above = distinct(units // np.uint64(ENTRIES))
        roots = np.full(len(above), self.root, dtype=np.uint64)
        uppers = gather(self.ram, roots, above) >> _SHIFT
        bare = self._empty(uppers)
        self.ram.u64[places(roots[bare], above[bare])] = 0
        holders, free = np.unique(self._slots >> _SHIFT, return_counts=True)
        unused = holders[free == SLOTS]
        self._slots = self._slots[~among(self._slots >> _SHIFT, unused)]
        self.spare = np.concatenate((self.spare, (entries[below] >> _SHIFT)[empty], uppers[bare], unused))

    def _empty(self, pages: U64) -> npt.NDArray[np.bool_]:
        """Return a mask of the table pages that have no entries."""
        entries = self.ram.u64[(pages << np.uint64(PAGE_SHIFT - 3))[:, None] + _column()]
        used: npt.NDArray[np.bool_] = entries.any(axis=1)
        return ~used


def build(ram: Ram, spans: Spans, allocate: Callable[[int], U64]) -> tuple[int, int, U64]:
    """Build a whole table of `spans` and of its own pages; return (root pfn, checksum, table pages).

    `allocate(n)` gives n more zeroed pages outside of `spans`.
    """
    fresh: list[U64] = []

    def take(count: int) -> U64:
        fresh.append(np.asarray(allocate(count), dtype=np.uint64))
        return fresh[-1]

    def unlisted() -> Spans:
        pages = np.concatenate([_NONE, *fresh])
        fresh.clear()
        return Spans.from_numbers(pages)

    table = TableWriter(ram, take)
    table.add(spans)
    digest = table.close(unlisted)
    return table.root, digest, pagetable.walk(ram, table.root).pages


def _parts(spans: Spans) -> tuple[U64, U64, U64, U64]:
    """Return (whole 1 GiB units, whole 2 MiB units outside of them, other 2 MiB blocks, their bitmaps)."""
    huge = spans.inward(UPPER)
    whole = spans.inward(LOWER)
    blocks, bits = pagetable.bits_of_spans(spans - whole.scale(LOWER))
    return _numbers(huge), _numbers(whole - huge.scale(ENTRIES)), blocks, bits.reshape(-1, BITMAP_WORDS)


def _numbers(spans: Spans) -> U64:
    """Return every number of a (small) set."""
    counts = spans.counts.astype(np.int64)
    within = np.arange(spans.total, dtype=np.uint64) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.uint64)
    return np.repeat(spans.starts, counts) + within


def _column() -> U64:
    return np.arange(ENTRIES, dtype=np.uint64)


def _twice(spans: Spans) -> PkramError:
    return PkramError(f"a frame was saved twice: one of {spans} is preserved already", errno.EEXIST)
