"""Link pages read back: one stream's chain, every page checked before an entry is believed.

    head ─► link ─► link ─► link = tail      a page names the next, which is its neighbour nearly always

So a chain is followed in strides that double: compare what the next n pages say with "my neighbour",
take those that agree, go on from where they end. Only pages that belong to the node are ever looked
at, which also bounds whatever a damaged chain can make a reader do.

Entries are read 64 links at a time, right after the checksum has brought them into the cache, into the
fewest runs (index, pfn, count). Where a stream is one page here and one page there, the runs are as
many as the entries, and are put straight into the arrays that are handed out.

Kernel: mm/pkram.c (pkram_remove_link, pkram_load_file_pages), patches 4, 33 and 36
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counter

import numpy as np
import numpy.typing as npt
import xxhash

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import parallel
from pkramfs.pkram.format import (
    COVERED,
    ENTRY_FLAGS_SHIFT,
    ENTRY_HUGE,
    ENTRY_ORDER_MASK,
    ENTRY_PFN_SHIFT,
    LINK_CAPACITY,
    LINK_MAGIC,
    NEXT,
    OTHER,
)
from pkramfs.pkram.link import BATCH, HEAD_WORDS, I64, PAGE_WORDS, U8, decode, join_runs, sizes
from pkramfs.pkram.page import letters, seal_array, unseal
from pkramfs.spans import U64, Spans
from pkramfs.units import MAX_ORDER, PAGE_SHIFT, PAGE_SIZE

INDEX_MAX = 1 << 52
"""Page indices are below this: a byte offset has 64 bits."""
_LOW = np.uint64((1 << ENTRY_PFN_SHIFT) - 1)
_UNKNOWN = np.uint64(int(_LOW) & ~(ENTRY_ORDER_MASK | ENTRY_HUGE << ENTRY_FLAGS_SHIFT))
_SHIFT = np.uint64(ENTRY_PFN_SHIFT)
_STEP = np.uint64(1 << ENTRY_PFN_SHIFT)
_FEWER = 8
"""Runs are copied once more at the end if they are fewer than the entries by this factor."""
_SLICE = 1 << 16

Runs = tuple[U64, U64, U64]


class _Workbench(threading.local):
    """One thread's copy of a batch: fresh arrays would be fresh memory every time, which costs more than the work."""

    def __init__(self) -> None:
        self.pages = np.empty((BATCH, PAGE_WORDS), dtype=np.uint64)
        self.rises = np.empty(BATCH * PAGE_WORDS, dtype=np.uint64)
        self.steady = np.empty((BATCH, PAGE_WORDS), dtype=bool)
        whole = memoryview(self.pages).cast("B")  # type: ignore[arg-type]
        self.covered = [whole[at + COVERED : at + PAGE_SIZE] for at in range(0, len(whole), PAGE_SIZE)]


