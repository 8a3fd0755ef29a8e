# SPDX-License-Identifier: GPL-2.0-or-later
"""Links of scattered pages: the work of `link` for rows of single pages only.

    pages  7 341 52 9 …    ─►  | 2^0 at 7 | 2^0 at 341 | 2^0 at 52 | …       an entry each

Memory that has been in use for long looks like this, and a save of 100 GiB then has 26 million entries. So there is
no pass over them more than needed, and no array is made on the way: in the general way, the kernel clearing pages
that the allocator had given back a moment before was the first line of a profile, a fifth of all samples.

Kernel: mm/pkram.c (pkram_add_link), patches 4, 5 and 33
"""

from collections.abc import Callable

import numpy as np

from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import ENTRY_PFN_SHIFT, LINK_CAPACITY
from pkramfs.pkram.frameset import Extent, extent_of
from pkramfs.pkram.streams.link import HEAD_WORDS, I64, WRITE, Links, Plan, Rows, headers, plain_starts
from pkramfs.spans import U64

SLICE = WRITE * LINK_CAPACITY
_SHIFT = np.uint64(ENTRY_PFN_SHIFT)
_NONE: I64 = np.empty(0, dtype=np.int64)
_COLUMN: I64 = np.arange(LINK_CAPACITY)


class Bench:
    """One thread's buffers: links, and room for as many answers as they have entries."""

    def __init__(self) -> None:
        self.links = Links(WRITE)
        self.answers = np.empty(SLICE, dtype=bool)


def write(ram: Ram, blocks: Rows, take: Callable[[int], U64], generation: int, bench: Bench) -> U64:
    """Make the links of up to SLICE single pages, chained and sealed, in pages that `take(n)` gives; their pfns.

    Kernel: pkram_add_link()
    """
    where = _plan(blocks)
    pages = take(len(where.starts))
    heads = headers(pages, where, generation)
    for low in range(0, len(pages), WRITE):
        part = slice(low, low + WRITE)
        _lay_out(bench.links.words, blocks.pfn, where.starts[part], where.counts[part])
        bench.links.write(ram, pages[part], heads[part])
    return pages


def extent(count: U64, bench: Bench) -> Extent:
    """Return the extent of up to SLICE counts: in one pass where all are 1, which they mostly are here, else in two."""
    maybe = count.strides != (0,) and count[0] == count[-1] == 1
    if maybe and np.equal(count, np.uint64(1), out=bench.answers[: len(count)]).all():
        return Extent(1, 1, len(count))
    return extent_of(count)


def dense(index: U64, bench: Bench) -> bool:
    """Return True if up to SLICE indices are consecutive: they rise, and last - first is their number less one."""
    last, signed = len(index) - 1, index.view(np.int64)  # which compare faster
    if int(index[-1]) - int(index[0]) != last:
        return False
    return bool(np.greater(signed[1:], signed[:-1], out=bench.answers[:last]).all())


def _plan(blocks: Rows) -> Plan:
    """Plan where links begin: after every jump of the index, and where the link before is full."""
    index, size = blocks.index, len(blocks.index)
    jumps: I64 = np.flatnonzero(index[1:] - index[:-1] != np.uint64(1)) + 1 if not blocks.dense else _NONE
    starts = plain_starts(np.concatenate(([0], jumps, [size])), LINK_CAPACITY)
    return Plan(starts, starts, np.diff(np.append(starts, size)), index[starts])


def _lay_out(words: U64, pfn: U64, starts: I64, counts: I64) -> None:
    """Fill the entries of links."""
    number, first, last = len(starts), int(starts[0]), int(starts[-1] + counts[-1])
    rows = words[:number, HEAD_WORDS:]
    if last - first == number * LINK_CAPACITY:
        np.left_shift(pfn[first:last].reshape(number, LINK_CAPACITY), _SHIFT, out=rows)
        return
    rows[:] = 0
    rows[counts[:, None] > _COLUMN] = pfn[first:last] << _SHIFT
