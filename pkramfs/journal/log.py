# SPDX-License-Identifier: GPL-2.0-or-later
"""Append to a log: chunks into segments, and the tail that commits them.

    write    a chunk is stored behind the tail: not committed yet
    commit   the tail is published: all written chunks count
    ensure   frames for the coming chunks, or ENOSPC, before anything has been changed
    rebase   another checkpoint: frames that only the old one needed are freed

As long as RAM has frames, there is a spare segment beyond the one in use, so that files can be deleted even on a full
machine. The host allocates the memory of a segment when it is taken, so that a store there cannot fail.

Kernel: fs/jbd2/journal.c (jbd2_journal_next_log_block), fs/jbd2/commit.c
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING

import xxhash

from pkramfs.errors import ExhaustedError
from pkramfs.journal.layout import (
    BASE_AT,
    CHECK,
    CHUNK,
    CHUNK_KIND,
    COVERED,
    FACTOR,
    GROWING_AT,
    GROWN_AT,
    LAST,
    MOST,
    SEGMENT,
    TAIL_AT,
    ZEROED_AT,
    Base,
    Figures,
    Seal,
    Segment,
    chunk_digest,
    guard,
    link_segment,
    renew,
    write_base,
    write_live,
    write_position,
    write_seal,
    write_segment,
)
from pkramfs.machine.frames import Run
from pkramfs.pkram.page import write_word
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT, pages, round_up

if TYPE_CHECKING:
    from pkramfs.journal.reader import Opened
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram

_HEAD, _digest = CHUNK.size, xxhash.xxh3_64_intdigest
_pack_head, _pack_asked = Struct("<IHHQ").pack, Struct("<QQ").pack
SEGMENT_PAGES = 64
"""Pages of a segment, 256 KiB; less where RAM is fragmented, more for one request that needs it."""
_LEAST_PAGES = 8
_GROWING = 1 << 20
"""Bytes by which is noted how far a file grows: seldom where it grows often."""
LESS, GROWTH = 6 << 10, 28 << 10
"""Bytes that must be left for a request that takes no memory, and for any other that has not said how many.

