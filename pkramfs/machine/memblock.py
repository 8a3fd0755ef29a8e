# SPDX-License-Identifier: GPL-2.0-or-later
"""memblock: the ranges that are memory, and those that are reserved, before there is any allocator.

Early boot knows two lists of byte ranges, each sorted and without overlaps:

    memory    |████████████████|....|███████████████████████████|     RAM, as the firmware says
    reserved  |..KK......pppp..|....|.......II..pp..pp..........|     ranges that must not be allocated

Free is what is memory and not reserved; no list holds it. To allocate is to find a free place and
reserve it. The lists live from the first look at the firmware map until memory is handed to page
blocks (leases); nobody reads them afterwards.

A region is (base, end, flags, node id). Two regions that touch become one if flags and node agree; a
change of a part of a region cuts it in up to three. To add a range that is partly there adds only the
missing part and leaves the rest as it is; to remove an absent range removes nothing. So calls may be
repeated, and overlap, without harm.

Flags of memory: HOTPLUG (may go away: not allocated from while `movable_node`), MIRROR (preferred
while `mirror`), NOMAP (never allocated from). PRESERVED is a flag of reserved: the last kernel's
pages. Such ranges are not merged with plain reserved neighbours, are cut at the borders of NUMA nodes
(`isolate`) and are never initialised.

Preserved ranges come as one sorted list of up to hundreds of thousands. To reserve them one by one
would be quadratic, and a list that grows half-way could be put into memory that is preserved but not
yet reserved. So `merge_preserved` makes the new list in one linear pass and swaps it in, or changes
nothing and names the two ranges that overlap (EBUSY); `find_beside` finds room that neither list has.

`find` searches from the top of memory down, or from the bottom up (`bottom_up`), for an aligned place
inside [minimum, maximum) and below `limit`, on one node if asked. A place never crosses the border
of two memory regions, so it is on one node. Page 0 is never handed out: 0 means "none".

Columns are numpy arrays: an operation is a handful of array passes, whatever the number of pages,
and its cost does not depend on the size of RAM.

Kernel: mm/memblock.c, include/linux/memblock.h; arch/x86/mm/numa.c (numa_isolate_memblocks);
        patches 11, 12 and 28 to 31
"""

import errno
from collections.abc import Iterable, Iterator
from enum import IntFlag
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pkramfs.errors import ExhaustedError, PkramError
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.spans import U64, Spans, distinct, first_place
from pkramfs.units import PAGE_SIZE, format_size, round_down, round_up

NO_NODE = -1
ANYWHERE = 1 << 62
"""Above every address: no limit."""


class Flag(IntFlag):
    """A property of a region."""

    NONE = 0
    HOTPLUG = 1
    MIRROR = 2
    NOMAP = 4
    PRESERVED = 8


class Region(NamedTuple):
    """One range of bytes, [base, end)."""

    base: int
    end: int
    flags: Flag = Flag.NONE
    nid: int = NO_NODE

    @property
    def size(self) -> int:
        """Return the size of the region."""
        return self.end - self.base

    def __str__(self) -> str:
        node = "" if self.nid == NO_NODE else f" on node {self.nid}"
        return f"[{self.base:#018x}-{self.end - 1:#018x}], {self.size:#x} bytes{node} flags: {self.flags:#x}"


