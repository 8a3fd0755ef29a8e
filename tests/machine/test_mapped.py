# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that can only be mapped: no read, no write, no seek and no fallocate ever reaches its descriptor."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pkramfs.errors import MachineError
from pkramfs.machine import mapped
from pkramfs.machine import ram as ram_module
from pkramfs.machine.backing import BLOCK, DEVMEM, FILE, FSDAX, Backing
from pkramfs.machine.leases import Leases
from pkramfs.machine.mapped import MappedRam, open_ram
from pkramfs.machine.ram import Ram
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE

SIZE = 64 * BLOCK_SIZE


@pytest.fixture
def descriptor_is_mute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call that names the descriptor of RAM, other than mmap, is a failure."""

    def refuse(*_: object) -> Any:
        raise AssertionError("the descriptor of memory that can only be mapped was used")

    for name in ("pread", "preadv", "pwrite", "lseek", "fstatvfs", "ftruncate", "posix_fallocate"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(ram_module._libc, "fallocate", refuse)


@pytest.fixture(params=[BLOCK, DEVMEM])
def memory(request: pytest.FixtureRequest, ram_path: str) -> Iterator[MappedRam]:
    """A file that stands for a device."""
    with open(ram_path, "wb") as file:
        file.truncate(SIZE)
    request.getfixturevalue("descriptor_is_mute")
    made = open_ram(Backing(request.param, ram_path, SIZE))
    assert isinstance(made, MappedRam)
    yield made
    made.close()


def test_bytes_go_through_the_mapping(memory: MappedRam) -> None:
    memory.fill(2 * PAGE_SIZE + 5, memoryview(b"text"))
    memory.overwrite(4 * PAGE_SIZE, memoryview(bytes([7]) * 64 * PAGE_SIZE))
    assert memory.peek(2)[5:9] == b"text"
    into = memoryview(bytearray(2 * PAGE_SIZE))
    memory.read(4, into)
    assert bytes(into) == bytes([7]) * 2 * PAGE_SIZE
    memory.copy(4, 400, 3)
    assert bytes(memory.page(400, 3)) == bytes([7]) * 3 * PAGE_SIZE
    memory.publish(8, 77)
    assert memory.load(8) == 77


def test_all_of_it_counts_as_data_and_is_there(memory: MappedRam) -> None:
    assert memory.data_spans() == Spans([(0, memory.pages)])
    assert memory.data_spans(3, 9) == Spans([(3, 9)])
    assert memory.backed == memory.room() == memory.most == SIZE
    memory.back(Spans([(0, 100)]))
    memory.check_room(SIZE * 2)
    assert not memory.sparse


def test_what_is_given_back_reads_as_zeros(memory: MappedRam) -> None:
    memory.words(0, 10)[:] = 1
    memory.punch(Spans([(2, 4), (5, 6)]))
    assert [bool(memory.words(page).any()) for page in range(7)] == [True, True, False, False, True, False, True]


def test_memory_of_others_is_clean_when_it_is_leased(memory: MappedRam) -> None:
    memory.u64[:] = 0xDEAD
    memory.zero(1)
    leases = Leases(memory, 1, 64, lambda: __import__("contextlib").nullcontext())
    leases.ids[0] = 1
    (block, _), *_ = leases.lease(1 << 20, 2)
    assert not memory.words(block * BLOCK_PAGES, 2 * BLOCK_PAGES).any()
    leases.release(1 << 20, leases.blocks_of(1 << 20))
    assert leases.counts()["free"] == 63


@pytest.mark.parametrize("count", [1, 5])
def test_beyond_its_end_there_is_nothing(memory: MappedRam, count: int) -> None:
    with pytest.raises(MachineError, match="ends at"):
        memory.peek(memory.pages - count + 1, count)
    with pytest.raises(MachineError, match="ends at"):
        memory.read(memory.pages - count + 1, memoryview(bytearray(count * PAGE_SIZE)))


def test_a_reply_points_into_memory_only_where_the_kernel_can_copy_from_it(ram_path: str) -> None:
    with open(ram_path, "wb") as file:
        file.truncate(SIZE)
    device, physical = (MappedRam(Backing(kind, ram_path, SIZE)) for kind in (BLOCK, DEVMEM))
    views = [one.bytes[4096:8192] for one in (device, physical)]
    physical.bytes[4096:4100] = b"text"
    assert isinstance(views[0], memoryview) and bytes(views[0][:4]) == b"text"
    assert views[1] == bytes(4096) and len(physical.bytes) == SIZE
    assert bytes(physical.page(1)[:4]) == b"text"
    for one in (device, physical):
        one.close()


def test_a_file_on_dax_must_be_allocated_and_on_dax(ram_path: str) -> None:
    with open(ram_path, "wb") as file:
        file.truncate(SIZE)
    with pytest.raises(MachineError, match="has 0 B allocated, but its machine needs 128 MiB: it was cut, or holes"):
        open_ram(Backing(FSDAX, ram_path, SIZE))
    with open(ram_path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    with pytest.raises(MachineError, match="cannot map RAM of 128 MiB"):  # tmpfs knows no MAP_SYNC
        open_ram(Backing(FSDAX, ram_path, SIZE))


def test_a_file_is_read_and_written_as_ever(ram_path: str) -> None:
    with open(ram_path, "wb") as file:
        file.truncate(SIZE)
    made = open_ram(Backing(FILE, ram_path, SIZE))
    assert type(made) is Ram and made.sparse
    made.close()


def test_views_are_of_one_memory(memory: MappedRam) -> None:
    memory.words(7)[:] = 3
    assert np.frombuffer(memory.peek(7), dtype="<u8").tolist() == [3] * 512
    assert mapped._MAP_SYNC == 0x80000
