# SPDX-License-Identifier: GPL-2.0-or-later
"""The checksums of a saved tree's data (verify=data): no damaged byte leaves a node unnoticed.

Each piece is compared once, before the first of it is handed out. A tree without checksums is read as it is.

Kernel: fs/btrfs/inode.c (btrfs_data_csum_ok)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.fs.pagecache import Run
from pkramfs.fs.pieces import KEY_SHIFT, PIECE_PAGES, PIECE_SHIFT, PIECE_SIZE, bits, buffer, digest
from pkramfs.fs.sumtable import Rows, SumTable

if TYPE_CHECKING:
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.treeformat import TreeStream

Runs = Callable[[int, int, int], list[Run]]
"""Returns the runs of an inode between two of its pages."""


class Sound:
    """The sums of one tree; `runs` finds the frames of a file."""

    def __init__(self, ram: Ram, parts: TreeStream, runs: Runs) -> None:
        self._ram, self._runs, self._buffer = ram, runs, buffer()
        self._table, self._masks, empty = SumTable(lambda _: None), dict[int, int](), np.empty(0, dtype=np.uint64)
        if len(parts.sums["ino"]):
            self._table.merge(Rows(**parts.sums), (empty, empty), (empty, empty))
        masks = [parts.damaged[f"pages{number}"].tolist() for number in range(4)]
        for ino, piece, *mask in zip(
            parts.damaged["ino"].tolist(), parts.damaged["piece"].tolist(), *masks, strict=True
        ):
            self._masks[ino << KEY_SHIFT | piece] = sum(part << 64 * number for number, part in enumerate(mask))

    def __bool__(self) -> bool:
        return bool(self._table.used or self._masks)

    def expect(self, ino: int, first: int, last: int, path: Callable[[], str]) -> None:
        """Raise FormatError, with the file's path, unless the pages [first, last) match their checksums."""
        for piece in range(first >> PIECE_SHIFT, ((last - 1) >> PIECE_SHIFT) + 1):
            if self._is_damaged(ino, piece) & bits(piece, first, last):
                start = piece * PIECE_SIZE
                raise FormatError(
                    "Tree data",
                    f"bytes {start}-{start + PIECE_SIZE - 1} of {path()}",
                    found="damaged",
                    expected="what their checksum says",
                )

    def damaged(self) -> dict[int, int]:
        """Return how many pieces of which inodes are damaged; all data that have checksums are read."""
        for row in range(self._table.used):
            self._is_damaged(*self._table.place(row))
        return Counter(key >> KEY_SHIFT for key in self._masks)

    def _is_damaged(self, ino: int, piece: int) -> int:
        """Return the damaged pages of a piece as bits, after comparing it if that was not done yet."""
        key, first = ino << KEY_SHIFT | piece, piece << PIECE_SHIFT
        row = self._table.doubtful(ino, piece)
        if row is not None:
            runs = self._runs(ino, first, first + PIECE_PAGES)
            lost = any(pfn + count > self._ram.pages for _, pfn, count in runs)
            if lost or digest(self._ram, ino, piece, runs, self._buffer) != int(self._table.sums[row]):
                self._masks[key] = bits(piece, first, first + PIECE_PAGES)
            self._table.agree(row)
        return self._masks.get(key, 0)
