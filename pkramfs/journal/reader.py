# SPDX-License-Identifier: GPL-2.0-or-later
"""Read a log: every committed chunk, each checked.

Nothing is trusted. The segments must lie in the tree's page blocks, each position must follow the one before, each
checksum must match, and the last chunk must end at the tail. A violation is a FormatError with position and field.

Kernel: fs/jbd2/recovery.c (do_one_pass)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from pkramfs.errors import FormatError
from pkramfs.journal.layout import (
    CHUNK,
    CHUNK_KIND,
    COVERED,
    LAST,
    OLD_KIND,
    SEGMENT,
    Figures,
    Live,
    Segment,
    chunk_digest,
    old_digest,
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


Chunk = tuple[int, int, int, bytes]
"""Position, who asked, 1 for the last chunk of a request, and behind AHEAD bytes its records, or a part of them."""
AHEAD = CHUNK.size - COVERED


class Opened(NamedTuple):
    """A log that was opened for reading: its live page, its base page, and its segments up to the tail.

    A sealed log has `figures`, which its tree must have, and a live page made from the seal, because the real one may
    have changed since.
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
    """Open a sealed log; all of it must lie in `allowed`, the frames of its node."""
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
            return  # a new segment without committed chunks
        yield segment
        if not following or pfn == last:
            return
        pfn, before = following, segment


def _require_inside(allowed: Spans, pfn: int, count: int, record: str, field: str, at: int) -> None:
    if Spans([(pfn, pfn + count)]) - allowed:
        raise FormatError(record, field, pfn=at, found=f"pfn {pfn:x}", expected="frames in this tree's page blocks")


def chunks(ram: Ram, log: Opened, tail: int | None = None, start: int | None = None) -> Iterator[Chunk]:
    """Yield every chunk from the base's position, or from `start`, the end of a request, to the tail, or to an earlier
    `tail`, which must be an end, too. The checksum is `chunk_digest`."""
    position, tail = log.base.position if start is None else start, log.live.tail if tail is None else tail
    flags, head, unpack, digest, old = LAST, CHUNK.size, CHUNK.unpack_from, xxhash.xxh3_64_intdigest, _old_digest
    ends = [one.base for one in log.segments[1:]] + [tail]
    for segment, end in zip(log.segments, ends, strict=True):
        if end <= position < tail:
            continue
        data = ram.peek(segment.pfn, segment.pages)
        ahead = SEGMENT.size - segment.base
        end = min(end, tail)
        most = min(end, len(data) - ahead)
        while position < end:
            at = ahead + position
            if position + head > most:
                raise _damaged("chunk", segment, position, "cut", "a header")
            length, kind, flags, checksum, number, asker = unpack(data, at)
            after, covered = position + length, data[at + COVERED : at + length]
            if (
                after > most or length < head or length & 7 or flags & ~LAST or number != position
                or (digest(covered, flags) if kind == CHUNK_KIND else old(kind, length, flags, covered)) != checksum
            ):  # fmt: skip
                raise _refused(segment, position, unpack(data, at), covered, most)
            yield position, asker, flags, covered
            position = after
    if position != tail or not flags:
        found = position if position != tail else "the middle of a request"
        raise FormatError("Journal", "end", found=found, expected=f"the end of a request at {tail}")


def _old_digest(kind: int, length: int, flags: int, covered: bytes) -> int:
    """Return the checksum that a chunk of version 1 must have, -1 if it is no such chunk."""
    position, asker = int.from_bytes(covered[:8], "little"), int.from_bytes(covered[8:16], "little")
    return old_digest(length, flags, position, asker, covered[16:]) if kind == OLD_KIND else -1


def _refused(segment: Segment, position: int, head: tuple[int, ...], covered: bytes, end: int) -> FormatError:
    """Return the error for a faulty chunk, which reaches to `end` at most."""
    length, kind, flags, checksum, number, _ = head
    if kind not in (CHUNK_KIND, OLD_KIND) or flags & ~LAST:
        expected = f"{CHUNK_KIND:#x} or {OLD_KIND:#x}"
        return _damaged("kind", segment, position, f"kind {kind:#x}, flags {flags:#x}", expected)
    if number != position:
        return _damaged("position", segment, position, number, position)
    if length % 8 or length < CHUNK.size or position + length > end:
        return _damaged("length", segment, position, length, "up to the tail")
    digest = chunk_digest(covered, flags) if kind == CHUNK_KIND else _old_digest(kind, length, flags, covered)
    return _damaged("checksum", segment, position, f"{checksum:016x}", f"{digest:016x}")


def _damaged(field: str, segment: Segment, position: int, found: object, expected: object) -> FormatError:
    pfn = segment.address(position) >> PAGE_SHIFT
    return FormatError("Journal", f"{field} at position {position}", pfn=pfn, found=found, expected=expected)
