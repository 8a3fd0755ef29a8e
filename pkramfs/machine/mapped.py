# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM on memory without holes, accessed through its mapping alone.

    Ram          a sparse file: holes, fallocate, pread, pwrite
    MappedRam    devdax, /dev/mem, a file on DAX: loads and stores only

All of it is allocated from the beginning, so that no store can fail, nothing need be backed first, and no room is
shared with others. Pages are zeroed instead of given back: an allocated page reads as zeros here, too. Such memory does
not record which pages were ever used, so all of it counts as data.

A file on DAX is mapped with MAP_SYNC. So the kernel refuses a file that is not on DAX, and a stored page can be found
after the kernel dies, although the file system's own tables were not written back.

Kernel: mmap(2), MAP_SYNC; drivers/dax/device.c (dax_mmap), drivers/char/mem.c (mmap_mem)
"""

import mmap
import os
from typing import Any, cast

from pkramfs.errors import MachineError
from pkramfs.machine.backing import FILE, FSDAX, Backing
from pkramfs.machine.ram import Ram
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT, format_size

_MAP_SHARED_VALIDATE, _MAP_SYNC = 0x03, 0x80000


def open_ram(backing: Backing) -> Ram:
    """Open memory that the user named."""
    return Ram(backing.path, backing.size) if backing.kind == FILE else MappedRam(backing)


class MappedRam(Ram):
    """Memory whose descriptor can only be mapped."""

    sparse = False

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        super().__init__(backing.path, backing.size)
        self._memory = self.bytes
        if not backing.traits.pinnable:
            self.bytes = cast(memoryview, _Copied(self.bytes))

    def _check_size(self, create: bool) -> None:
        """Refuse a file that was cut, or is not allocated completely; mmap(2) checks a device."""
        if self._backing.kind != FSDAX:
            return
        status = os.fstat(self.fd)
        if status.st_size < self.size or status.st_blocks * 512 < self.size:
            raise MachineError(
                f"{self.path} has {format_size(min(status.st_size, status.st_blocks * 512))} allocated, but its "
                f"machine needs {format_size(self.size)}: it was cut, or holes were made in it"
            )

    def _map(self) -> mmap.mmap:
        flags = _MAP_SHARED_VALIDATE | _MAP_SYNC if self._backing.kind == FSDAX else mmap.MAP_SHARED
        return mmap.mmap(self.fd, self.size, flags=flags, offset=self._backing.start)

    def peek(self, pfn: int, count: int = 1) -> bytes:
        if not 0 <= pfn <= pfn + count <= self.pages:
            raise MachineError(f"{self.path} ends at pfn {self.pages:x}, before pfn {pfn + count:x}")
        return bytes(self.page(pfn, count))

    def page(self, pfn: int, count: int = 1) -> memoryview:
        start = pfn << PAGE_SHIFT
        return self._memory[start : start + (count << PAGE_SHIFT)]

    def read(self, pfn: int, into: memoryview) -> None:
        at = pfn << PAGE_SHIFT
        if at + len(into) > self.size:
            raise MachineError(f"{self.path} ends at {self.size:#x}, before {at + len(into):#x}")
        into[:] = self._memory[at : at + len(into)]

    def fill(self, at: int, data: memoryview) -> None:
        self._memory[at : at + len(data)] = data

    def overwrite(self, at: int, data: bytes | memoryview) -> None:
        self._memory[at : at + len(data)] = data

    def back_run(self, pfn: int, count: int) -> None:
        """Do nothing: all of it is allocated."""

    def punch_run(self, pfn: int, count: int) -> None:
        self.zero(pfn, count)

    def data_spans(self, start: int = 0, end: int | None = None) -> Spans:
        return Spans([(start, self.pages if end is None else end)]).clip(0, self.pages)

    @property
    def backed(self) -> int:
        return self.size

    def room(self, *, floor: float = 1.0) -> int:
        return self.size

    @property
    def most(self) -> int:
        return self.size

    def check_room(self, size: int, *, floor: float = 1.0) -> None:
        """Do nothing: every page has its memory."""


class _Copied:
    """A memoryview whose slices are copies: the kernel cannot copy from this memory on our behalf."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def __getitem__(self, part: Any) -> Any:
        return bytes(self._memory[part])

    def __setitem__(self, part: Any, data: Any) -> None:
        self._memory[part] = data

    def __len__(self) -> int:
        return len(self._memory)