_bench = _Workbench()


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
        table = self._table(batch)
        if table is not None:
            return table.reshape(-1)
        pages, counts = self.pages[_part(batch)], self.counts[_part(batch)]
        begin = np.repeat(np.cumsum(counts) - counts, counts)
        within = np.arange(int(counts.sum()), dtype=np.int64) - begin
        at = np.repeat((pages << np.uint64(PAGE_SHIFT - 3)) + np.uint64(HEAD_WORDS), counts)
        gathered: U64 = self.ram.u64[at + within.astype(np.uint64)]
        return gathered

    def _table(self, batch: int) -> U64 | None:
        """The entries where they lie, a row for each link, if links are neighbours and equally full."""
        pages, counts = self.pages[_part(batch)], self.counts[_part(batch)]
        number, full, first = len(pages), int(counts[0]), int(pages[0])
        if int(pages[-1]) - first != number - 1 or (pages[1:] < pages[:-1]).any() or (counts != full).any():
            return None
        whole = self.ram.u64[first * PAGE_WORDS : (first + number) * PAGE_WORDS].reshape(number, PAGE_WORDS)
        rows: U64 = whole[:, HEAD_WORDS : HEAD_WORDS + full]
        return rows

    def blocks(self, batch: int) -> tuple[U64, U64, U8]:
        """64 links as arrays (index, pfn, order) of their entries."""
        pfn, order, _ = decode(self.entries(batch))
        return self._indices(batch, sizes(order)), pfn, order

    def _indices(self, batch: int, size: U64) -> U64:
        """The index of each entry, from its link's first and the sizes before it."""
        counts = self.counts[_part(batch)]
        before = np.cumsum(size) - size
        firsts = np.cumsum(counts) - counts
        found: U64 = np.repeat(self.index[_part(batch)] - before[firsts], counts) + before
        return found

    def steady_run(self, batch: int) -> Runs | None:
        """Check 64 links, and make one run of them if they are nothing but single pages in a row.

        Works on a copy that stays in the cache. FormatError for a wrong checksum.
        """
        pages, counts, index = self.pages[_part(batch)], self.counts[_part(batch)], self.index[_part(batch)]
        copy, number, full = _bench.pages[: len(pages)], len(pages), int(counts[0])
        np.take(self.ram.u64.reshape(-1, PAGE_WORDS), pages.view(np.int64), axis=0, out=copy, mode="clip")
        digest = xxhash.xxh3_64_intdigest
        sums = [digest(view, pfn) for view, pfn in zip(_bench.covered, pages.tolist(), strict=False)]
        _expect(pages, "checksum", copy[:, 1], np.array(sums, dtype=np.uint64))
        first = copy[:, HEAD_WORDS]
        rise = np.arange(0, number * full, full, dtype=np.uint64)
        if int(first[0] & _LOW) or (first - first[0] != rise << _SHIFT).any() or (index - index[0] != rise).any():
            return None
        if (counts[:-1] != full).any() or counts[-1] > full:
            return None
        flat, rises, steady = copy.reshape(-1), _bench.rises[: copy.size], _bench.steady[:number]
        np.subtract(flat[1:], flat[:-1], out=rises[1:])
        np.equal(rises.reshape(copy.shape), _STEP, out=steady)
        begin, last = HEAD_WORDS + 1, HEAD_WORDS + int(counts[-1])
        if not steady[:-1, begin : HEAD_WORDS + full].all() or not steady[-1, begin:last].all():
            return None
        pfn, size = first[:1] >> _SHIFT, int(counts.sum())
        if not 0 < int(pfn[0]) <= self.ram.pages - size:
            return None  # `runs` says what is wrong
        return index[:1], pfn, np.array([size], dtype=np.uint64)

    def runs(self, batch: int) -> Runs:
        """64 links as the fewest runs (index, pfn, count); FormatError for an entry that cannot be."""
        entries = self.entries(batch)
        if int(np.bitwise_or.reduce(entries) & _LOW) == 0:
            return self._single_runs(batch, entries)
        pfn, order, _ = decode(entries)
        size = np.uint64(1) << np.minimum(order, MAX_ORDER).astype(np.uint64)
        bad = (order > MAX_ORDER) | (pfn == 0) | ((pfn & (size - np.uint64(1))) != 0)
        bad |= (entries & _UNKNOWN != 0) | (pfn + size > np.uint64(self.ram.pages))
        if bad.any():
            raise self._bad_entry(batch, entries, bad)
        return join_runs(self._indices(batch, size), pfn, size)

    def _single_runs(self, batch: int, entries: U64) -> Runs:
        """`runs` where all entries are single pages."""
        counts, number = self.counts[_part(batch)], len(entries)
        firsts = np.cumsum(counts) - counts
        base: U64 = self.index[_part(batch)] - firsts.astype(np.uint64)  # index of an entry less its position
        fresh = np.empty(number, dtype=bool)
        fresh[0] = True
        np.not_equal(entries[1:] - entries[:-1], _STEP, out=fresh[1:])
        fresh[firsts[1:]] |= base[1:] != base[:-1]
        index: U64
        count: U64
        if fresh.all():
            index = np.arange(number, dtype=np.uint64)
            index += np.repeat(base, counts)
            pfn, count = entries >> _SHIFT, np.ones(number, dtype=np.uint64)
        else:
            at = np.flatnonzero(fresh)
            index = base[np.searchsorted(firsts, at, side="right") - 1] + at.astype(np.uint64)
            pfn, count = entries[at] >> _SHIFT, np.diff(np.append(at, number)).astype(np.uint64)
        if int(pfn.min()) == 0 or int((pfn + count).max()) > self.ram.pages:
            every = entries >> _SHIFT
            raise self._bad_entry(batch, entries, (every == 0) | (every >= np.uint64(self.ram.pages)))
        return index, pfn, count

    def _bad_entry(self, batch: int, entries: U64, bad: npt.NDArray[np.bool_]) -> FormatError:
        place = int(np.flatnonzero(bad)[0])
        link = int(np.searchsorted(np.cumsum(self.counts[_part(batch)]), place, side="right"))
        return FormatError(
            "Link",
            "entry",
            pfn=int(self.pages[_part(batch)][link]),
            found=f"{int(entries[place]):#x}",
            expected="an aligned block of order 0 to 18 inside RAM",
        )

    def all_runs(self) -> Runs:
        """The whole stream as the fewest runs by index, on all CPUs; FormatError for what cannot be.

        This is where checksums and entries are checked.
        """
        # Checksums hold the interpreter, so threads would only be in each other's way.
        found = [self.steady_run(batch) for batch in range(self.batches)]
        index, pfn, count = self._together(found)
        order, apart = _order(index, pfn, count)
        if not order:
            by_index = np.argsort(index, kind="stable")
            index, pfn, count = index[by_index], pfn[by_index], count[by_index]
            _, apart = _order(index, pfn, count)
        if len(index) and int(index[-1]) + int(count[-1]) > INDEX_MAX:
            raise self._wrong("index", f"{int(index[-1]):#x}", f"below {INDEX_MAX:#x}")
        if (index[1:] < index[:-1] + count[:-1]).any() if not apart else _overlap(index, count):
            raise self._wrong("index", "an index with two pages", "one page each")
        return (index, pfn, count) if apart else join_runs(index, pfn, count)

    def _together(self, found: list[Runs | None]) -> Runs:
        """Runs of all batches, by link; those that are not one run are made by all CPUs."""
        left = [batch for batch, runs in enumerate(found) if runs is None]
        gather, threads = _Gather(self.counts if left else self.counts[:0]), None if len(left) >= 8 else 1

        def work(number: int) -> Runs:
            return gather.keep(left[number], self.runs(left[number]))

        made = parallel.each(work, len(left), threads=threads)
        for batch, runs in zip(left, made, strict=True):
            found[batch] = runs
        return gather.together([runs for runs in found if runs is not None])

    def _wrong(self, field: str, found: object, expected: object) -> FormatError:
        return FormatError("Link", field, pfn=int(self.pages[0]), found=found, expected=expected)

    def share(self) -> Iterator[tuple[U64, U64, U8]]:
        """Batches of (index, pfn, order), in order; several threads may take from one such iterator."""
        return _Shared(self)


