# SPDX-License-Identifier: GPL-2.0-or-later
"""Physical memory: bytes and words of it, holes, damage, and how much the host still has."""

import contextlib
import errno
import gc
import os
from pathlib import Path

import numpy as np
import pytest

from pkramfs.errors import ExhaustedError, MachineError
from pkramfs.machine import ram as ram_module
from pkramfs.machine.leases import Leases
from pkramfs.machine.ram import POISON, Ram
from pkramfs.spans import Spans
from pkramfs.units import GIB, MIB, PAGE_SIZE, TIB


def test_views_are_the_same_memory(ram):
    ram.page(3)[:4] = b"\1\2\3\4"
    assert ram.words(3)[0] == ram.load(3 * PAGE_SIZE) == 0x04030201
    ram.publish(3 * PAGE_SIZE + 8, 77)
    assert bytes(ram.page(3)[8:10]) == b"\x4d\0"
    assert len(ram.page(3, 5)) == 5 * PAGE_SIZE and len(ram.words(3, 5)) == 5 * 512


def test_what_one_process_writes_another_reads(ram):
    other = Ram(ram.path, ram.size)
    ram.words(9)[:] = 5
    assert (other.words(9) == 5).all()
    other.close()


def test_a_word_is_published_whole_or_not(ram):
    with pytest.raises(AssertionError, match="unaligned"):
        ram.publish(4097, 1)


def test_punched_memory_is_zero_and_costs_nothing(ram):
    ram.words(0, 100)[:] = 1
    assert ram.backed == 100 * PAGE_SIZE
    ram.punch(Spans([(10, 20), (30, 90)]))
    assert ram.data_spans() == Spans([(0, 10), (20, 30), (90, 100)])
    assert not ram.words(10, 10).any()


def test_where_holes_cannot_be_punched_memory_is_zeroed(ram, monkeypatch):
    ram.words(0, 4)[:] = 1
    monkeypatch.setattr(ram_module._libc, "fallocate", lambda *_args: -1)
    monkeypatch.setattr(ram_module.ctypes, "get_errno", lambda: 95)
    ram.punch(Spans([(1, 3)]))
    assert [int(ram.words(page).sum()) for page in range(4)] == [512, 0, 0, 512]
    monkeypatch.setattr(ram_module.ctypes, "get_errno", lambda: 5)
    with pytest.raises(OSError, match="Input/output error"):
        ram.punch(Spans([(1, 3)]))


def test_filling_holes_backs_what_is_written_and_no_more(ram, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3000], at))  # one call may take less
    ram.fill(2 * PAGE_SIZE + 100, memoryview(bytes([7]) * 5000))
    assert ram.data_spans() == Spans([(2, 4)])
    assert bytes(ram.page(2, 2)) == bytes(100) + bytes([7]) * 5000 + bytes(2 * PAGE_SIZE - 5100)


def test_a_host_that_is_out_of_memory_says_so(ram, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        ram.fill(0, memoryview(b"x"))


def test_what_can_only_be_mapped_is_filled_through_the_mapping(ram, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "devdax")))
    ram.fill(5, memoryview(b"text"))
    assert bytes(ram.page(0)[5:9]) == b"text"


@pytest.mark.parametrize("size", [1, PAGE_SIZE, 300 * PAGE_SIZE])
@pytest.mark.parametrize("populates", [True, False])
def test_overwriting(ram, monkeypatch, size, populates):
    """Whether the kernel can map many pages at once or not, at any place in a page."""
    asked = []
    monkeypatch.setattr(ram, "_mapping", Mapping(ram._mapping, asked, populates))
    ram.fill(0, memoryview(bytes([1]) * (400 * PAGE_SIZE)))
    for value, at in ((2, 77), (3, 3 * PAGE_SIZE)):
        ram.overwrite(at, memoryview(bytes([value]) * size))
        assert bytes(ram.bytes[at - 1 : at + size + 1]) == b"\1" + bytes([value]) * size + b"\1"
        ram.overwrite(at, memoryview(bytes([1]) * size))
    many = size == 300 * PAGE_SIZE
    assert len(asked) == (0 if not many else 2 if populates else 1)  # nobody asks again: it is mapped, or was refused
    assert all(start % PAGE_SIZE == 0 and option == 23 for option, start, _ in asked)


