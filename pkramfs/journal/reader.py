# SPDX-License-Identifier: GPL-2.0-or-later
"""Read a log: every chunk that counts, each checked.

Nothing is trusted: the segments must lie in the tree's page blocks, each position follow the one before, each
checksum fit, and the end be exactly at the tail. What does not fit is a FormatError with position and field.

Kernel: fs/jbd2/recovery.c (do_one_pass)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.errors import FormatError
from pkramfs.journal.layout import (
    CHUNK,
    CHUNK_KIND,
    LAST,
    SEGMENT,
    Figures,
    Live,
    Segment,
    chunk_digest,
    read_base,
    read_live,
    read_seal,
    read_segment,
)
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from pkramfs.journal.layout import Base
    from pkramfs.machine.ram import Ram


class Chunk(NamedTuple):
    """The records of one request, or a part of them."""

    position: int
    asker: int
    last: bool
    body: bytes


class Opened(NamedTuple):
    """A log that was opened for reading: its live page, its base page, and its segments so far as they count.

    One that was sealed has `figures`, which its tree must come to, and a live page made from the seal: the real one
    may say anything.
    """

    live: Live
    base: Base
    segments: list[Segment]
    figures: Figures | None = None

    def pages(self) -> Spans:
        """Return the frames of the log."""
        runs = [(self.live.pfn, 1), (self.live.base, 1), *((one.pfn, one.pages) for one in self.segments)]
        return Spans((pfn, pfn + count) for pfn, count in runs)


def open_log(ram: Ram, live_pfn: int, allowed: Spans) -> Opened:
    """Open the log of a live page; all of it must lie in `allowed`, the frames of the tree's page blocks."""
    live = read_live(ram, live_pfn)
    for field, pfn in (("pfn", live_pfn), ("base", live.base)):
        _require_inside(allowed, pfn, 1, "Live", field, live_pfn)
    base = _base(ram, live)
    return Opened(live, base, list(_segments(ram, live, base, allowed)))


def open_sealed(ram: Ram, pfn: int, tree_id: int, generation: int, allowed: Spans) -> Opened:
    """Open the log that a seal page ends; all of it must lie in `allowed`, the frames of the node that it holds."""
    seal = read_seal(ram, pfn, tree_id)
    for field in ("base", "segment", "live"):
        _require_inside(allowed, getattr(seal, field), 1, "Seal", field, pfn)
    live = Live(seal.live, b"", tree_id, generation, seal.base, seal.tail, seal.tail, 0, 0)
    base = _base(ram, live)
    return Opened(live, base, list(_segments(ram, live, base, allowed, seal.segment)), seal.figures)


def _base(ram: Ram, live: Live) -> Base:
    base = read_base(ram, live.base, live.tree_id)
    if base.position > live.tail:
        raise FormatError("Base", "position", pfn=live.base, found=base.position, expected=f"at most {live.tail}")
    return base


def _segments(ram: Ram, live: Live, base: Base, allowed: Spans, last: int = 0) -> Iterator[Segment]:
    """Yield the segments from the base's to the one that holds the tail, which may be known to be the `last`."""
    pfn, before, seen = base.segment, None, set[int]()
    while True:
        if pfn in seen:
            raise FormatError("Segment", "next", pfn=pfn, found="a segment met before", expected="the end")
        seen.add(pfn)
        segment, following = read_segment(ram, pfn, live.tree_id)
        _require_inside(allowed, pfn, segment.pages, "Segment", "size", pfn)
        if before is None and not segment.base <= base.position <= segment.base + segment.room:
            raise FormatError("Segment", "base", pfn=pfn, found=segment.base, expected=f"before {base.position}")
        if before is not None and not before.base <= segment.base <= before.base + before.room:
            raise FormatError("Segment", "base", pfn=pfn, found=segment.base, expected=f"after {before.base}")
        if segment.base > live.tail:
            return  # it was begun, and nothing in it counts
        yield segment
        if not following or pfn == last:
            return
        pfn, before = following, segment


def _require_inside(allowed: Spans, pfn: int, count: int, record: str, field: str, at: int) -> None:
    if Spans([(pfn, pfn + count)]) - allowed:
        raise FormatError(record, field, pfn=at, found=f"pfn {pfn:x}", expected="frames in this tree's page blocks")


def chunks(ram: Ram, log: Opened, tail: int | None = None) -> Iterator[Chunk]:
    """Yield every chunk from the base's position to the tail, or to an earlier `tail`, which must be an end, too."""
    position, tail = log.base.position, log.live.tail if tail is None else tail
    last = True
    ends = [one.base for one in log.segments[1:]] + [tail]
    for segment, end in zip(log.segments, ends, strict=True):
        end = min(end, tail)
        data = memoryview(ram.peek(segment.pfn, segment.pages))
        while position < end:
            chunk = _chunk(data, segment, position, end)
            yield chunk
            position, last = position + CHUNK.size + len(chunk.body), chunk.last
    if position != tail or not last:
        found = position if position != tail else "the middle of a request"
        raise FormatError("Journal", "end", found=found, expected=f"the end of a request at {tail}")


def _chunk(data: memoryview, segment: Segment, position: int, end: int) -> Chunk:
    """Return the chunk at a position; FormatError if it is not whole."""
    at = SEGMENT.size + position - segment.base
    where = f"at position {position}"
    if position + CHUNK.size > end or at + CHUNK.size > len(data):
        raise FormatError("Journal", f"chunk {where}", pfn=segment.pfn, found="cut", expected="a header")
    length, kind, flags, checksum, number, asker = CHUNK.unpack_from(data, at)
    if kind != CHUNK_KIND or flags & ~LAST:
        found = f"kind {kind:#x}, flags {flags:#x}"
        raise FormatError("Journal", f"kind {where}", pfn=_pfn(segment, at), found=found, expected=f"{CHUNK_KIND:#x}")
    if number != position:
        raise FormatError("Journal", f"position {where}", pfn=_pfn(segment, at), found=number, expected=position)
    if length % 8 or length < CHUNK.size or position + length > end or at + length > len(data):
        raise FormatError("Journal", f"length {where}", pfn=_pfn(segment, at), found=length, expected="up to the tail")
    body = bytes(data[at + CHUNK.size : at + length])
    digest = chunk_digest(length, flags, position, asker, body)
    if digest != checksum:
        raise FormatError(
            "Journal", f"checksum {where}", pfn=_pfn(segment, at), found=f"{checksum:016x}", expected=f"{digest:016x}"
        )
    return Chunk(position, asker, bool(flags & LAST), body)


def _pfn(segment: Segment, at: int) -> int:
    return segment.pfn + (at >> PAGE_SHIFT)
