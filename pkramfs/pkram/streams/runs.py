# SPDX-License-Identifier: GPL-2.0-or-later
"""The content of the links of a stream: the fewest runs (index, pfn, count), by index.

    steady links      one run each, known from the header and the first entry: nothing is read again
    all others        entries, STEP links at a time, on all CPUs

Where a stream is one page here and one page there, the runs are as many as the entries, and are put straight
into the arrays that are handed out: memory that is touched for the first time costs more than the arithmetic.

Kernel: mm/pkram.c (pkram_load_file_pages), mm/shmem_pkram.c, patches 33 and 36
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pkramfs.errors import FormatError
from pkramfs.pkram import parallel
from pkramfs.pkram.format import ENTRY_FLAGS_SHIFT, ENTRY_HUGE, ENTRY_ORDER_MASK, ENTRY_PFN_SHIFT, LINK_CAPACITY
from pkramfs.pkram.streams.link import BATCH, HEAD_WORDS, decode, join_runs
from pkramfs.pkram.streams.linkreader import INDEX_MAX, Chain, Flags, Workbench, differences
from pkramfs.spans import U64
from pkramfs.units import MAX_ORDER

Runs = tuple[U64, U64, U64]

STEP = 128
"""Links whose entries one thread reads in one step: 512 KiB; at most chain.READ."""

_LOW = np.uint64((1 << ENTRY_PFN_SHIFT) - 1)
_UNKNOWN = np.uint64(int(_LOW) & ~(ENTRY_ORDER_MASK | ENTRY_HUGE << ENTRY_FLAGS_SHIFT))
_ORDER = np.uint64(ENTRY_ORDER_MASK)
_SHIFT = np.uint64(ENTRY_PFN_SHIFT)
_STEP = np.uint64(1 << ENTRY_PFN_SHIFT)
_ONE = np.uint64(1)
_FEWER = 8
"""Runs that are fewer than the entries by this factor are kept apart, and copied once more at the end."""
_NONE: Runs = (np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64))
_COUNTING = np.arange(LINK_CAPACITY, dtype=np.uint64)


def all_runs(chain: Chain) -> Runs:
    """Return the whole stream as the fewest runs by index; FormatError for an invalid entry."""
    if not len(chain.pages):
        return _NONE
    reading = _Reading(chain)
    parts, ordered = reading.parts()
    index, pfn, count = reading.together(parts)
    edges = _edges(parts)
    if not ordered or not _in_order(edges):
        by_index = np.argsort(index, kind="stable")
        index, pfn, count = index[by_index], pfn[by_index], count[by_index]
        if not _in_order((index, pfn, count)):
            raise _wrong(chain, "an index with two pages", "one page each")
        edges = index, pfn, count
    if int(index[-1]) + int(count[-1]) > INDEX_MAX:
        raise _wrong(chain, f"{int(index[-1]):#x}", f"below {INDEX_MAX:#x}")
    return join_runs(index, pfn, count) if _continued(edges) else (index, pfn, count)


def _wrong(chain: Chain, found: str, expected: str) -> FormatError:
    return FormatError("Link", "index", pfn=int(chain.pages[0]), found=found, expected=expected)


class _Reading:
    """A chain cut into stretches of steady links and single steps of others.

    Columns are virtual memory for the runs of all steps; only written parts take real memory.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain, begins = chain, np.arange(0, len(chain.pages), STEP)
        self._steady: npt.NDArray[np.bool_] = np.logical_and.reduceat(_sound(chain), begins)
        entries = np.where(self._steady, 0, np.add.reduceat(chain.counts, begins))
        self._edges: list[int] = [0, *np.cumsum(entries).tolist()]
        self._columns = tuple(np.empty(self._edges[-1], dtype=np.uint64) for _ in range(3))

    def parts(self) -> tuple[list[Runs], bool]:
        """Return the runs of each stretch and step, in the order of links, and True if each is sorted by index."""
        left = np.flatnonzero(~self._steady).tolist()
        read = parallel.each(lambda number: self._read(left[number]), len(left))
        change = np.flatnonzero(self._steady[1:] != self._steady[:-1]) + 1
        stretches = [0, *change.tolist(), len(self._steady)]
        found, at = list[tuple[Runs, bool]](), 0
        for low, high in pairwise(stretches):
            if self._steady[low]:
                found.append(_steady_runs(self.chain, slice(low * STEP, high * STEP)))
            else:
                found += read[at : at + high - low]
                at += high - low
        return [runs for runs, _ in found], all(ordered for _, ordered in found)

    def _read(self, step: int) -> tuple[Runs, bool]:
        """Read one step: return its runs (in the columns, if they are many), and True if they are sorted by index."""
        links, place = slice(step * STEP, (step + 1) * STEP), slice(self._edges[step], self._edges[step + 1])
        with self.chain.benches.lend() as bench:
            words = self.chain.fetch(links, bench.words)
            if self._is_scattered(links, words, bench):
                return self._scattered_runs(links, words, place)
            parts = [self._few_runs(links, words, low) for low in range(0, len(words), BATCH)]
        index, pfn, count = (np.concatenate(column) for column in zip(*parts, strict=True))
        runs = join_runs(index, pfn, count)
        return self._keep(runs, place), _in_order(runs)

    def _few_runs(self, links: slice, words: U64, low: int) -> Runs:
        """Return the runs of 64 links of a step, from link `low` on: as many entries as fit the L2 cache."""
        part = slice(links.start + low, min(links.start + low + BATCH, links.stop))
        entries = self.chain.entries(part, words[low : low + BATCH])
        tail = np.bitwise_or.reduce(entries) & _LOW  # order and flags
        if tail == np.bitwise_and.reduce(entries) & _LOW and not tail & _UNKNOWN and tail & _ORDER <= MAX_ORDER:
            return _uniform_runs(self.chain, part, entries, int(tail & _ORDER))
        return _block_runs(self.chain, part, entries)

    def _is_scattered(self, links: slice, words: U64, bench: Workbench) -> bool:
        """Return True if links are full of single pages of which none continues the one before it."""
        counts, index = self.chain.counts[links], self.chain.index[links]
        tail = np.bitwise_or.reduce(words[:, HEAD_WORDS:], axis=None) & _LOW  # orders and flags
        if tail or (counts != LINK_CAPACITY).any():
            return False
        meet = (index[1:] == index[:-1] + np.uint64(LINK_CAPACITY)) & (words[1:, HEAD_WORDS] == words[:-1, -1] + _STEP)
        return not meet.any() and not differences(words, bench, fill=False).any()

    def _scattered_runs(self, links: slice, words: U64, place: slice) -> tuple[Runs, bool]:
        """Read full links, of which each entry is a run, straight into the columns."""
        index, pfn = (column[place] for column in self._columns[:2])
        first = self.chain.index[links]
        np.right_shift(words[:, HEAD_WORDS:], _SHIFT, out=pfn.reshape(-1, LINK_CAPACITY))
        np.add(first[:, None], _COUNTING, out=index.reshape(-1, LINK_CAPACITY))
        if int(pfn.min()) == 0 or int(pfn.max()) >= self.chain.ram.pages:
            raise _bad_block(self.chain, links, words[:, HEAD_WORDS:].reshape(-1))
        ordered = bool((first[1:] >= first[:-1] + np.uint64(LINK_CAPACITY)).all())
        return (index, pfn, np.broadcast_to(_ONE, len(pfn))), ordered

    def _keep(self, runs: Runs, place: slice) -> Runs:
        """Copy many runs to their place; few are kept as they are, and so are counts that are all 1."""
        size, entries = len(runs[0]), place.stop - place.start
        if size * _FEWER < entries:
            return runs
        index, pfn, count = (column[place.start : place.start + size] for column in self._columns)
        index[:], pfn[:] = runs[:2]
        if int(runs[2].max()) == 1:
            return index, pfn, np.broadcast_to(_ONE, size)
        count[:] = runs[2]
        return index, pfn, count

    def together(self, parts: list[Runs]) -> Runs:
        """Return all runs, in the order of links."""
        index, pfn, count = self._columns
        if sum(len(part[0]) for part in parts) == len(index) and all(part[0].base is index for part in parts):
            ones = [part[2].strides == (0,) for part in parts]
            if all(ones):
                return index, pfn, np.broadcast_to(_ONE, len(index))
            if not any(ones):
                return index, pfn, count
        index, pfn, count = (np.concatenate(column) for column in zip(*parts, strict=True))
        return index, pfn, count


