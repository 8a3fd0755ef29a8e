# SPDX-License-Identifier: GPL-2.0-or-later
"""The set of frames that a save or a load has named so far, each at most once.

A frame in two places would be a page of two files (D19: the original panics). Runs come in any order
and number, from any thread, so they are kept in the cheapest of three ways:

    few, long        a set of spans
    few, short       bits in an array, tested before they are set
    many, short      the same bits, set without a test; the count at the end tells if one was set twice

The array is one byte for each page of RAM, backed only where it was touched.

Kernel: mm/pkram_pagetable.c (pkram_add_identity_map, whose BUG this answers)
"""

import errno
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pkramfs.errors import PkramError
from pkramfs.pkram import parallel
from pkramfs.spans import U64, Spans

_FEW = 16
_SHORT = 32
"""Pages of a run on average, below which runs are marked page by page."""
_SLICE = 1 << 15


class Extent(NamedTuple):
    """The least, the most and the sum of counts of pages."""

    least: int
    most: int
    total: int

    @classmethod
    def together(cls, parts: list["Extent"]) -> "Extent":
        """Return the extent of all parts together."""
        least, most, total = zip(*parts, strict=True)
        return cls(min(least), max(most), sum(total))


class FrameSet:
    """A set of frames of a RAM of `pages` pages; frames outside of it are refused.

    `refused` means that a call was refused half-way, and that the set is useless.
    """

    def __init__(self, pages: int) -> None:
        self._pages, self._bits = pages, _NO_BITS
        self._low, self._high, self._marked = pages, 0, 0
        self._long, self.refused = Spans(), False
        self._lock = threading.Lock()

    def add(self, pfn: U64, count: U64, extent: Extent | None = None) -> int:
        """Add runs of frames, whose counts have this extent if it is known; return the number of frames.

        Raise PkramError: EINVAL for frames that are not memory, EEXIST if one is known to be in the set already.
        `spans` finds all others that were added twice.
        """
        if not len(pfn):
            return 0
        extent = extent or extent_of(count)
        total = extent.total
        if len(pfn) <= _FEW or total > _SHORT * len(pfn):
            self.expect_memory(pfn, count, extent)
            with self._lock:
                self._add_spans(Spans.from_runs(pfn, count), total, short=total <= _SHORT * len(pfn))
            return total
        with self._lock:
            self._have_bits()
        try:
            low, high = self._mark(pfn, count, extent)
        except PkramError:
            self.refused = True  # some are marked: the set is useless
            raise
        with self._lock:
            self._account(low, high, total)
        return total

    def expect_memory(self, pfn: U64, count: U64, extent: Extent) -> None:
        """Raise PkramError (EINVAL) for runs that are not within RAM; `extent` is that of their counts."""
        if not extent.least or extent.most > self._pages or not int(pfn.min()) or int(pfn.max()) >= self._pages:
            raise outside()
        if int((pfn + count).max()) > self._pages:
            raise outside()

    def _add_spans(self, spans: Spans, total: int, *, short: bool) -> None:
        """Add a set of spans; raise PkramError (EEXIST) if any of it is known."""
        if spans.total != total or (len(spans) <= _FEW and self._known(spans)):
            raise twice()
        if not short:
            together = self._long | spans
            if together.total != self._long.total + total:
                raise twice()
            self._long = together
            return
        self._have_bits()
        self._account(int(spans.starts[0]), int(spans.ends[-1]), total)
        for start, end in spans:
            self._bits[start:end] = True

    def _known(self, spans: Spans) -> bool:
        if spans & self._long:
            return True
        return len(self._bits) > 0 and any(bool(self._bits[start:end].any()) for start, end in spans)

    def _have_bits(self) -> None:
        if not len(self._bits):
            self._bits = np.zeros(self._pages, dtype=bool)

    def _account(self, low: int, high: int, total: int) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._marked += total

    def _mark(self, pfn: U64, count: U64, extent: Extent) -> tuple[int, int]:
        """Set the bits of many short runs; return the range of pages in which they lie."""

        def work(number: int) -> tuple[int, int]:
            part = slice(number * _SLICE, (number + 1) * _SLICE)
            where = pfn[part].view(np.int64)  # an index of another type would be converted first
            # where becomes one element for each page, not for each run: the run's start plus the place in it.
            if extent.most > 1 or not extent.least:
                self.expect_memory(pfn[part], count[part], extent)
                each = count[part].view(np.int64)
                where = np.repeat(where - (np.cumsum(each) - each), each) + np.arange(int(each.sum()))
            low, high = int(where.min()), int(where.max()) + 1
            if low <= 0 or high > self._pages:
                raise outside()
            self._bits[where] = True
            return low, high

        steps = -(-len(pfn) // _SLICE)
        edges = parallel.each(work, steps, threads=None if steps > 8 else 1)
        return min(low for low, _ in edges), max(high for _, high in edges)

    def spans(self) -> Spans:
        """Return all frames; raise PkramError: EEXIST if one was added twice, EINVAL if one was refused."""
        if self.refused:
            raise outside()
        if not len(self._bits):
            return self._long
        bits = self._bits[self._low : self._high]
        whole = int(np.count_nonzero(bits)) == len(bits)  # eight times as fast as a search for edges
        together = (Spans([(self._low, self._high)]) if whole else Spans.from_mask(bits, self._low)) | self._long
        if together.total != self._marked + self._long.total:
            raise twice()
        return together


_NO_BITS: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)


def extent_of(count: U64) -> Extent:
    """Return the extent of counts."""
    if count.strides == (0,):
        return Extent(int(count[0]), int(count[0]), int(count[0]) * len(count))
    most, total = int(count.max()), int(count.sum())
    return Extent(1 if most == 1 and total == len(count) else int(count.min()), most, total)


def outside() -> PkramError:
    """Return the error for a frame that is not memory."""
    return PkramError("pages to preserve are not memory", errno.EINVAL)


def twice() -> PkramError:
    """Return the error for a frame that was added twice."""
    return PkramError("a frame was saved twice", errno.EEXIST)
