# SPDX-License-Identifier: GPL-2.0-or-later
"""The frames that hold a file's pages: runs of consecutive pages in consecutive frames.

    file page   0   1   2   3   4   5   6   7   8
                |---run 0---|   hole    |--run 1--|
    frames      340 341 342             900 901

A run is three numbers, (index, pfn, count), laid one after the other in a C array: 24 bytes, no
Python objects, and inserting or removing a run is one slice operation. A file that was written
from start to end is usually one run whatever its size. Where a file has many runs they are cut
into *leaves* of at most LEAF_RUNS, so that an insertion moves one leaf and not the whole file:

    firsts         [ 5000,      9000 ]          first index of every leaf but the first
    leaves   [ .. ][ 5000 .. ][ 9000 .. ]

Runs never overlap and are in order of index; neighbours that continue each other are joined
(inside a leaf). A hole is simply no run. Nothing here touches RAM or counts limits.

The host has memory for every frame of a map, so that a load or a store cannot fail. For a restored map
this is not known (an image of RAM may have been copied with its zeros made holes).
`backed` has the pieces of the file that were checked since, and is None if no check is needed.

Kernel: mm/filemap.c, include/linux/xarray.h; mm/shmem.c (shmem_insert_page, patches 23 and 36-38)
"""

from array import array
from bisect import bisect_right, insort
from collections.abc import Iterator

Run = tuple[int, int, int]
"""(file page index, first pfn, pages)"""

LEAF_RUNS = 1024
RUN_BYTES = 24
END = 1 << 62
"""An index beyond every page of every file."""
_NOTHING: set[int] = set()


class PageMap:
    """The runs of one file: `count` pages in `runs` runs."""

    __slots__ = ("backed", "count", "firsts", "leaves", "runs")

    def __init__(self, raw: bytes | memoryview = b"", count: int = 0) -> None:
        """Make an empty map, or that of a restored file from the bytes of its runs (as `leaves` hold them)."""
        self.backed: set[int] | None = _NOTHING if count else None
        self.count, self.runs = count, len(raw) // RUN_BYTES
        self.firsts: list[int] | tuple[()] = ()
        if not raw:
            self.leaves: list[array[int]] = [array("q")]
        elif self.runs <= LEAF_RUNS:
            self.leaves = [array("q", bytes(raw))]
        else:
            step = LEAF_RUNS // 2 * RUN_BYTES
            self.leaves = [array("q", bytes(raw[at : at + step])) for at in range(0, len(raw), step)]
            self.firsts = [leaf[0] for leaf in self.leaves[1:]]

    def __iter__(self) -> Iterator[Run]:
        return iter(self.between(0, END))

    def between(self, first: int, last: int) -> list[Run]:
        """Return the runs in [first, last), cut to it."""
        found: list[Run] = []
        for leaf in self.leaves[bisect_right(self.firsts, first) :] if self.firsts else self.leaves:
            for at in range(_locate(leaf, first), len(leaf), 3):
                index, pfn, count = leaf[at : at + 3]
                if index >= last:
                    return found
                if index < first:
                    pfn, count, index = pfn + first - index, count - (first - index), first
                if index + count > last:
                    count = last - index
                found.append((index, pfn, count))
        return found

    def holes(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the (index, count) of [first, last) that no run covers."""
        found = []
        for index, _, count in self.between(first, last):
            if index > first:
                found.append((first, index - first))
            first = index + count
        if first < last:
            found.append((first, last - first))
        return found

    def insert(self, index: int, pfn: int, count: int) -> None:
        """Put a run where there is a hole."""
        self.count += count
        number = bisect_right(self.firsts, index) if self.firsts else 0
        leaf = self.leaves[number]
        at = _locate(leaf, index)
        if at and leaf[at - 3] + leaf[at - 1] == index and leaf[at - 2] + leaf[at - 1] == pfn:
            leaf[at - 1] += count
            self._join_next(leaf, at)
            return
        if at < len(leaf) and index + count == leaf[at] and pfn + count == leaf[at + 1]:
            leaf[at], leaf[at + 1], leaf[at + 2] = index, pfn, leaf[at + 2] + count
            return
        leaf[at:at] = array("q", (index, pfn, count))
        self.runs += 1
        if len(leaf) > LEAF_RUNS * 3:
            self._split(number)

    def remove(self, first: int, last: int = END) -> list[tuple[int, int]]:
        """Make [first, last) a hole; returns the (pfn, count) that were there."""
        if first >= last:
            return []
        if not first and last == END and not self.firsts:  # the usual case: all pages of a file are removed
            leaf = self.leaves[0]
            gone = list(zip(leaf[1::3], leaf[2::3], strict=True))
            del leaf[:]
            self.count = self.runs = 0
            return gone
        low = high = 0
        if self.firsts:
            low, high = bisect_right(self.firsts, first), bisect_right(self.firsts, last)
        gone = []
        for number in range(low, high + 1):
            leaf = self.leaves[number]
            self.runs -= len(leaf) // 3
            gone += _cut(leaf, first, last)
            self.runs += len(leaf) // 3
        if high > low or (self.firsts and not self.leaves[low]):
            self._drop_empty()
        elif len(self.leaves[low]) > LEAF_RUNS * 3:
            self._split(low)
        elif low:
            self.firsts[low - 1] = self.leaves[low][0]  # type: ignore[index]
        self.count -= sum(count for _, count in gone)
        return gone

    def _join_next(self, leaf: "array[int]", at: int) -> None:
        """Join the run before `at` with the one there, if the latter continues it."""
        if at < len(leaf):
            index, pfn, count = leaf[at - 3 : at]
            if index + count == leaf[at] and pfn + count == leaf[at + 1]:
                leaf[at - 1] += leaf[at + 2]
                del leaf[at : at + 3]
                self.runs -= 1

    def _split(self, number: int) -> None:
        leaf = self.leaves[number]
        middle = len(leaf) // 6 * 3
        self.leaves.insert(number + 1, leaf[middle:])
        if not self.firsts:
            self.firsts = []
        insort(self.firsts, leaf[middle])
        del leaf[middle:]

    def _drop_empty(self) -> None:
        self.leaves = [leaf for leaf in self.leaves if leaf] or [array("q")]
        self.firsts = [leaf[0] for leaf in self.leaves[1:]] or ()


def _locate(leaf: "array[int]", index: int) -> int:
    """Return where in the leaf the first run begins that ends beyond `index`; its length if none does."""
    high = len(leaf)
    if not high or leaf[high - 3] + leaf[high - 1] <= index:
        return high  # beyond the last run, where files grow
    low, high = 0, high // 3 - 1
    while low < high:
        middle = (low + high) >> 1
        at = middle * 3
        if leaf[at] + leaf[at + 2] <= index:
            low = middle + 1
        else:
            high = middle
    return low * 3


def _cut(leaf: "array[int]", first: int, last: int) -> list[tuple[int, int]]:
    """Remove [first, last) from one leaf; returns the (pfn, count) that were there."""
    start = at = _locate(leaf, first)
    gone: list[tuple[int, int]] = []
    kept: list[int] = []
    while at < len(leaf) and leaf[at] < last:
        index, pfn, count = leaf[at : at + 3]
        low, high = max(index, first), min(index + count, last)
        if low > index:
            kept += (index, pfn, low - index)
        gone.append((pfn + low - index, high - low))
        if high < index + count:
            kept += (high, pfn + high - index, index + count - high)
        at += 3
    leaf[start:at] = array("q", kept)
    return gone