def _sound(chain: Chain) -> Flags:
    """Return a mask of the links that are one valid run of memory each."""
    last = np.uint64(chain.ram.pages) - np.minimum(chain.counts.view(np.uint64), np.uint64(chain.ram.pages))
    pfn = chain.firsts >> _SHIFT
    found: Flags = chain.steady & (chain.firsts & _LOW == 0) & (pfn != 0) & (pfn <= last)
    return found


def _steady_runs(chain: Chain, links: slice) -> tuple[Runs, bool]:
    """Return the fewest runs of links that are one run each, and True if they are sorted by index."""
    runs = chain.index[links], chain.firsts[links] >> _SHIFT, chain.counts[links].view(np.uint64)
    ordered = _in_order(runs)
    return join_runs(*runs) if ordered else runs, ordered


def _uniform_runs(chain: Chain, links: slice, entries: U64, order: int) -> Runs:
    """Return the runs of entries that are all of one order."""
    counts, number, size = chain.counts[links], len(entries), np.uint64(1 << order)
    firsts = np.cumsum(counts) - counts
    # base: the index of a link's first entry, less what the entries before it make; equal while indices go on.
    base: U64 = chain.index[links] - firsts.astype(np.uint64) * size
    # fresh, shape (entries,): the entry does not continue the one before it, in memory or, at a link's start, in index.
    fresh = np.empty(number, dtype=bool)
    fresh[0] = True
    np.not_equal(entries[1:] - entries[:-1], size << _SHIFT, out=fresh[1:])
    fresh[firsts[1:]] |= base[1:] != base[:-1]
    # One run for each fresh entry; it ends where the next one begins.
    at = np.flatnonzero(fresh)
    index = base[np.searchsorted(firsts, at, side="right") - 1] + at.astype(np.uint64) * size
    pfn, count = entries[at] >> _SHIFT, np.diff(np.append(at, number)).astype(np.uint64) * size
    if int(pfn.min()) == 0 or int((pfn + count).max()) > chain.ram.pages or (pfn & (size - _ONE)).any():
        raise _bad_block(chain, links, entries)
    return index, pfn, count


