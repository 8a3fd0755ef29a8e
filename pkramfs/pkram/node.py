# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a node: its page, its page table, its objects, each checked before it is used.

    super block ─► list of nodes, each met once
    node page ─► magic, checksum, flags, name
    page table ─► the frames of the node; nothing outside of them is read
    objects ───► as many as the node says, none twice
    all frames ─► used once, and in the page table

Kernel: mm/pkram.c (struct pkram_node, pkram_prepare_load_obj), patches 2 and 3
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NAME_MAX, NEXT, NODE, NODE_MAGIC, OTHER, WITHDRAWN_MAGIC
from pkramfs.pkram.page import check_pfn, expect_flags, expect_unused, read_page, read_word
from pkramfs.pkram.streams.reader import ObjectReader
from pkramfs.pkram.table import reader as pagetable
from pkramfs.pkram.table.reader import Walk
from pkramfs.spans import Spans
from pkramfs.text import exact
from pkramfs.units import PAGE_SHIFT

STRICT, LOGGED = 1, 2
_LOOKS = 3
"""How often the list is read before damage is believed: a node may be withdrawn under our eyes."""


@dataclass(frozen=True)
class Node:
    """A published node. `pages` counts its frames, metadata included."""

    name: bytes
    tree_id: int
    pfn: int
    pages: int
    created_ns: int
    objects: int
    generation: int
    strict: bool
    table_pfn: int
    table_checksum: int
    object_pfn: int
    relocated: int
    """Frames that hold copies: their pages lay where a loaded kernel, or this one, would be."""
    log_pfn: int = 0
    """The page that seals a log, which holds the tree; 0 if objects hold it."""


_known: dict[int, tuple[bytes, Node]] = {}
"""Pages of nodes that were read, by pfn: the list is read again and again, and few of its pages change."""
_KNOWN = 1024


def read_node(ram: Ram, pfn: int, *, listed: bool = True) -> Node:
    """Read and check a node page; one that was withdrawn, too, unless it must be `listed`."""
    check_pfn(ram, pfn, NODE.name, "pfn")
    page, known = ram.peek(pfn), _known.get(pfn)
    if listed and known is not None and known[0] == page:
        return known[1]
    node = _read_node(ram, pfn, listed)
    if listed:
        if len(_known) >= _KNOWN:
            _known.clear()
        _known[pfn] = page, node
    return node


def _read_node(ram: Ram, pfn: int, listed: bool) -> Node:
    withdrawn = not listed and ram.load(pfn << PAGE_SHIFT) == WITHDRAWN_MAGIC
    page = read_page(ram, pfn, NODE, WITHDRAWN_MAGIC if withdrawn else NODE_MAGIC)
    if not 0 < page.name_length <= NAME_MAX:
        raise FormatError("Node", "name_length", pfn=pfn, found=page.name_length, expected=f"1 to {NAME_MAX}")
    name, rest = page.name[: page.name_length], page.name[page.name_length :]
    if rest.strip(b"\0") or b"\0" in name:
        raise FormatError("Node", "name", pfn=pfn, found=page.name.rstrip(b"\0"), expected="as long as name_length")
    expect_flags("Node", pfn, page.flags, STRICT | LOGGED)
    if bool(page.flags & LOGGED) != bool(page.log) or (page.log and page.objects):
        raise FormatError("Node", "log", pfn=pfn, found=f"{page.log:x}", expected="a page with bit 1 of flags, else 0")
    expect_unused(ram, pfn, "Node", OTHER, "other")
    return Node(
        name=name,
        tree_id=page.tree_id,
        pfn=pfn,
        pages=page.pages,
        created_ns=page.created,
        objects=page.objects,
        generation=page.generation,
        strict=bool(page.flags & STRICT),
        table_pfn=page.table,
        table_checksum=page.table_checksum,
        object_pfn=page.object,
        relocated=page.moved,
        log_pfn=page.log,
    )


def list_nodes(ram: Ram, super_pfn: int) -> list[Node]:
    """Return every node below a super block, newest first; FormatError if the list is damaged."""
    for _ in range(_LOOKS - 1):
        try:
            return list(walk_nodes(ram, super_pfn))
        except FormatError:
            continue
    return list(walk_nodes(ram, super_pfn))


