# SPDX-License-Identifier: GPL-2.0-or-later
"""Another name for a node: a second page of the node, written beside the first, which takes its place by one store.

    before ──▶ node "old" ──▶ next            before ──┐   node "old" (withdrawn)
               │  └▶ page table                        └──▶ node "new" ──▶ next
               └▶ objects                                   │  └▶ page table of its own
                                                            └▶ the same objects

The name is under the checksum of the node's page, so it cannot be changed in place. The page table names the node's
page, and its own, so it is written anew as well; objects and contents stay. Until the store the old node stands,
after it the new one, and no reader ever sees both or neither.
"""

from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NEXT, NODE, NODE_MAGIC, OTHER
from pkramfs.pkram.node import Node, read_table
from pkramfs.pkram.page import read_page, write_page
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.table.writer import TableWriter
from pkramfs.spans import Spans

_OF_THE_PAGE = ("checksum", "next", "other")
"""Fields that the new page has of its own."""


def write_twin(ram: Ram, node: Node, name: bytes, frames: SaveFrames) -> tuple[int, Spans]:
    """Write a node's page with another name; return its pfn, and the pages that only the old one uses."""
    table = read_table(ram, node)
    own = Spans([(node.pfn, node.pfn + 1)]) | Spans.from_numbers(table.pages)
    (pfn,) = frames.pages(1).tolist()
    writer = TableWriter(ram, frames.pages)
    frames.unlisted()
    kept = table.spans - own
    writer.add(kept | frames.spans())
    digest = writer.close(frames.unlisted)
    found = read_page(ram, node.pfn, NODE, NODE_MAGIC)._asdict()
    fields = {key: value for key, value in found.items() if key not in _OF_THE_PAGE}
    fields |= {"name": name, "name_length": len(name), "table": writer.root, "table_checksum": digest}
    fields["pages"] = (kept | frames.spans()).total
    write_page(ram, pfn, NODE, {NEXT: 0, OTHER: 0}, **fields)
    return pfn, own
