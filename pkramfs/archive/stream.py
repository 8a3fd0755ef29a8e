# SPDX-License-Identifier: GPL-2.0-or-later
"""The bytes of an archive that is read: counted, exactly as many as are asked for, never more than are there.

Counterparts: GNU tar (buffer.c)
"""

from collections.abc import Callable, Iterator
from typing import NoReturn

from pkramfs.archive.keywords import BLOCK
from pkramfs.errors import PkramfsError

PIECE = 1 << 20
"""Bytes of contents that are read at once."""
Extents = list[tuple[int, int]]
"""(offset, size) of what is no hole, in order."""


class ArchiveError(PkramfsError):
    """An archive cannot be read; the message names it, the member and the fault."""


class Stream:
    """An archive. `member` is the name of the one at hand, for errors; `at` counts bytes."""

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self._read, self.name, self.at = read, name, 0
        self.member = ""

    def wrong(self, what: str) -> NoReturn:
        """Raise ArchiveError."""
        raise ArchiveError(f"{self.name}: {f'{self.member}: ' if self.member else ''}{what}")

    def exactly(self, size: int) -> bytes:
        """Return the next bytes; raise ArchiveError where the archive ends before."""
        parts, left = [], size
        while left:
            part = self._read(min(left, PIECE))
            if not part:
                self.wrong(f"the archive ends in the middle, after {self.at:,} bytes")
            parts.append(part)
            left, self.at = left - len(part), self.at + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def padded(self, size: int) -> bytes:
        """Return the next bytes, and skip what fills up the last block."""
        return self.exactly(size + -size % BLOCK)[:size]

    def block(self) -> bytes | None:
        """Return the next header; None at the mark that ends an archive. What has none may have been cut off."""
        first = self._read(BLOCK)
        self.at += len(first)
        if not first and self.at:
            self.wrong(
                f"the archive has no end, after {self.at:,} bytes: cut off? 1,024 zero bytes behind it are an end"
            )
        if not first:
            self.wrong("it is empty, which is not a tar archive")
        while len(first) < BLOCK and (more := self._read(BLOCK - len(first))):
            first += more
            self.at += len(more)
        if kind := compression(first) if self.at == len(first) else "":
            self.wrong(f"it is compressed with {kind}: pipe it through that, and import -")
        if len(first) < BLOCK:
            self.wrong(f"the archive ends in the middle, after {self.at:,} bytes")
        return None if first == bytes(BLOCK) else first


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def compression(first: bytes) -> str:
    """Return the kind of compression by the first bytes of a file; empty if there is none."""
    return next((kind for magic, kind in _COMPRESSED.items() if first.startswith(magic)), "")


class Body:
    """What follows the header of a member: `left` bytes of it are still to be read."""

    def __init__(self, stream: Stream, size: int) -> None:
        self.stream, self.size, self.left, self._padding = stream, size, size, -size % BLOCK

    def take(self, size: int) -> bytes:
        """Return the next bytes of the body, of which there must be as many."""
        if size > self.left:
            self.stream.wrong(f"its map needs {size - self.left:,} bytes more than the archive has for it")
        self.left -= size
        return self.stream.exactly(size)

    def data(self, extents: Extents) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of the contents, up to 1 MiB at a time."""
        for offset, size in extents:
            at, end = offset, offset + size
            while at < end:
                part = self.take(min(end - at, PIECE))
                yield at, part
                at += len(part)

    def skip(self) -> None:
        """Skip the rest."""
        self.left, left = 0, self.left + self._padding
        while left:
            left -= len(self.stream.exactly(min(left, PIECE)))
