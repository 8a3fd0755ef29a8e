# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a new kernel's parts go."""

import errno
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkramfs.errors import ExhaustedError, PkramError
from pkramfs.kernel import nvram, placement
from pkramfs.kernel.nvram import ImageInfo, Pending
from pkramfs.kernel.segments import Segment
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.memblock import Flag
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, GIB, MIB, TIB

IMAGE = ImageInfo("builtin", "builtin", "1", 4 * MIB, 2 * MIB, 16 * MIB, True)
BOOT = Pending(nvram.KEXEC, 2, "ro", IMAGE)
SMALL = FirmwareMap.default(128 * MIB, seed=3)


def loaded(pfn: int, pages: int = 1024) -> Segment:
    return Segment("kernel", "kernel", 4096, pages, BLOCK_PAGES, pfn)


@settings(max_examples=60)
@given(st.sets(st.integers(BLOCK_PAGES, 64 * BLOCK_PAGES - 1), max_size=30), st.integers(1, 1000))
def test_no_part_shares_a_page_block_with_preserved_pages_or_another_part(pfns: set[int], generation: int) -> None:
    preserved = Spans((pfn, pfn + 1) for pfn in pfns)
    boot = replace(BOOT, generation=generation, segments=(loaded(60 * BLOCK_PAGES),))
    try:
        found = placement.place(SMALL, boot, preserved)
    except ExhaustedError:
        return
    parts = [found.kernel, found.table, found.reserve]
    assert Spans(parts).total == sum(end - start for start, end in parts)
    assert not found.spans & Spans([(60 * BLOCK_PAGES, 62 * BLOCK_PAGES)])
    assert not placement.blocks_of(found.spans) & preserved
    assert not found.spans - SMALL.usable
    assert found == placement.place(SMALL, boot, preserved)


def test_kaslr_counts_slots_and_moves_with_the_generation() -> None:
    places = {placement.place(SMALL, replace(BOOT, generation=n), Spans()).kernel[0] for n in range(50)}
    assert len(places) > 20
    # 64 blocks of 2 MiB; the lowest slot is at 16 MiB; a kernel of two blocks
    assert placement.place(SMALL, BOOT, Spans()).slots == 64 - 8 - 1


def test_nokaslr_runs_where_it_was_loaded() -> None:
    boot = replace(BOOT, cmdline="nokaslr", segments=(loaded(20 * BLOCK_PAGES),))
    found = placement.place(SMALL, boot, Spans())
    assert (found.kernel, found.slots) == ((20 * BLOCK_PAGES, 22 * BLOCK_PAGES), 0)
    with pytest.raises(ExhaustedError, match="shares a page block with preserved"):
        placement.place(SMALL, boot, Spans([(22 * BLOCK_PAGES - 1, 22 * BLOCK_PAGES)]))


def test_a_kernel_that_cannot_move_runs_at_its_address_or_not_at_all() -> None:
    boot = replace(BOOT, image=replace(IMAGE, relocatable=False))
    assert placement.place(SMALL, boot, Spans()).kernel[0] == 16 * MIB // 4096
    with pytest.raises(ExhaustedError, match="at 0x1000000"):
        placement.place(SMALL, boot, Spans([(4097, 4098)]))


def test_mem_limits_what_is_used() -> None:
    boot = replace(BOOT, cmdline="mem=64M")
    assert placement.place(SMALL, boot, Spans()).spans.ends.max() <= 64 * MIB // 4096
    with pytest.raises(ExhaustedError, match="outside of the memory that mem= allows"):
        placement.place(SMALL, boot, Spans([(20000, 20001)]))


def test_crashkernel_and_scratch() -> None:
    boot = replace(BOOT, cmdline="crashkernel=16M scratch=32M@32M")
    found = placement.place(SMALL, boot, Spans())
    assert found.scratch == (32 * MIB // 4096, 64 * MIB // 4096)
    assert found.crash is not None
    assert found.crash[1] - found.crash[0] == 16 * MIB // 4096
    assert Spans([found.scratch]).covers(*found.kernel)
    assert not Spans([found.scratch]).overlaps(*found.reserve)
    kept = placement.place(SMALL, replace(boot, cmdline="scratch=32M", scratch=found.scratch), Spans())
    assert kept.scratch == found.scratch
    for wrong in ("crashkernel=1G", "crashkernel=4M@0", "crashkernel=4M@126M"):
        with pytest.raises(ExhaustedError, match="crashkernel="):
            placement.place(SMALL, replace(BOOT, cmdline=wrong), Spans())


def test_tables_are_small() -> None:
    for size in (8 * GIB, 64 * GIB, 16 * TIB):
        hardware = FirmwareMap.default(size, seed=1)
        found = placement.place(hardware, BOOT, Spans())
        pages = sum(end - start for start, end in (found.table, found.reserve))
        assert pages * 4096 < size * 0.0005


def test_no_room_for_the_reserve() -> None:
    everything = SMALL.usable.inward(BLOCK_PAGES).scale(BLOCK_PAGES)
    first, last = int(everything.starts[0]), int(everything.ends[-1])
    with pytest.raises(ExhaustedError, match="no room for PKRAM's reserve"):
        placement.place(
            SMALL,
            replace(BOOT, cmdline="nokaslr", segments=(loaded(first, BLOCK_PAGES),)),
            Spans((pfn, pfn + 1) for pfn in range(first + BLOCK_PAGES, last, BLOCK_PAGES)),
        )


def test_preserved_ranges_are_reserved_apart_and_know_their_node() -> None:
    hardware = FirmwareMap.default(128 * MIB, nodes=2, seed=3)
    border = 64 * MIB // 4096
    preserved = Spans([(border - 2 * BLOCK_PAGES, border + BLOCK_PAGES), (border + 9 * BLOCK_PAGES, border + 9999)])
    placed, early = placement.arrange(hardware, BOOT, preserved)
    marked = [region for region in early.reserved if region.flags & Flag.PRESERVED]
    assert [(region.base // 4096, region.end // 4096, region.nid) for region in marked] == [
        (border - 2 * BLOCK_PAGES, border, 0),
        (border, border + BLOCK_PAGES, 1),
        (border + 9 * BLOCK_PAGES, border + 9999, 1),
    ]
    assert early.reserved.spans == (placed.spans | preserved).scale(4096)


def test_an_overlap_at_the_last_step_is_refused_and_names_both() -> None:
    placed = placement.place(SMALL, BOOT, Spans())
    start = placed.kernel[0]
    with pytest.raises(PkramError, match=f"{start * 4096:x}") as refused:
        placement.reserve(SMALL, BOOT, placed, Spans([(start + 3, start + 4)]))
    assert refused.value.errno == errno.EBUSY


def test_d13_the_reserve_of_the_super_block_is_nobodys_destination() -> None:
    placed, early = placement.arrange(SMALL, BOOT, Spans())
    assert placed.reserve is not None
    assert early.is_reserved(placed.reserve[0] * 4096, (placed.reserve[1] - placed.reserve[0]) * 4096)
    assert not early.free_spans().overlaps(placed.reserve[0] * 4096, placed.reserve[1] * 4096)
