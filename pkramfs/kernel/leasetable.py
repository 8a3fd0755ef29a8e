# SPDX-License-Identifier: GPL-2.0-or-later
"""The lease table as boot writes it: the owner of each page block of the new kernel's RAM.

    block      0     1     2     3     4     5 …
    state     HOLE KERNEL FREE  id    id   RESERVE

FREE is zero and the table starts as a hole in the RAM file, so only other words are written: a table
for 16 TiB costs what its holes, kernel and preserved trees cost. A block that two owners claim is an
error: the last kernel broke the rule of one owner.

Kernel: mm/mm_init.c (memmap_init, deferred_init_memmap), patches 28 to 31
"""

from collections.abc import Sequence

from pkramfs.errors import FormatError
from pkramfs.kernel.incoming import IncomingNode
from pkramfs.kernel.kernelrecord import Range
from pkramfs.machine import leases
from pkramfs.machine.leases import HOLE, KERNEL, RESERVE
from pkramfs.machine.ram import Ram
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE


def write(
    ram: Ram, table: Range, blocks: int, usable: Spans, kernel: Spans, reserve: Spans, nodes: Sequence[IncomingNode]
) -> None:
    """Build the table in fresh pages. `usable`, `kernel` and `reserve` are pages.

    Raise ExhaustedError on a full host, and FormatError if two owners claim a block.
    """
    ram.punch(Spans([table]))
    view = lease_view(ram, table[0], blocks)
    holes = Spans([(0, blocks)]) - usable.inward(BLOCK_PAGES)
    kernel_blocks = kernel.outward(BLOCK_PAGES) - holes
    of_nodes = Spans.union(node.spans for node in nodes).outward(BLOCK_PAGES)
    leases.back(ram, table[0], holes | kernel_blocks | reserve.outward(BLOCK_PAGES) | of_nodes)
    _fill(view, holes, HOLE)
    _fill(view, kernel_blocks, KERNEL)
    _fill(view, reserve.outward(BLOCK_PAGES), RESERVE)
    taken = holes | kernel_blocks | reserve.outward(BLOCK_PAGES)
    trees: dict[int, Spans] = {}
    for node in nodes:
        owned = node.spans.outward(BLOCK_PAGES)
        if clash := owned & taken - trees.get(node.tree_id, Spans()):
            raise FormatError(
                "Node",
                "pages",
                pfn=node.pfn,
                found=f"page block {int(clash.starts[0]):x}",
                expected="blocks of its own",
            )
        _fill(view, owned, node.tree_id)
        trees[node.tree_id] = trees.get(node.tree_id, Spans()) | owned
        taken = taken | owned


def _fill(view: U64, blocks: Spans, state: int) -> None:
    for start, end in blocks:
        view[start:end] = state


def lease_view(ram: Ram, table_pfn: int, blocks: int) -> U64:
    """Return the table as an array of one word per block."""
    start = table_pfn * PAGE_SIZE // 8
    return ram.u64[start : start + blocks]
