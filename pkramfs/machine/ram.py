# SPDX-License-Identifier: GPL-2.0-or-later
"""Physical memory: one sparse shared file, mapped by every process of the machine.

    file offset = physical address; page `pfn` is bytes pfn*4096 … pfn*4096+4095

This module owns every assumption about the file behind RAM: mapping, size, hole punching, room.
Chapters above see pages as bytes (`page`) or as little-endian words (`words`), and use three verbs:

* `publish(address, value)`: the one aligned 8-byte store that makes a change of shared structures
  visible, after everything it points to is complete. A process that dies before it has changed
  nothing (pkramfs-safety(7)).
* `punch(spans)`: give memory back to the host; the pages read as zeros afterwards.
* `check_room(size)`: refuse, before memory is touched, a size that the host could not back.

A load or a store through the mapping raises SIGBUS, which kills the daemon, if the host's file
system cannot provide the page. Reading a hole through the mapping makes tmpfs allocate the page, too. Other
processes may fill that file system between a check and a store. So memory is touched through the
mapping only where the host has backed it: after `back` (fallocate), `fill` or `copy` (pwrite), which
fail with ENOSPC instead. Pages that may be holes are read with `peek` or `read` (pread returns zeros and
allocates nothing), or after a look at `data_spans`.

Kernel: the direct map, include/linux/mm.h; fallocate(2), FALLOC_FL_PUNCH_HOLE; madvise(2), MADV_POPULATE_WRITE
"""

import contextlib
import ctypes
import errno
import mmap
import os
import time
import weakref

import numpy as np

from pkramfs.errors import ExhaustedError, MachineError, explain
from pkramfs.machine import locks
from pkramfs.machine.cgroups import MemoryGroups
from pkramfs.spans import U64, Spans
from pkramfs.units import MIB, PAGE_SHIFT, PAGE_SIZE, format_size

POISON = 0x6B
"""The byte that `--poison` fills unreserved memory with, the kernel's own POISON_FREE."""

