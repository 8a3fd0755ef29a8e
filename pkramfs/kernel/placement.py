# SPDX-License-Identifier: GPL-2.0-or-later
"""Places for the parts of a new kernel: one pure function, asked before the old one dies and again in boot.

    |..pp..[initrd]..[kernel].....pp....[reserve][scratch]|
       ^       ^         ^              top down, whole page blocks
       |       |         KASLR slot, clear of all others
       |       where kexec loaded it; freed when boot is done
       preserved: the new kernel must not even share a page block with it

Everything that a kernel keeps lies in page blocks without preserved pages, because a block belongs to
one owner. Only the lease table prefers the odd pages beside a hole (the second half of the first MiB
block), which could not be leased to anybody.

Two steps, each over a memblock of its own:

    place      finds room: preserved page blocks are reserved first, whole; nodes are not known yet
    reserve    what early boot holds in the end: kernel, tables, loaded segments, and the preserved
               ranges merged in one pass, cut at NUMA borders. An overlap is EBUSY and names both

The kexec planner asks for both (`arrange`) with what is preserved now; boot with what it finds. The
same arguments give the same answer: a lack of room is found while the old kernel can still refuse,
and a repeated boot puts everything in the same places.

Kernel: arch/x86/boot/compressed/kaslr.c, setup_arch() up to initmem_init(); KHO's scratch areas;
        mm/pkram.c (pkram_reserve), patches 11, 12 and 28 to 30
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pkramfs.errors import ExhaustedError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import kaslr
from pkramfs.kernel.kernelrecord import Range
from pkramfs.kernel.nvram import ImageInfo, Pending
from pkramfs.kernel.segments import LOWEST_PFN, Segment, destinations
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.memblock import Memblock
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, MIB, PAGE_SHIFT, PAGE_SIZE, format_size, pages, plural, round_up

_RESERVE_SHARE = 32768
"""One reserve block (130,000 ranges) for every 64 GiB of RAM, and one more."""
_KASLR_CEILING = 512 * MIB
"""The lowest slot is the preferred address or this, whichever is lower."""


@dataclass(frozen=True)
class Placement:
    """Page ranges of the new kernel's parts, and what KASLR had to choose from."""

    kernel: Range
    slots: int
    table: Range
    reserve: Range | None
    crash: Range | None
    scratch: Range | None

    @property
    def named(self) -> dict[str, Range]:
        """Return the ranges that stay reserved while the kernel lives, by name."""
        found = {"Kernel image": self.kernel, "Lease table": self.table}
        later = {"PKRAM reserve": self.reserve, "Crash kernel": self.crash, "Scratch": self.scratch}
        return found | {name: part for name, part in later.items() if part}

    @property
    def spans(self) -> Spans:
        """Return all pages that stay reserved while the kernel lives."""
        return Spans(self.named.values())


def usable_memory(hardware: FirmwareMap, pending: Pending) -> Spans:
    """Return the pages that a kernel may use: up to mem=, or for a crash kernel its own window."""
    if pending.crash:
        return Spans([pending.crash])
    usable, limit = hardware.usable, words.memory_limit(pending.cmdline)
    return usable if limit is None else usable.clip(0, limit >> PAGE_SHIFT)


