# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes in a pipe that are to be stored in RAM: the kernel copies them once, from where a program left them.

    page cache ──reference──▶ pipe ──one copy──▶ frames            splice(2) twice
    page cache ──copy──▶ our buffer ──copy──▶ frames               read(2) and write(2)

A pipe gives its bytes once. Should something fail when some of them are in frames, they are brought together in a
buffer, from the frames and from the rest of the pipe, before the frames are freed; then they are like any others.

Kernel: fs/splice.c (iter_file_splice_write), fs/fuse/dev.c (fuse_dev_splice_read)
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from pkramfs.errors import MachineError

if TYPE_CHECKING:
    from pkramfs.machine.ram import Ram

_FULL = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


class Piped:
    """The next bytes of a pipe, as many as `room` has. A slice is the next part; parts are stored in their order."""

    __slots__ = ("_fetched", "_pipe", "_places", "_ram", "_room", "_size", "_whole")

    def __init__(self, pipe: int, room: memoryview, ram: Ram) -> None:
        self._pipe, self._room, self._ram, self._size = pipe, room, ram, len(room)
        self._places: list[tuple[int, int]] = []
        self._fetched = False
        self._whole = self

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> Piped:
        start, stop, _ = part.indices(self._size)
        made = Piped.__new__(Piped)
        made._whole, made._size = self._whole, stop - start
        return made

    def store(self, at: int) -> None:
        """Move the bytes to address `at`, where the host may have no memory yet: then raise ENOSPC."""
        whole, done, size = self._whole, 0, self._size
        try:
            while done < size:
                moved = os.splice(whole._pipe, whole._ram.fd, size - done, offset_dst=at + done)
                if not moved:
                    raise MachineError("a pipe ended before its bytes were stored")
                whole._places.append((at + done, moved))
                done += moved
        except OSError as error:
            whole.fetch()
            if error.errno in _FULL:
                raise OSError(errno.ENOSPC, error.strerror) from None
            raise

    def fetch(self) -> None:
        """Bring all bytes to the `room`: what was stored, and what is in the pipe."""
        if self._fetched:
            return
        done = 0
        for address, size in self._places:
            self._room[done : done + size] = self._ram.bytes[address : address + size]
            done += size
        while done < self._size:
            done += os.readv(self._pipe, [self._room[done:]])
        self._fetched = True


def store(at: int, data: Piped) -> None:
    """Store at address `at`, as Ram.fill does with bytes."""
    data.store(at)