_ROOM_FLOOR, _ROOM_SHARE, _ROOM_MOST = 256 * MIB, 0.05, 0.25
_KEEP_SIZE, _PUNCH_HOLE_KEEP_SIZE = 0x01, 0x03
_MAP_NORESERVE = 0x4000  # named by Python 3.13
_MADV_WIPEONFORK, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 18, 22, 23  # not named by Python
_MANY = 16 * PAGE_SIZE
"""Bytes of a store from which it pays to populate all its pages at once."""
_GRANT_SECONDS, _GRANT_PART, _GRANT_MOST = 0.005, 64, 4 * MIB
_MANY_PAGES = 1 << 20
"""Pages that are not noted one by one when they are unmapped: then nothing is known any more."""
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)
_FULL = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
"""Errors of a host without memory: the file system, the memory cgroup or the quota is full."""
_COPY_PAGES = 256
_ONLY_MAPPED = (errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of reading or writing a backing that can only be mapped: devdax."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Ram:
    """The machine's memory, mapped shared. `size` is bytes, `pages` frames, holes included."""

    sparse = True
    """Pages that nobody uses are holes, which cost nothing. Where they are not (mapped.py), all pages count as data."""

    def __init__(self, path: str, size: int, *, create: bool = False) -> None:
        self.path, self.size, self.pages = path, size, size >> PAGE_SHIFT
        self._groups = MemoryGroups()
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            self.fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise MachineError(f"cannot open RAM: {explain(error)}") from None
        try:
            self._check_size(create)
            self._mapping = self._map()
        except (OSError, MachineError) as error:
            os.close(self.fd)
            why = f"{path}: {explain(error)}" if isinstance(error, OSError) else error
            raise MachineError(f"cannot map RAM of {format_size(size)}: {why}") from None
        self._end = weakref.finalize(self, os.close, self.fd)  # also if the object is forgotten without `close`
        self.bytes = memoryview(self._mapping)
        self.u64: U64 = np.frombuffer(self._mapping, dtype="<u8")
        self._granted, self._grant_ends = 0, 0.0  # see check_room
        self._mapped = _marks(self.pages)
        self._words = self.bytes.cast("Q")  # a store takes 0.13 µs, through numpy 0.16

    def _map(self) -> mmap.mmap:
        return mmap.mmap(self.fd, self.size, flags=mmap.MAP_SHARED)

    def _check_size(self, create: bool) -> None:
        found = os.fstat(self.fd).st_size
        if create and found < self.size:
            os.ftruncate(self.fd, self.size)
        elif found != self.size:
            raise MachineError(
                f"{self.path} is {format_size(found)} ({found} bytes), but machine.json says "
                f"{format_size(self.size)} ({self.size} bytes): the memory was cut or replaced"
            )

    def require_named(self) -> None:
        """Raise MachineError if others would not find this memory: its file was removed, moved or replaced."""
        if not locks.still_named(self.fd, self.path):
            raise MachineError(
                f"{self.path} is no longer the memory of this mount, but was removed or replaced: put it back, or copy "
                "the files elsewhere"
            )

    def close(self) -> None:
        """Close the file. The mapping ends with the last view of it."""
        self._end()
        self.fd = -1

    def page(self, pfn: int, count: int = 1) -> memoryview:
        """Return `count` pages from `pfn` as writable bytes, without a copy."""
        start = pfn << PAGE_SHIFT
        return self.bytes[start : start + (count << PAGE_SHIFT)]

    def words(self, pfn: int, count: int = 1) -> U64:
        """Return `count` pages from `pfn` as a writable array of 512 words each, without a copy."""
        start = pfn << (PAGE_SHIFT - 3)
        return self.u64[start : start + (count << (PAGE_SHIFT - 3))]

    def peek(self, pfn: int, count: int = 1) -> bytes:
        """Return a copy of `count` pages; a hole reads as zeros and stays a hole."""
        at, end = pfn << PAGE_SHIFT, (pfn + count) << PAGE_SHIFT
        data = os.pread(self.fd, end - at, at)
        while len(data) < end - at:  # one call reads 2 GiB at most
            more = os.pread(self.fd, end - at - len(data), at + len(data))
            if not more:
                raise MachineError(f"{self.path} ends at {at + len(data):#x}, before the end of RAM: it was cut")
            data += more
        return data

    def read(self, pfn: int, into: memoryview) -> None:
        """Copy whole pages from pfn into a buffer without mapping them: for data that is read once.

        200 MiB of unmapped pages took 24 ms to read this way, and 23 ms only to map, with a fault for each 64 KiB.
        """
        at, done, size = pfn << PAGE_SHIFT, 0, len(into)
        try:
            while done < size:
                read = os.preadv(self.fd, [into[done:] if done else into], at + done)
                if not read:
                    raise MachineError(f"{self.path} ends at {at + done:#x}, before the end of RAM: it was cut")
                done += read
        except OSError as error:
            if error.errno not in _ONLY_MAPPED:
                raise
            into[done:] = self.bytes[at + done : at + size]

    def write(self, pfn: int, data: memoryview) -> None:
        """Copy whole pages to pfn, where pages are still holes; see `fill`."""
        self.fill(pfn << PAGE_SHIFT, data)

    def fill(self, at: int, data: memoryview) -> None:
        """Copy bytes to address `at`, where pages are still holes.

        Per MiB this took 0.49 ms, and stores through the mapping 0.82: no fault for each page, and no page is cleared
        only to be overwritten. Raise ENOSPC if the host has no memory left (a store would be a SIGBUS).
        """
        done, size = 0, len(data)
        try:
            while done < size:
                done += os.pwrite(self.fd, data[done:] if done else data, at + done)
        except OSError as error:
            if error.errno in _FULL:
                raise OSError(errno.ENOSPC, error.strerror) from None
            if error.errno not in _ONLY_MAPPED:
                raise
            self.bytes[at + done : at + size] = data[done:]

    def overwrite(self, at: int, data: bytes | memoryview) -> None:
        """Copy bytes to address `at`, where pages are in use and backed.

        Pages that `fill` wrote are not in our page table yet. Per MiB, a fault for each page took 0.39 ms; populating
        all pages at once and storing took 0.18 (0.09 if they were mapped, 0.07 without populating); `fill` took 0.23.
        """
        size, first = len(data), at >> PAGE_SHIFT
        if size >= _MANY and not self._is_mapped(at, size):
            self._populate(at, size)
        self.bytes[at : at + size] = data
        if 0 < size < _MANY and not self._mapped[first]:  # stores have mapped them, so a later read need not map them
            last = (at + size - 1 >> PAGE_SHIFT) + 1
            self._mapped[first:last] = b"\1" * (last - first)

    def map(self, at: int, size: int) -> None:
        """Map pages that the host has backed before the kernel reads them on our behalf."""
        if not self._is_mapped(at, size):
            self._populate(at, size, _MADV_POPULATE_READ)

    def _is_mapped(self, at: int, size: int) -> bool:
        """Return True if pages were mapped or stored to, and since then not punched. (They may have been swapped out.)

        To ask the host takes 0.9 µs for a page and 95 for a MiB, mapped or not; to know it, 0.2.
        """
        return 0 not in self._mapped[at >> PAGE_SHIFT : (at + size - 1 >> PAGE_SHIFT) + 1]

    def _populate(self, at: int, size: int, how: int = _MADV_POPULATE_WRITE) -> None:
        """Map pages before they are touched; kernels before 5.14 cannot, and fault them in one by one."""
        first, last = at >> PAGE_SHIFT, (at + size - 1 >> PAGE_SHIFT) + 1
        try:
            self._mapping.madvise(how, first << PAGE_SHIFT, (last - first) << PAGE_SHIFT)
        except OSError as error:
            if error.errno in (errno.EFAULT, *_FULL):  # EFAULT: a store would be a SIGBUS
                raise self._exhausted(error) from None
            if error.errno != errno.EINVAL:
                raise
            self._is_mapped = _leave  # type: ignore[method-assign]
        self._mapped[first:last] = b"\1" * (last - first)

    def _unmapped(self, pfn: int, count: int) -> None:
        """Note that pages are no longer mapped. (A process that leases a page block punches it first.)"""
        if count < _MANY_PAGES:
            self._mapped[pfn : pfn + count] = bytes(count)
        else:
            self._mapped = _marks(self.pages)

    def load(self, address: int) -> int:
        """Return the 8-byte word at an aligned physical address."""
        return int(self.u64[address >> 3])

    def publish(self, address: int, value: int) -> None:
        """Store an aligned 8-byte word: the moment at which a change becomes visible to all processes."""
        if address & 7:
            raise AssertionError(f"publish to unaligned address {address:#x}")
        self._words[address >> 3] = value

    def append(self, at: int, data: bytes, where: int, word: int) -> None:
        """Copy some bytes to address `at`, where pages are in use and backed; then publish an aligned word.

        One call for both: it is done for each request that changes a tree.
        """
        self.bytes[at : at + len(data)] = data
        self._words[where >> 3] = word

    def zero(self, pfn: int, count: int = 1) -> None:
        """Fill pages with zeros, keeping them backed."""
        self.words(pfn, count)[:] = 0

    def copy(self, source: int, target: int, count: int = 1) -> None:
        """Copy `count` pages from pfn `source` to pfn `target`; raise ExhaustedError if the host has no memory."""
        self.back_run(target, count)
        buffer = memoryview(bytearray(min(count, _COPY_PAGES) << PAGE_SHIFT))
        for done in range(0, count, _COPY_PAGES):
            part = buffer[: min(count - done, _COPY_PAGES) << PAGE_SHIFT]
            self.read(source + done, part)
            self.fill((target + done) << PAGE_SHIFT, part)

    def back(self, spans: Spans) -> None:
        """Allocate host memory for those pages of `spans` (in pfns) that are holes; the others keep their contents."""
        for start, end in spans:
            self.back_run(start, end - start)

    def back_run(self, pfn: int, count: int) -> None:
        """Back one run, so that no access to it can fail. Raise ExhaustedError, and back nothing, if the host is full.

        A hole took 0.5 µs a page, a page that was backed already 0.06 µs.
        """
        while _libc.fallocate(self.fd, _KEEP_SIZE, pfn << PAGE_SHIFT, count << PAGE_SHIFT):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code in _NO_FALLOCATE:
                return  # a backing without holes, such as devdax
            error = OSError(code, os.strerror(code), self.path)
            if code in _FULL:
                raise self._exhausted(error)
            raise error

    def punch(self, spans: Spans) -> None:
        """Give the pages of `spans` (in pfns) back to the host; they read as zeros afterwards."""
        for start, end in spans:
            self.punch_run(start, end - start)

    def punch_run(self, pfn: int, count: int) -> None:
        """Punch one run."""
        self._unmapped(pfn, count)
        while _libc.fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, pfn << PAGE_SHIFT, count << PAGE_SHIFT):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code not in _NO_FALLOCATE:
                raise OSError(code, os.strerror(code), self.path)
            self.zero(pfn, count)  # a backing without holes, such as devdax
            return

    def poison(self, spans: Spans) -> None:
        """Fill pages with a pattern, so that a test finds data that would survive only by accident."""
        for start, end in spans:
            np.frombuffer(self.page(start, end - start), dtype=np.uint8)[:] = POISON

    def data_spans(self, start: int = 0, end: int | None = None) -> Spans:
        """Return the pfns in [start, end) that the host has backed; the rest reads as zeros."""
        end = self.pages if end is None else end
        found, at, limit = [], start << PAGE_SHIFT, end << PAGE_SHIFT
        while at < limit:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            hole = os.lseek(self.fd, data, os.SEEK_HOLE)
            found.append((data >> PAGE_SHIFT, (hole + PAGE_SIZE - 1) >> PAGE_SHIFT))
            at = hole
        return Spans(found).clip(start, end)

    @property
    def backed(self) -> int:
        """Return the bytes of host memory behind RAM."""
        return os.fstat(self.fd).st_blocks * 512

    def room(self, *, floor: float = 1.0) -> int:
        """Return the bytes that may still be touched: the free bytes behind RAM, less a reserve for others.

        The reserve is 5 % or 256 MiB, whichever is more, but at most a quarter of the file system (containers have
        small ones). The memory cgroups of this process may allow less. `floor` is the part of the reserve that must
        stay: work that has to succeed may use some of it.
        """
        host = os.fstatvfs(self.fd)
        free, whole = host.f_bavail * host.f_frsize, host.f_blocks * host.f_frsize
        room, allowed = free - int(floor * _reserve(whole)), self._groups.room(floor)
        return room if allowed is None else min(room, allowed)

    @property
    def most(self) -> int:
        """Return the most bytes that the host could give: the size of the file system, or the limit of the cgroup."""
        host = os.fstatvfs(self.fd)
        whole, limit = host.f_blocks * host.f_frsize, self._groups.limit()
        return whole if limit is None else min(whole, limit)

    def _exhausted(self, error: OSError) -> ExhaustedError:
        """Return the error for a host that refused memory which it had when it was asked: others use it, too."""
        return ExhaustedError(
            f"no room behind RAM ({error.strerror}): free some on the file system of {self.path}, or in the memory "
            "cgroup, or enlarge it"
        )

    def check_room(self, size: int, *, floor: float = 1.0) -> None:
        """Raise ExhaustedError (ENOSPC) if touching `size` more bytes could exhaust the host.

        To ask the host takes 3 µs, as long as to store a page. So where there is much more room than was asked for, a
        little more is granted for the next few milliseconds.
        """
        now = time.monotonic()
        if size > self._granted or now > self._grant_ends:
            room = self._require_room(size, floor)
            self._granted = min(room // _GRANT_PART, _GRANT_MOST) if floor >= 1.0 else 0
            self._grant_ends = now + _GRANT_SECONDS
        else:
            self._granted -= size
        self._groups.take(size)

    def _require_room(self, size: int, floor: float) -> int:
        """Return how much room there is beside `size` bytes."""
        room = self.room(floor=floor)
        if size > room:
            self._groups.look()
            room = self.room(floor=floor)
        if size > room:
            raise ExhaustedError(
                f"no room behind RAM: {format_size(size)} wanted, {format_size(max(room, 0))} may be used on the "
                f"file system of {self.path}, and in this process's memory cgroup; free some there or give it more"
            )
        return room - size


def _reserve(whole: int) -> int:
    """Return the bytes of a file system of `whole` bytes that are left to others."""
    return int(max(min(_ROOM_FLOOR, whole * _ROOM_MOST), whole * _ROOM_SHARE))


def _marks(pages: int) -> mmap.mmap:
    """Return a byte for each page, 1 if it is mapped. They take memory only where one is set.

    A child process has nothing mapped, hence no mark (before Linux 4.14 it has; but no child here reads for others).
    """
    marks = mmap.mmap(-1, max(pages, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with contextlib.suppress(OSError):
        marks.madvise(_MADV_WIPEONFORK)
    return marks


def _leave(at: int, size: int) -> bool:
    """Return True: pages are mapped as they are touched."""
    return True
