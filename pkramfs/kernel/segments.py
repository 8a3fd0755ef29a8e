# SPDX-License-Identifier: GPL-2.0-or-later
"""Segments: the pieces of the next kernel, each with a source and a destination in RAM.

    kernel      the image                        aligned as it asks, room for its init size
    initrd      the file given with --initrd
    cmdline     the command line, NUL-terminated
    params      boot parameters: the setup header with the addresses of the two above
    purgatory   a list of all others with their SHA-256: checked before the kernel is entered

A segment has `size` bytes to copy and `pages` pages that are its own (the rest is zero). With -s
the destinations are found here, between pages that must not be touched, from the top of memory down.
With -c, as with kexec_load, the user's limits and addresses count. Only the check afterwards looks at
preserved pages, and its refusal lists the owners of those in the way.

Kernel: include/linux/kexec.h (struct kexec_segment), kernel/kexec_file.c (locate_mem_hole_top_down),
        kernel/kexec_core.c (sanity_check_segment_list), patches 16 and 18
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from typing import Any

from pkramfs import schema
from pkramfs.errors import ConflictError, ExhaustedError
from pkramfs.spans import Spans
from pkramfs.units import MIB, PAGE_SHIFT, PAGE_SIZE, format_size, pages, plural

LOWEST_PFN = MIB >> PAGE_SHIFT
"""Nothing is placed in the first MiB: firmware and old hardware use it."""

_FILE = re.compile(r"(?!\.)[^/]*")
_SHA256 = re.compile("[0-9a-f]{0,64}")
_MOST_SHOWN = 20
"""Ranges of one owner that a refusal lists: a tree may have a hundred thousand."""


@dataclass(frozen=True)
class Segment:
    """One piece: `file` in the staging directory goes to page `pfn`; 0 is not placed yet."""

    name: str
    file: str
    size: int
    pages: int
    align: int = 1
    pfn: int = 0
    sha256: str = ""
    source: str = ""
    """A path or `builtin`, as the user said; empty for a segment that the loader makes."""

    @property
    def end(self) -> int:
        """Return the page after the last one."""
        return self.pfn + self.pages

    def describe(self) -> str:
        """Describe the segment in one line: its source, size and destination."""
        what = f"{self.name} ({self.source or 'made by the loader'}): {format_size(self.size)}"
        where = f"{self.pfn << PAGE_SHIFT:#x}-{(self.end << PAGE_SHIFT) - 1:#x}"
        return f"{what} to {where} (pfn {self.pfn:x}, {plural(self.pages, 'page')})"

    def to_json(self) -> dict[str, Any]:
        """Return the segment as JSON data."""
        return asdict(self)


def declared(frames: int) -> schema.Kind:
    """Declare a list of segments in JSON, for RAM of so many frames."""
    return schema.ListOf(_Declared(frames))


def from_json(items: Iterable[dict[str, Any]]) -> list[Segment]:
    """Make segments from the result of `to_json`."""
    return [Segment(**item) for item in items]


class _Declared(schema.Kind):
    """One segment as `Segment.to_json` gives it, within RAM."""

    expected = "a segment"

    def __init__(self, frames: int) -> None:
        self._object = schema.Object(
            {
                "name": schema.Text(64),
                "file": schema.Text(255, matches=_FILE, meaning="a file's name without a directory"),
                "size": schema.Whole(0, frames << PAGE_SHIFT),
                "pages": schema.Whole(1, frames),
            },
            optional={
                "align": schema.Whole(1, frames),
                "pfn": schema.Whole(0, frames),
                "sha256": schema.Text(matches=_SHA256, meaning="hexadecimal digits, 64 at most"),
                "source": schema.Text(),
            },
            closed=True,
        )
        self._frames = frames

    def read(self, value: Any, at: str = "") -> dict[str, Any]:
        """Return the segment; raise Invalid if it is not within RAM."""
        data = self._object.read(value, at)
        found = Segment(**data)
        if found.end > self._frames:
            raise schema.Invalid(f"{at}.pfn", f"{found.pfn} with {found.pages} pages", f"all within {self._frames}")
        if found.size > found.pages << PAGE_SHIFT:
            raise schema.Invalid(f"{at}.size", f"{found.size} bytes", f"at most its {found.pages} pages")
        return data


def destinations(segments: Iterable[Segment]) -> Spans:
    """Return the pages that segments will be copied to."""
    return Spans((s.pfn, s.end) for s in segments if s.pfn)


def place_all(
    segments: Sequence[Segment],
    rooms: Sequence[Spans],
    *,
    top_down: bool = True,
    remedy: str = "load less",
) -> list[Segment]:
    """Give every segment without a destination one, in the first of `rooms` that has a place for all.

    Rooms go from best to barely acceptable; a kernel that wants a fixed address has it already.
    ExhaustedError names the segment without a place, and the remedy.
    """
    failure: ExhaustedError | None = None
    for room in rooms:
        try:
            return _place(segments, room, top_down)
        except ExhaustedError as error:
            failure = failure or error
    raise ExhaustedError(f"{failure or 'no RAM to load a kernel into'}; {remedy}")


def _place(segments: Sequence[Segment], room: Spans, top_down: bool) -> list[Segment]:
    """Place segments in one room, the largest first: small ones could break the only big hole."""
    room = room.clip(LOWEST_PFN, 1 << 62) - destinations(segments)
    placed: dict[str, Segment] = {}
    for segment in sorted(segments, key=lambda s: -s.pages):
        if not segment.pfn:
            at = room.first_fit(segment.pages, segment.align, top_down=top_down)
            if at is None:
                raise ExhaustedError(_no_hole(segment, room))
            segment = replace(segment, pfn=at)
            room = room - Spans([(segment.pfn, segment.end)])
        placed[segment.name] = segment
    return [placed[s.name] for s in segments]


def _no_hole(segment: Segment, room: Spans) -> str:
    largest = int(room.counts.max()) if room else 0
    aligned = f" aligned to {format_size(segment.align * PAGE_SIZE)}" if segment.align > 1 else ""
    return (
        f"no place for the {segment.name}: {format_size(segment.pages * PAGE_SIZE)}{aligned} wanted, the largest of "
        f"{plural(len(room), 'hole')} is {format_size(largest * PAGE_SIZE)}"
    )


def check_destinations(segments: Sequence[Segment], usable: Spans, owners: dict[str, Spans], remedy: str) -> None:
    """Raise ConflictError unless every segment lies in RAM, apart from the others and from the pages of `owners`."""
    foreign = [s for s in segments if not usable.covers(s.pfn, s.end)]
    pairs = pairwise(sorted(segments, key=lambda s: s.pfn))
    problems = [f"{s.describe()}: not all of it is usable RAM" for s in foreign]
    problems += [f"{b.describe()}: overlaps the {a.name}" for a, b in pairs if b.pfn < a.end]
    problems += conflicts(segments, owners)
    if problems:
        raise ConflictError(
            f"cannot assign requested address: {plural(len(problems), 'conflict')}, "
            f"the first is {problems[0]}; {remedy}",
            problems,
        )


def conflicts(segments: Iterable[Segment], owners: dict[str, Spans]) -> list[str]:
    """Return a line for every range of an owner's pages in a destination; of many ranges only the first."""
    found = []
    for segment in segments:
        for owner, spans in owners.items():
            hit = Spans([(segment.pfn, segment.end)]) & spans
            for start, end in islice(hit, _MOST_SHOWN):
                where = f"{start << PAGE_SHIFT:#x}-{(end << PAGE_SHIFT) - 1:#x} ({plural(end - start, 'page')})"
                found.append(f"{segment.name} at {segment.pfn << PAGE_SHIFT:#x}: {where} belongs to {owner}")
            if len(hit) > _MOST_SHOWN:
                rest = plural(len(hit) - _MOST_SHOWN, "more range")
                found.append(
                    f"{segment.name} at {segment.pfn << PAGE_SHIFT:#x}: {rest} of {owner}, "
                    f"{plural(hit.total, 'page')} in all"
                )
    return found


def page_count(size: int) -> int:
    """Return how many pages a segment of `size` bytes has; an empty file has one, so that it has an address."""
    return max(1, pages(size))
