# SPDX-License-Identifier: GPL-2.0-or-later
"""A small RAM with a lease table, a super block and an owner's frames."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

import pytest

from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.pkram.check import check
from pkramfs.pkram.store import Store
from pkramfs.units import BLOCK_SIZE

TREE, SUPER_PFN = 0xABCDEF, 9


@pytest.fixture
def ram() -> Iterator[Ram]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        made = Ram(os.path.join(directory, "ram"), 64 * BLOCK_SIZE, create=True)
        yield made
        made.close()


@pytest.fixture
def frames(ram: Ram) -> Frames:
    leases = Leases(ram, 1, 64, contextlib.nullcontext)
    leases.ids[0] = KERNEL
    return Frames(ram, leases, TREE)


@pytest.fixture
def store(ram: Ram) -> Store:
    superblock.create(ram, SUPER_PFN, generation=7)
    return Store(ram, SUPER_PFN, contextlib.nullcontext)


@pytest.fixture
def wide() -> Iterator[Ram]:
    """Very much sparse RAM (8 TiB), for tables of what lies far apart."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        made = Ram(os.path.join(directory, "ram"), 8 << 40, create=True)
        yield made
        made.close()


@pytest.fixture
def wide_frames(wide: Ram) -> Frames:
    leases = Leases(wide, 1, 64, contextlib.nullcontext)
    leases.ids[0] = KERNEL
    return Frames(wide, leases, TREE)


@pytest.fixture
def wide_store(wide: Ram) -> Store:
    superblock.create(wide, SUPER_PFN, generation=7)
    return Store(wide, SUPER_PFN, contextlib.nullcontext)


@pytest.fixture(autouse=True)
def sound(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test that had a store leaves memory in which nothing is wrong."""
    names = request.fixturenames
    if "store" not in names or "damaged" in names:
        yield
        return
    ram, store = request.getfixturevalue("ram"), request.getfixturevalue("store")
    frames = request.getfixturevalue("frames") if "frames" in names else None
    yield
    report = check(ram, store.super_pfn)
    assert report.problems == []
    if frames is not None:
        mine = [node for node in report.nodes if node.tree_id == TREE]
        assert not any(store.pages_of(node) - frames.used() for node in mine), "a page is free and preserved"