A request has names, targets and a few inodes: some 6 KiB, at most 16. The rest is for those that are not asked:
closing, forgetting, data that are lost, and for deletions, which is how a full machine stops to be full.
"""
FREEING = LESS + 8
"""The same for a deletion. Its log may take even the memory that the host leaves to others, to give back more."""


class Log:
    """The log of one tree, to which its daemon appends."""

    def __init__(self, ram: Ram, frames: Frames, live: int, generation: int) -> None:
        self.ram, self.frames, self.live = ram, frames, live
        self._append = ram.append
        self._generation = generation
        self.base, self.base_page = Base(0, 0, 0), 0
        self.segments: list[Segment] = []
        self.position = self.tail = 0
        self.left = 0
        """Bytes that are left in the segment in use."""
        self._spare: Run | None = None
        self.size = 0
        """Bytes of the segments in use."""
        self.scarce: Callable[[], object] = _nobody
        """Called when frames for a segment were taken that are held for a save."""
        self._growing, self._grown = 0, 0
        self._tail_at = (live << PAGE_SHIFT) + TAIL_AT
        self._tail_mark = self._tail_at << 20
        self._ahead = 0
        """How far the address of a position in the segment in use is ahead of it."""

    @classmethod
    def create(cls, ram: Ram, frames: Frames, name: bytes, generation: int, node: int = 0) -> Log:
        """Begin a log whose checkpoint is a node, or 0, the empty tree; raise ExhaustedError if RAM is full."""
        taken: list[Run] = []
        try:
            taken += _take(ram, frames, 1)
            taken += _take(ram, frames, 1)
            run = _take_segment(ram, frames, SEGMENT_PAGES)
            taken.append(run)
        except BaseException:
            _free(frames, taken)
            raise
        log = cls(ram, frames, taken[0][0], generation)
        log._use(Segment(*run, 0))
        log.base, log.base_page = Base(node, run[0], 0), taken[1][0]
        write_base(ram, log.base_page, log.base, frames.tree_id, generation)
        write_live(ram, log.live, name, frames.tree_id, generation, log.base_page)
        return log

    @classmethod
    def resume(
        cls, ram: Ram, frames: Frames, live: int, generation: int, base_page: int, base: Base, segments: list[Segment],
        tail: int,
    ) -> Log:  # fmt: skip
        """Continue a log that was read, behind its tail."""
        log = cls(ram, frames, live, generation)
        log.base, log.base_page, log.segments, log.position, log.tail = base, base_page, segments, tail, tail
        last = segments[-1]
        log.size = sum(one.pages for one in segments) << PAGE_SHIFT
        log.left, log._ahead = last.room - (tail - last.base), last.address(0)
        ram.back_run(last.pfn, last.pages)
        ram.back_run(live, 1)
        renew(ram, live)
        link_segment(ram, last.pfn, 0)  # chunks behind the tail do not count, and frames behind it are free
        return log

    @classmethod
    def reopen(cls, ram: Ram, frames: Frames, name: bytes, generation: int, sealed: Opened) -> Log:
        """Continue a sealed log under another kernel; the seal stays valid."""
        live, tail = sealed.live, sealed.live.tail
        write_live(ram, live.pfn, name, frames.tree_id, generation, live.base)
        log = cls.resume(ram, frames, live.pfn, generation, live.base, sealed.base, sealed.segments, tail)
        log.commit()
        return log

    def seal(self, pfn: int, figures: Figures, unsummed: int | None = None) -> None:
        """Write a seal page of the present log. Chunks appended later are seen only through the live page."""
        seal = Seal(self.base_page, self.segments[-1].pfn, self.tail, self.live, figures, unsummed)
        write_seal(self.ram, pfn, seal, self.frames.tree_id, self._generation)

    # -- appending ------------------------------------------------------------------------------

    def ensure(self, size: int = GROWTH, *, last: bool = False) -> None:
        """Take frames now for a request that appends so many bytes; raise ExhaustedError (ENOSPC) if there are none.

        `last` takes even the memory that the host leaves to others.
        """
        if self.left >= size or (self._spare is not None and _room(self._spare) >= size):
            return
        fresh = self._take_any(pages(size + SEGMENT.size), last=last)
        if self._spare is not None:
            _free(self.frames, [self._spare])
        self._spare = fresh

    def _take_any(self, least: int, *, last: bool = False) -> Run:
        """Take a segment of at least so many pages, from the frames held for a save if there are no others."""
        wanted = max(SEGMENT_PAGES, least)
        try:
            return _take_segment(self.ram, self.frames, wanted, least)
        except ExhaustedError:
            try:
                run = _take_segment(self.ram, self.frames, wanted, least, held=True)
            except ExhaustedError:
                if not last:
                    raise
                run = _take(self.ram, self.frames, least, held=True, last=True)[0]
        self.scarce()
        return run

    def write(self, parts: list[bytes], asker: int = 0) -> None:
        """Store records behind the tail, as one chunk or several."""
        body = b"".join(parts)
        length = _HEAD + len(body)
        if length <= self.left:
            self._store(body, LAST, asker)
        elif length <= self._next_room(length):
            self._switch()
            self._store(body, LAST, asker)
        else:
            self._write_pieces(parts, asker)

    def _write_pieces(self, parts: list[bytes], asker: int) -> None:
        """Store records that do not fit into one segment, as many in each chunk as fit; all of them or none."""
        position, left, used = self.position, self.left, len(self.segments)
        try:
            self._write_some(parts, asker)
        except BaseException:
            gone = self.segments[used:]
            self.position, self.left, self.segments = position, left, self.segments[:used]
            self._ahead = self.segments[-1].address(0)
            if gone:
                link_segment(self.ram, self.segments[-1].pfn, 0)
                self.size -= sum(one.pages for one in gone) << PAGE_SHIFT
                _free(self.frames, [(one.pfn, one.pages) for one in gone])
            raise

    def _write_some(self, parts: list[bytes], asker: int) -> None:
        some, size = list[bytes](), _HEAD
        for part in parts:
            if size + len(part) > self.left:
                if some:
                    self._store(b"".join(some), 0, asker)
                self.ensure(len(part) + _HEAD)
                self._switch()
                some, size = [], _HEAD
            some.append(part)
            size += len(part)
        self._store(b"".join(some), LAST, asker)

    def _store(self, body: bytes, flags: int, asker: int) -> None:
        position, length = self.position, _HEAD + len(body)
        covered = _pack_asked(position, asker) + body
        head = _pack_head(length, CHUNK_KIND, flags, chunk_digest(covered, flags))
        after, left = position + length, self.left - length
        self.ram.overwrite(self._ahead + position, head + covered)
        self.position, self.left = after, left

    def commit(self) -> None:
        """Publish the tail: all written chunks count from now on."""
        self.ram.publish(self._tail_at, guard(self.position, self._tail_at))
        self.tail = self.position

    def append(self, parts: list[bytes], asker: int = 0) -> None:
        """Write the records of a request and commit them."""
        covered = _pack_asked(self.position, asker) + b"".join(parts)
        if len(covered) + COVERED > self.left:
            self.write(parts, asker)
            try:
                self.commit()
            except MemoryError:  # it will be written again, and must not occur twice
                if self.segments[-1].base <= self.tail:
                    self.position, self.left = self.tail, self.left + self.position - self.tail
                raise
        else:
            self.put(covered)

    def put(self, covered: bytes) -> None:
        """Store and commit the records of a request, with position and request number; they must fit.

        Every request with a change runs this code, so it makes few calls: it repeats `chunk_digest` for the checksum
        and `guard` for the published word.
        """
        length, position = COVERED + len(covered), self.position
        tail, left = position + length, self.left - length
        chunk = _pack_head(length, CHUNK_KIND, LAST, _digest(covered, LAST)) + covered
        word = (tail ^ self._tail_mark) * FACTOR & CHECK | tail
        self._append(self._ahead + position, chunk, self._tail_at, word)
        self.position, self.tail, self.left = tail, tail, left  # now: any step above may have failed for want of memory

    def note_zeroed(self) -> None:
        """Publish that the rest of cut pages is zeroed."""
        write_position(self.ram, self.live, ZEROED_AT, self.tail)

    def note_growing(self, ino: int, end: int) -> None:
        """Publish that bytes of a file behind its end are about to be written, up to `end`, before its size changes.

        A recovery clears them if the daemon did not finish that request. One file is enough: the sizes of all files
        before are committed.
        """
        if ino != self._growing or end > self._grown:
            self._growing, self._grown = ino, round_up(end, _GROWING)
            self.ram.publish((self.live << PAGE_SHIFT) + GROWN_AT, self._grown)
            self.ram.publish((self.live << PAGE_SHIFT) + GROWING_AT, ino)

    # -- segments -------------------------------------------------------------------------------

    def _next_room(self, length: int) -> int:
        """Return the room for a chunk in the next segment, after trying to get enough."""
        if length <= MOST >> 1:
            with contextlib.suppress(ExhaustedError):
                self.ensure(max(length, self.left + 1))
        return 0 if self._spare is None else _room(self._spare)

    def _switch(self) -> None:
        """Continue in the spare segment, and try to take another."""
        if self._spare is None:
            raise ExhaustedError("no room for the journal")
        run, self._spare = self._spare, None
        before = self.segments[-1].pfn
        self._use(Segment(*run, self.position))
        link_segment(self.ram, before, run[0])
        with contextlib.suppress(ExhaustedError):  # `ensure` tries again when one is needed
            self._spare = _take_segment(self.ram, self.frames, SEGMENT_PAGES)

    def _use(self, segment: Segment) -> None:
        write_segment(self.ram, segment, self.frames.tree_id)
        self.segments.append(segment)
        self.left, self._ahead = segment.room, segment.address(0)
        self.size += segment.pages << PAGE_SHIFT

    def pages(self) -> Spans:
        """Return the frames of the log: live page, base page, segments, the spare one."""
        runs = [(self.live, 1), (self.base_page, 1), *((one.pfn, one.pages) for one in self.segments)]
        runs += [self._spare] if self._spare is not None else []
        return Spans((pfn, pfn + count) for pfn, count in runs)

    # -- checkpoints ----------------------------------------------------------------------------

    def rebase(self, node: int, position: int) -> None:
        """Begin the log with another checkpoint: the node with the tree as it was at `position`.

        Published by one store. The old base page and the segments before that position are freed afterwards; the
        old node is the caller's. Raise ExhaustedError, and change nothing, if there is no frame for the base page.
        """
        (fresh,) = _take(self.ram, self.frames, 1, held=True)
        first = next(one.base for one in reversed(self.segments) if one.base <= position)
        keep = [one for one in self.segments if one.base >= first]
        base = Base(node, keep[0].pfn, position)
        write_base(self.ram, fresh[0], base, self.frames.tree_id, self._generation)
        write_word(self.ram, self.live, BASE_AT, fresh[0])
        gone = [(self.base_page, 1), *((one.pfn, one.pages) for one in self.segments if one not in keep)]
        self.base, self.base_page, self.segments = base, fresh[0], keep
        self.size = sum(one.pages for one in keep) << PAGE_SHIFT
        _free(self.frames, gone)


def _room(run: Run) -> int:
    return (run[1] << PAGE_SHIFT) - SEGMENT.size


def _take(ram: Ram, frames: Frames, count: int, *, held: bool = False, last: bool = False) -> list[Run]:
    """Take one run of zeroed frames, backed by the host."""
    runs = frames.allocate(count, held=held, last=last)
    if len(runs) > 1:
        _free(frames, runs)
        raise ExhaustedError(f"no {count} frames in a row")
    try:
        ram.back_run(*runs[0])
    except BaseException:
        _free(frames, runs)
        raise
    return runs


def _take_segment(ram: Ram, frames: Frames, wanted: int, least: int = _LEAST_PAGES, *, held: bool = False) -> Run:
    """Take a run for a segment: `wanted` pages, or fewer if RAM is fragmented."""
    while True:
        try:
            return _take(ram, frames, wanted, held=held)[0]
        except ExhaustedError:
            if wanted <= least:
                raise
        wanted = max(wanted // 2, least)


def _free(frames: Frames, runs: list[Run]) -> None:
    for pfn, count in runs:
        frames.free([pfn], [count])


def _nobody() -> None:
    """Do nothing."""
