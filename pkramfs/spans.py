# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets of page ranges: usable, preserved, reserved, banned, free.

    |..####....##........|     Spans([(2, 6), (10, 12)])
     0         10

A Spans is immutable: two sorted uint64 arrays `starts` and `ends` (end exclusive), no span empty,
none touching the next. Units are the caller's, pages nearly everywhere. All set operations are one
linear numpy pass, so that a million ranges cost milliseconds.

Kernel: the region arithmetic of mm/memblock.c, without its arrays
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
_FEW = 64
"""Ranges of a set that are cheaper to combine whole than to search."""


class Spans:
    """An immutable set of half-open ranges of whole numbers in [0, 2**63)."""

    __slots__ = ("ends", "starts")
    starts: U64
    ends: U64

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Make the union of (start, end) ranges, in any order; empty ones are dropped."""
        pairs = np.array([r for r in ranges if r[1] > r[0]], dtype=np.uint64).reshape(-1, 2)
        self.starts, self.ends = _merge(pairs[:, 0], pairs[:, 1])

    @classmethod
    def from_arrays(cls, starts: Any, ends: Any) -> "Spans":
        """Return the union of ranges given as two arrays (any order, overlap allowed)."""
        starts = np.asarray(starts, dtype=np.uint64)
        ends = np.asarray(ends, dtype=np.uint64)
        keep = ends > starts
        if not keep.all():
            starts, ends = starts[keep], ends[keep]
        return cls._made(*_merge(starts, ends))

    @classmethod
    def _made(cls, starts: U64, ends: U64) -> "Spans":
        """Make a set of ranges that are in order already, none empty, none touching the next."""
        spans = cls.__new__(cls)
        spans.starts, spans.ends = starts, ends
        return spans

    @classmethod
    def from_runs(cls, starts: Any, counts: Any) -> "Spans":
        """Return the union of runs given as arrays of first and count."""
        starts = np.asarray(starts, dtype=np.uint64)
        return cls.from_arrays(starts, starts + np.asarray(counts, dtype=np.uint64))

    @classmethod
    def from_numbers(cls, numbers: Any) -> "Spans":
        """Return the set of an array of numbers, in any order."""
        numbers = np.asarray(numbers, dtype=np.uint64)
        return cls.from_arrays(numbers, numbers + np.uint64(1))

    @classmethod
    def union(cls, sets: Iterable["Spans"]) -> "Spans":
        """Return the union of many sets, in one pass."""
        all_sets = list(sets)
        if not all_sets:
            return cls()
        return cls.from_arrays(
            np.concatenate([spans.starts for spans in all_sets]), np.concatenate([spans.ends for spans in all_sets])
        )

    @classmethod
    def from_mask(cls, mask: Any, start: int = 0) -> "Spans":
        """Return the runs of True in a boolean array whose first element is number `start`."""
        mask = np.asarray(mask, dtype=bool)
        # inner: where the mask changes; with a start and an end that touch the border, edges alternate start, end.
        inner = np.flatnonzero(mask[1:] != mask[:-1]) + 1
        first, last = [0] * bool(mask[:1].any()), [len(mask)] * bool(mask[-1:].any())
        edges = np.concatenate((first, inner, last)).astype(np.uint64) + np.uint64(start)
        return cls.from_arrays(edges[::2], edges[1::2])

    def __len__(self) -> int:
        return len(self.starts)

    def __bool__(self) -> bool:
        return len(self.starts) > 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.tolist(), self.ends.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spans):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.ends, other.ends)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{a:#x}-{b:#x}" for a, b in list(self)[:8])
        return f"Spans({shown}{', …' if len(self) > 8 else ''})"

    @property
    def counts(self) -> U64:
        """Return the length of each span."""
        return self.ends - self.starts

    @property
    def total(self) -> int:
        """Return how many numbers are in the set."""
        return int(self.counts.sum())

    def __contains__(self, number: int) -> bool:
        return self.overlaps(number, number + 1)

    def overlaps(self, start: int, end: int) -> bool:
        """Return True if any number of [start, end) is in the set."""
        if end <= start:
            return False
        at = int(np.searchsorted(self.ends, np.uint64(max(start, 0)), side="right"))
        return at < len(self.starts) and int(self.starts[at]) < end

    def covers(self, start: int, end: int) -> bool:
        """Return True if all of [start, end) is in the set."""
        if end <= start:
            return True
        at = int(np.searchsorted(self.ends, np.uint64(start), side="right"))
        return at < len(self.starts) and int(self.starts[at]) <= start and end <= int(self.ends[at])

    def __or__(self, other: "Spans") -> "Spans":
        if not self or not other:
            return self or other
        return Spans.from_arrays(np.concatenate((self.starts, other.starts)), np.concatenate((self.ends, other.ends)))

    def __and__(self, other: "Spans") -> "Spans":
        if not self or not other:
            return Spans()
        return self._combine(self._meeting(other), other, lambda a, b: a & b)

    def __sub__(self, other: "Spans") -> "Spans":
        if not self or not other:
            return self
        here = self._meeting(other)
        left = self._combine(here, other, lambda a, b: a & ~b)
        if here.stop - here.start == len(self):
            return left
        starts = np.concatenate((self.starts[: here.start], left.starts, self.starts[here.stop :]))
        return self._made(starts, np.concatenate((self.ends[: here.start], left.ends, self.ends[here.stop :])))

    def _meeting(self, other: "Spans") -> slice:
        """Return the part of the ranges that can meet another set: those between its first and last number."""
        if len(self) <= _FEW:
            return slice(0, len(self))
        low, high = np.searchsorted(self.ends, other.starts[0], "right"), np.searchsorted(self.starts, other.ends[-1])
        return slice(int(low), int(max(low, high)))

    def _combine(self, here: slice, other: "Spans", keep: Any) -> "Spans":
        """Cut the line at the edges of both sets where they meet, then keep the pieces that `keep(in_a, in_b)` says."""
        mine, theirs = self._edges(here), other._edges(other._meeting(self))
        cuts = np.concatenate((mine, theirs))
        cuts.sort(kind="stable")  # two arrays that are in order: one merge
        # Pieces [cuts[n], cuts[n+1]), empty where two edges meet; chosen: a mask of those to keep. Shape: (cuts - 1,).
        left = cuts[:-1]
        chosen = keep(_between(mine, left), _between(theirs, left))
        return Spans.from_arrays(left[chosen], cuts[1:][chosen])

    def _edges(self, which: slice) -> U64:
        """Return starts and ends of ranges in order. Shape: (2 * ranges,)."""
        edges = np.empty(2 * (which.stop - which.start), dtype=np.uint64)
        edges[::2], edges[1::2] = self.starts[which], self.ends[which]
        return edges

    def clip(self, start: int, end: int) -> "Spans":
        """Return the part of the set inside [start, end)."""
        low, high = np.uint64(max(start, 0)), np.uint64(max(end, 0))
        return Spans.from_arrays(np.clip(self.starts, low, high), np.clip(self.ends, low, high))

    def gaps(self, start: int, end: int) -> "Spans":
        """Return the part of [start, end) that is not in the set."""
        return Spans([(start, end)]) - self

    def scale(self, factor: int) -> "Spans":
        """Return the same set in units `factor` times smaller (pages to bytes: PAGE_SIZE)."""
        return Spans.from_arrays(self.starts * np.uint64(factor), self.ends * np.uint64(factor))

    def outward(self, unit: int) -> "Spans":
        """Return every unit, `unit` times larger, that the set touches."""
        step = np.uint64(unit)
        return Spans.from_arrays(self.starts // step, (self.ends + step - np.uint64(1)) // step)

    def inward(self, unit: int) -> "Spans":
        """Return every unit, `unit` times larger, that lies wholly in the set."""
        step = np.uint64(unit)
        return Spans.from_arrays((self.starts + step - np.uint64(1)) // step, self.ends // step)

    def first_fit(self, count: int, align: int = 1, *, top_down: bool = False) -> int | None:
        """Return the start of the first (or last) aligned place for `count` numbers inside the set, or None."""
        return first_place(self.starts, self.ends, count, align, top_down=top_down)


def first_place(starts: U64, ends: U64, count: int, align: int = 1, *, top_down: bool = False) -> int | None:
    """Return the start of the first (or last) aligned place for `count` numbers in ascending ranges, or None.

    Ranges may touch; a place lies in one of them.
    """
    step, size = np.uint64(align), np.uint64(count)
    roomy = ends >= starts + size  # before any subtraction: these are unsigned. Shape: (ranges,)
    starts, ends = starts[roomy], ends[roomy]
    # places: the lowest (or highest) aligned number of each range that has room; fits: it lies inside. (roomy ranges,)
    if top_down:
        places = (ends - size) // step * step
        fits = places >= starts
    else:
        places = (starts + step - np.uint64(1)) // step * step
        fits = places + size <= ends
    return int(places[fits][-1 if top_down else 0]) if fits.any() else None


def _between(edges: U64, numbers: U64) -> npt.NDArray[np.bool_]:
    """Return a mask of the numbers that lie at or behind a start and before its end: an odd count of edges passed."""
    found: npt.NDArray[np.bool_] = (np.searchsorted(edges, numbers, side="right") & 1).astype(bool)
    return found


def _merge(starts: U64, ends: U64) -> tuple[U64, U64]:
    """Sort ranges and join those that overlap or touch; return new arrays. Most come in order, and only touch."""
    # fresh: a mask of the ranges that begin a joined one; each ends where the range before the next fresh one ends.
    if (starts[1:] >= ends[:-1]).all():
        fresh = np.ones(len(starts), dtype=bool)
        np.not_equal(starts[1:], ends[:-1], out=fresh[1:])
        return starts[fresh], ends[np.append(fresh[1:], fresh[:1])]
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    fresh = np.concatenate(([True], starts[1:] > ends[:-1]))
    return starts[fresh], ends[np.concatenate((fresh[1:], [True]))]


def distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return each number once, in order, as numpy.unique does: that imports numpy.ma, which takes 20 ms and 3 MiB."""
    found: npt.NDArray[Any] = np.sort(values, axis=None)
    fresh = np.ones(len(found), dtype=bool)
    np.not_equal(found[1:], found[:-1], out=fresh[1:])
    return found[fresh]


def among(values: npt.NDArray[Any], some: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return a mask of the values that `some` holds, as numpy.isin does; see `distinct`."""
    ordered = np.sort(np.asarray(some, dtype=values.dtype), axis=None)
    if not len(ordered):
        return np.zeros(values.shape, dtype=bool)
    found: npt.NDArray[np.bool_] = ordered[np.searchsorted(ordered[1:], values, side="right")] == values
    return found
