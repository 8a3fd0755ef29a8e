# SPDX-License-Identifier: GPL-2.0-or-later
"""The two streams of an object, read back: all of it checked before any of it is handed out.

A reader is made of an object's page and the pages that the node's page table names; nothing else is
ever looked at. Every link is read, every entry, every byte of the byte stream; lengths, counts and
checksums must agree with the object, no index may have two pages and no frame two indices. After
that reading cannot fail, and it consumes nothing.

Pages are to be had as the fewest runs (`load_runs`), as blocks (`load_pages`), or 64 links at a time
by several threads (`batches`), in memory that does not grow with the file.

Kernel: mm/pkram.c (pkram_read, pkram_load_file_page, pkram_load_file_pages), patches 4, 6 and 36
"""

import mmap
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import xxhash

from pkramfs.errors import FormatError, PkramError
from pkramfs.machine.frames import Run, spans_of
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NEXT, OBJECT, OBJECT_MAGIC, OTHER
from pkramfs.pkram.frameset import FrameSet
from pkramfs.pkram.page import expect_flags, expect_unused, read_page
from pkramfs.pkram.streams import linkreader
from pkramfs.pkram.streams.link import U8
from pkramfs.pkram.streams.linkreader import Chain
from pkramfs.pkram.streams.runs import Runs, all_runs
from pkramfs.spans import U64, Spans
from pkramfs.units import PAGE_SIZE, pages

_PIECE = 256
"""Pages of the byte stream that are read at once."""


class ObjectReader:
    """One object of a loaded node. `length` is bytes of the byte stream, `data` the frames of the page stream."""

    def __init__(self, ram: Ram, pfn: int, generation: int, allowed: Spans) -> None:
        self._ram, self.pfn, self._allowed = ram, pfn, allowed
        self.record = read_page(ram, pfn, OBJECT, OBJECT_MAGIC)
        if self.record.generation != generation:
            raise FormatError("Object", "generation", pfn=pfn, found=self.record.generation, expected=generation)
        expect_flags("Object", pfn, self.record.flags)
        for offset, field in ((NEXT, "next"), (OTHER, "other")):
            expect_unused(ram, pfn, "Object", offset, field)
        self.length: int = self.record.data_length
        self._at = 0
        self._bytes = self._chain("bytes_head", "bytes_tail", "byte_links")
        self._pages = self._chain("pages_head", "pages_tail", "page_links")
        self._byte_runs = self._check_bytes()
        self._runs, self.data = self._check_pages()

    def _chain(self, head: str, tail: str, links: str) -> Chain:
        found = self.record
        return linkreader.read(
            self._ram,
            self.pfn,
            (head, getattr(found, head)),
            getattr(found, tail),
            getattr(found, links),
            generation=found.generation,
            allowed=self._allowed,
        )

    def _wrong(self, field: str, found: object, expected: object) -> FormatError:
        return FormatError("Object", field, pfn=self.pfn, found=found, expected=expected)

    def _check_bytes(self) -> list[Run]:
        """Compare the byte stream's length and checksum; return its runs of frames."""
        index, pfn, count = all_runs(self._bytes)
        self._inside(pfn, count, "bytes")
        total = int(count.sum())
        if (np.cumsum(count) - count != index).any() or total != pages(self.length):
            raise self._wrong("data_length", f"{self.length} in {total} pages of bytes", "as many bytes as pages")
        runs = list(zip(pfn.tolist(), count.tolist(), strict=True))
        digest = xxhash.xxh3_64()
        for view in self._views(runs):
            digest.update(view)
        if digest.intdigest() != self.record.data_checksum:
            raise self._wrong("data_checksum", f"{self.record.data_checksum:016x}", f"{digest.intdigest():016x}")
        return runs

    def _check_pages(self) -> tuple[Runs, Spans]:
        """Check that each frame of the page stream occurs once; return its runs and its frames."""
        index, pfn, count = all_runs(self._pages)
        named = FrameSet(self._ram.pages)
        try:
            total = named.add(pfn, count)
            if total != self.record.page_count:
                raise self._wrong("page_count", self.record.page_count, f"{total}, as its links say")
            data = named.spans()
        except PkramError:
            raise self._wrong("pages", "a frame named twice", "each once") from None
        self._inside(data.starts, data.counts, "pages")
        return (index, pfn, count), data

    def _inside(self, pfn: U64, count: U64, field: str) -> None:
        if outside := Spans.from_runs(pfn, count) - self._allowed:
            raise self._wrong(field, f"pfn {int(outside.starts[0]):x}", "a page of the node's page table")

    def _views(self, runs: list[Run]) -> Iterator[memoryview]:
        """Yield the byte stream in pieces, read past the mapping: damaged memory may have holes of the host."""
        left = self.length
        for start, count in runs:
            for at in range(0, count, _PIECE):
                size = min(left, (count - at) * PAGE_SIZE, _PIECE * PAGE_SIZE)
                yield memoryview(self._ram.peek(start + at, pages(size)))[:size]
                left -= size

    @cached_property
    def byte_frames(self) -> Spans:
        """Return the frames that hold the byte stream."""
        return spans_of(self._byte_runs)

    @cached_property
    def links(self) -> Spans:
        """Return the link pages of both streams."""
        singles = np.concatenate((self._bytes.pages, self._pages.pages))
        return Spans.from_numbers(singles)

    def metadata(self) -> Spans:
        """Return the object's own frames: its page, its links, the byte stream."""
        return self.links | self.byte_frames | Spans([(self.pfn, self.pfn + 1)])

    def uses(self) -> int:
        """Return the number of uses of frames that the object names: the number of frames, unless one has two uses."""
        links = len(self._bytes.pages) + len(self._pages.pages)
        return 1 + links + sum(count for _, count in self._byte_runs) + self.data.total

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes of the byte stream (all that is left for -1); short at the end.

        Kernel: pkram_read()
        """
        end = self.length if size < 0 else min(self._at + size, self.length)
        parts, at = [], 0
        for view in self._views(self._byte_runs):
            low, high = max(self._at - at, 0), min(end - at, len(view))
            if low < high:
                parts.append(view[low:high])
            at += len(view)
        self._at = end
        return b"".join(parts)

    def load_bytes(self) -> memoryview:
        """Return the whole byte stream, in memory of its own; `read` of it would copy it twice."""
        size = max(pages(self.length), 1) * PAGE_SIZE
        into, at = (
            memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)),
            0,
        )  # which nobody clears first
        for start, count in self._byte_runs:
            self._ram.read(start, into[at : at + count * PAGE_SIZE])
            at += count * PAGE_SIZE
        return into[: self.length].toreadonly()

    def load_runs(self) -> Runs:
        """Return the page stream as the fewest runs: read-only arrays (u64) of index, pfn and count, by index."""
        return self._runs

    def load_pages(self) -> tuple[U64, U64, U8]:
        """Return the page stream as arrays (index u64, pfn u64, order u8) of its blocks, in the order of links.

        Kernel: pkram_load_file_page()
        """
        parts = [self._pages.blocks(batch) for batch in range(self._pages.batches)]
        if not parts:
            empty = np.empty(0, dtype=np.uint64)
            return empty, empty, np.empty(0, dtype=np.uint8)
        index, pfn, order = zip(*parts, strict=True)
        return np.concatenate(index), np.concatenate(pfn), np.concatenate(order)

    def batches(self) -> Iterator[tuple[U64, U64, U8]]:
        """Return the page stream 64 links at a time, as `load_pages`; several threads may take from one iterator.

        Kernel: pkram_load_file_pages()
        """
        return self._pages.share()
