# SPDX-License-Identifier: GPL-2.0-or-later
"""Which indices a page stream names, each at most once: checked while the stream is saved.

Every load would refuse a stream with two pages for one index (PKRAM notices it at the load, too, and loses the
file). Links are written in batches, in any order and from any thread. If each batch is in order and no two batches
overlap, no index is named twice; that can be checked without keeping the indices:

    batch 1  |0 ───── 300|          batch 3  |900 ── 1200|
                     batch 2  |300 ────── 900|

This holds for a file that is saved from start to end, or in chunks (row 32). In all other cases the stream is
doubtful, and its indices have to be read.

Kernel: mm/shmem.c (shmem_add_to_page_cache, whose EEXIST a load gets)
"""

from itertools import pairwise

from pkramfs.pkram.streams.link import Rows


class Indices:
    """The ranges of index of the batches of one stream. Any number of threads may add."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._disorder = False

    def add(self, blocks: Rows) -> None:
        """Note the indices of a batch that was written."""
        if not len(blocks.index):
            return
        if blocks.dense:
            self._ranges.append((int(blocks.index[0]), int(blocks.index[-1]) + 1))
            return
        ends = blocks.index + blocks.pages
        if (blocks.index[1:] < ends[:-1]).any():
            self._disorder = True
        self._ranges.append((int(blocks.index[0]), int(ends[-1])))

    @property
    def doubtful(self) -> bool:
        """Return True if an index may have been named twice."""
        return self._disorder or any(before[1] > after[0] for before, after in pairwise(sorted(self._ranges)))