def walk_nodes(ram: Ram, super_pfn: int) -> Iterator[Node]:
    """Yield each node; FormatError at the first that cannot be read, for its name may be the one looked for."""
    at, seen = super_pfn, set[int]()
    try:
        while pfn := following(ram, super_pfn, at, seen):
            yield read_node(ram, pfn)
            at = pfn
    except FormatError as error:
        error.remedy = "`pkramctl free --damaged` gives up what cannot be read"
        raise


def following(ram: Ram, super_pfn: int, at: int, seen: set[int]) -> int:
    """Return the node behind a node (or the super block), 0 at the end; FormatError where the list is broken."""
    record, field = ("Super", "node") if at == super_pfn else ("Node", "next")
    pfn = read_word(ram, at, NEXT, record, field)
    if pfn in seen:
        raise FormatError(record, field, pfn=at, found="a node met before", expected="the end of the list")
    seen.add(pfn)
    return pfn


def read_table(ram: Ram, node: Node) -> Walk:
    """Read a node's page table, and check that the node page agrees with it."""
    check_pfn(ram, node.table_pfn, "Node", "table", node.pfn)
    table = pagetable.walk(ram, node.table_pfn)
    for field, found, expected in (
        ("table_checksum", f"{node.table_checksum:016x}", f"{table.checksum:016x}"),
        ("pages", node.pages, table.spans.total),
    ):
        if found != expected:
            raise FormatError("Node", field, pfn=node.pfn, found=found, expected=f"{expected}, as its page table says")
    return table


def read_objects(ram: Ram, node: Node, allowed: Spans) -> list[ObjectReader]:
    """Read all objects of a node, in the order of saving, each checked; `allowed` are the node's frames."""
    readers: list[ObjectReader] = []
    seen, pfn, holder = set[int](), node.object_pfn, ("Node", node.pfn)
    while pfn:
        record, at = holder
        if len(readers) >= node.objects or pfn in seen:
            found = "an object met before" if pfn in seen else f"pfn {pfn:x}"
            raise FormatError(record, "object", pfn=at, found=found, expected=f"the end after {node.objects} objects")
        if pfn >= ram.pages or pfn not in allowed:
            raise FormatError(
                record, "object", pfn=at, found=f"pfn {pfn:x}", expected="a page of the node's page table"
            )
        seen.add(pfn)
        readers.append(ObjectReader(ram, pfn, node.generation, allowed))
        holder, pfn = ("Object", pfn), readers[-1].record.object
    if len(readers) != node.objects:
        raise FormatError("Node", "objects", pfn=node.pfn, found=node.objects, expected=f"{len(readers)} in the list")
    return readers


def own_pages(node: Node, table: Walk) -> Spans:
    """Return the frames of a node's page, of its page table, and of the seal of its log."""
    pages = [node.pfn, node.log_pfn] if node.log_pfn else [node.pfn]
    return Spans((pfn, pfn + 1) for pfn in pages) | Spans.from_numbers(table.pages)


def check_frames(node: Node, table: Walk, readers: list[ObjectReader]) -> Spans:
    """Check that no frame has two uses and that the page table has every used frame; return these frames.

    The reader of a log checks the frames that the log uses; here all frames in the page table count as used.
    """
    if node.log_pfn and node.log_pfn not in table.spans:
        raise FormatError("Node", "log", pfn=node.pfn, found=f"pfn {node.log_pfn:x}", expected="a page of its table")
    sets = [own_pages(node, table)]
    uses = 1 + bool(node.log_pfn) + len(table.pages) + sum(reader.uses() for reader in readers)
    sets += [spans for reader in readers for spans in (reader.metadata(), reader.data)]
    together = Spans.union(sets)
    if together.total != uses:
        raise FormatError("Node", "objects", pfn=node.pfn, found="a frame with two uses", expected="one use each")
    if missing := together - table.spans:
        raise FormatError(
            "PageTable",
            "pages",
            pfn=node.table_pfn,
            found=f"pfn {int(missing.starts[0]):x} absent",
            expected="every frame that the node uses",
        )
    return table.spans if node.log_pfn else together


def shown(name: bytes | int) -> str:
    """Return a node's name, or its tree id, for people."""
    return f"of tree {name:016x}" if isinstance(name, int) else exact(name)
