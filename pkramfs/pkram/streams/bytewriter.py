# SPDX-License-Identifier: GPL-2.0-or-later
"""The byte stream of an object, being written: frames filled to the brim, and links that name them.

    write(b"…") write(b"…")  ─► buffer, 1 MiB ─► frames ─► links

One thread writes it. The last page is filled with zeros behind the end.

Kernel: mm/pkram.c (pkram_write), patch 6
"""

from typing import Any

import numpy as np
import xxhash

from pkramfs.machine.frames import Run
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.streams import link
from pkramfs.pkram.streams.completeness import Completeness
from pkramfs.pkram.streams.link import Rows
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE, pages

_FLUSH = 1 << 20
"""Bytes that are collected before frames are taken for them."""


class ByteWriter:
    """The bytes of one object; `length` so far."""

    def __init__(self, frames: SaveFrames, completeness: Completeness) -> None:
        self._frames, self._completeness = frames, completeness
        self._buffer, self._runs = bytearray(), list[Run]()
        self._digest = xxhash.xxh3_64()
        self.length = 0

    @property
    def checksum(self) -> int:
        """Return the XXH3-64 of all bytes so far."""
        return self._digest.intdigest()

    def write(self, data: Any) -> int:
        """Append bytes; return how many. PkramError (ENOMEM) if memory is out."""
        view = memoryview(data).cast("B")
        self._buffer += view
        self.length += len(view)
        self._digest.update(view)
        if len(self._buffer) >= _FLUSH:
            with self._completeness.required():
                self._flush(len(self._buffer) // PAGE_SIZE * PAGE_SIZE)
        return len(view)

    def _flush(self, size: int) -> None:
        """Move the first `size` bytes of the buffer to frames."""
        done = 0
        for start, count in self._frames.take(pages(size)):
            part = memoryview(self._buffer)[done : min(done + count * PAGE_SIZE, size)]
            self._frames.ram.fill(start << PAGE_SHIFT, part)
            done += len(part)
            part.release()
            self._runs.append((start, count))
        del self._buffer[:size]

    def flush(self) -> None:
        """Move what is left to frames."""
        if self._buffer:
            self._flush(len(self._buffer))

    def rows(self, *, strict: bool) -> Rows | None:
        """Return all frames as rows by index, or None if there are no bytes."""
        if not self._runs:
            return None
        runs = np.array(self._runs, dtype=np.uint64)  # shape (runs, 2): first pfn, pages
        pfn, count = runs[:, 0].copy(), runs[:, 1].copy()
        return link.run_rows(np.cumsum(count) - count, pfn, count, strict=strict)
