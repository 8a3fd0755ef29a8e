# SPDX-License-Identifier: GPL-2.0-or-later
"""A small RAM in a directory of its own, with a lease table in its first usable page."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

import pytest

from pkramfs.machine.leases import Leases
from pkramfs.machine.ram import Ram
from pkramfs.units import BLOCK_SIZE


@pytest.fixture
def ram_path() -> Iterator[str]:
    """Where a RAM file may be of any size: on a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield os.path.join(directory, "ram")


@pytest.fixture
def ram(ram_path: str) -> Iterator[Ram]:
    made = Ram(ram_path, 64 * BLOCK_SIZE, create=True)
    yield made
    made.close()


@pytest.fixture
def leases(ram: Ram) -> Leases:
    """64 blocks; block 0 holds the table and is the kernel's."""
    table = Leases(ram, 1, 64, contextlib.nullcontext)
    table.ids[0] = 1
    return table