def _part(batch: int) -> slice:
    return slice(batch * BATCH, (batch + 1) * BATCH)


def _order(index: U64, pfn: U64, count: U64) -> tuple[bool, bool]:
    """Whether runs come by index, and whether none continues the one before; in slices that stay in the cache."""

    def look(number: int) -> tuple[bool, bool]:
        low, high = number * _SLICE, min((number + 1) * _SLICE, len(index) - 1)
        before, after = slice(low, high), slice(low + 1, high + 1)
        ends = index[before] + count[before]
        joined = (index[after] == ends) & (pfn[after] == pfn[before] + count[before])
        return bool((index[after] >= index[before]).all()), not joined.any()

    steps = -(-max(len(index) - 1, 0) // _SLICE)
    found = parallel.each(look, steps, threads=None if steps > 8 else 1)
    return all(order for order, _ in found), all(apart for _, apart in found)


def _overlap(index: U64, count: U64) -> bool:
    """Whether a run begins before the one in front of it ends; in slices that stay in the cache."""
    for low in range(0, len(index) - 1, _SLICE):
        high = min(low + _SLICE, len(index) - 1)
        if (index[low + 1 : high + 1] < index[low:high] + count[low:high]).any():
            return True
    return False


class _Gather:
    """Runs of all batches, in the arrays that are handed out in the end if there is nothing to join."""

    def __init__(self, counts: I64) -> None:
        ends = np.cumsum(counts)
        self._edges = [0, *ends[BATCH - 1 :: BATCH].tolist()]
        self._total = int(ends[-1]) if len(ends) else 0
        if len(counts) % BATCH:
            self._edges.append(self._total)
        # Virtual memory; only what is written becomes real.
        self._columns = tuple(np.empty(self._total, dtype=np.uint64) for _ in range(3))

    def keep(self, batch: int, runs: Runs) -> Runs:
        """Copy many runs to their place; few are kept as they are."""
        low, high = self._edges[batch], self._edges[batch + 1]
        size = len(runs[0])
        if size * _FEWER < high - low:
            return runs
        for column, part in zip(self._columns, runs, strict=True):
            column[low : low + size] = part
        first, second, third = (column[low : low + size] for column in self._columns)
        return first, second, third

    def together(self, parts: list[Runs]) -> Runs:
        """All runs, in the order of links."""
        if sum(len(index) for index, _, _ in parts) == self._total:  # so every batch is in its place
            index, pfn, count = self._columns
            if all(part.base is index for part, _, _ in parts):
                return index, pfn, count
        index, pfn, count = (np.concatenate(column) for column in zip(*parts, strict=True))
        return index, pfn, count


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
    """Follow the links of a stream of object `owner` and check their headers; they must be pages of `allowed`.

    `head` is the name and the value of the object's field, `tail` and `links` what the end must agree
    with. Checksums and entries are checked by `Chain.all_runs`.
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
    heads = ram.u64[at[:, None] + np.arange(HEAD_WORDS, dtype=np.uint64)]
    magic, _, _, other, born, index, counts, zero = (np.ascontiguousarray(column) for column in heads.T)
    _expect(pages, "magic", magic, np.uint64(LINK_MAGIC))
    _expect(pages, "other", other, seal_array(np.zeros_like(pages), (at << np.uint64(3)) + np.uint64(OTHER)))
    _expect(pages, "generation", born, np.uint64(generation))
    _expect(pages, "zero", zero, np.uint64(0))
    _expect_at_most(pages, "count", counts - np.uint64(1), LINK_CAPACITY - 1, f"1 to {LINK_CAPACITY} and no flags")
    _expect_at_most(pages, "index", index, INDEX_MAX, f"up to {INDEX_MAX:#x}")
    return Chain(ram, pages, index, counts.astype(np.int64))


def _expect(pages: U64, field: str, found: U64, expected: U64 | np.uint64) -> None:
    wrong = found != expected
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        value = int(expected[place]) if isinstance(expected, np.ndarray) else int(expected)
        show = letters if field == "magic" else hex
        raise FormatError("Link", field, pfn=int(pages[place]), found=show(int(found[place])), expected=show(value))


def _expect_at_most(pages: U64, field: str, found: U64, most: int, expected: str) -> None:
    wrong = found > np.uint64(most)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise FormatError("Link", field, pfn=int(pages[place]), found=hex(int(found[place])), expected=expected)


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
    if not (pages[1:] > pages[:-1]).all() and len(np.unique(pages)) != len(pages):
        raise FormatError("Link", "next", pfn=int(pages[-1]), found="a link met before", expected="the end")
    return pages


def _end_of_run(allowed: Spans, pfn: int, place: tuple[str, str, int]) -> int:
    """Where the node's pages end that hold page `pfn`; FormatError, naming the place that names it, if none do."""
    at = int(np.searchsorted(allowed.ends, np.uint64(pfn), side="right"))
    if at == len(allowed) or int(allowed.starts[at]) > pfn:
        record, field, holder = place
        raise FormatError(record, field, pfn=holder, found=f"pfn {pfn:x}", expected="a page of the node's page table")
    return int(allowed.ends[at])
