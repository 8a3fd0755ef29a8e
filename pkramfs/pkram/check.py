# SPDX-License-Identifier: GPL-2.0-or-later
"""Validators that trust nothing: they read everything that would cross a kexec, and compare the parts with one another.

    super block ── magic, checksum, version; a page of memory, in no node
    node list ──── every node reached, none twice; a name once; not from the future
    each node ──── page table, objects, links, bytes; every frame has one use, and every use its frame
    nodes ──────── no frame belongs to two; all are memory, and in their owner's page blocks
    region list ── if there is one: every node, the super block and the list itself are in it

Ordinary readers stop at the first problem. `check` goes on as long as it can: a damaged node does not
hide the next one, because the word that leads there has a check of its own. Every problem is one line for
people.

PKRAM itself finds damage only when it loads (D15).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pkramfs.errors import FormatError, PkramfsError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import regions, superblock
from pkramfs.pkram.format import NEXT
from pkramfs.pkram.node import Node, check_frames, read_node, read_objects, read_table, shown
from pkramfs.pkram.page import check_pfn, read_word
from pkramfs.pkram.streams.reader import ObjectReader
from pkramfs.spans import Spans
from pkramfs.units import format_pfn, plural

_SHARED = "another node's, too"
_LOOKS = 3
"""How often all is read before damage is believed of nodes that do not stay."""
Visit = Callable[[Node, list[ObjectReader], Spans], Iterable[str]]
Owned = Callable[[int], Spans]


@dataclass
class Report:
    """Result of a check: problems, the nodes whose page could be read, and all frames that they name."""

    problems: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    preserved: Spans = field(default_factory=Spans)
    frames: list[tuple[Node, Spans]] = field(default_factory=list)


def check(
    ram: Ram,
    super_pfn: int,
    *,
    usable: Spans | None = None,
    owned: Owned | None = None,
    names: list[bytes] | None = None,
    visit: Visit | None = None,
    handed_over: bool = True,
) -> Report:
    """Check everything below a super block, or only the nodes of these names.

    `usable` are the pages that are memory; `owned(tree_id)` returns those of an owner's page blocks.
    `visit` looks into a sound node and returns the problems there. Without `handed_over` no kexec is under
    way, and a region list is an unused remainder that is not checked.

    A node may be withdrawn, or replaced, while it is read: then an inconsistency is not damage, and everything is
    read again.
    """
    for _ in range(_LOOKS - 1):
        report = _check(ram, super_pfn, usable, owned, names, visit, handed_over)
        if not report.problems or _stand(ram, report.nodes):
            return report
    return _check(ram, super_pfn, usable, owned, names, visit, handed_over)


def _stand(ram: Ram, nodes: list[Node]) -> bool:
    """Return True if nodes that were read are still published as they were."""
    try:
        return all(read_node(ram, node.pfn) == node for node in nodes)
    except FormatError:
        return False


def _check(
    ram: Ram,
    super_pfn: int,
    usable: Spans | None,
    owned: Owned | None,
    names: list[bytes] | None,
    visit: Visit | None,
    handed_over: bool,
) -> Report:
    report = Report()
    try:
        found = superblock.check(ram, super_pfn, usable)
    except FormatError as error:
        report.problems.append(str(error))
        return report
    for node in _nodes(ram, super_pfn, report):
        report.nodes.append(node)
        if names is None or node.name in names:
            _check_node(ram, node, report, usable, owned, visit)
        if node.generation > found.generation:
            later = f"generation {node.generation} is later than the super block's ({found.generation})"
            report.problems.append(f"{shown(node.name)}: {later}")
    _check_names(report)
    _check_shared(report)
    if super_pfn in report.preserved:
        report.problems.append(f"the super block at pfn {format_pfn(super_pfn)} is a page of a node")
    if found.region_pfn and handed_over:
        _check_regions(ram, super_pfn, found.region_pfn, report, usable, complete=names is None)
    return report


def _nodes(ram: Ram, super_pfn: int, report: Report) -> Iterator[Node]:
    """Yield every node that can be reached; report damage on the way."""
    record, at, seen = "Super", super_pfn, set[int]()
    while True:
        try:
            pfn = read_word(ram, at, NEXT, record, "node" if record == "Super" else "next")
            if not pfn:
                return
            check_pfn(ram, pfn, record, "next", at)
            if pfn in seen:
                raise FormatError(record, "next", pfn=at, found=f"pfn {pfn:x}, met before", expected="the end")
        except FormatError as error:
            report.problems.append(str(error))
            return
        seen.add(pfn)
        try:
            yield read_node(ram, pfn)
        except FormatError as error:
            report.problems.append(str(error))
        record, at = "Node", pfn


def _check_node(
    ram: Ram, node: Node, report: Report, usable: Spans | None, owned: Owned | None, visit: Visit | None
) -> None:
    title = shown(node.name)
    try:
        table = read_table(ram, node)
        report.problems += [f"{title}: {line}" for line in _misplaced(node, table.spans, usable, owned)]
        report.frames.append((node, table.spans))
        readers = read_objects(ram, node, table.spans)
        used = check_frames(node, table, readers)
        if idle := table.spans - used:
            start = format_pfn(int(idle.starts[0]))
            report.problems.append(f"{title}: {plural(idle.total, 'page')} from pfn {start} on belong to nothing")
        if visit is not None:
            report.problems += [f"{title}: {line}" for line in visit(node, readers, table.spans)]
    except PkramfsError as error:
        report.problems.append(f"{title}: {error}")


def _misplaced(node: Node, pages: Spans, usable: Spans | None, owned: Owned | None) -> Iterator[str]:
    """Yield problems with pages of a node that are not RAM, or lie in page blocks of another owner."""
    for what, wrong in (
        ("not usable RAM", pages - usable if usable is not None else Spans()),
        ("in page blocks that are not this tree's", pages - owned(node.tree_id) if owned else Spans()),
    ):
        if wrong:
            yield _misused(wrong, what)


def _misused(pages: Spans, what: str) -> str:
    return f"{plural(pages.total, 'page')} from pfn {format_pfn(int(pages.starts[0]))} on are {what}"


def _check_shared(report: Report) -> None:
    """Report pages of two nodes. One pass over all tells if there are any; only then are nodes compared."""
    report.preserved = Spans.union(spans for _, spans in report.frames)
    if report.preserved.total == sum(spans.total for _, spans in report.frames):
        return
    before = Spans()
    for node, spans in report.frames:
        if shared := spans & before:
            report.problems.append(f"{shown(node.name)}: {_misused(shared, _SHARED)}")
        before = before | spans


def _check_names(report: Report) -> None:
    """Report names of two nodes. A tree id may occur twice: an owner can save more than one node."""
    for name, times in Counter(node.name for node in report.nodes).items():
        if times > 1:
            report.problems.append(f"node name {shown(name)} occurs {times} times")


def _check_regions(
    ram: Ram, super_pfn: int, head: int, report: Report, usable: Spans | None, *, complete: bool
) -> None:
    """Check that the region list is sound, and lists everything that it must."""
    try:
        listed, own = regions.read(ram, head, usable), regions.pages_of(ram, head)
    except FormatError as error:
        report.problems.append(str(error))
        return
    needed = Spans([(super_pfn, super_pfn + 1)]) | Spans.from_numbers(own)
    if complete:
        needed = needed | report.preserved
    if missing := needed - listed:
        start = format_pfn(int(missing.starts[0]))
        report.problems.append(f"Regions at pfn {head:x}: {plural(missing.total, 'page')} from pfn {start} on missing")