def test_what_is_mapped_is_known_until_it_is_punched(ram, monkeypatch):
    """By us, or by another who had it meanwhile."""
    asked = []
    monkeypatch.setattr(ram, "_mapping", Mapping(ram._mapping, asked, populates=True))
    ram.fill(0, memoryview(bytes([1]) * (40 * PAGE_SIZE)))
    for at, size in ((5, 1), (5, PAGE_SIZE), (0, 10 * PAGE_SIZE), (4095, 2), (9 * PAGE_SIZE, PAGE_SIZE)):
        ram.map(at, size)
    assert asked == [(22, 0, PAGE_SIZE), (22, 0, 2 * PAGE_SIZE), (22, 0, 10 * PAGE_SIZE)]
    ram.punch_run(3, 2)
    ram._unmapped(7, 1)
    for page in range(10):
        ram.map(page * PAGE_SIZE, PAGE_SIZE)
    assert [start // PAGE_SIZE for _, start, _ in asked[3:]] == [3, 4, 7]
    ram._unmapped(0, 1 << 20)
    ram.map(0, PAGE_SIZE)
    assert len(asked) == 7


def test_who_stored_bytes_has_their_pages_mapped(ram, monkeypatch):
    """Until they are punched; `fill` goes past the mapping."""
    asked = []
    monkeypatch.setattr(ram, "_mapping", Mapping(ram._mapping, asked, populates=True))
    ram.fill(0, memoryview(bytes([1]) * (40 * PAGE_SIZE)))
    ram.overwrite(0, b"x" * PAGE_SIZE)
    ram.overwrite(2 * PAGE_SIZE - 1, b"xy")
    ram.overwrite(40 * PAGE_SIZE, b"")
    ram.overwrite(ram.size, b"")
    ram.map(0, 3 * PAGE_SIZE)
    assert asked == []
    ram.punch_run(1, 1)
    ram.map(0, 3 * PAGE_SIZE)
    ram.map(3 * PAGE_SIZE, 1)
    assert asked == [(22, 0, 3 * PAGE_SIZE), (22, 3 * PAGE_SIZE, PAGE_SIZE)]


class Mapping:
    """A mapping that notes what is asked of it."""

    def __init__(self, mapping, asked, populates):
        self.mapping, self.asked, self.populates = mapping, asked, populates

    def madvise(self, *words):
        self.asked.append(words)
        if not self.populates:
            raise OSError(errno.EINVAL, "an old kernel")
        self.mapping.madvise(*words)


def test_looking_into_holes_costs_nothing(ram):
    assert ram.peek(7, 3) == bytes(3 * PAGE_SIZE)
    assert ram.data_spans() == Spans()
    assert ram.backed == 0


def test_a_look_is_whole_or_an_error(ram, monkeypatch):
    ram.words(5, 3)[:] = 3
    whole, pread = ram.peek(4, 5), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 1000), at))  # one call may give less
    assert ram.peek(4, 5) == whole
    os.truncate(ram.path, 6 * PAGE_SIZE)
    with pytest.raises(MachineError, match="ends at 0x6000, before the end of RAM: it was cut"):
        ram.peek(4, 5)


def test_backed_memory_is_found_in_16_tib(ram_path):
    ram = Ram(ram_path, 16 * TIB, create=True)
    for pfn in (0, 1 << 20, (1 << 32) - 1):
        ram.words(pfn)[0] = 1
    assert ram.data_spans() == Spans([(0, 1), (1 << 20, (1 << 20) + 1), ((1 << 32) - 1, 1 << 32)])
    assert ram.data_spans(1, 1 << 21) == Spans([(1 << 20, (1 << 20) + 1)])
    assert not ram.data_spans(1, 1 << 20)
    ram.close()


def test_copy_and_poison(ram):
    ram.words(2, 2)[:] = np.arange(1024)
    ram.copy(2, 8, 2)
    assert (ram.words(8, 2) == np.arange(1024)).all()
    ram.poison(Spans([(8, 9)]))
    assert set(bytes(ram.page(8))) == {POISON} and ram.words(9)[0] == 512


@pytest.mark.parametrize(
    ("whole", "free", "room"), [(64, 10, 6.8), (1, 0.5, 0.25), (4, 0.1, -0.15), (1 / 16, 1 / 16, 3 / 64)]
)
def test_some_room_is_left_to_the_host(ram, monkeypatch, whole, free, room):
    """5 % of the file system or 256 MiB, whichever is more, but of a small one a quarter."""
    figures = (4096, 4096, int(whole * GIB) >> 12, 0, int(free * GIB) >> 12, 0, 0, 0, 0, 255)
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: os.statvfs_result(figures))
    assert ram.room() == pytest.approx(room * GIB, abs=MIB)
    assert ram.room(floor=0) == pytest.approx(free * GIB, abs=MIB)
    with pytest.raises(ExhaustedError, match=r"no room behind RAM: .* wanted, .* may be used on the file system of"):
        ram.check_room(int(max(room, 0) * GIB) + 2 * MIB)
    if room > 0:
        ram.check_room(int(room * GIB) - 2 * MIB)


