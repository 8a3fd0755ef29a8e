# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory handed over by the last kernel: found through one number, believed only after checking.

    pkram=34f ─→ super block ─→ region list           the pages that must not be touched
                     └────────→ nodes ─→ page tables  their owners

Reading changes nothing and needs no allocator, so the planner uses it on the living kernel, and boot
before it has decided anything. The region list must hold every page of every node; a short list
would let boot punch preserved data, so it is an error, not a warning.

Kernel: mm/pkram.c (pkram_reserve, pkram_init), patches 10 to 14
"""

from dataclasses import dataclass

from pkramfs.errors import FormatError, PkramfsError
from pkramfs.journal.layout import read_seal
from pkramfs.machine.ram import Ram
from pkramfs.mounting.names import mount_name
from pkramfs.pkram import regions, superblock
from pkramfs.pkram.node import Node, list_nodes, read_table
from pkramfs.pkram.streams.first import first_page
from pkramfs.pkram.treeformat import HAS_SUMS, TREE, TREE_MAGIC
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
    """How many of the pages were relocated when the tree was saved."""
    unchecked: int | None = None
    """How many pieces of its files have no checksum; None: none has one, or it is no file tree."""


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
        """Return the pages of super block and region list that share no page block with a node.

        They are of no use after the take-over.
        """
        trees = Spans.union(node.spans for node in self.nodes)
        return self.preserved - trees.outward(BLOCK_PAGES).scale(BLOCK_PAGES)


def examine(ram: Ram, super_pfn: int, usable: Spans, *, listed: bool = True) -> Incoming:
    """Find and check the super block of `pkram=`; raise FormatError if it is damaged, StaleError if it was consumed.

    Unless it is `listed`, there is no region list to be believed: kexec(8) has nobody write one, and all that was
    preserved are the pages that the nodes name.
    """
    found = superblock.check(ram, super_pfn, usable)
    if not found.node_pfn and not found.region_pfn:
        return Incoming(super_pfn, found.generation, 0, Spans(), ())
    preserved = regions.read(ram, found.region_pfn, usable) if found.region_pfn and listed else Spans()
    found_nodes = nodes(ram, super_pfn)
    named = Spans.union(node.spans for node in found_nodes) | Spans([(super_pfn, super_pfn + 1)])
    if not listed:
        preserved = _in_memory(named, usable, super_pfn)
    missing = named - preserved
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


def _in_memory(named: Spans, usable: Spans, super_pfn: int) -> Spans:
    """Return these pages; raise FormatError if some are no memory."""
    if outside := named - usable:
        found = f"pfn {int(outside.starts[0]):x}"
        raise FormatError("Node", "pages", pfn=super_pfn, found=found, expected="usable memory")
    return named


def _check_blocks(nodes: list[IncomingNode]) -> None:
    """Raise FormatError if two trees have pages in one page block: the next kernel could not tell the owner."""
    trees: dict[int, list[Spans]] = {}
    for node in nodes:
        trees.setdefault(node.tree_id, []).append(node.spans.outward(BLOCK_PAGES))
    blocks = {tree_id: Spans.union(parts) for tree_id, parts in trees.items()}
    if Spans.union(blocks.values()).total == sum(one.total for one in blocks.values()):
        return
    for node in nodes:
        others = Spans.union(one for tree_id, one in blocks.items() if tree_id != node.tree_id)
        if clash := blocks[node.tree_id] & others:
            found = f"page block {int(clash.starts[0]):x}, another tree's"
            raise FormatError("Node", "pages", pfn=node.pfn, found=found, expected="blocks of its own")


def nodes(ram: Ram, super_pfn: int) -> list[IncomingNode]:
    """Return the nodes below a super block with their pages, read from their page tables."""
    return [described(ram, node) for node in list_nodes(ram, super_pfn)]


def described(ram: Ram, node: Node) -> IncomingNode:
    """Return a node with its pages; raise FormatError if its page table cannot be read."""
    spans = read_table(ram, node).spans
    return IncomingNode(exact(node.name), node.tree_id, node.pfn, spans, node.relocated, unchecked(ram, node))


def unchecked(ram: Ram, node: Node) -> int | None:
    """Return the number of pieces of files (at most 1 MiB each) without a checksum in a node; None if not known."""
    if mount_name(node.name) is None:
        return None
    try:
        if node.log_pfn:
            return read_seal(ram, node.log_pfn, node.tree_id).unsummed
        header = TREE.read(first_page(ram, node.object_pfn))
    except PkramfsError:
        return None  # `verify` reports the fault
    return header.unsummed if header.magic == TREE_MAGIC and header.flags & HAS_SUMS else None
