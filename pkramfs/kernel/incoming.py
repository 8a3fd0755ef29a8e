# SPDX-License-Identifier: GPL-2.0-or-later
"""What the last kernel left for this one: found through one number, believed only after checking.

    pkram=34f ─→ super block ─→ region list          which pages must not be touched
                     └────────→ nodes ─→ page tables whose they are

Reading changes nothing and needs no allocator, so the planner uses it on the living kernel, too,
and boot before it has decided anything. The region list must hold every page of every node; a
list that is short would let boot punch somebody's data, so that is an error, not a warning.

Kernel: mm/pkram.c (pkram_reserve, pkram_init), patches 10 to 14
"""

from dataclasses import dataclass

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import regions, superblock
from pkramfs.pkram.node import list_nodes, read_table
from pkramfs.spans import Spans
from pkramfs.text import exact
from pkramfs.units import BLOCK_PAGES


@dataclass(frozen=True)
class IncomingNode:
    """A preserved tree: the pages that its node names, metadata included."""

    name: str
    tree_id: int
    pfn: int
    spans: Spans
    relocated: int = 0
    """Pages that were relocated when the tree was saved."""


@dataclass(frozen=True)
class Incoming:
    """Everything that crosses: `preserved` is the region list, super block and list pages included."""

    super_pfn: int
    generation: int
    first_node_pfn: int
    preserved: Spans
    nodes: tuple[IncomingNode, ...]

    @property
    def stale(self) -> Spans:
        """Super block and region list, of no use after the take-over: pages in no node's page blocks."""
        trees = union(node.spans for node in self.nodes)
        return self.preserved - trees.outward(BLOCK_PAGES).scale(BLOCK_PAGES)


union = Spans.union


def examine(ram: Ram, super_pfn: int, usable: Spans) -> Incoming:
    """Find and check what `pkram=` names; FormatError or StaleError says what is wrong with it."""
    found = superblock.check(ram, super_pfn, usable)
    if not found.node_pfn and not found.region_pfn:
        return Incoming(super_pfn, found.generation, 0, Spans(), ())
    preserved = regions.read(ram, found.region_pfn, usable) if found.region_pfn else Spans()
    found_nodes = nodes(ram, super_pfn)
    missing = (union(node.spans for node in found_nodes) | Spans([(super_pfn, super_pfn + 1)])) - preserved
    if missing:
        raise FormatError(
            "Regions",
            "ranges",
            pfn=found.region_pfn,
            found=f"{missing.total} pages short",
            expected="every node's pages",
        )
    _check_blocks(found_nodes)
    return Incoming(super_pfn, found.generation, found.node_pfn, preserved, tuple(found_nodes))


def _check_blocks(nodes: list[IncomingNode]) -> None:
    """FormatError where two trees have pages in one page block: the next kernel could not say whose it is."""
    trees: dict[int, list[Spans]] = {}
    for node in nodes:
        trees.setdefault(node.tree_id, []).append(node.spans.outward(BLOCK_PAGES))
    blocks = {tree_id: union(parts) for tree_id, parts in trees.items()}
    if union(blocks.values()).total == sum(one.total for one in blocks.values()):
        return
    for node in nodes:
        others = union(one for tree_id, one in blocks.items() if tree_id != node.tree_id)
        if clash := blocks[node.tree_id] & others:
            found = f"page block {int(clash.starts[0]):x}, another tree's"
            raise FormatError("Node", "pages", pfn=node.pfn, found=found, expected="blocks of its own")


def nodes(ram: Ram, super_pfn: int) -> list[IncomingNode]:
    """Return the nodes below a super block with their pages, read from their page tables."""
    return [
        IncomingNode(exact(node.name), node.tree_id, node.pfn, read_table(ram, node).spans, node.relocated)
        for node in list_nodes(ram, super_pfn)
    ]
