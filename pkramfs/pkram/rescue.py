# SPDX-License-Identifier: GPL-2.0-or-later
"""Search for nodes that a damaged list no longer leads to, by their own pages.

    Super ──► a ──► b ──✗       c ──► d        one word was damaged: c and d are whole, but out of reach

A node page has a checksum of its own, seeded with its pfn, and lies in a page block that its own tree
has leased. So a search over the first word of every page of the trees finds the nodes without the list,
and does not take other pages (a file's contents) for nodes. A node that was withdrawn on purpose is not
found: its magic is gone.

A survey changes nothing. It names the nodes that the list still leads to, those that the search found,
and all damage, so that everything can be reported before anything is given up (`Store.mend`).

PKRAM itself loses every node that its list loses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NEXT, NODE_MAGIC
from pkramfs.pkram.node import Node, read_node, read_table, shown
from pkramfs.pkram.page import corrected
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

_PAGE_WORDS = PAGE_SIZE // 8
_STEP = 1 << 18
"""Pages whose first words are read in one step: 1 GiB."""


@dataclass
class Survey:
    """The nodes that the list leads to (`listed`), those found elsewhere (`found`), and the damage.

    `broken` has an error for each word of the list that cannot be read, `damaged` one for each node page.
    """

    listed: list[Node] = field(default_factory=list)
    found: list[Node] = field(default_factory=list)
    broken: list[FormatError] = field(default_factory=list)
    damaged: list[FormatError] = field(default_factory=list)
    problems: list[FormatError] = field(default_factory=list)
    """Both kinds of errors, in the order of the list."""
    cut: bool = False
    """Whether nobody knows what the list named behind the last break."""

    @property
    def nodes(self) -> list[Node]:
        """Return all nodes that can be read, in the order for a new list."""
        return self.listed + self.found

    def note(self, error: FormatError, *, page: bool) -> None:
        """Add an error of a node page, or of a word of the list."""
        self.problems.append(error)
        (self.damaged if page else self.broken).append(error)


def behind_break(ram: Ram, at: int, seen: set[int]) -> int | None:
    """Return the node behind a word of the list in which one bit has flipped (0: none), None if it is not that.

    This is for a boot that has no lease table to search by. The node must be sound, and not met before.
    """
    address = (at << PAGE_SHIFT) + NEXT
    pfn = corrected(ram.load(address), address)
    if pfn:
        try:
            read_node(ram, pfn)
        except FormatError:
            return None
    return None if pfn is None or (pfn in seen and pfn) else pfn


def search(ram: Ram, pages: Spans, owner: Callable[[int], int], busy: Callable[[bytes], bool], survey: Survey) -> None:
    """Find nodes in `pages` that the list does not lead to: of each name, the newest.

    `owner(pfn)` returns the tree id of a page's block; `busy(name)` returns True while a save claims the name.
    """
    known = {node.pfn for node in survey.listed} | {error.pfn for error in survey.damaged}
    found: list[Node] = []
    for pfn in candidates(ram, pages):
        if pfn in known:
            continue
        try:
            node = read_node(ram, pfn)
        except FormatError as error:
            survey.note(error, page=True)
            continue
        if node.tree_id == owner(pfn) and not busy(node.name) and _holds_itself(ram, node):
            found.append(node)
    names = {node.name for node in survey.listed}
    for node in sorted(found, key=lambda node: -node.created_ns):
        if node.name in names:
            survey.note(
                FormatError("Node", "name", pfn=node.pfn, found=f"{shown(node.name)} again", expected="a new one"),
                page=True,
            )
            continue
        names.add(node.name)
        survey.found.append(node)


def candidates(ram: Ram, pages: Spans) -> Iterator[int]:
    """Yield the pages whose first word is a node's magic; holes are not touched."""
    for start, end in ram.data_spans() & pages:
        for low in range(start, end, _STEP):
            # The first word of each page of one step. Shape: (pages,).
            words = ram.words(low, min(_STEP, end - low))[::_PAGE_WORDS]
            yield from (np.flatnonzero(words == np.uint64(NODE_MAGIC)) + low).tolist()


def _holds_itself(ram: Ram, node: Node) -> bool:
    """Return True if a node's page table has the node's page, or cannot be read: that is found when it is loaded."""
    try:
        return node.pfn in read_table(ram, node).spans
    except FormatError:
        return True
