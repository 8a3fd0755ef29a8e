# SPDX-License-Identifier: GPL-2.0-or-later
"""Link pages read back: one stream's chain, every page checked before an entry is believed.

    head ─► link ─► link ─► link = tail      a page names the next, which is its neighbour nearly always

So a chain is read in strides: fetch the next n pages as if each named its neighbour, take those that do, go on
from where they end. The first stride takes all for granted; after one that was wrong the next is a single page,
and from there they grow again. Only pages that belong to the node are ever looked at, which also bounds
whatever a damaged chain can make a reader do.

Each page is fetched once, into a buffer that stays in the cache, and all is done there that has to be done for
every byte: the checksum, and whether the link is nothing but single pages in a row. For at 100 GiB each further
pass over all links costs as much as a load may take, and so does having them mapped: 23 ms for the faults of
200 MiB, where pread brings them into the cache in 24. READ links at a time leave several threads room, for
the checksums hold the interpreter: with 64 links, two threads were hardly faster than one.

`runs` reads the entries.

Kernel: mm/pkram.c (pkram_remove_link, pkram_load_file_pages), patches 4, 33 and 36
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counter
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import parallel
from pkramfs.pkram.format import COVERED, ENTRY_PFN_SHIFT, LINK_CAPACITY, LINK_MAGIC, NEXT, OTHER
from pkramfs.pkram.page import letters, seal_array, unseal
from pkramfs.pkram.streams.link import BATCH, HEAD_WORDS, I64, PAGE_WORDS, U8, decode, sizes
from pkramfs.spans import U64, Spans, distinct
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

READ = 512
"""Links that one thread reads in one step: 2 MiB."""
INDEX_MAX = 1 << 52
"""Page indices are below this: a byte offset has 64 bits."""
_STEP = np.uint64(1 << ENTRY_PFN_SHIFT)
_KEPT = HEAD_WORDS + 1
"""Words of each link that are kept: the header and the first entry."""
_COUNT = 6
"""The word of a header that has the number of entries."""
_MOST = 1 << 16
"""Links that are fetched at most on the assumption that they follow one another."""
_GROWTH = 8
_ONE = np.uint64(1)
_PLACE: I64 = np.arange(PAGE_WORDS)

Flags = npt.NDArray[np.bool_]


class Workbench:
    """One thread's buffers: so many links as they were fetched, and room for differences and answers."""

    def __init__(self, links: int) -> None:
        both = np.empty((2 * links, PAGE_WORDS), dtype=np.uint64)  # from 4 MiB on numpy asks for huge pages
        self.words, self.rises = both[:links], both[links:]
        self.steady = np.empty((links, PAGE_WORDS), dtype=bool)
        self.bytes = memoryview(self.words).cast("B")  # type: ignore[arg-type]
        self.covered = [self.bytes[at + COVERED : at + PAGE_SIZE] for at in range(0, links * PAGE_SIZE, PAGE_SIZE)]


