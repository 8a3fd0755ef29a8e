"""The two streams of an object: bytes of any length, and pages by index. Writer and reader.

    bytes   write(b"…") write(b"…")        ─► frames, filled to the brim ─► links
    pages   save_runs(index, pfn, count)    ─► aligned blocks              ─► links

A writer collects; `finish` writes the link pages and the object, in the frames of the node's owner.
Several threads may save pages of one object at once, each in calls of its own: what a call brings
goes into links of its own, and links carry their index, so their order does not matter (rows 32-34).
The byte stream belongs to one thread.

A reader has been checked whole before it is handed out; reading it consumes nothing.

Kernel: mm/pkram.c (pkram_write, pkram_read, pkram_save_file_page, pkram_load_file_pages),
patches 4, 5, 6, 32 to 36
"""

import errno
import itertools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from pkramfs.errors import FormatError, PkramError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import link
from pkramfs.pkram.format import ENTRY_HUGE, LINK_CAPACITY, NEXT, OBJECT, OBJECT_MAGIC, OTHER
from pkramfs.pkram.link import U8
from pkramfs.pkram.page import expect_flags, expect_unused, read_page, write_page
from pkramfs.pkram.relocate import Allocator, allocate_outside, move_out
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_ORDER, PAGE_SIZE, pages

_FLUSH = 1 << 20
"""Bytes that the byte stream collects before it takes frames for them."""

Runs = list[tuple[int, int]]


class Arena:
    """The frames that a save takes for itself: metadata, byte pages, copies. All go if it is discarded."""

    def __init__(self, ram: Ram, frames: Allocator, banned: Spans, no_memory: Callable[[OSError], PkramError]) -> None:
        self.ram, self.frames, self.banned = ram, frames, banned
        self._no_memory, self._lock = no_memory, threading.Lock()
        self.runs: Runs = []

    def take(self, count: int) -> Runs:
        """Runs of `count` zeroed frames outside of banned memory."""
        if not count:
            return []
        with self._lock:
            try:
                runs = allocate_outside(self.frames, count, self.banned)
            except OSError as error:
                raise self._no_memory(error) from error
            self.runs += runs
        return runs

    def pages(self, count: int) -> U64:
        """The pfns of `count` zeroed frames."""
        runs = self.take(count)
        if not runs:
            return np.empty(0, dtype=np.uint64)
        return np.concatenate([np.arange(start, start + size, dtype=np.uint64) for start, size in runs])

    def adopt(self, runs: Runs) -> None:
        """Count frames that were taken elsewhere as this save's."""
        with self._lock:
            self.runs += runs

    def release(self) -> None:
        """Give everything back."""
        if self.runs:
            self.frames.free([start for start, _ in self.runs], [count for _, count in self.runs])
        self.runs = []

    def spans(self) -> Spans:
        return Spans((start, start + count) for start, count in self.runs)