def block_count(hardware: FirmwareMap) -> int:
    """Count the page blocks from address 0 to the end of RAM, holes included."""
    return -(-hardware.size // (BLOCK_PAGES * PAGE_SIZE))


def blocks_of(spans: Spans) -> Spans:
    """Return the pages of every page block that `spans` touch."""
    return spans.outward(BLOCK_PAGES).scale(BLOCK_PAGES)


def arrange(hardware: FirmwareMap, pending: Pending, preserved: Spans) -> tuple[Placement, Memblock]:
    """Do `place`, then `reserve`: all that can be refused before anything is changed."""
    placed = place(hardware, pending, preserved)
    return placed, reserve(hardware, pending, placed, preserved)


def reserve(hardware: FirmwareMap, pending: Pending, placed: Placement, preserved: Spans) -> Memblock:
    """Return early boot's memory with everything in its place reserved; all else is free."""
    early = Memblock.of(usable_memory(hardware, pending))
    early.reserve_pages(placed.spans | destinations(pending.segments))
    early.merge_preserved(preserved.scale(PAGE_SIZE))
    early.set_nodes(hardware)
    early.isolate()
    return early


def place(hardware: FirmwareMap, pending: Pending, preserved: Spans) -> Placement:
    """Find room for every part of the kernel that `pending` starts; ExhaustedError names a part without room."""
    usable = usable_memory(hardware, pending)
    if pending.crash:
        return _place_crash(block_count(hardware), pending, usable)
    if lost := preserved - usable:
        raise ExhaustedError(f"{plural(lost.total, 'preserved page')} lie outside of the memory that mem= allows")
    outside = Memblock.of(usable)
    outside.merge_preserved(blocks_of(preserved).scale(PAGE_SIZE))
    outside.reserve(0, LOWEST_PFN * PAGE_SIZE)
    # scratch comes first: the loaded segments may lie in it
    scratch = _reserve(outside, pending, "scratch", pending.scratch)
    outside.reserve_pages(destinations(pending.segments))
    crash = _reserve(outside, pending, "crashkernel", None)
    inside = _inside(scratch, pending) if scratch else outside
    enough = scratch_pages(pending, block_count(hardware)) if scratch else 0
    kernel, slots = _place_kernel(pending, inside, preserved, hardware.seed, enough)
    for room in (inside, outside):
        room.reserve_pages(Spans([kernel]))
    table = _place_table(block_count(hardware), usable, inside, outside)
    outside.reserve_pages(Spans([table]))
    off = words.pkram_off(pending.cmdline)
    reserved = None if off else _place_reserve(block_count(hardware), outside)
    return Placement(kernel, slots, table, reserved, crash, scratch)


def _inside(scratch: Range, pending: Pending) -> Memblock:
    """Return scratch as a memory of its own, less the segments loaded in it."""
    room = Memblock.of(Spans([scratch]))
    room.reserve_pages(destinations(pending.segments))
    return room


def _find(room: Memblock, count: int, align: int = 1, *, low: int = 0, bottom_up: bool = False) -> Range | None:
    """Find room for `count` pages; this module counts pages, memblock bytes."""
    at = room.find(count * PAGE_SIZE, align * PAGE_SIZE, minimum=low * PAGE_SIZE, bottom_up=bottom_up)
    return None if at is None else (at // PAGE_SIZE, at // PAGE_SIZE + count)


def _free(room: Memblock) -> Spans:
    return room.free_spans().inward(PAGE_SIZE)


def _place_crash(blocks: int, pending: Pending, room: Spans) -> Placement:
    """Place a crash kernel where it was loaded, and its lease table beside it."""
    kernel = next((s for s in pending.segments if s.name == "kernel"), None)
    at = (room - destinations(pending.segments)).first_fit(pages(blocks * 8))
    if kernel is None or at is None:
        raise ExhaustedError("no room for a crash kernel and its lease table: boot with a larger crashkernel=")
    return Placement((kernel.pfn, kernel.end), 0, (at, at + pages(blocks * 8)), None, None, None)


def _reserve(room: Memblock, pending: Pending, name: str, kept: Range | None) -> Range | None:
    """Set aside what `crashkernel=` or `scratch=` asks for: at its address, where it was, or as high as possible."""
    wanted = words.reservation(pending.cmdline, name)
    if wanted is None:
        return None
    found: Range | None
    count = round_up(pages(wanted.size), BLOCK_PAGES)
    if wanted.start is not None:
        if not room.is_memory(wanted.start, count * PAGE_SIZE) or room.overlaps(wanted.start, count * PAGE_SIZE):
            raise ExhaustedError(f"{name}={words.get(pending.cmdline, name)}: that memory is not RAM, or is in use")
        found = wanted.start >> PAGE_SHIFT, (wanted.start >> PAGE_SHIFT) + count
    elif kept and kept[1] - kept[0] == count:
        found = kept  # the loaded segments lie in it, and no preserved pages
    else:
        found = _find(room, count, BLOCK_PAGES)
    if found is None:
        raise ExhaustedError(f"{name}={words.get(pending.cmdline, name)}: no free range of {format_size(wanted.size)}")
    room.reserve_pages(Spans([found]))
    return found


def scratch_pages(pending: Pending, blocks: int) -> int:
    """Return how much scratch gives this kernel room to be loaded, to run, and to have its table."""
    align = max(BLOCK_PAGES, pending.image.align // PAGE_SIZE)
    runs = round_up(pages(pending.image.init_size), align)
    lies = sum(round_up(s.pages, max(BLOCK_PAGES, s.align)) for s in pending.segments)
    return runs + lies + round_up(pages(blocks * 8), BLOCK_PAGES)


def _place_kernel(pending: Pending, room: Memblock, preserved: Spans, seed: int, scratch: int) -> tuple[Range, int]:
    """Place the kernel: without KASLR where it is loaded or prefers to be, else in a random slot.

    `scratch` is how many pages of scratch would be enough, if `room` is scratch; else 0.
    """
    image, size = pending.image, pages(pending.image.init_size)
    if not image.relocatable or words.has(pending.cmdline, "nokaslr"):
        return _place_fixed(pending.segments, image, room, preserved), 0
    # a block belongs to one owner, so a kernel starts and ends at block borders
    align = max(BLOCK_PAGES, image.align >> PAGE_SHIFT)
    low = min(image.preferred, _KASLR_CEILING) >> PAGE_SHIFT
    free = _free(room)
    slots = kaslr.find_slots(free, round_up(size, BLOCK_PAGES), align, minimum=low)
    at = kaslr.choose(slots, seed, pending.generation)
    if at is None:
        what = f"KASLR: no slot for a kernel of {format_size(size * PAGE_SIZE)} in "
        if scratch:
            said, enough = words.get(pending.cmdline, "scratch"), scratch * PAGE_SIZE // MIB
            raise ExhaustedError(f"{what}scratch={said}: scratch={enough}M is enough")
        where = "; append nokaslr to run it where it is loaded" if pending.segments else ""
        raise ExhaustedError(f"{what}{plural(len(free), 'free range')}{where}")
    return (at, at + size), slots.total


def _place_fixed(segments: Sequence[Segment], image: ImageInfo, room: Memblock, preserved: Spans) -> Range:
    """Place the kernel where kexec loaded it, or for a cold boot at or above the preferred address."""
    size = pages(image.init_size)
    for segment in segments:
        if segment.name == "kernel":
            if blocks_of(preserved).overlaps(segment.pfn, segment.end):
                raise ExhaustedError(
                    f"the kernel at pfn {segment.pfn:x} shares a page block with preserved pages: load it elsewhere"
                )
            return segment.pfn, segment.end
    align = max(BLOCK_PAGES, image.align >> PAGE_SHIFT)
    found = _find(room, size, align, low=image.preferred >> PAGE_SHIFT, bottom_up=True)
    if found is None or (not image.relocatable and found[0] != image.preferred >> PAGE_SHIFT):
        raise ExhaustedError(f"no room for a kernel of {format_size(size * PAGE_SIZE)} at {image.preferred:#x}")
    return found


def _place_table(blocks: int, usable: Spans, inside: Memblock, outside: Memblock) -> Range:
    """Place the lease table: in pages that no lease could use if there are enough, else high in free memory."""
    count = pages(blocks * 8)
    odd = (_free(outside) - usable.inward(BLOCK_PAGES).scale(BLOCK_PAGES)).first_fit(count)
    if odd is not None:
        return odd, odd + count
    whole = _find(inside, round_up(count, BLOCK_PAGES), BLOCK_PAGES)
    if whole is None:
        raise ExhaustedError(f"no room for a lease table of {format_size(count * PAGE_SIZE)}")
    return whole[0], whole[0] + count


def _place_reserve(blocks: int, room: Memblock) -> Range:
    """Place whole page blocks for the super block and, when this kernel dies, its region list."""
    count = (1 + blocks // _RESERVE_SHARE) * BLOCK_PAGES
    found = _find(room, count, BLOCK_PAGES)
    if found is None:
        raise ExhaustedError(f"no room for PKRAM's reserve of {format_size(count * PAGE_SIZE)}")
    return found
