# SPDX-License-Identifier: GPL-2.0-or-later
"""Names that a log adds to a sleeping directory, or takes from it, while the directory sleeps on.

    columns (asleep)   a  b  c  d           the names of the checkpoint
    gone                  b                 rows that count no more
    added                          e  f     entries behind them: a Directory of their own

Waking a directory takes 2 to 6 µs for each name in it, one change to it 5 µs. So a log that changes a few names here
and there wakes nobody: a million files behind 64,000 requests in a thousand directories are recovered in a third of the
time. When the directory wakes, all of it is put together. Only a replay changes names this way, and it checks each
change against columns and amendments as it would against a directory that is awake.

A directory is found by its own number in a way that wakes the one above it (asleep). So whoever has a name that sleeps
and is awake is no directory.

Kernel: fs/overlayfs/readdir.c (ovl_dir_cache), which puts two directories together when one is read
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from pkramfs.fs.directory import Directory
from pkramfs.fs.inode import Inode
from pkramfs.pkram.treeformat import Array, TreeStream


class Sleeping(Protocol):
    """What sleeps: see asleep."""

    parts: TreeStream
    name_edges: Array
    names_gone: Array

    def named(self, row: int) -> Inode:
        """Return the inode that a row of the entries names, awake."""
        ...


class Amended:
    """The directory `folder`, whose names are rows [low, high) of the columns, asleep."""

    __slots__ = ("_names", "_packed", "added", "folder", "gone", "high", "left", "low")
    asleep = True

    def __init__(self, folder: Inode, packed: Sleeping, low: int, high: int) -> None:
        assert folder.entries is not None
        self.folder, self._packed, self.low, self.high = folder, packed, low, high
        self.gone: set[int] = set()
        self.added = Directory(folder.entries.parent)
        if low < high:
            self.added.next_cookie = int(packed.parts.entries["cookie"][high - 1]) + 1
        self._names: dict[bytes, int] | None = None
        self.left = high - low
        """How many names may still change before the directory may as well wake."""

    @property
    def rows(self) -> dict[bytes, int]:
        """Return the rows of the names that sleep, by name."""
        if self._names is None:
            edges, blob = self._packed.name_edges[self.low : self.high + 1].tolist(), self._packed.parts.names
            names = [blob[start:end] for start, end in pairwise(edges)]
            self._names = dict(zip(names, range(self.low, self.high), strict=True))
            for row in self.gone:
                del self._names[names[row - self.low]]
        return self._names

    def rest(self) -> None:
        """Forget what is only needed while names change."""
        self._names = None

    def holds(self, name: bytes) -> bool:
        """Return True if there is such a name."""
        return name in self.added.entries or name in self.rows

    def find(self, name: bytes) -> Inode | None:
        """Return the inode of a name, or None."""
        row = self.rows.get(name)
        return self.added.find(name) if row is None else self._packed.named(row)

    def add(self, name: bytes, inode: Inode, cookie: int = 0) -> int:
        """Add a name that is not there yet; see Directory."""
        self.left -= 1
        return self.added.add(name, inode, cookie)

    def remove(self, name: bytes) -> None:
        """Remove a name that is there."""
        self.left -= 1
        row = self.rows.pop(name, None)
        if row is None:
            self.added.remove(name)
        else:
            self.gone.add(row)
            self._packed.names_gone[row] = True
