# SPDX-License-Identifier: GPL-2.0-or-later
"""Banned memory: where preserved pages may not lie, and how a save relocates those that do.

A kexec image that is loaded already has fixed destinations; what the kernel reserved early and the
crash kernel's window are out of bounds as well. Pages that a save finds there are copied to frames
elsewhere, and the copies are preserved. The file keeps the original; the caller keeps the tree frozen
until the node is withdrawn, so the copy cannot become stale (D7).

    run   [----------====-----]        ==== banned
    kept  [----------]    [---]
    relocated         [==]  ─► one run elsewhere, or several: the largest pieces that fit

Only the banned part of a huge page is relocated; both parts are then entries of the largest orders that
fit, where PKRAM copies all of it into base pages. Bans are a set of spans, so there is no table to
overflow (D12).

Kernel: mm/pkram.c (banned_regions, pkram_alloc_page, __pkram_save_page), patches 5 and 15
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from pkramfs.machine.frames import Run
from pkramfs.machine.ram import Ram
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_ORDER, PAGE_SIZE

I64 = npt.NDArray[np.int64]
Runs = tuple[U64, U64, U64]
"""Columns: index in the stream, first pfn, count."""
_LONG = 16
"""Pages of a run from which it is copied by a call of its own."""
_TOGETHER = 64
"""Pages of short runs that are copied in one step: they fit the L2 cache."""


class Allocator(Protocol):
    """The part of a frame allocator that a save needs: see `machine.frames.Frames`."""

    def allocate(self, count: int, order: int = 0, *, held: bool = False) -> list[Run]: ...

    def free(self, starts: list[int], counts: list[int]) -> None: ...


def touched(banned: Spans, pfn: U64, count: U64) -> npt.NDArray[np.bool_]:
    """Return a mask of the runs of which any page is banned."""
    if not banned:
        return np.zeros(len(pfn), dtype=bool)
    # at: the first banned span that ends behind each run's start; first: where it starts. Shape: (runs,).
    at = np.searchsorted(banned.ends, pfn, side="right")
    first = np.append(banned.starts, ~np.uint64(0))[at]
    hit: npt.NDArray[np.bool_] = first < pfn + count
    return hit


def allocate_outside(frames: Allocator, count: int, banned: Spans, order: int = 0) -> list[Run]:
    """Allocate runs of `count` frames outside of `banned`, aligned to 2**order as far as memory allows.

    Frames found inside are parked until the end, so that the allocator does not offer them again.
    """
    if not banned:
        return frames.allocate(count, order, held=True)
    good: list[Run] = []
    parked: list[Run] = []
    try:
        while count:
            for start, size in frames.allocate(count, order, held=True):
                run = Spans([(start, start + size)])
                parked += [(a, b - a) for a, b in run & banned]
                fine = [(a, b - a) for a, b in run - banned]
                good += fine
                count -= sum(size for _, size in fine)
    except BaseException:
        free_runs(frames, good)
        raise
    finally:
        free_runs(frames, parked)
    return good


def free_runs(frames: Allocator, runs: list[Run]) -> None:
    """Give runs back to their allocator."""
    if runs:
        frames.free([start for start, _ in runs], [count for _, count in runs])


def relocate_banned(
    ram: Ram, frames: Allocator, index: U64, pfn: U64, count: U64, banned: Spans
) -> tuple[U64, U64, U64, list[Run]]:
    """Copy every banned part of runs (index, pfn, count) elsewhere; return the new runs, by index, and the copies."""
    hit = touched(banned, pfn, count)
    if not hit.any():
        return index, pfn, count, []
    # edges: starts and ends of banned spans in order; start, size: pieces of the runs that touch any. Shape: (pieces,).
    edges = np.column_stack((banned.starts, banned.ends)).reshape(-1)
    row, start, size = _cut(pfn[hit], count[hit], edges)
    first = index[hit][row] + start - pfn[hit][row]
    inside = np.searchsorted(edges, start, side="right") % 2 == 1  # an odd number of edges passed: banned
    relocated, copies = _copy_elsewhere(ram, frames, (first[inside], start[inside], size[inside]), banned)
    unhit = (index[~hit], pfn[~hit], count[~hit])
    parts = (unhit, (first[~inside], start[~inside], size[~inside]), relocated)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    by_index = np.argsort(columns[0], kind="stable")
    return columns[0][by_index], columns[1][by_index], columns[2][by_index], copies


def _cut(start: U64, count: U64, edges: U64) -> tuple[I64, U64, U64]:
    """Cut runs at every edge inside of them; return (number of the run, start, count) of the pieces, in order."""
    # Edges low … high-1 lie inside of a run, so it falls into high - low + 1 pieces. Shape: (runs,).
    end = start + count
    low, high = np.searchsorted(edges, start, side="right"), np.searchsorted(edges, end, side="left")
    pieces = high - low + 1
    # row: the run of each piece; within: its number in the run. Shape: (all pieces,).
    row = np.repeat(np.arange(len(start)), pieces)
    within = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    guarded = np.concatenate((edges, edges[:1]))  # the element behind the last edge is read, but not used
    # A piece begins at its run's start or at the edge before it, and ends at the next edge or at its run's end.
    before = guarded[np.maximum(low[row] + within - 1, 0)]
    begin = np.where(within == 0, start[row], before)
    until = np.where(within == pieces[row] - 1, end[row], guarded[low[row] + within])
    return row, begin, until - begin


def _copy_elsewhere(ram: Ram, frames: Allocator, rows: Runs, banned: Spans) -> tuple[Runs, list[Run]]:
    """Copy banned runs, laid out largest first so that large pieces keep their alignment."""
    by_size = np.argsort(~rows[2], kind="stable")
    index, source, size = (column[by_size] for column in rows)
    order = min(BLOCK_ORDER, int(size[0]).bit_length() - 1)
    copies = allocate_outside(frames, int(size.sum()), banned, order)
    try:
        for run in copies:
            ram.back_run(*run)
        starts, counts = np.array(copies, dtype=np.uint64).reshape(-1, 2).T
        # Banned runs and copies are both laid on one line, [0, total): cut the former where a copy ends.
        edges, borders = np.cumsum(size), np.cumsum(counts)
        piece, at, length = _cut(edges - size, size, borders)
        # For each piece: the copy that holds it, its offset in its run, and its place in that copy.
        which = np.searchsorted(borders, at, side="right")
        offset = at - (edges - size)[piece]
        target = starts[which] + at - (borders - counts)[which]
        _copy(ram, source[piece] + offset, target, length, banned)
    except BaseException:
        free_runs(frames, copies)
        raise
    return (index[piece] + offset, target, length), copies


def _copy(ram: Ram, source: U64, target: U64, count: U64, within_banned: Spans) -> None:
    """Copy runs of pages: long ones one by one, the pages of all short ones many at a time.

    Holes are zeros, as the copies are already, and must not be read through the mapping.
    """
    long = count >= _LONG
    for row in zip(source[long].tolist(), target[long].tolist(), count[long].tolist(), strict=True):
        ram.copy(*row)
    # All pages of all short runs, one element each: where from (origin) and where to (place). RAM as (pages, 512).
    table, left = ram.u64.reshape(-1, PAGE_SIZE // 8), count[~long].astype(np.int64)
    within = np.arange(int(left.sum())) - np.repeat(np.cumsum(left) - left, left)
    origin, place = (np.repeat(pfn[~long].astype(np.int64), left) + within for pfn in (source, target))
    if len(origin):
        there = Spans.union(ram.data_spans(low, high) for low, high in within_banned)
        held = touched(there, origin.astype(np.uint64), np.ones(len(origin), dtype=np.uint64))
        origin, place = origin[held], place[held]
    for low in range(0, len(origin), _TOGETHER):
        part = slice(low, low + _TOGETHER)
        table[place[part]] = table[origin[part]]