class Regions:
    """One of the two lists (the kernel's memblock_type)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._set([], [], [], [])

    def _set(self, bases: Any, ends: Any, flags: Any, nids: Any) -> None:
        self.bases: U64 = np.asarray(bases, dtype=np.uint64)
        self.ends: U64 = np.asarray(ends, dtype=np.uint64)
        self.flags: npt.NDArray[np.uint8] = np.asarray(flags, dtype=np.uint8)
        self.nids: npt.NDArray[np.int16] = np.asarray(nids, dtype=np.int16)

    def __len__(self) -> int:
        return len(self.bases)

    def __iter__(self) -> Iterator[Region]:
        columns = (self.bases.tolist(), self.ends.tolist(), self.flags.tolist(), self.nids.tolist())
        return (Region(base, end, Flag(flags), nid) for base, end, flags, nid in zip(*columns, strict=True))

    @property
    def total(self) -> int:
        """Return the number of bytes in the list."""
        return int((self.ends - self.bases).sum())

    @property
    def spans(self) -> Spans:
        """Return the bytes in the list as a set, without flags and nodes."""
        return Spans.from_arrays(self.bases, self.ends)

    def marked(self, flag: Flag) -> Spans:
        """Return the bytes that have a flag."""
        chosen = (self.flags & flag) != 0
        return Spans.from_arrays(self.bases[chosen], self.ends[chosen])

    def on_node(self, nid: int, flag: Flag = Flag.NONE) -> Spans:
        """Return the bytes of one node, all or those that have a flag."""
        chosen = (self.nids == nid) & ((self.flags & flag) == flag)
        return Spans.from_arrays(self.bases[chosen], self.ends[chosen])

    def add(self, spans: Spans, flags: Flag = Flag.NONE, nid: int = NO_NODE) -> None:
        """Add those bytes of `spans` that are missing.

        Kernel: memblock_add_range()
        """
        new = spans - self.spans
        self._sorted(
            np.concatenate((self.bases, new.starts)),
            np.concatenate((self.ends, new.ends)),
            np.concatenate((self.flags, np.full(len(new), flags, np.uint8))),
            np.concatenate((self.nids, np.full(len(new), nid, np.int16))),
        )
        self._merge()

    def _sorted(self, bases: U64, ends: U64, flags: Any, nids: Any) -> None:
        order = np.argsort(bases, kind="stable")  # of two ascending lists: one linear merge
        self._set(bases[order], ends[order], flags[order], nids[order])

    def remove(self, base: int, end: int) -> None:
        """Remove [base, end), cutting the regions at its ends.

        Kernel: memblock_remove_range()
        """
        self._keep(~self._isolate(base, end))

    def _keep(self, chosen: npt.NDArray[np.bool_]) -> None:
        self._set(self.bases[chosen], self.ends[chosen], self.flags[chosen], self.nids[chosen])

    def change(self, base: int, end: int, *, put: Flag = Flag.NONE, drop: Flag = Flag.NONE, nid: Any = None) -> None:
        """Change flags, or the node, of regions within [base, end).

        Kernel: memblock_setclr_flag(), memblock_set_node()
        """
        inside = self._isolate(base, end)
        self.flags[inside] = self.flags[inside] & ~np.uint8(drop) | np.uint8(put)
        if nid is not None:
            self.nids[inside] = nid
        self._merge()

    def _isolate(self, base: int, end: int) -> npt.NDArray[np.bool_]:
        """Cut at both ends of [base, end); return a mask of the regions inside.

        Kernel: memblock_isolate_range()
        """
        if end <= base:
            return np.zeros(len(self), dtype=np.bool_)
        self.cut([base, end])
        return (self.bases >= np.uint64(base)) & (self.ends <= np.uint64(end))

    def cut(self, addresses: Iterable[int]) -> None:
        """Make every address inside a region the border of two."""
        at = distinct(np.array(list(addresses), dtype=np.uint64))
        # owner: the last region that begins at or below each address; inside: the address cuts it. Shape: (addresses,).
        owner = np.searchsorted(self.bases, at, side="right") - 1
        inside = owner >= 0
        inside[inside] = (self.bases[owner[inside]] < at[inside]) & (at[inside] < self.ends[owner[inside]])
        if not inside.any():
            return
        # Every cut is the base of a new region, which has the rest from the region that it cuts. Shape: (new regions,).
        bases = np.sort(np.concatenate((self.bases, at[inside])), kind="stable")
        owner = np.searchsorted(self.bases, bases, side="right") - 1
        following = np.concatenate((bases[1:], [np.uint64(ANYWHERE)]))
        self._set(bases, np.minimum(self.ends[owner], following), self.flags[owner], self.nids[owner])

    def _merge(self) -> None:
        """Merge neighbours that touch and have the same flags and node.

        Kernel: memblock_merge_regions()
        """
        if len(self) < 2:
            return
        # apart: the border after each region stays, because the next does not touch or differs. Shape: (regions - 1,).
        apart = (
            (self.bases[1:] != self.ends[:-1]) | (self.flags[1:] != self.flags[:-1]) | (self.nids[1:] != self.nids[:-1])
        )
        first = np.concatenate(([True], apart))
        last = np.concatenate((apart, [True]))
        self._set(self.bases[first], self.ends[last], self.flags[first], self.nids[first])

    def merged_with(self, ranges: Spans, flags: Flag) -> "Regions":
        """Return this list with disjoint ranges added, in one linear pass, none merged. EBUSY names an overlap."""
        made = Regions(self.name)
        made._sorted(
            np.concatenate((self.bases, ranges.starts)),
            np.concatenate((self.ends, ranges.ends)),
            np.concatenate((self.flags, np.full(len(ranges), flags, np.uint8))),
            np.concatenate((self.nids, np.full(len(ranges), NO_NODE, np.int16))),
        )
        overlaps = np.flatnonzero(made.ends[:-1] > made.bases[1:])
        if len(overlaps):
            pair = list(made)[int(overlaps[0]) : int(overlaps[0]) + 2]
            preserved, other = sorted(pair, key=lambda region: not region.flags & flags)
            raise PkramError(f"preserved memory {preserved} overlaps what is reserved already: {other}", errno.EBUSY)
        return made


class Memblock:
    """The two lists, and the search for memory that is not reserved."""

    def __init__(self, *, bottom_up: bool = False) -> None:
        self.memory, self.reserved = Regions("memory"), Regions("reserved")
        self.bottom_up = bottom_up
        self.limit = ANYWHERE
        """Nothing is allocated at or above this address."""
        self.movable_node = self.mirror = False

    @classmethod
    def of(cls, usable: Spans) -> "Memblock":
        """Make the lists of a machine from its usable pages; nodes are not known yet.

        Kernel: e820__memblock_setup()
        """
        made = cls()
        made.memory.add(usable.scale(PAGE_SIZE))
        return made

    # -- the lists ------------------------------------------------------------------------------

    def add(self, base: int, size: int, nid: int = NO_NODE, flags: Flag = Flag.NONE) -> None:
        """Add [base, base+size) to memory."""
        self.memory.add(Spans([(base, base + size)]), flags, nid)

    def remove(self, base: int, size: int) -> None:
        """Remove [base, base+size) from memory."""
        self.memory.remove(base, base + size)

    def reserve(self, base: int, size: int, nid: int = NO_NODE, flags: Flag = Flag.NONE) -> None:
        """Reserve [base, base+size); it need not be memory."""
        self.reserved.add(Spans([(base, base + size)]), flags, nid)

    def reserve_pages(self, pages: Spans) -> None:
        """Reserve many ranges, given in pages."""
        self.reserved.add(pages.scale(PAGE_SIZE))

    def free(self, base: int, size: int) -> None:
        """Free [base, base+size)."""
        self.reserved.remove(base, base + size)

    def mark(self, base: int, size: int, flag: Flag) -> None:
        """Mark memory in [base, base+size) as HOTPLUG, MIRROR or NOMAP."""
        self.memory.change(base, base + size, put=flag)

    def clear(self, base: int, size: int, flag: Flag) -> None:
        """Clear a flag of memory in [base, base+size)."""
        self.memory.change(base, base + size, drop=flag)

    def set_node(self, base: int, size: int, nid: int) -> None:
        """Set the NUMA node of memory in [base, base+size)."""
        self.memory.change(base, base + size, nid=nid)

    def set_nodes(self, hardware: FirmwareMap) -> None:
        """Set the node of all memory; memory that the firmware does not name is on node 0.

        Kernel: numa_register_memblks()
        """
        self.memory.change(0, ANYWHERE, nid=0)
        for nid, pages in hardware.node_spans().items():
            for base, end in pages.scale(PAGE_SIZE) if nid else ():
                self.memory.change(base, end, nid=nid)

    def cap(self, base: int, size: int) -> None:
        """Forget all memory outside of [base, base+size), as mem= has it.

        Kernel: memblock_cap_memory_range()
        """
        self.memory.remove(0, base)
        self.memory.remove(base + size, ANYWHERE)

    def trim(self, align: int) -> None:
        """Trim every region of memory to multiples of `align`; a region without one is removed.

        Kernel: memblock_trim_memory()
        """
        for region in list(self.memory):
            base, end = round_up(region.base, align), round_down(region.end, align)
            self.memory.remove(region.base, min(base, region.end))
            self.memory.remove(max(end, region.base), region.end)

    def is_memory(self, base: int, size: int = 1) -> bool:
        """Return True if all of [base, base+size) is memory."""
        return self.memory.spans.covers(base, base + size)

    def is_reserved(self, base: int, size: int = 1) -> bool:
        """Return True if all of [base, base+size) is reserved."""
        return self.reserved.spans.covers(base, base + size)

    def is_preserved(self, base: int, size: int = 1) -> bool:
        """Return True if any of [base, base+size) was preserved by the last kernel."""
        return self.reserved.marked(Flag.PRESERVED).overlaps(base, base + size)

    def overlaps(self, base: int, size: int) -> bool:
        """Return True if any of [base, base+size) is reserved."""
        return self.reserved.spans.overlaps(base, base + size)

    # -- preserved ranges -----------------------------------------------------------------------

    def merge_preserved(self, preserved: Spans) -> None:
        """Reserve the last kernel's ranges (in bytes), all or none.

        Kernel: patch 11, memblock_merge_preserved()
        """
        self.reserved = self.reserved.merged_with(preserved, Flag.PRESERVED)

    def isolate(self) -> None:
        """Cut reserved ranges at the borders of NUMA nodes, and set the node of each part.

        Kernel: patches 28 and 29, numa_isolate_memblocks()
        """
        for region in list(self.memory):
            if region.nid != NO_NODE:
                self.reserved.change(region.base, region.end, nid=region.nid)

    def find_beside(self, preserved: Spans, size: int, align: int = PAGE_SIZE) -> int | None:
        """Return the highest free place that is outside of `preserved` (bytes), too, before that is merged."""
        free = self.free_spans() - preserved
        return free.clip(PAGE_SIZE, self.limit).first_fit(size, align, top_down=True)

    # -- the search -----------------------------------------------------------------------------

    def free_spans(self, nid: int | None = None) -> Spans:
        """Return the bytes that are memory and not reserved, on one node or on all; never those of NOMAP."""
        chosen = self._allowed(nid, mirror=False)
        return Spans.from_arrays(self.memory.bases[chosen], self.memory.ends[chosen]) - self.reserved.spans

    def free_areas(self, nid: int | None = None, *, mirror: bool = False) -> tuple[U64, U64]:
        """Return starts and ends of free areas, cut where one region of memory ends and the next begins.

        Kernel: for_each_free_mem_range()
        """
        # Gaps between reserved ranges, the first from 0, the last to ANYWHERE. Shape: (reserved ranges + 1,).
        taken = self.reserved.spans
        gap_starts = np.concatenate((np.zeros(1, np.uint64), taken.ends))
        gap_ends = np.concatenate((taken.starts, np.full(1, ANYWHERE, np.uint64)))
        starts, ends = [], []
        for at in np.flatnonzero(self._allowed(nid, mirror=mirror)).tolist():
            # Gaps first … last-1 meet this region of memory.
            base, end = self.memory.bases[at], self.memory.ends[at]
            first = int(np.searchsorted(gap_ends, base, side="right"))
            last = int(np.searchsorted(gap_starts, end, side="left"))
            starts.append(np.maximum(gap_starts[first:last], base))
            ends.append(np.minimum(gap_ends[first:last], end))
        empty = np.empty(0, dtype=np.uint64)
        return np.concatenate([empty, *starts]), np.concatenate([empty, *ends])

    def _allowed(self, nid: int | None, *, mirror: bool) -> npt.NDArray[np.bool_]:
        """Return a mask of the regions of memory that may be allocated from.

        Kernel: should_skip_region()
        """
        flags = self.memory.flags
        chosen: npt.NDArray[np.bool_] = (flags & Flag.NOMAP) == 0
        if nid not in (None, NO_NODE):
            chosen &= self.memory.nids == nid
        if self.movable_node:
            chosen &= (flags & Flag.HOTPLUG) == 0
        if mirror:
            chosen &= (flags & Flag.MIRROR) != 0
        return chosen

    def find(
        self,
        size: int,
        align: int = PAGE_SIZE,
        *,
        minimum: int = 0,
        maximum: int = ANYWHERE,
        nid: int | None = None,
        bottom_up: bool | None = None,
    ) -> int | None:
        """Find a free aligned place for `size` bytes in [minimum, maximum); return None without one.

        Kernel: memblock_find_in_range_node()
        """
        for mirror in (True, False) if self.mirror else (False,):
            areas = self.free_areas(nid, mirror=mirror)
            low, high = max(minimum, PAGE_SIZE), min(maximum, self.limit)
            up = self.bottom_up if bottom_up is None else bottom_up
            place = _fit(*areas, low, high, size, align, bottom_up=up)
            if place is not None:
                return place
        return None

    def allocate(
        self,
        size: int,
        align: int = PAGE_SIZE,
        *,
        minimum: int = 0,
        maximum: int = ANYWHERE,
        nid: int | None = None,
        exact: bool = False,
        bottom_up: bool | None = None,
    ) -> int:
        """Find and reserve. Try other nodes unless `exact`, then lower addresses; else raise ExhaustedError (ENOMEM).

        Kernel: memblock_alloc_range_nid(), memblock_alloc_internal()
        """
        nodes = [nid] if exact or nid in (None, NO_NODE) else [nid, None]
        for low in dict.fromkeys((minimum, 0)):
            for node in nodes:
                base = self.find(size, align, minimum=low, maximum=maximum, nid=node, bottom_up=bottom_up)
                if base is not None:
                    self.reserve(base, size)
                    return base
        where = "" if nid is None else f" on node {nid}" if exact else f" (node {nid} first)"
        raise ExhaustedError(
            f"early boot: no {format_size(size)} aligned to {format_size(align)} are free{where}; "
            f"{format_size(self.free_spans().total)} are, in {len(self.free_areas()[0])} pieces",
            errno.ENOMEM,
        )

    def dump(self) -> list[str]:
        """Return both lists as lines for people.

        Kernel: memblock_dump_all()
        """
        lines = [f"memory size = {self.memory.total:#x} reserved size = {self.reserved.total:#x}"]
        for regions in (self.memory, self.reserved):
            lines.append(f"{regions.name}.cnt = {len(regions)}")
            lines += [f"{regions.name}[{number}] {region}" for number, region in enumerate(regions)]
        return lines


def _fit(starts: U64, ends: U64, low: int, high: int, size: int, align: int, *, bottom_up: bool) -> int | None:
    """Return the first (or last) aligned place for `size` bytes in areas clipped to [low, high), or None."""
    if high <= low or size <= 0:
        return None
    starts, ends = np.maximum(starts, np.uint64(low)), np.minimum(ends, np.uint64(high))
    return first_place(starts, ends, size, align, top_down=not bottom_up)
