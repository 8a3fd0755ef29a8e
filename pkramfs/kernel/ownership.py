"""Whose a page block is, from all that says so: the lease table is one witness of several.

    holes, kernel, reserve    the firmware map and kernel.json say which blocks these are
    a preserved tree          its node, checksummed, names its pages
    a live tree               its lock is held
    a dead tree               an id with a check of its own, or one whose lock file lies there, free
    anything else             nobody knows: a word that was damaged, and maybe somebody's memory

A word of the table lets a sweep punch a block, and a zero lets anybody lease it. So before the one,
`disagreements` asks the others, and what they know is `guarded` from the other. Where witnesses
disagree nothing is destroyed: the command that would have done it refuses and names the block. A
kexec makes the table anew, from the nodes.

Kernel: no counterpart; struct page has no second opinion
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkramfs.errors import FormatError
from pkramfs.kernel import cmdline as words
from pkramfs.machine.leases import FIRST_TREE_ID, HOLE, KERNEL, RESERVE, STATES, is_tree_id
from pkramfs.pkram.node import Node, shown
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT

if TYPE_CHECKING:
    from pkramfs.kernel.running import Running

REMEDY = (
    "nothing was freed: preserve what is mounted, and pkram-kexec makes the table anew from what is preserved, "
    "or `pkramctl free --damaged` does"
)


class Ownership:
    """What a running kernel knows of its page blocks without looking into the lease table."""

    def __init__(self, kernel: "Running") -> None:
        self._kernel = kernel
        self._fixed = _fixed(kernel)
        self._known: dict[tuple[int, int], Spans] = {}
        """Blocks of nodes that were read before, by page and checksum of the page table."""

    def guarded(self) -> Spans:
        """Blocks that must not be leased, whatever the table says: the kernel's, holes, what nodes name."""
        if self._kernel.info.pkram:
            with contextlib.suppress(FormatError):  # of the list: who needs it says so, and what was read stays guarded
                self._nodes()
        found = Spans()
        for blocks in (*self._fixed.values(), *self._known.values()):
            found = found | blocks
        return found

    def _nodes(self) -> list[tuple[Node, Spans]]:
        """Every node and its blocks."""
        known = self._known
        nodes = self._kernel.store.nodes() if self._kernel.info.pkram else []
        keys = [(node.table_pfn, node.table_checksum) for node in nodes]
        self._known = {
            key: known[key] if key in known else self._blocks_of(node) for key, node in zip(keys, nodes, strict=True)
        }
        return [(node, self._known[key]) for key, node in zip(keys, nodes, strict=True)]

    def _blocks_of(self, node: Node) -> Spans:
        """The blocks of a node's pages; the table's word for it where the page table cannot be read."""
        try:
            return self._kernel.store.pages_of(node).outward(BLOCK_PAGES)
        except FormatError:
            return self._kernel.leases.blocks_of(node.tree_id)

    def kept(self) -> set[int]:
        """Tree ids whose blocks must stay; FormatError, naming the block, if anything speaks against the table."""
        self._known = {}  # read again what authorises to punch all else
        live = self._kernel.machine.live_ids()
        for error in self.disagreements(live):
            error.remedy = REMEDY
            raise error
        return live | {node.tree_id for node, _ in self._nodes()}

    def disagreements(self, live: set[int], *, of_nodes: bool = True) -> Iterator[FormatError]:
        """What the table says and others deny: the first block of each node, state and word."""
        leases, nodes = self._kernel.leases, self._nodes()
        named = Spans()
        for node, blocks in nodes:
            named = named | blocks
            wrong = leases.others_in(blocks, node.tree_id)
            if wrong is not None and of_nodes:
                yield self._wrong(*wrong, f"{node.tree_id:016x}, the tree of node {shown(node.name)}")
        for state, blocks in self._fixed.items():
            wrong = leases.others_in(blocks, state)
            if wrong is not None:
                yield self._wrong(*wrong, STATES[state])
            elif not self._kernel.info.crash and (more := leases.blocks_of(state) - blocks - named):
                yield self._wrong(int(more.starts[0]), state, "nobody's block, or the id of a tree")
        known = live | {node.tree_id for node, _ in nodes} | self._kernel.machine.tree_ids()
        for word in leases.words():
            unknown = word not in STATES if word < FIRST_TREE_ID else word not in known and not is_tree_id(word)
            if unknown and (blocks := leases.blocks_of(word) - named):
                yield self._wrong(int(blocks.starts[0]), word, "nobody's block, or the id of a tree")

    def _wrong(self, block: int, word: int, expected: str) -> FormatError:
        found = STATES.get(word, f"{word:016x}")
        page = self._kernel.leases.page_of(block)
        return FormatError("Lease table", f"owner of page block {block:x}", pfn=page, found=found, expected=expected)


def _fixed(kernel: "Running") -> dict[int, Spans]:
    """Blocks whose state follows from the machine and the boot, by state."""
    info, whole = kernel.info, Spans([(0, kernel.info.blocks)])
    reserve = Spans((block, block + 1) for block in info.reserve_blocks)
    if info.crash:  # the dead kernel's memory is as if it were not there
        return {KERNEL: info.own_pages.inward(BLOCK_PAGES)}
    usable, limit = kernel.machine.hardware().usable, words.memory_limit(kernel.cmdline)
    if limit is not None:
        usable = usable.clip(0, limit >> PAGE_SHIFT)
    holes = whole - usable.inward(BLOCK_PAGES)
    return {HOLE: holes, KERNEL: info.own_pages.outward(BLOCK_PAGES) - holes - reserve, RESERVE: reserve}
