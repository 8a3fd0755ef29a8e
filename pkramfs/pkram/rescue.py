# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes that the list does not lead to any more, found by their own pages.

    Super ──► a ──► b ──✗       c ──► d        one word was damaged: c and d are whole, but out of reach

A node page has a checksum of its own, seeded with its pfn, and lies in a page block that its own tree
has leased. So whoever looks at the first word of every page of the trees finds the nodes again, list
or no list, and what only looks like a node page (a file's contents) is not taken for one. A node that
was withdrawn on purpose is not found: its magic is gone.

`survey` changes nothing. It says what the list still leads to, what was found beside it, and what is
damaged, so that all of that can be named before anything is given up (Store.mend).

Kernel: no counterpart; PKRAM loses what its lists lose
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NODE_MAGIC
from pkramfs.pkram.node import Node, read_node, read_table, shown
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SIZE

_PAGE_WORDS = PAGE_SIZE // 8
_STEP = 1 << 18
"""Pages whose first words are looked at in one step: 1 GiB."""


@dataclass
class Survey:
    """What the list still leads to, and what it does not.

    `broken` are words of the list that cannot be read, `damaged` node pages, and why each cannot be.
    """

    listed: list[Node] = field(default_factory=list)
    found: list[Node] = field(default_factory=list)
    broken: list[FormatError] = field(default_factory=list)
    damaged: list[FormatError] = field(default_factory=list)
    problems: list[FormatError] = field(default_factory=list)
    """Both, in the order of the list."""

    @property
    def nodes(self) -> list[Node]:
        """All that can be read, as a list should name it."""
        return self.listed + self.found

    def note(self, error: FormatError, *, page: bool) -> None:
        """Add what is wrong with a node page, or with a word of the list."""
        self.problems.append(error)
        (self.damaged if page else self.broken).append(error)


def search(ram: Ram, pages: Spans, owner: Callable[[int], int], busy: Callable[[bytes], bool], survey: Survey) -> None:
    """Find nodes in `pages` that the list does not lead to, the newest of each name.

    `owner` is whose page block a page lies in; a name that is `busy` is being saved by somebody.
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
    """Pages whose first word is a node's magic; holes are not touched."""
    for start, end in ram.data_spans() & pages:
        for low in range(start, end, _STEP):
            words = ram.words(low, min(_STEP, end - low))[::_PAGE_WORDS]
            yield from (np.flatnonzero(words == np.uint64(NODE_MAGIC)) + low).tolist()


def _holds_itself(ram: Ram, node: Node) -> bool:
    """Whether a node's page table names the node's page; one that cannot be read is the node's own trouble."""
    try:
        return node.pfn in read_table(ram, node).spans
    except FormatError:
        return True