@pytest.mark.parametrize(("free", "looks"), [(GIB, 2), (256 * MIB + 8 * PAGE_SIZE, 6)])
def test_the_host_is_asked_again_soon_and_where_room_is_scarce_each_time(ram, monkeypatch, free, looks):
    """Nothing is granted beyond a small part of the room that there was."""
    asked, now = [], [0.0]
    figures = (4096, 4096, GIB >> 12, 0, free >> 12, 0, 0, 0, 0, 255)
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: asked.append(1) or os.statvfs_result(figures))
    monkeypatch.setattr(ram_module.time, "monotonic", lambda: now[0])
    for moment in (1.0, 1.001, 1.004, 1.006, 1.01):
        now[0] = moment
        ram.check_room(PAGE_SIZE)
    ram.check_room(PAGE_SIZE, floor=0)
    assert len(asked) == looks
    ram.check_room(5 * MIB if looks == 2 else PAGE_SIZE)
    assert len(asked) == looks + 1
    assert ram._granted <= free >> 6


def test_a_file_of_another_size_is_refused_and_closed(ram):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineError, match=r"cannot map RAM of 64.0 MiB: .*the memory was cut or replaced"):
        Ram(ram.path, 64 * MIB)
    assert len(os.listdir("/proc/self/fd")) == before


def test_backing_takes_memory_once_and_changes_nothing(ram):
    ram.words(5)[:] = 7
    ram.back(Spans([(2, 4), (5, 9)]))
    assert ram.backed == 6 * PAGE_SIZE
    assert (ram.words(5) == 7).all() and not ram.words(6, 3).any()
    ram.back(Spans([(2, 9)]))
    assert ram.backed == 7 * PAGE_SIZE


def test_backing_and_punching_go_on_after_a_signal(ram, monkeypatch):
    answers, fallocate = iter([-1, -1]), ram_module._libc.fallocate
    monkeypatch.setattr(ram_module._libc, "fallocate", lambda *words: next(answers, None) or fallocate(*words))
    monkeypatch.setattr(ram_module.ctypes, "get_errno", lambda: errno.EINTR)
    ram.back_run(3, 2)
    assert ram.backed == 2 * PAGE_SIZE
    answers = iter([-1, -1])
    ram.punch_run(3, 2)
    assert ram.backed == 0


@pytest.fixture
def tight(host):
    """RAM of 128 MiB on a host of 64."""
    made = Ram(os.path.join(host.directory, "ram"), 128 * MIB, create=True)
    yield made
    made.close()


def test_a_full_host_refuses_and_kills_nobody(host, tight):
    tight.words(9)[:] = 7
    host.fill(leave=2 * PAGE_SIZE)
    with pytest.raises(ExhaustedError, match="no room behind RAM"):
        tight.back_run(20, 100)
    assert tight.backed == PAGE_SIZE
    with pytest.raises(ExhaustedError, match="no room behind RAM"):
        tight.copy(9, 20, 100)
    with pytest.raises(ExhaustedError, match="no room behind RAM"):
        tight.overwrite(200 * PAGE_SIZE, memoryview(bytes(100 * PAGE_SIZE)))
    tight.overwrite(9 * PAGE_SIZE, memoryview(b"more"))
    assert tight.peek(9)[:8] == b"more\0\0\0\0"


def test_leases_on_a_full_host(host, tight):
    """The table's page may be one that the host never backed."""
    leases = Leases(tight, 1, 32, contextlib.nullcontext)
    host.fill()
    with pytest.raises(ExhaustedError, match="no room behind RAM"):
        leases.lease(0x1234, 4)
    host.empty()
    assert leases.lease(0x1234, 4).total == 4


def test_forgotten_ram_keeps_no_file_open(tmp_path):
    """A process may open many machines, one after the other."""
    path = tmp_path / "forgotten"
    memory = Ram(str(path), MIB, create=True)
    assert _holders(path) != []
    del memory
    gc.collect()
    assert _holders(path) == []


def _holders(path):
    """Return the descriptors of this process that are open on a file."""
    return [held for held in Path("/proc/self/fd").iterdir() if held.exists() and held.samefile(path)]
