"""Which frames were named, each at most once: noticed while a save or a load goes on.

A frame in two places would be two files' page (D19: the original panics). Runs come in any order and
any number, so three ways of keeping them, by what they cost:

    few, long        a set of spans
    few, short       bits in an array, looked at before they are set
    many, short      the same bits, set blindly; the count at the end tells whether one was set twice

The array is one byte for each page of RAM, backed only where it was touched.

Kernel: mm/pkram_pagetable.c (pkram_add_identity_map, whose BUG this answers)
"""

import errno

import numpy as np
import numpy.typing as npt

from pkramfs.errors import PkramError
from pkramfs.spans import U64, Spans

_FEW = 16
_SHORT = 32
"""Pages of a run on average, below which runs are marked page by page."""
_SLICE = 1 << 16


class Marks:
    """A set of frames of a RAM of `pages` pages."""

    def __init__(self, pages: int) -> None:
        self._pages, self._bits = pages, _NO_BITS
        self._low, self._high, self._marked = pages, 0, 0
        self._long = Spans()

    def add(self, pfn: U64, count: U64) -> None:
        """Name runs of frames. PkramError (EEXIST) if one is known to be named; the rest `spans` finds."""
        if not len(pfn):
            return
        total = int(count.sum())
        if total > _SHORT * len(pfn):
            spans = Spans.from_runs(pfn, count)
            together = self._long | spans
            if together.total != self._long.total + total or (len(pfn) <= _FEW and self._any(spans)):
                raise twice()
            self._long = together
            return
        self._mark(pfn, count, total)

    def _mark(self, pfn: U64, count: U64, total: int) -> None:
        if self._bits is _NO_BITS:
            self._bits = np.zeros(self._pages, dtype=bool)
        if len(pfn) <= _FEW and (self._any(spans := Spans.from_runs(pfn, count)) or spans & self._long):
            raise twice()
        self._low = min(self._low, int(pfn.min()))
        self._high = max(self._high, int((pfn + count).max()))
        self._marked += total
        if total == len(pfn):
            self._bits[pfn] = True
            return
        for first in range(0, len(pfn), _SLICE):
            part = slice(first, first + _SLICE)
            each = count[part].astype(np.int64)
            within = np.arange(int(each.sum())) - np.repeat(np.cumsum(each) - each, each)
            self._bits[np.repeat(pfn[part].astype(np.int64), each) + within] = True

    def _any(self, spans: Spans) -> bool:
        if self._bits is _NO_BITS:
            return False
        return any(bool(self._bits[start:end].any()) for start, end in spans)

    def spans(self) -> Spans:
        """Every frame that was named; PkramError (EEXIST) if one was named twice."""
        if self._bits is _NO_BITS:
            return self._long
        bits = self._bits[self._low : self._high]
        marked = Spans.from_mask(bits, self._low)
        together = marked | self._long
        if together.total != self._marked + self._long.total:
            raise twice()
        return together


_NO_BITS: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)


def twice() -> PkramError:
    """The error for a frame that two places name."""
    return PkramError("a frame was saved twice", errno.EEXIST)