@dataclass(frozen=True)
class Chain:
    """A stream's links, in order: the page, the first index, the number of entries and the first entry of each.

    `steady` tells of each link whether all its entries are single pages that lie in a row.
    """

    ram: Ram
    pages: U64
    index: U64
    counts: I64
    firsts: U64
    steady: Flags
    benches: parallel.Workbenches[Workbench]

    @property
    def batches(self) -> int:
        """Return how many steps `blocks` has."""
        return -(-len(self.pages) // BATCH)

    def fetch(self, links: slice, words: U64) -> U64:
        """Read whole links into the first rows of `words`, a row for each."""
        pages = self.pages[links]
        target = memoryview(words).cast("B")  # type: ignore[arg-type]
        edges = [0, *(np.flatnonzero(pages[1:] != pages[:-1] + _ONE) + 1).tolist(), len(pages)]
        for low, high in pairwise(edges):
            self.ram.read(int(pages[low]), target[low << PAGE_SHIFT : high << PAGE_SHIFT])
        return words[: len(pages)]

    def entries(self, links: slice, words: U64) -> U64:
        """Return the entries of some links that were fetched, one after the other."""
        rows, counts = words[:, HEAD_WORDS:], self.counts[links]
        full = int(counts[0])
        if (counts == full).all():
            return rows[:, :full].reshape(-1)
        if (counts[:-1] == full).all():
            return np.concatenate((rows[:-1, :full].reshape(-1), rows[-1, : int(counts[-1])]))
        found: U64 = rows[_PLACE[:LINK_CAPACITY] < counts[:, None]]
        return found

    def blocks(self, batch: int) -> tuple[U64, U64, U8]:
        """Return 64 links as arrays (index, pfn, order) of their entries."""
        links = slice(batch * BATCH, (batch + 1) * BATCH)
        words = self.fetch(links, np.empty((BATCH, PAGE_WORDS), dtype=np.uint64))
        pfn, order, _ = decode(self.entries(links, words))
        return self.indices(links, sizes(order)), pfn, order

    def indices(self, links: slice, size: U64) -> U64:
        """Return the index of each entry, from its link's first and the sizes before it."""
        counts = self.counts[links]
        before = np.cumsum(size) - size
        firsts = np.cumsum(counts) - counts
        found: U64 = np.repeat(self.index[links] - before[firsts], counts) + before
        return found

    def share(self) -> Iterator[tuple[U64, U64, U8]]:
        """Return the batches of (index, pfn, order), in order; several threads may take from one such iterator."""
        return _Shared(self)


class _Shared(Iterator[tuple[U64, U64, U8]]):
    def __init__(self, chain: Chain) -> None:
        self._chain, self._next = chain, counter()

    def __next__(self) -> tuple[U64, U64, U8]:
        batch = next(self._next)  # one step of the interpreter: no two threads get the same
        if batch >= self._chain.batches:
            raise StopIteration
        return self._chain.blocks(batch)


class _Survey:
    """The fields kept of each link while a chain is followed, by position, so that a wrong guess is overwritten."""

    def __init__(self, ram: Ram, links: int) -> None:
        self.ram, self.benches = ram, parallel.Workbenches(lambda: Workbench(min(links, READ)))
        self.pages = np.empty(links, dtype=np.uint64)
        self.kept = np.empty((_KEPT, links), dtype=np.uint64)
        self.sums = np.empty(links, dtype=np.uint64)
        self.steady = np.empty(links, dtype=bool)

    def look(self, at: int, pfn: int, size: int) -> int:
        """Fetch `size` pages from pfn as links at, at + 1, …; how many are if each but the last names its neighbour."""

        def work(number: int) -> None:
            low = number * READ
            with self.benches.lend() as bench:
                self._fetch(at + low, pfn + low, min(READ, size - low), bench)

        parallel.each(work, -(-size // READ))
        run = np.arange(pfn, pfn + size, dtype=np.uint64)
        self.pages[at : at + size] = run
        names = seal_array(run + _ONE, (run << np.uint64(PAGE_SHIFT)) + np.uint64(NEXT))
        neighbours = self.kept[NEXT // 8, at : at + size] == names
        return size if neighbours.all() else int(np.argmin(neighbours)) + 1

    def _fetch(self, at: int, pfn: int, number: int, bench: Workbench) -> None:
        here, words = slice(at, at + number), bench.words[:number]
        self.ram.read(pfn, bench.bytes[: number << PAGE_SHIFT])
        self.steady[here] = _steady(words, bench)
        self.kept[:, here] = words[:, :_KEPT].T
        # checksums last, with a pread to follow: whatever needs the interpreter waits for other threads' checksums
        digests = map(xxhash.xxh3_64_intdigest, bench.covered, range(pfn, pfn + number))
        self.sums[here] = np.fromiter(digests, np.uint64, number)


def _steady(words: U64, bench: Workbench) -> Flags | bool:
    """Return a mask of the links that hold only single pages in a row."""
    if not (words[:, _KEPT] - words[:, HEAD_WORDS] == _STEP).any():
        return False
    steady = differences(words, bench, fill=True)
    if steady.all():
        return True
    counts = np.minimum(words[:, _COUNT], np.uint64(LINK_CAPACITY)).astype(np.int64)
    steady |= counts[:, None] + HEAD_WORDS <= _PLACE
    whole: Flags = np.logical_and.reduce(steady, axis=1)
    return whole


def differences(words: U64, bench: Workbench, *, fill: bool) -> Flags:
    """Return a mask, shape (links, 512), of the words that name the page behind that of the word before.

    `fill` is the answer for heads and first entries. Differences are taken over whole pages, heads and
    all, and put right afterwards: numpy is four times as fast on memory without gaps.
    """
    flat, rises, found = words.reshape(-1), bench.rises[: len(words)], bench.steady[: len(words)]
    np.subtract(flat[1:], flat[:-1], out=rises.reshape(-1)[1:])
    np.equal(rises, _STEP, out=found)
    found[:, :_KEPT] = fill
    return found


def read(
    ram: Ram, owner: int, head: tuple[str, int], tail: int, links: int, *, generation: int, allowed: Spans
) -> Chain:
    """Follow the links of a stream of object `owner` and check their headers; they must be pages of `allowed`.

    `head` is the name and the value of the object's field, `tail` and `links` what the end must agree
    with. Entries are checked by `runs`.
    """
    if links > allowed.total:
        raise FormatError(
            "Object", "links", pfn=owner, found=links, expected=f"at most the node's {allowed.total} pages"
        )
    survey = _Survey(ram, links)
    pages = _follow(survey, owner, head, links, allowed)
    last = int(pages[-1]) if len(pages) else 0
    if len(pages) != links or last != tail:
        raise FormatError(
            "Object", "tail", pfn=owner, found=f"{len(pages)} links up to {last:x}", expected=f"{links} up to {tail:x}"
        )
    address = pages << np.uint64(PAGE_SHIFT)
    magic, sums, _, other, born, index, counts, zero, firsts = survey.kept
    _expect(pages, "magic", magic, np.uint64(LINK_MAGIC))
    _expect(pages, "other", other, seal_array(np.zeros_like(pages), address + np.uint64(OTHER)))
    _expect(pages, "generation", born, np.uint64(generation))
    _expect(pages, "zero", zero, np.uint64(0))
    _expect_at_most(pages, "count", counts - _ONE, LINK_CAPACITY - 1, f"1 to {LINK_CAPACITY} and no flags")
    _expect_at_most(pages, "index", index, INDEX_MAX, f"up to {INDEX_MAX:#x}")
    _expect(pages, "checksum", sums, survey.sums)
    return Chain(ram, pages, index, counts.view(np.int64), firsts, survey.steady, survey.benches)


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


def _follow(survey: _Survey, owner: int, head: tuple[str, int], links: int, allowed: Spans) -> U64:
    """Return the pages of a chain, at most `links` of them, none twice."""
    record, (field, pfn), holder = "Object", head, owner
    total, stride = 0, _MOST
    while pfn:
        end = _end_of_run(allowed, pfn, (record, field, holder))
        if total >= links:
            raise FormatError(record, field, pfn=holder, found=f"pfn {pfn:x}", expected=f"the end after {links} links")
        size = min(stride, links - total, end - pfn)
        taken = survey.look(total, pfn, size)
        stride = min(stride * _GROWTH, _MOST) if taken == size else 1
        total, record, field, holder = total + taken, "Link", "next", pfn + taken - 1
        pfn = unseal(int(survey.kept[NEXT // 8, total - 1]), (holder << PAGE_SHIFT) + NEXT, "Link", "next")
    pages = survey.pages[:total]
    if not (pages[1:] > pages[:-1]).all() and len(distinct(pages)) != len(pages):
        raise FormatError("Link", "next", pfn=int(pages[-1]), found="a link met before", expected="the end")
    return pages


def _end_of_run(allowed: Spans, pfn: int, place: tuple[str, str, int]) -> int:
    """Return the end of the run of the node's pages that holds `pfn`; FormatError, naming `place`, if there is none."""
    at = int(np.searchsorted(allowed.ends, np.uint64(pfn), side="right"))
    if at == len(allowed) or int(allowed.starts[at]) > pfn:
        record, field, holder = place
        raise FormatError(record, field, pfn=holder, found=f"pfn {pfn:x}", expected="a page of the node's page table")
    return int(allowed.ends[at])