class ObjectWriter:
    """One object being saved. Use it in a `with`: leaving finishes it."""

    def __init__(self, arena: Arena, generation: int, *, strict: bool, align: bool) -> None:
        self._arena, self._ram, self._generation = arena, arena.ram, generation
        self._strict, self._align = strict, align
        self._buffer, self._byte_runs, self._length = bytearray(), Runs(), 0
        self._digest = xxhash.xxh3_64()
        self._lock = threading.Lock()
        self._page_links: list[tuple[U64, U64, U64]] = []
        self.page_count = 0
        self.data: Spans = Spans()
        self.moved: Runs = []
        self.values: dict[str, int] | None = None
        """The object record's fields, once finished."""

    def __enter__(self) -> "ObjectWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()

    def write(self, data: Any) -> int:
        """Append bytes to the byte stream; returns how many. PkramError (ENOMEM) if memory is out."""
        view = memoryview(data).cast("B")
        self._buffer += view
        self._length += len(view)
        self._digest.update(view)
        if len(self._buffer) >= _FLUSH:
            self._flush(len(self._buffer) // PAGE_SIZE * PAGE_SIZE)
        return len(view)

    def _flush(self, size: int) -> None:
        done = 0
        for start, count in self._arena.take(pages(size)):
            part = memoryview(self._buffer)[done : min(done + count * PAGE_SIZE, size)]
            self._ram.page(start, count)[: len(part)] = part
            done += len(part)
            part.release()
            self._byte_runs.append((start, count))
        del self._buffer[:size]

    def save_runs(self, index: Any, pfn: Any, count: Any) -> None:
        """Preserve runs of frames: arrays of first index, first pfn and pages; any number of threads.

        Frames are not copied unless they are banned. Saving a frame twice is EINVAL at `finish` of
        the node (PKRAM panics, D19).
        """
        index, pfn, count = (np.asarray(column, dtype=np.uint64) for column in (index, pfn, count))
        if not len(index):
            return
        if self._arena.banned:
            index, pfn, count, copies = move_out(
                self._ram, self._arena.frames, index, pfn, count, self._arena.banned
            )
            self._arena.adopt(copies)
            with self._lock:
                self.moved += copies
        if self._strict:
            self._save_singly(index, pfn, count)
        else:
            self._save_blocks(*link.split_runs(index, pfn, count), 0)

    def _save_singly(self, index: U64, pfn: U64, count: U64) -> None:
        """One order-0 entry a page, as PKRAM does."""
        each = count.astype(np.int64)
        within = np.arange(int(count.sum()), dtype=np.uint64) - np.repeat(np.cumsum(count) - count, each)
        order = np.zeros(len(within), dtype=np.uint8)
        self._save_blocks(np.repeat(index, each) + within, np.repeat(pfn, each) + within, order, 0)

    def save_pages(self, index: Any, pfn: Any, order: Any) -> None:
        """Preserve blocks as they are: arrays of index, pfn (aligned to the order) and order 0 to 18.

        An order-9 block is marked as a huge page. Blocks that touch banned memory are moved and
        come back in pieces.
        """
        index, pfn = np.asarray(index, dtype=np.uint64), np.asarray(pfn, dtype=np.uint64)
        order = np.asarray(order, dtype=np.uint8)
        sizes = link.sizes(order)
        if (pfn & (sizes - np.uint64(1))).any() or (pfn == 0).any():
            raise PkramError("a block to preserve is not aligned to its order", errno.EINVAL)
        if self._arena.banned and any(
            self._arena.banned.overlaps(a, a + n) for a, n in zip(pfn.tolist(), sizes.tolist(), strict=True)
        ):
            self.save_runs(index, pfn, sizes)
        elif len(index):
            self._save_blocks(index, pfn, order, ENTRY_HUGE)

    def _save_blocks(self, index: U64, pfn: U64, order: U8, huge: int) -> None:
        entries = link.encode(pfn, order)
        if huge:
            entries[order == BLOCK_ORDER] |= np.uint64(ENTRY_HUGE << 5)
        links = self._write_links(index, entries, order, align=self._align)
        sizes = link.sizes(order)
        with self._lock:
            self._page_links.append(links)
            before = self.data.total
            self.page_count += int(sizes.sum())
            self.data = self.data | Spans.from_runs(pfn, sizes)
            if self.data.total != before + int(sizes.sum()):
                raise PkramError("a frame was saved twice", errno.EINVAL)

    def _write_links(self, index: U64, entries: U64, order: U8, *, align: bool) -> tuple[U64, U64, U64]:
        """Write one chain of links that nothing names yet; (link pfns, …)."""
        starts, counts = link.break_links(index, order, LINK_CAPACITY, align=align)
        where = self._arena.pages(len(starts))
        link.write_links(self._ram, where, index, entries, starts, counts, self._generation)
        return where, starts.astype(np.uint64), counts.astype(np.uint64)

    def finish(self) -> None:
        """Write the rest of the byte stream and chain the links; the object is complete."""
        if self.values is not None:
            return
        if self._buffer:
            self._flush(len(self._buffer))
        byte_links = self._finish_bytes()
        page_links = self._chain_pages()
        self.values = {
            "generation": self._generation,
            "pages_head": int(page_links[0]) if len(page_links) else 0,
            "pages_tail": int(page_links[-1]) if len(page_links) else 0,
            "bytes_head": int(byte_links[0]) if len(byte_links) else 0,
            "bytes_tail": int(byte_links[-1]) if len(byte_links) else 0,
            "data_length": self._length,
            "data_checksum": self._digest.intdigest(),
            "page_count": self.page_count,
            "page_links": len(page_links),
            "byte_links": len(byte_links),
        }

    def _finish_bytes(self) -> U64:
        if not self._byte_runs:
            return np.empty(0, dtype=np.uint64)
        runs = np.array(self._byte_runs, dtype=np.uint64)
        index = np.cumsum(runs[:, 1]) - runs[:, 1]
        blocks = link.split_runs(index, runs[:, 0], runs[:, 1])
        return self._write_links(blocks[0], link.encode(blocks[1], blocks[2]), blocks[2], align=False)[0]

    def _chain_pages(self) -> U64:
        """Hang the chains of all calls behind one another."""
        chains = [links for links, _, _ in self._page_links]
        for before, after in itertools.pairwise(chains):
            link.hang(self._ram, int(before[-1]), int(after[0]))
        return np.concatenate(chains) if chains else np.empty(0, dtype=np.uint64)

    def write_record(self, pfn: int, following: int) -> None:
        """Write the object's own page, naming the next object."""
        if self.values is None:
            raise AssertionError("the object was not finished")
        write_page(self._ram, pfn, OBJECT, {NEXT: 0, OTHER: 0}, magic=OBJECT_MAGIC, object=following, **self.values)


class ObjectReader:
    """One object of a loaded node, checked whole."""

    def __init__(self, ram: Ram, pfn: int, generation: int) -> None:
        self._ram, self.pfn = ram, pfn
        self.record = read_page(ram, pfn, OBJECT, OBJECT_MAGIC)
        if self.record.generation != generation:
            raise FormatError("Object", "generation", pfn=pfn, found=self.record.generation, expected=generation)
        expect_flags("Object", pfn, self.record.flags)
        for offset, field in ((NEXT, "next"), (OTHER, "other")):
            expect_unused(ram, pfn, "Object", offset, field)
        self.length: int = self.record.data_length
        self._read_bytes(generation)
        self._read_pages(generation)
        self._at = 0

    def _read_bytes(self, generation: int) -> None:
        found = self.record
        index, entries, self._byte_links = link.read_links(
            self._ram, found.bytes_head, found.bytes_tail, found.byte_links, generation
        )
        link.check_entries(self._ram, entries, "Object.bytes")
        first, pfn, count = link.join_blocks(index, *link.decode(entries)[:2])
        if (np.cumsum(count) - count != first).any() or int(count.sum()) != pages(self.length):
            raise FormatError(
                "Object", "data_length", pfn=self.pfn, found=f"{int(count.sum())} pages of bytes", expected=self.length
            )
        self._byte_runs: Runs = list(zip(pfn.tolist(), count.tolist(), strict=True))
        digest = xxhash.xxh3_64()
        for view in self._views():
            digest.update(view)
        if digest.intdigest() != found.data_checksum:
            raise FormatError(
                "Object",
                "data_checksum",
                pfn=self.pfn,
                found=f"{digest.intdigest():016x}",
                expected=f"{found.data_checksum:016x}",
            )

    def _views(self) -> list[memoryview]:
        """The byte stream, a piece for each run of frames."""
        left, views = self.length, []
        for start, count in self._byte_runs:
            size = min(left, count * PAGE_SIZE)
            views.append(self._ram.page(start, count)[:size])
            left -= size
        return views

    def _read_pages(self, generation: int) -> None:
        found = self.record
        self.index, self._entries, self._page_links = link.read_links(
            self._ram, found.pages_head, found.pages_tail, found.page_links, generation
        )
        link.check_entries(self._ram, self._entries, "Object.pages")
        pfn, order, _ = link.decode(self._entries)
        total = int(link.sizes(order).sum())
        if total != found.page_count:
            raise FormatError("Object", "page_count", pfn=self.pfn, found=total, expected=found.page_count)
        self.data = Spans.from_runs(pfn, link.sizes(order))
        if self.data.total != total:
            raise FormatError("Object", "pages", pfn=self.pfn, found="a frame named twice", expected="each once")

    def metadata(self) -> Spans:
        """The object's own frames: its page, its links, the byte stream."""
        singles = np.concatenate((self._byte_links, self._page_links, np.array([self.pfn], dtype=np.uint64)))
        frames = Spans.from_runs(singles, np.ones_like(singles))
        return frames | Spans((start, start + count) for start, count in self._byte_runs)

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes of the byte stream (all that is left for -1); short at the end."""
        end = self.length if size < 0 else min(self._at + size, self.length)
        parts, at = [], 0
        for view in self._views():
            low, high = max(self._at - at, 0), min(end - at, len(view))
            if low < high:
                parts.append(view[low:high])
            at += len(view)
        self._at = end
        return b"".join(parts)

    def load_pages(self) -> tuple[U64, U64, Any]:
        """The page stream as arrays (index, pfn, order), by link order."""
        pfn, order, _ = link.decode(self._entries)
        return self.index, pfn, order

    def load_runs(self) -> tuple[U64, U64, U64]:
        """The page stream as the fewest runs (index, pfn, count), by index."""
        index, pfn, order = self.load_pages()
        if len(index) > 1 and (index[1:] < index[:-1]).any():
            by_index = np.argsort(index, kind="stable")
            index, pfn, order = index[by_index], pfn[by_index], order[by_index]
        return link.join_blocks(index, pfn, order)

