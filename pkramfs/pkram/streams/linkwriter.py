# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows of blocks to link pages that nothing names yet: the general way, or the short one for single pages.

Kernel: mm/pkram.c (pkram_add_link), patches 4, 5 and 33
"""

from pkramfs.pkram import parallel
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.streams import link, scattered
from pkramfs.pkram.streams.link import Rows
from pkramfs.spans import U64


class LinkWriter:
    """Writes links into frames of one save. Any number of threads may write."""

    def __init__(self, frames: SaveFrames, generation: int) -> None:
        self._frames, self._ram, self.generation = frames, frames.ram, generation
        self.benches = parallel.Workbenches(scattered.Bench)

    def write(self, blocks: Rows, *, align: bool = False) -> U64:
        """Write one chain of links; return their pfns, in order."""
        if blocks.single and not align and len(blocks.index) <= scattered.SLICE:
            with self.benches.lend() as bench:
                return scattered.write(self._ram, blocks, self._frames.pages, self.generation, bench)
        where = link.plan(blocks, align=align)
        places = self._frames.pages(len(where.starts))
        link.write_links(self._ram, places, blocks, where, self.generation)
        return places

    def hang(self, before: U64, after: U64) -> None:
        """Hang one chain behind another."""
        link.hang(self._ram, int(before[-1]), int(after[0]))
