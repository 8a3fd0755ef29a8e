# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl free: give nodes up, or with --dry-run list what would be freed and what would be refused.

    shmem-x: 4,096 pages (16.0 MiB) would be given back
      lost   /a/file, 1.0 MiB
    refused: shmem-y is in use by /mnt: …

A dry run takes no lock but the machine's, and changes nothing; its status is that of the real run.
"""

import argparse
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, nodes, render
from pkramfs.errors import FormatError, PkramError, PkramfsError
from pkramfs.mounting.names import node_name
from pkramfs.text import exact
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, format_size, plural

if TYPE_CHECKING:
    from pkramfs.kernel.running import Running
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry
    from pkramfs.pkram.node import Node


def act(args: argparse.Namespace) -> int:
    """Run `pkramctl free NAME… | --all | --damaged`, or its dry run."""
    nodes.need_one(args)
    if not args.dry_run:
        return nodes.act_free(args)
    from pkramfs.kernel.running import look

    machine = arguments.existing(args)
    with machine.lifecycle(shared=True, timeout=nodes.LOCK_SECONDS):
        running = look(machine)
        return _damaged(args, running) if args.damaged else _named(args, machine, running)


def _named(args: argparse.Namespace, machine: "Machine", running: "Running") -> int:
    running.refuse_doubt()
    live = machine.live_ids()
    found, problems = list[dict[str, Any]](), list[PkramfsError]()
    chosen = [node.name for node in running.store.nodes()] if args.all else []
    for name in chosen or [nodes.resolve(running, name) for name in args.names]:
        node = running.store.find(name)
        dead = next((e for e in daemons.outlived(machine) if node_name(e.name or "") == name), None)
        if node is None and dead is not None:
            found.append(_outlived(running, dead))
        elif node is None:
            problems.append(PkramError(nodes.nothing_to_free(machine, name)))
        elif node.tree_id in live:
            problems.append(PkramError(nodes.in_use(machine, node)))
        else:
            found.append(_lost(running, node))
    if args.all:
        found += [_outlived(running, entry) for entry in daemons.outlived(machine)]
    if arguments.wants_json(args):
        render.emit_json({"freed": found, "refused": [str(problem) for problem in problems]})
    else:
        _say(found)
        for problem in problems:
            render.say(f"refused: {problem}")
    return problems[0].exit_status if problems else 0


def _outlived(running: "Running", entry: "MountEntry") -> dict[str, Any]:
    """Return the loss of a dead daemon's tree; only a mount could list its files."""
    pages = running.leases.blocks_of(entry.tree_id).total * BLOCK_PAGES
    problem = "its daemon has died: mount it to see them"
    return {"name": entry.name, "pages": pages, "bytes": pages * PAGE_SIZE, "problem": problem, "lost": []}


def _lost(running: "Running", node: "Node") -> dict[str, Any]:
    """Return the loss of a node."""
    plain = {"name": exact(node.name), "pages": node.pages, "bytes": node.pages * PAGE_SIZE, "problem": None}
    try:
        return plain | {"lost": list(_files(running, node))}
    except FormatError as error:
        return plain | {"lost": [], "problem": str(error)}
    except PkramError:
        return plain | {"lost": []}  # a program's node, which holds no files


def _files(running: "Running", node: "Node") -> Iterator[dict[str, Any]]:
    from pkramfs.archive.view import open_tree

    tree = open_tree(running.store, node.name)
    for path, place in tree.walk():
        found = tree.attributes(place)
        if found.kind != stat.S_IFDIR:
            yield {"path": "/" + exact(path), "size": found.size}


def _say(found: list[dict[str, Any]]) -> None:
    for one in found:
        render.say(f"{one['name']}: {plural(one['pages'], 'page')} ({format_size(one['bytes'])}) would be given back")
        if one["problem"]:
            render.say(f"  its files are not known: {one['problem']}")
        for file in one["lost"]:
            render.say(f"  lost   {file['path']}, {format_size(file['size'])}")
    if not found:
        render.say("nothing would be given back")


def _damaged(args: argparse.Namespace, running: "Running") -> int:
    """Print what `free --damaged` would find again, mend and give up."""
    said: dict[str, list[str]] = {"given_up": [], "found": [], "mended": []}

    def say(kind: str, line: str) -> None:
        said[kind].append(line)

    survey = running.survey()
    nodes.tell(running, survey, say)
    kept = {node.tree_id for node in survey.nodes} | running.machine.held_ids()
    freed = sum(running.leases.blocks_of(owner).total for owner in running.leases.tree_ids() - kept) * BLOCK_SIZE
    if arguments.wants_json(args):
        render.emit_json(said | {"bytes": freed})
        return 0
    for kind, lines in said.items():
        for line in lines:
            render.say(f"would be {kind.replace('_', ' ')}: {line}")
    render.say(f"{format_size(freed)} would be given back" if any(said.values()) else "every node can be read")
    return 0
