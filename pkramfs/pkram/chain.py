"""Link pages read back: one stream's chain, every page checked before an entry is believed.

    head ─► link ─► link ─► link = tail      a page names the next, which is its neighbour nearly always

So a chain is followed in strides that double: compare what the next n pages say with "my neighbour",
take those that agree, go on from where they end. Only pages that belong to the node are ever looked
at, which also bounds whatever a damaged chain can make a reader do.

Entries are read 64 links at a time, into the fewest runs (index, pfn, count). Whatever has to be known
of them is found while they are in the cache, for at 100 GiB each further pass over all of them costs
as much as a load may take. Where a stream is one page here and one page there, the runs are as many as
the entries, are made by all CPUs, and are put straight into the arrays that are handed out.

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
_PAGES = 1 << 11
"""Links whose page tables one thread fills at once: following a chain is mostly faults."""
_ONE = np.uint64(1)

Runs = tuple[U64, U64, U64]
_NONE: Runs = (np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64))


class _Workbench(threading.local):
    """One thread's results: fresh arrays would be fresh memory every time, which costs more than the work."""

    def __init__(self) -> None:
        self.rises = np.empty((BATCH, PAGE_WORDS), dtype=np.uint64)
        self.steady = np.empty((BATCH, PAGE_WORDS), dtype=bool)


_bench = _Workbench()


@dataclass(frozen=True)
class Chain:
    """A stream's links, in order: the page, its checksum, the first index and the number of entries of each."""

    ram: Ram
    pages: U64
    sums: U64
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
        whole, counts = self._neighbours(batch), self.counts[_part(batch)]
        if whole is None or (counts != counts[0]).any():
            return None
        rows: U64 = whole[:, HEAD_WORDS : HEAD_WORDS + int(counts[0])]
        return rows

    def _neighbours(self, batch: int) -> U64 | None:
        """64 links where they lie, a row for each, if each is the next page of memory."""
        pages = self.pages[_part(batch)]
        number, first = len(pages), int(pages[0])
        if int(pages[-1]) - first != number - 1 or (pages[1:] < pages[:-1]).any():
            return None
        whole: U64 = self.ram.u64[first * PAGE_WORDS : (first + number) * PAGE_WORDS].reshape(number, PAGE_WORDS)
        return whole

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

    def check_sums(self, batch: int) -> None:
        """FormatError for a wrong checksum among 64 links."""
        pages, digest, memory = self.pages[_part(batch)], xxhash.xxh3_64_intdigest, self.ram.bytes
        sums = [
            digest(memory[(pfn << PAGE_SHIFT) + COVERED : (pfn << PAGE_SHIFT) + PAGE_SIZE], pfn)
            for pfn in pages.tolist()
        ]
        _expect(pages, "checksum", self.sums[_part(batch)], np.array(sums, dtype=np.uint64))

    def steady_run(self, batch: int) -> Runs | None:
        """64 links as one run if they are nothing but single pages in a row.

        Differences are taken over whole pages, heads and all, and heads left out of the answer: numpy is four times
        as fast on memory without gaps.
        """
        whole, counts, index = self._neighbours(batch), self.counts[_part(batch)], self.index[_part(batch)]
        if whole is None:
            return None
        number, full, size, first = len(counts), int(counts[0]), int(counts.sum()), whole[:, HEAD_WORDS]
        begin = int(first[0])
        if begin & int(_LOW) or not 0 < begin >> ENTRY_PFN_SHIFT <= self.ram.pages - size:
            return None  # `runs` says what is wrong
        before = np.arange(0, number * full, full, dtype=np.uint64)
        if (first - first[0] != before << _SHIFT).any() or (index - index[0] != before).any():
            return None
        if (counts[:-1] != full).any() or counts[-1] > full:
            return None
        flat, rises, steady = whole.reshape(-1), _bench.rises.reshape(-1)[: whole.size], _bench.steady[:number]
        np.subtract(flat[1:], flat[:-1], out=rises[1:])
        np.equal(rises, _STEP, out=steady.reshape(-1))
        steady[:, : HEAD_WORDS + 1], steady[:, HEAD_WORDS + full :] = True, True
        steady[-1, HEAD_WORDS + int(counts[-1]) :] = True
        if not steady.all():
            return None
        return index[:1], first[:1] >> _SHIFT, np.array([size], dtype=np.uint64)

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
            pfn, count = entries >> _SHIFT, np.broadcast_to(_ONE, number)
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
        if not self.batches:
            return _NONE
        gather, found = self._all_batches()
        parts = [runs for runs, _ in found]
        index, pfn, count = gather.together(parts)
        ordered = all(order for _, order in found) and _in_order(_edges(parts))
        if not ordered:
            by_index = np.argsort(index, kind="stable")
            index, pfn, count = index[by_index], pfn[by_index], count[by_index]
            if not _in_order((index, pfn, count)):
                raise self._wrong("index", "an index with two pages", "one page each")
        if int(index[-1]) + int(count[-1]) > INDEX_MAX:
            raise self._wrong("index", f"{int(index[-1]):#x}", f"below {INDEX_MAX:#x}")
        if ordered and not _continued(_edges(parts)):
            return index, pfn, count
        return join_runs(index, pfn, count)

    def _all_batches(self) -> tuple["_Gather", list[tuple[Runs, bool]]]:
        """The runs of each batch, and whether they are in order; what is not one run is made by all CPUs."""
        found: list[tuple[Runs, bool]] = []
        left: list[int] = []
        for batch in range(self.batches):  # checksums hold the interpreter: threads would be in each other's way
            self.check_sums(batch)
            steady = self.steady_run(batch)
            found.append((steady or _NONE, True))
            if steady is None:
                left.append(batch)
        gather = _Gather(self.counts if left else self.counts[:0])

        def work(number: int) -> tuple[Runs, bool]:
            runs = self.runs(left[number])
            return gather.keep(left[number], runs), _in_order(runs)

        made = parallel.each(work, len(left), threads=None if len(left) >= 8 else 1)
        for batch, one in zip(left, made, strict=True):
            found[batch] = one
        return gather, found

    def _wrong(self, field: str, found: object, expected: object) -> FormatError:
        return FormatError("Link", field, pfn=int(self.pages[0]), found=found, expected=expected)

    def share(self) -> Iterator[tuple[U64, U64, U8]]:
        """Batches of (index, pfn, order), in order; several threads may take from one such iterator."""
        return _Shared(self)


