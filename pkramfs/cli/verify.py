"""pkramctl verify: all that would cross a kexec, checked as the next kernel and the next mount would.

    super block ── its magic, checksum, version
    node list ──── sound, no cycle
    each node ──── page table, objects, links, bytes; its pages are RAM and lie in its own page blocks
    nodes ──────── no page belongs to two
    each tree ──── names, links, extents agree (a node of pkramfs's own: shmem-NAME)

Every problem is one line and hides none of the others, as far as what is found allows to go on.

Kernel: no counterpart; PKRAM finds out when it loads
"""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkramfs.cli import arguments, nodes, render
from pkramfs.errors import FormatError, PkramfsError
from pkramfs.units import format_pfn, plural

if TYPE_CHECKING:
    from pkramfs.kernel.running import Running
    from pkramfs.pkram.node import Node
    from pkramfs.pkram.reader import ObjectReader
    from pkramfs.spans import Spans


def act(args: argparse.Namespace) -> int:
    """pkramctl verify [NAME…]."""
    machine = arguments.existing(args)
    from pkramfs.kernel.running import look

    with machine.lifecycle(shared=True, timeout=nodes.LOCK_SECONDS):
        running = look(machine)
        names = [nodes.resolve(running, name) for name in args.names]
        checked, problems = check(running, names)
    if arguments.wants_json(args):
        render.emit_json({"nodes": checked, "problems": problems})
    elif problems:
        print("\n".join(render.printable(problem) for problem in problems))
    else:
        print(f"{plural(checked, 'node')} checked, nothing is wrong")
    return FormatError.exit_status if problems else 0


def check(running: "Running", names: list[bytes]) -> tuple[int, list[str]]:
    """How many nodes were checked (all, if none is named), and what is wrong."""
    from pkramfs.pkram import superblock
    from pkramfs.spans import Spans

    usable = running.machine.hardware().usable
    try:
        superblock.check(running.ram, running.info.super_pfn, usable)
        chosen = [node for node in running.store.nodes() if not names or node.name in names]
    except FormatError as error:
        return 0, [str(error)]
    problems = [f"no node {render.printable(name)} is preserved" for name in set(names) - {n.name for n in chosen}]
    taken = Spans()
    for node in chosen:
        title = render.printable(node.name)
        try:
            pages = running.store.pages_of(node)
            problems += [f"{title}: {line}" for line in _misplaced(running, node, pages, usable, taken)]
            taken = taken | pages
            _read(running, node, pages)
        except PkramfsError as error:
            problems.append(f"{title}: {error}")
    return len(chosen), problems


def _misplaced(running: "Running", node: "Node", pages: "Spans", usable: "Spans", taken: "Spans") -> Iterator[str]:
    """Pages of a node that are nobody's RAM, another node's, or in page blocks of another owner."""
    from pkramfs.units import BLOCK_PAGES

    blocks = running.leases.blocks_of(node.tree_id)
    for what, wrong in (
        ("not usable RAM", pages - usable),
        ("another node's too", pages & taken),
        ("in page blocks that are not this tree's", pages - blocks.scale(BLOCK_PAGES)),
    ):
        if wrong:
            yield f"{plural(wrong.total, 'page')} from pfn {format_pfn(int(wrong.starts[0]))} on are {what}"


def _read(running: "Running", node: "Node", pages: "Spans") -> None:
    """Read a node as a load does, and its tree if it is one of ours; FormatError for what is wrong."""
    with running.store.prepare_load(node.name) as load:
        objects = list(load)
        for one in objects:
            outside = one.data - pages
            if outside:
                pfn = int(outside.starts[0])
                raise FormatError("Object", "entry", pfn=pfn, found="a page of the stream", expected="it in the table")
        if node.name.startswith(nodes.PREFIX):
            _read_tree(objects, pages)


def _read_tree(objects: list["ObjectReader"], pages: "Spans") -> None:
    from pkramfs.fs.verify import verify
    from pkramfs.pkram.treeformat import TreeStream

    if len(objects) != 2:
        raise FormatError("Node", "objects", found=len(objects), expected="2, bytes and pages of a tree")
    verify(TreeStream(objects[0].read()), objects[1].load_runs(), pages)