def _block_runs(chain: Chain, links: slice, entries: U64) -> Runs:
    """Return the runs of entries of any order; FormatError for an invalid entry."""
    pfn, order, _ = decode(entries)
    size = np.uint64(1) << np.minimum(order, MAX_ORDER).astype(np.uint64)
    if _bad(chain, entries).any():
        raise _bad_block(chain, links, entries)
    return join_runs(chain.indices(links, size), pfn, size)


def _bad(chain: Chain, entries: U64) -> Flags:
    """Return a mask of the entries that are no aligned block of RAM."""
    pfn, order, _ = decode(entries)
    size = np.uint64(1) << np.minimum(order, MAX_ORDER).astype(np.uint64)
    found: Flags = (order > MAX_ORDER) | (pfn == 0) | ((pfn & (size - _ONE)) != 0)
    found |= (entries & _UNKNOWN != 0) | (pfn + size > np.uint64(chain.ram.pages))
    return found


def _bad_block(chain: Chain, links: slice, entries: U64) -> FormatError:
    place = int(np.flatnonzero(_bad(chain, entries))[0])
    link = int(np.searchsorted(np.cumsum(chain.counts[links]), place, side="right"))
    return FormatError(
        "Link",
        "entry",
        pfn=int(chain.pages[links][link]),
        found=f"{int(entries[place]):#x}",
        expected="an aligned block of order 0 to 18 inside RAM",
    )


def _in_order(runs: Runs) -> bool:
    """Return True if runs are sorted by index and do not overlap."""
    index, _, count = runs
    return bool((index[1:] >= index[:-1] + count[:-1]).all())


def _continued(runs: Runs) -> bool:
    """Return True if a run continues the one before it, in index and in memory."""
    index, pfn, count = runs
    return bool(((index[1:] == index[:-1] + count[:-1]) & (pfn[1:] == pfn[:-1] + count[:-1])).any())


def _edges(parts: list[Runs]) -> Runs:
    """Return the first and the last run of each part: all that matters where parts meet."""
    index, pfn, count = (
        np.array([edge for runs in parts for edge in _ends(runs[column])], dtype=np.uint64) for column in range(3)
    )
    return index, pfn, count


def _ends(column: U64) -> list[np.uint64]:
    return [column[0]] if len(column) == 1 else [column[0], column[-1]]