def _part(batch: int) -> slice:
    return slice(batch * BATCH, (batch + 1) * BATCH)


def _in_order(runs: Runs) -> bool:
    """Whether runs come by index, none beginning before the one in front of it ends."""
    index, _, count = runs
    return bool((index[1:] >= index[:-1] + count[:-1]).all())


def _continued(runs: Runs) -> bool:
    """Whether a run goes on, in index and in memory, where the one in front of it ends."""
    index, pfn, count = runs
    return bool(((index[1:] == index[:-1] + count[:-1]) & (pfn[1:] == pfn[:-1] + count[:-1])).any())


def _edges(parts: list[Runs]) -> Runs:
    """The first and the last run of each part: all that matters where parts meet."""
    index, pfn, count = (
        np.array([edge for runs in parts for edge in _ends(runs[column])], dtype=np.uint64) for column in range(3)
    )
    return index, pfn, count


def _ends(column: U64) -> list[np.uint64]:
    return [column[0]] if len(column) == 1 else [column[0], column[-1]]


class _Gather:
    """Runs of all batches, in the arrays that are handed out in the end if there is nothing to join."""

    def __init__(self, counts: I64) -> None:
        ends = np.cumsum(counts)
        self._total = int(counts.sum())
        self._edges = [0, *ends[BATCH - 1 : -1 : BATCH].tolist(), self._total]
        # Virtual memory; only what is written becomes real.
        self._columns = tuple(np.empty(self._total, dtype=np.uint64) for _ in range(3))

    def keep(self, batch: int, runs: Runs) -> Runs:
        """Copy many runs to their place; few are kept as they are, and so are counts that are all 1."""
        low, high = self._edges[batch], self._edges[batch + 1]
        size = len(runs[0])
        if size * _FEWER < high - low:
            return runs
        kept = []
        for column, part in zip(self._columns, runs, strict=True):
            if part.strides != (0,):
                column[low : low + size] = part
                part = column[low : low + size]
            kept.append(part)
        return kept[0], kept[1], kept[2]

    def together(self, parts: list[Runs]) -> Runs:
        """All runs, in the order of links."""
        if sum(len(index) for index, _, _ in parts) == self._total:  # so every batch is in its place
            index, pfn, count = self._columns
            if all(part.base is index for part, _, _ in parts):
                ones = [part.strides == (0,) for _, _, part in parts]
                if all(ones):
                    return index, pfn, np.broadcast_to(_ONE, self._total)
                if not any(ones):
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
    magic, sums, _, other, born, index, counts, zero = (np.ascontiguousarray(column) for column in heads.T)
    _expect(pages, "magic", magic, np.uint64(LINK_MAGIC))
    _expect(pages, "other", other, seal_array(np.zeros_like(pages), (at << np.uint64(3)) + np.uint64(OTHER)))
    _expect(pages, "generation", born, np.uint64(generation))
    _expect(pages, "zero", zero, np.uint64(0))
    _expect_at_most(pages, "count", counts - np.uint64(1), LINK_CAPACITY - 1, f"1 to {LINK_CAPACITY} and no flags")
    _expect_at_most(pages, "index", index, INDEX_MAX, f"up to {INDEX_MAX:#x}")
    return Chain(ram, pages, sums, index, counts.astype(np.int64))


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
        taken = _row(ram, pfn, size)
        stride = min(stride * 2, 1 << 16) if taken == size else 8
        parts.append(np.arange(pfn, pfn + taken, dtype=np.uint64))
        total, record, field, holder = total + taken, "Link", "next", pfn + taken - 1
        pfn = unseal(ram.load((holder << PAGE_SHIFT) + NEXT), (holder << PAGE_SHIFT) + NEXT, "Link", "next")
    pages = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
    if not (pages[1:] > pages[:-1]).all() and len(np.unique(pages)) != len(pages):
        raise FormatError("Link", "next", pfn=int(pages[-1]), found="a link met before", expected="the end")
    return pages


