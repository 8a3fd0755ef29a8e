# SPDX-License-Identifier: GPL-2.0-or-later
"""Content: sizes, holes, shrinking and growing, vectors, maps, the largest offsets."""

import mmap
import os
import resource
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import write

pytestmark = pytest.mark.mount

MAX = (1 << 63) - 1
SIZES = (0, 1, 100, 4095, 4096, 4097, 8192, 1 << 20, (1 << 31) + 1, 1 << 40, MAX - 4096, MAX - 1, MAX, -1)
CONTENTS = {"empty": 0, "small": 100, "page": 4096, "odd": 10_001}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("size", SIZES)
def test_truncate(both: Any, size: int, content: str) -> None:
    def case(t: Any) -> None:
        write("a", b"c" * CONTENTS[content])
        t.touched(os.truncate, "a", size)
        t(os.stat, "a")
        fd = t(os.open, "a", os.O_RDWR)
        t(os.pread, fd, 20_000, 0)
        t(os.pread, fd, 20, max(size - 10, 0))
        t(os.ftruncate, fd, 50)
        t(os.ftruncate, fd, 12_000)
        t(os.pread, fd, 20_000, 0)
        t(os.fstat, fd)

    both(case)


@pytest.mark.parametrize(
    "offset", [0, 1, 99, 100, 4095, 4096, 5000, 1 << 20, (1 << 32) - 3, 1 << 45, MAX - 4, MAX - 1, MAX, -1]
)
@pytest.mark.parametrize("size", [0, 1, 5, 4096, 10_000])
def test_pwrite(both: Any, offset: int, size: int) -> None:
    def case(t: Any) -> None:
        write("a", b"c" * 100)
        fd = t(os.open, "a", os.O_RDWR)
        t(os.pwrite, fd, bytes(range(1, 251)) * 40 if size == 10_000 else b"w" * size, offset)
        t(os.fstat, fd)
        t(os.pread, fd, 16_384, max(offset - 1000, 0))
        t(os.pread, fd, 16_384, 0)
        t(os.lseek, fd, -3, os.SEEK_END)
        t(os.read, fd, 10)

    both(case)


@pytest.mark.parametrize("first", [1, 4096, 10_000, 100_000])
@pytest.mark.parametrize("second", [0, 1, 4095, 5000])
@pytest.mark.parametrize("third", [4096, 8000, 200_000])
def test_shrink_and_grow(both: Any, first: int, second: int, third: int) -> None:
    """What was cut off is zeros when the file grows again, by truncate and by a write beyond the end."""

    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_RDWR | os.O_CREAT)
        t(os.write, fd, b"x" * first)
        t(os.ftruncate, fd, second)
        t(os.ftruncate, fd, third)
        t(os.pread, fd, 1 << 20, 0)
        t(os.ftruncate, fd, second)
        t(os.pwrite, fd, b"far", third)
        t(os.pread, fd, 1 << 20, 0)
        t(os.fstat, fd)

    both(case)


def test_vectors(both: Any) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_RDWR | os.O_CREAT)
        t(os.writev, fd, [b"abc", b"", b"d" * 5000, b"e"])
        t(os.pwritev, fd, [b"12", b"34"], 2)
        buffers = [bytearray(3), bytearray(4999), bytearray(1), bytearray(100)]
        t(os.preadv, fd, buffers, 1)
        t.note(*map(t.show, buffers))
        t(os.lseek, fd, 0, os.SEEK_SET)
        t(os.readv, fd, [bytearray(10)])
        t(os.pwritev, fd, [b"x"], 0, getattr(os, "RWF_APPEND", 16))
        t(os.pwritev, fd, [b"x"], 0, os.RWF_SYNC)
        t(os.fstat, fd)

    both(case)


