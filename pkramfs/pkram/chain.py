"""Link pages read back: one stream's chain, every page checked before an entry is believed.

    head ─► link ─► link ─► link = tail      a page names the next, which is its neighbour nearly always

So a chain is followed in strides that double: compare what the next n pages say with "my neighbour",
take those that agree, go on from where they end. Only pages that belong to the node are ever looked
at, which also bounds whatever a damaged chain can make a reader do.

Entries are read 64 links at a time into the fewest runs (index, pfn, count): in the common case of
order-0 entries that continue one another that is one subtraction and one comparison.

Kernel: mm/pkram.c (pkram_remove_link, pkram_load_file_pages), patches 4, 33 and 36
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counter

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import parallel
from pkramfs.pkram.format import (
    ENTRY_FLAGS_SHIFT,
    ENTRY_HUGE,
    ENTRY_ORDER_MASK,
    ENTRY_PFN_SHIFT,
    LINK_CAPACITY,
    LINK_MAGIC,
    NEXT,
    OTHER,
)
from pkramfs.pkram.link import BATCH, HEAD_WORDS, I64, PAGE_WORDS, U8, checksums, decode, join_runs, sizes
from pkramfs.pkram.page import letters, seal_array, unseal
from pkramfs.spans import U64, Spans
from pkramfs.units import MAX_ORDER, PAGE_SHIFT

INDEX_MAX = 1 << 52
"""Page indices are below this: a byte offset has 64 bits."""
_LOW = np.uint64((1 << ENTRY_PFN_SHIFT) - 1)
_UNKNOWN = np.uint64(int(_LOW) & ~(ENTRY_ORDER_MASK | ENTRY_HUGE << ENTRY_FLAGS_SHIFT))
_PAGE_STEP = np.uint64(1 << ENTRY_PFN_SHIFT)

Runs = tuple[U64, U64, U64]


@dataclass(frozen=True)
class Chain:
    """A stream's links, in order: the page, the first index and the number of entries of each."""

    ram: Ram
    pages: U64
    index: U64
    counts: I64

    @property
    def batches(self) -> int:
        """How many steps `blocks` and `runs` have."""
        return -(-len(self.pages) // BATCH)

    def entries(self, batch: int) -> U64:
        """A copy of the entries of 64 links."""
        part = slice(batch * BATCH, (batch + 1) * BATCH)
        pages, counts = self.pages[part], self.counts[part]
        number, full = len(pages), int(counts[0])
        if (counts == full).all() and int(pages[-1]) - int(pages[0]) == number - 1 and (pages[1:] > pages[:-1]).all():
            first = int(pages[0]) * PAGE_WORDS
            whole = self.ram.u64[first : first + number * PAGE_WORDS].reshape(number, PAGE_WORDS)
            copied: U64 = whole[:, HEAD_WORDS : HEAD_WORDS + full].reshape(-1)
            return copied
        begin = np.repeat(np.cumsum(counts) - counts, counts)
        within = np.arange(int(counts.sum()), dtype=np.int64) - begin
        at = np.repeat((pages << np.uint64(PAGE_SHIFT - 3)) + np.uint64(HEAD_WORDS), counts)
        gathered: U64 = self.ram.u64[at + within.astype(np.uint64)]
        return gathered

    def blocks(self, batch: int) -> tuple[U64, U64, U8]:
        """64 links as arrays (index, pfn, order) of their entries."""
        pfn, order, _ = decode(self.entries(batch))
        return self._indices(batch, sizes(order)), pfn, order

    def _indices(self, batch: int, size: U64) -> U64:
        """The index of each entry, from its link's first and the sizes before it."""
        part = slice(batch * BATCH, (batch + 1) * BATCH)
        counts = self.counts[part]
        before = np.cumsum(size) - size
        firsts = np.cumsum(counts) - counts
        found: U64 = np.repeat(self.index[part] - before[firsts], counts) + before
        return found

    def runs(self, batch: int) -> Runs:
        """64 links as the fewest runs (index, pfn, count); FormatError for an entry that cannot be."""
        entries = self.entries(batch)
        steady = entries[1:] - entries[:-1] == _PAGE_STEP
        low = int(entries[0] & _LOW)
        if low == 0 and self._one_stretch(batch, len(entries)) and steady.all():
            first, size = int(entries[0]) >> ENTRY_PFN_SHIFT, len(entries)
            if first > 0 and first + size <= self.ram.pages:
                return self.index[batch * BATCH :][:1], np.array([first], np.uint64), np.array([size], np.uint64)
        pfn, order, _ = decode(entries)
        self._check(batch, entries, pfn, order)
        size_of = sizes(order)
        return join_runs(self._indices(batch, size_of), pfn, size_of)

    def _one_stretch(self, batch: int, total: int) -> bool:
        """Whether these links' indices continue one another if all entries are single pages."""
        part = slice(batch * BATCH, (batch + 1) * BATCH)
        index, counts = self.index[part], self.counts[part]
        return bool((index[1:] == index[:-1] + counts[:-1].astype(np.uint64)).all())

    def _check(self, batch: int, entries: U64, pfn: U64, order: U8) -> None:
        size = np.uint64(1) << np.minimum(order, MAX_ORDER).astype(np.uint64)
        bad = (order > MAX_ORDER) | (pfn == 0) | ((pfn & (size - np.uint64(1))) != 0)
        bad |= (entries & _UNKNOWN != 0) | (pfn + size > np.uint64(self.ram.pages))
        if not bad.any():
            return
        place = int(np.flatnonzero(bad)[0])
        part = slice(batch * BATCH, (batch + 1) * BATCH)
        link = int(np.searchsorted(np.cumsum(self.counts[part]), place, side="right"))
        raise FormatError(
            "Link",
            "entry",
            pfn=int(self.pages[part][link]),
            found=f"{int(entries[place]):#x}",
            expected="an aligned block of order 0 to 18 inside RAM",
        )

    def all_runs(self) -> Runs:
        """The whole stream as the fewest runs by index, on all CPUs; FormatError for what cannot be."""
        found = parallel.each(self.runs, self.batches, threads=None if self.batches >= 8 else 1)
        if not found:
            empty = np.empty(0, dtype=np.uint64)
            return empty, empty, empty
        index, pfn, count = (np.concatenate(column) for column in zip(*found, strict=True))
        if (index[1:] < index[:-1]).any():
            by_index = np.argsort(index, kind="stable")
            index, pfn, count = index[by_index], pfn[by_index], count[by_index]
        if len(index) and int(index[-1]) + int(count[-1]) > INDEX_MAX:
            raise self._wrong("index", f"{int(index[-1]):#x}", f"below {INDEX_MAX:#x}")
        if (index[1:] < index[:-1] + count[:-1]).any():
            raise self._wrong("index", "an index with two pages", "one page each")
        return join_runs(index, pfn, count)

    def _wrong(self, field: str, found: object, expected: object) -> FormatError:
        return FormatError("Link", field, pfn=int(self.pages[0]), found=found, expected=expected)

    def share(self) -> Iterator[tuple[U64, U64, U8]]:
        """Batches of (index, pfn, order), in order; several threads may take from one such iterator."""
        return _Shared(self)


class _Shared(Iterator[tuple[U64, U64, U8]]):
    def __init__(self, chain: Chain) -> None:
        self._chain, self._next = chain, counter()

    def __next__(self) -> tuple[U64, U64, U8]:
        batch = next(self._next)  # one step of the interpreter: no two threads get the same
        if batch >= self._chain.batches:
            raise StopIteration
        return self._chain.blocks(batch)


def read(
    ram: Ram, owner: int, head: tuple[str, int], tail: int, links: int, *, generation: int, allowed: Spans
) -> Chain:
    """Follow and check the links of a stream of object `owner`; they must be pages of `allowed`.

    `head` is the name and the value of the object's field, `tail` and `links` what the end must agree with.
    """
    if links > allowed.total:
        raise FormatError(
            "Object", "links", pfn=owner, found=links, expected=f"at most the node's {allowed.total} pages"
        )
    pages = _follow(ram, owner, head, links, allowed)
    last = int(pages[-1]) if len(pages) else 0
    if len(pages) != links or last != tail:
        raise FormatError(
            "Object", "tail", pfn=owner, found=f"{len(pages)} links up to {last:x}", expected=f"{links} up to {tail:x}"
        )
    at = pages << np.uint64(PAGE_SHIFT - 3)
    _expect(ram, pages, "magic", ram.u64[at], np.uint64(LINK_MAGIC))
    _check_sums(ram, pages)
    _expect(ram, pages, "other", ram.u64[at + np.uint64(3)], _empty_words(pages))
    _expect(ram, pages, "generation", ram.u64[at + np.uint64(4)], np.uint64(generation))
    _expect(ram, pages, "zero", ram.u64[at + np.uint64(7)], np.uint64(0))
    index, counts = ram.u64[at + np.uint64(5)], ram.u64[at + np.uint64(6)]
    bad = (counts == 0) | (counts > LINK_CAPACITY) | (index > INDEX_MAX)
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        field, found = ("index", index) if index[place] > INDEX_MAX else ("count", counts)
        expected = f"1 to {LINK_CAPACITY} and no flags" if field == "count" else f"below {INDEX_MAX:#x}"
        raise FormatError("Link", field, pfn=int(pages[place]), found=int(found[place]), expected=expected)
    return Chain(ram, pages, index, counts.astype(np.int64))


def _empty_words(pages: U64) -> U64:
    """The published word "none" of each page's second word."""
    return seal_array(np.zeros_like(pages), (pages << np.uint64(PAGE_SHIFT)) + np.uint64(OTHER))


def _expect(ram: Ram, pages: U64, field: str, found: U64, expected: U64 | np.uint64) -> None:
    wrong = found != expected
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        value = int(expected[place]) if isinstance(expected, np.ndarray) else int(expected)
        show = letters if field == "magic" else hex
        raise FormatError("Link", field, pfn=int(pages[place]), found=show(int(found[place])), expected=show(value))


def _check_sums(ram: Ram, pages: U64) -> None:
    found = ram.u64[(pages << np.uint64(PAGE_SHIFT - 3)) + np.uint64(1)]
    _expect(ram, pages, "checksum", found, checksums(ram, pages))


def _follow(ram: Ram, owner: int, head: tuple[str, int], links: int, allowed: Spans) -> U64:
    """The pages of a chain, at most `links` of them, none twice."""
    parts: list[U64] = []
    record, (field, pfn), holder = "Object", head, owner
    total, stride = 0, 8
    while pfn:
        end = _end_of_run(allowed, pfn, (record, field, holder))
        if total >= links:
            raise FormatError(record, field, pfn=holder, found=f"pfn {pfn:x}", expected=f"the end after {links} links")
        size = min(stride, links - total, end - pfn)
        run = np.arange(pfn, pfn + size, dtype=np.uint64)
        words = ram.u64[pfn * PAGE_WORDS + NEXT // 8 : (pfn + size) * PAGE_WORDS : PAGE_WORDS]
        steady = words == seal_array(run + np.uint64(1), (run << np.uint64(PAGE_SHIFT)) + np.uint64(NEXT))
        taken = size if steady.all() else int(np.argmin(steady)) + 1
        stride = min(stride * 2, 1 << 16) if taken == size else 8
        parts.append(run[:taken])
        total, record, field, holder = total + taken, "Link", "next", pfn + taken - 1
        pfn = unseal(int(words[taken - 1]), (holder << PAGE_SHIFT) + NEXT, "Link", "next")
    pages = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
    if len(np.unique(pages)) != len(pages):
        raise FormatError("Link", "next", pfn=int(pages[-1]), found="a link met before", expected="the end")
    return pages


def _end_of_run(allowed: Spans, pfn: int, place: tuple[str, str, int]) -> int:
    """Where the node's pages end that hold page `pfn`; FormatError, naming the place that names it, if none do."""
    at = int(np.searchsorted(allowed.ends, np.uint64(pfn), side="right"))
    if at == len(allowed) or int(allowed.starts[at]) > pfn:
        record, field, holder = place
        raise FormatError(
            record, field, pfn=holder, found=f"pfn {pfn:x}", expected="a page of the node's page table"
        )
    return int(allowed.ends[at])
