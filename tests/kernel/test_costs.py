# SPDX-License-Identifier: GPL-2.0-or-later
"""Bans or scratch: the figures of both, and that scratch of that size is enough."""

from typing import Any

import pytest

from pkramfs.kernel import costs, placement, staging
from pkramfs.kernel.segments import destinations
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE


def compared(lab: Any) -> costs.Costs:
    kernel, loaded = lab.up(), staging.read(lab.machine)
    assert loaded is not None
    return costs.compare(kernel, loaded, kernel.store.preserved())


def test_an_empty_machine_pays_nothing_for_bans(lab: Any) -> None:
    lab.load("builtin:4M")
    found = compared(lab)
    assert (found.conflicting, found.at_risk, found.aside_now) == (0, 0, 0)
    assert found.slots == found.slots_without > 0
    assert found.banned == destinations(staging.read(lab.machine).segments).total


def test_preserved_ranges_take_slots_and_live_trees_may_be_copied(lab: Any) -> None:
    lab.preserve("a", 10 * BLOCK_PAGES)
    lab.load("builtin:4M")
    assert compared(lab).slots < compared(lab).slots_without
    lab.grow(110 * BLOCK_PAGES - 20000)
    found = compared(lab)
    assert 0 <= found.at_risk <= found.banned
    bans, scratch = found.describe()
    assert f"take {found.slots_without - found.slots} of" in bans
    assert f"scratch={found.aside * PAGE_SIZE >> 20}M" in scratch


@pytest.mark.parametrize("image", ["builtin:4M", "builtin:20M"])
def test_scratch_of_that_size_is_enough(lab: Any, image: str) -> None:
    lab.load(image)
    size = compared(lab).aside * PAGE_SIZE >> 20
    lab.cycle(image, f"ro scratch={size}M")
    assert compared_now(lab, image).aside_now * PAGE_SIZE >> 20 == size
    for generation in range(3):
        lab.preserve(f"a{generation}", 300)
        lab.cycle(image, f"ro scratch={size}M")
    kernel = lab.up()
    start, end = kernel.info.reserved["Scratch"]
    assert start <= kernel.info.reserved["Kernel image"][0] < end
    assert not placement.blocks_of(kernel.store.preserved()).overlaps(start, end)
    assert all(lab.intact(f"a{generation}") for generation in range(3))


def compared_now(lab: Any, image: str) -> costs.Costs:
    lab.load(image)
    return compared(lab)
