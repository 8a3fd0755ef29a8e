# SPDX-License-Identifier: GPL-2.0-or-later
"""Owners of page blocks, from all that names them: the lease table is one witness of several.

    holes, kernel, reserve    the firmware map and kernel.json name these blocks
    a preserved tree          its checksummed node names its pages
    a live tree               its lock is held
    a tree that was left      the entry of its dead daemon names its log
    a dead tree               an id with a check of its own, or one whose lock file is there and free
    anything else             not known: a damaged word, and perhaps a tree's memory

A word of the table lets a sweep punch a block, and a zero lets anybody lease it. So a sweep first asks
the other witnesses (`disagreements`), and a lease never takes a block that they name (`guarded`).
Where witnesses disagree nothing is destroyed: the command refuses and names the block. A kexec makes
the table anew, from the nodes; `mend` does what it can while the kernel lives.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pkramfs.errors import FormatError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import kernelrecord
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.machine.directory import Machine
from pkramfs.machine.leases import FIRST_TREE_ID, FREE, HOLE, KERNEL, RESERVE, STATES, Leases, is_tree_id
from pkramfs.pkram.node import Node, shown
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT

_REMEDY = "nothing was freed: preserve what is mounted, and pkram-kexec makes the table anew from what is preserved"
_OR_MEND = ", or `pkramctl free --damaged` does"

_NOBODY = "nobody's block, or the id of a tree"


@dataclass(frozen=True)
class _Doubt:
    """Blocks whose word in the table other witnesses deny; the word that is right, and its name for people."""

    blocks: Spans
    right: int
    expected: str
    node: bool = False


def _maybe_a_mount_s(doubt: _Doubt, held: set[int]) -> bool:
    """Return True if blocks that seem to be free may be those of a mount."""
    return doubt.right == FREE and bool(held)


class Ownership:
    """The lease table of a running kernel, and the owners of page blocks that are known without the table."""

    def __init__(self, machine: Machine, info: KernelInfo, store: Store) -> None:
        self._machine, self._info, self._store = machine, info, store
        self.leases = Leases(store.ram, info.lease_table_pfn, info.blocks, machine.tables, self.guarded)
        self._fixed = _fixed(machine, info)
        self._known: dict[tuple[int, int], Spans] = {}
        """Blocks of nodes that were read before, by page and checksum of the page table."""

    def guarded(self) -> Spans:
        """Return the blocks never to be leased, whatever the table says: the kernel's, holes, and those of nodes."""
        if self._info.pkram:
            with contextlib.suppress(FormatError):  # readers of the list report it; nodes read before stay guarded
                self._nodes()
        return Spans.union([*self._fixed.values(), *self._known.values()])

    def _nodes(self) -> list[tuple[Node, Spans]]:
        """Return every node and its blocks."""
        known = self._known
        nodes = self._store.nodes() if self._info.pkram else []
        keys = [(node.table_pfn, node.table_checksum) for node in nodes]
        self._known = {
            key: known[key] if key in known else self._blocks_of(node) for key, node in zip(keys, nodes, strict=True)
        }
        return [(node, self._known[key]) for key, node in zip(keys, nodes, strict=True)]

    def _blocks_of(self, node: Node) -> Spans:
        """Return the blocks of a node's pages; where its page table is damaged, those that the lease table names."""
        try:
            return self._store.pages_of(node).outward(BLOCK_PAGES)
        except FormatError:
            return self.leases.blocks_of(node.tree_id)

    def kept(self) -> set[int]:
        """Return the tree ids whose blocks must stay; raise FormatError, naming the block, on any disagreement."""
        self._known = {}  # read all nodes again: blocks that they do not name will be punched
        held = self._machine.held_ids()
        for doubt in self._doubts(held):
            error = self._error(doubt)
            error.remedy = _REMEDY if _maybe_a_mount_s(doubt, held) else _REMEDY + _OR_MEND
            raise error
        return held | {node.tree_id for node, _ in self._nodes()}

    def disagreements(self, live: set[int], *, of_nodes: bool = True) -> Iterator[FormatError]:
        """Yield an error for the blocks of each node, state and word where the table and others disagree."""
        for doubt in self._doubts(live):
            if of_nodes or not doubt.node:
                yield self._error(doubt)

    def mend(self, say: Callable[[str, str], None]) -> None:
        """Write words that other witnesses confirm, and free blocks without an owner. The caller holds the table lock.

        `say` is told of each before. Blocks that two claim, or that may be a mount's, are left alone.
        """
        held = self._machine.held_ids()
        claimed = held | {node.tree_id for node, _ in self._nodes()}
        for doubt in list(self._doubts(held)):
            blocks = doubt.blocks
            for other in claimed - {doubt.right}:
                blocks = blocks - self.leases.blocks_of(other)
            if not blocks or _maybe_a_mount_s(doubt, held):
                continue
            say("given_up" if doubt.right == FREE else "mended", str(self._error(doubt)))
            self.leases.correct(blocks, doubt.right)

    def _doubts(self, live: set[int]) -> Iterator[_Doubt]:
        leases, nodes = self.leases, self._nodes()
        named = Spans.union(blocks for _, blocks in nodes)
        for node, blocks in nodes:
            if leases.others_in(blocks, node.tree_id):
                who = f"{node.tree_id:016x}, the tree of node {shown(node.name)}"
                yield _Doubt(blocks - leases.blocks_of(node.tree_id), node.tree_id, who, node=True)
        for state, blocks in self._fixed.items():
            if leases.others_in(blocks, state):
                yield _Doubt(blocks - leases.blocks_of(state), state, STATES[state])
            if not self._info.crash and (more := leases.blocks_of(state) - blocks - named):
                yield _Doubt(more, FREE, _NOBODY)
        fixed = Spans.union(self._fixed.values())
        known = live | {node.tree_id for node, _ in nodes} | self._machine.tree_ids()
        for word in leases.words():
            unknown = word not in STATES if word < FIRST_TREE_ID else word not in known and not is_tree_id(word)
            if unknown and (blocks := leases.blocks_of(word) - named - fixed):
                yield _Doubt(blocks, FREE, _NOBODY)

    def _error(self, doubt: _Doubt) -> FormatError:
        block = int(doubt.blocks.starts[0])
        leases = self.leases
        word = int(leases.ids[block])
        found = STATES.get(word, f"{word:016x}")
        field, page = f"owner of page block {block:x}", leases.page_of(block)
        return FormatError("Lease table", field, pfn=page, found=found, expected=doubt.expected)


def _fixed(machine: Machine, info: KernelInfo) -> dict[int, Spans]:
    """Return the blocks whose state follows from the machine and the boot, by state."""
    whole = Spans([(0, info.blocks)])
    reserve = Spans((block, block + 1) for block in info.reserve_blocks)
    if info.crash:  # a crash kernel has only its window; all else is the dead kernel's
        return {KERNEL: info.own_pages.inward(BLOCK_PAGES)}
    usable, limit = machine.hardware().usable, words.memory_limit(kernelrecord.cmdline(machine))
    if limit is not None:
        usable = usable.clip(0, limit >> PAGE_SHIFT)
    holes = whole - usable.inward(BLOCK_PAGES)
    return {HOLE: holes, KERNEL: info.own_pages.outward(BLOCK_PAGES) - holes - reserve, RESERVE: reserve}