def _row(ram: Ram, pfn: int, size: int) -> int:
    """How many of `size` pages from pfn are links of which each but the last names its neighbour as next."""

    def look(number: int) -> int:
        low, high = pfn + number * _PAGES, pfn + min((number + 1) * _PAGES, size)
        run = np.arange(low, high, dtype=np.uint64)
        words = ram.u64[low * PAGE_WORDS + NEXT // 8 : high * PAGE_WORDS : PAGE_WORDS]
        steady = words == seal_array(run + _ONE, (run << np.uint64(PAGE_SHIFT)) + np.uint64(NEXT))
        return high - pfn if steady.all() else low - pfn + int(np.argmin(steady))

    for number, reached in enumerate(parallel.each(look, -(-size // _PAGES))):
        if reached < min((number + 1) * _PAGES, size):
            return reached + 1
    return size


def _end_of_run(allowed: Spans, pfn: int, place: tuple[str, str, int]) -> int:
    """Where the node's pages end that hold page `pfn`; FormatError, naming the place that names it, if none do."""
    at = int(np.searchsorted(allowed.ends, np.uint64(pfn), side="right"))
    if at == len(allowed) or int(allowed.starts[at]) > pfn:
        record, field, holder = place
        raise FormatError(record, field, pfn=holder, found=f"pfn {pfn:x}", expected="a page of the node's page table")
    return int(allowed.ends[at])