@pytest.mark.parametrize("limit", [0, 1000, 4096, 10_000])
def test_file_size_limit(both: Any, limit: int) -> None:
    def limited(t: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        fd = t(os.open, "a", os.O_RDWR | os.O_CREAT)
        t(os.write, fd, b"x" * 3000)
        t(os.write, fd, b"x" * 3000)
        t(os.pwrite, fd, b"x", 9_999)
        t(os.pwrite, fd, b"x", 10_000)
        t(os.ftruncate, fd, 5000)
        t(os.ftruncate, fd, 20_000)
        t(os.fstat, fd)

    both(lambda t: t.other(limited, os.getuid(), os.getgid()))


def test_big_and_small_io(both: Any) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_RDWR | os.O_CREAT)
        pattern = bytes(range(256)) * (5 << 12)
        t(os.write, fd, pattern)
        for size in (1, 511, 4097, 131_073, 1 << 20, 5 << 20):
            t(os.pread, fd, size, size)
            t(os.pwrite, fd, pattern[:size], size * 3)
        t(os.pread, fd, 1 << 25, 0)
        t(os.fsync, fd)
        t(os.fdatasync, fd)
        t(system.syncfs, fd)
        t(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
        t(os.pread, fd, 1 << 25, 0)

    both(case)


# -- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096, 5000, 1 << 20])
@pytest.mark.parametrize("shared", [True, False])
def test_map(both: Any, size: int, shared: bool) -> None:
    def case(t: Any) -> None:
        write("a", b"m" * size)
        fd = t(os.open, "a", os.O_RDWR)
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        with mmap.mmap(fd, size, flags) as memory:
            memory[0:1] = b"A"
            memory[size - 1 : size] = b"Z"
            t(os.pread, fd, size, 0)
            t(os.pwrite, fd, b"W", size // 2)
            t.note(t.show(memory[:]))
            memory.flush()
            t(os.pwrite, fd, b"beyond", size)
        t(os.pread, fd, size + 100, 0)
        t(os.fstat, fd)

    both(case)


@pytest.mark.parametrize("size", [0, 100, 4096, 6000])
def test_map_grows_with_the_file(both: Any, size: int) -> None:
    def case(t: Any) -> None:
        write("a", b"m" * size)
        fd = t(os.open, "a", os.O_RDWR)
        os.ftruncate(fd, 20_000)
        with mmap.mmap(fd, 20_000) as memory:
            t.note(t.show(memory[:]))
            memory[12_000:12_005] = b"inmap"
            os.ftruncate(fd, 12_002)
            os.ftruncate(fd, 20_000)
            t.note(t.show(memory[:]))
            t(os.pread, fd, 20_000, 0)
        t(os.fstat, fd)

    both(case)


def test_map_past_the_end_is_not_written(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"12345")
        fd = t(os.open, "a", os.O_RDWR)
        with mmap.mmap(fd, 5) as memory:
            address = memory
            t(len, address)
        with mmap.mmap(fd, 0) as memory:
            memory[:5] = b"54321"
        os.ftruncate(fd, 4096)
        t(os.pread, fd, 4096, 0)

    both(case)


def test_map_of_what_cannot_be_mapped(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * 4096)
        os.mkdir("d")
        reading, writing = os.open("a", os.O_RDONLY), os.open("a", os.O_WRONLY)
        t(mmap.mmap, reading, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE | mmap.PROT_READ)
        t(mmap.mmap, reading, 4096, mmap.MAP_PRIVATE, mmap.PROT_WRITE | mmap.PROT_READ)
        t(mmap.mmap, writing, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
        t(mmap.mmap, os.open("d", os.O_RDONLY), 4096)

    both(case)


@pytest.mark.parametrize("how", ["write", "mmap", "truncate", "fallocate"])
def test_mixed_with_another_descriptor(both: Any, how: str) -> None:
    def case(t: Any) -> None:
        write("a", b"start" * 1000)
        one, two = os.open("a", os.O_RDWR), os.open("a", os.O_RDONLY)
        match how:
            case "write":
                t(os.pwrite, one, b"NEW", 4999)
            case "mmap":
                with mmap.mmap(one, 5000) as memory:
                    memory[4990:] = b"mapped-end"
            case "truncate":
                t(os.ftruncate, one, 10)
            case "fallocate":
                t(os.posix_fallocate, one, 0, 9000)
        t(os.pread, two, 10_000, 0)
        t(os.stat, "a")
        t(os.truncate, "a", 4000)
        t(os.pread, two, 10_000, 0)
        t(os.fstat, one)

    both(case)


@pytest.mark.parametrize("holes", ["start", "middle", "end", "all", "every other"])
def test_sparse(both: Any, holes: str) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_RDWR | os.O_CREAT)
        t(os.ftruncate, fd, 40 << 12)
        pages = {"start": range(30, 40), "middle": (*range(5), *range(35, 40)), "end": range(3), "all": ()}
        for page in pages.get(holes, range(0, 40, 2)):
            os.pwrite(fd, b"p%d" % page, (page << 12) + 100)
        t(os.pread, fd, 1 << 20, 0)
        t(os.fstat, fd)

    both(case)
