# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl nodes and free: the preserved nodes, by name.

    NODE            STATE          SIZE      PAGES   RELOCATED   UNCHECKED   PFN
    shmem-mytmpfs   mounted     2.0 GiB    524,288           0     nothing   3f8
    shmem-other     preserved   4.0 MiB      1,024          12         all   4a10

UNCHECKED are data without a checksum: all, or up to so many bytes that were changed shortly before (verify=data).

`free` takes the node's tree id the way a mount does, by its lock file, so that it cannot free what
a mount is loading, saving or using; then it withdraws the node by one store, and what the tree had
leased is free memory again.

Kernel: mm/pkram.c (pkram_store, patch 19)
"""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, render
from pkramfs.cli.arguments import need
from pkramfs.cli.render import Column
from pkramfs.errors import MachineError, NotPreservedError, PkramError, PkramfsError
from pkramfs.mounting.names import mount_name, node_name
from pkramfs.text import exact
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE, MIB, PAGE_SIZE, format_pfn, format_size, plural

if TYPE_CHECKING:
    from pkramfs.kernel.running import Running
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry
    from pkramfs.pkram.node import Node
    from pkramfs.pkram.rescue import Survey

LOCK_SECONDS = 30.0


def listing(machine: "Machine") -> list[dict[str, Any]]:
    """Return every node, as plain data, in the order of the node list."""
    running = daemons.attached(machine)
    if running is None or not running.info.pkram:
        return []
    live = machine.live_ids()
    return [_describe(running, node, mounted=node.tree_id in live) for node in running.store.nodes()]


def _describe(running: "Running", node: "Node", *, mounted: bool) -> dict[str, Any]:
    from pkramfs.kernel.incoming import unchecked

    return {
        "name": exact(node.name),
        "state": "mounted" if mounted else "preserved",
        "pages": node.pages,
        "bytes": node.pages * PAGE_SIZE,
        "moved": node.relocated,
        "pfn": node.pfn,
        "tree_id": f"{node.tree_id:016x}",
        "created_ns": node.created_ns,
        "unchecked": unchecked(running.ram, node),
    }


def refuse_loss(machine: "Machine") -> None:
    """Raise NotPreservedError if emptying the memory would lose a mounted or preserved tree."""
    from pkramfs.kernel import hostboot

    resume = f"pkram-kexec{machine.words} --resume"
    living = [entry.mountpoint for entry in machine.mounts() if entry.alive]
    if living:
        raise NotPreservedError(f"{plural(len(living), 'mount')} would be lost: umount {', '.join(living)} first")
    dead = [entry.name or "" for entry in daemons.outlived(machine)]
    if dead:
        trees = f"{plural(len(dead), 'tree')} of dead daemons"
        raise NotPreservedError(f"{trees} would be lost: mount {', '.join(dead)} again, or free them, or use --force")
    try:
        found, unfinished, waiting = listing(machine), _unfinished(machine), hostboot.waiting(machine)
    except PkramfsError as error:
        raise MachineError(f"the preserved nodes cannot be read ({error}): only --force goes on") from None
    if unfinished:
        raise NotPreservedError(f"a kexec is not finished, and the nodes that it hands over would be lost: {resume}")
    if waiting:
        raise NotPreservedError(f"{waiting}, would be lost: {resume} says how to restore it, or use --force")
    if found:
        size = format_size(sum(node["bytes"] for node in found))
        raise NotPreservedError(f"{plural(len(found), 'node')}, {size}, would be lost: free them, or use --force")


def _unfinished(machine: "Machine") -> bool:
    """Return True if the old kernel is gone and the new one not up, so that the nodes are not known."""
    from pkramfs.kernel import kernelrecord, nvram

    pending = nvram.pending(machine)
    waits = pending is not None and pending.kind == nvram.KEXEC
    return waits and kernelrecord.read(machine, any_layout=True) is None


def act_nodes(args: argparse.Namespace) -> None:
    """Run `pkramctl nodes`."""
    machine = arguments.existing(args)
    running = daemons.attached(machine)
    if running is not None:
        running.store.root()  # where PKRAM is off this raises ENODEV: no list is not an empty list
    found = listing(machine)
    if arguments.wants_json(args):
        render.emit_json(found)
    else:
        show(found)


def show(found: list[dict[str, Any]]) -> None:
    """Print nodes as a table."""
    if not found:
        render.say("no nodes are preserved")
        return
    columns = [
        Column("NODE"),
        Column("STATE"),
        Column("SIZE", figures=True),
        Column("PAGES", figures=True),
        Column("RELOCATED", figures=True),
        Column("UNCHECKED", figures=True),
        Column("PFN", figures=True),
    ]
    rows = [
        (
            n["name"],
            n["state"],
            format_size(n["bytes"]),
            f"{n['pages']:,}",
            f"{n['moved']:,}",
            without_sum(n["name"], n["unchecked"]),
            format_pfn(n["pfn"]),
        )
        for n in found
    ]
    render.table(columns, rows)


def without_sum(name: str, pieces: int | None) -> str:
    """Return how much of a node has no checksum; `-` for one that is no file tree."""
    if mount_name(os.fsencode(name)) is None:
        return "-"
    return "all" if pieces is None else format_size(pieces * MIB) if pieces else "nothing"


def need_one(args: argparse.Namespace) -> None:
    """Raise UsageError unless the nodes to free are named in one way."""
    need(bool(args.names) + args.all + args.damaged == 1, "give the NAMEs to free, or --all, or --damaged")


def act_free(args: argparse.Namespace) -> int:
    """Run `pkramctl free NAME… | --all | --damaged`."""
    machine = arguments.existing(args)
    if args.damaged:
        return _free_damaged(args, machine)
    from pkramfs.kernel.running import look

    freed, problems = [], []
    with machine.lifecycle(shared=True, timeout=LOCK_SECONDS):
        running = look(machine)
        running.refuse_doubt()
        for name in _node_names(running) if args.all else [resolve(running, name) for name in args.names]:
            try:
                freed.append({"name": exact(name), "pages": _free(machine, running, name)})
            except PkramfsError as error:
                problems.append(error)
        if args.all:
            freed += [_discard(machine, running, entry) for entry in daemons.outlived(machine)]
        running.sweep()
    _say_freed(args, freed, refused=bool(problems))
    for problem in problems:
        arguments.complain("pkramctl", str(problem))
    return problems[0].exit_status if problems else 0


def _free_damaged(args: argparse.Namespace, machine: "Machine") -> int:
    """Find again the nodes that can be found, and give up those that cannot be read and hide others."""
    from pkramfs.kernel.running import look

    said: dict[str, list[str]] = {"given_up": [], "found": [], "mended": []}

    def say(kind: str, line: str) -> None:
        """Report a change before it is made."""
        said[kind].append(line)
        machine.log(f"pkram: {'gave up a node' if kind == 'given_up' else kind}: {line}")
        if not arguments.wants_json(args):
            render.tell(f"{kind.replace('_', ' ')}: {line}")

    with machine.lifecycle(shared=True, timeout=LOCK_SECONDS):
        running = look(machine)
        running.mend(lambda survey: tell(running, survey, say))
        with machine.tables():
            running.ownership.mend(say)
        freed = running.sweep() * BLOCK_SIZE
    if arguments.wants_json(args):
        render.emit_json(said | {"bytes": freed})
        return 0
    render.say(f"{format_size(freed)} given back" if any(said.values()) else "every node can be read")
    return 0


def tell(running: "Running", survey: "Survey", say: Callable[[str, str], None]) -> None:
    """Name the nodes that will be found again and given up, tree by tree, before anything is changed."""
    from pkramfs.pkram import superblock
    from pkramfs.pkram.node import shown

    kept = {node.tree_id for node in survey.nodes} | running.machine.held_ids()
    orphans = running.leases.tree_ids() - kept if survey.problems else set()
    for problem in survey.damaged:
        owner = running.owner(problem.pfn) if problem.pfn is not None else 0
        say("given_up", f"{problem}{_extent(running, owner) if owner in orphans else ''}")
        orphans.discard(owner)
    for owner in sorted(orphans):
        say("given_up", f"tree {owner:016x}: no node that can be read names it{_extent(running, owner)}")
    broken = superblock.damage(running.ram, running.store.root())
    for problem in survey.broken or ([broken] if broken else []):
        say("mended", str(problem))
    for node in survey.found:
        say("found", f"{shown(node.name)}, {plural(node.pages, 'page')}, at pfn {format_pfn(node.pfn)}")


def _extent(running: "Running", owner: int) -> str:
    blocks = running.leases.blocks_of(owner).total
    return f"; tree {owner:016x} goes with it, {plural(blocks, 'page block')}, {format_size(blocks * BLOCK_SIZE)}"


def _node_names(running: "Running") -> list[bytes]:
    return [node.name for node in running.store.nodes()]


def resolve(running: "Running", name: str) -> bytes:
    """Return the node that NAME means: a mount's NAME, or the node's own name."""
    raw, of_mount = os.fsencode(name), node_name(name)
    if running.store.find(of_mount) is not None:
        return of_mount
    return raw if mount_name(raw) is not None or running.store.find(raw) is not None else of_mount


def _free(machine: "Machine", running: "Running", name: bytes) -> int:
    """Withdraw one node and return the number of pages that it preserved."""
    node = running.store.find(name)
    if node is None:
        dead = next((e for e in daemons.outlived(machine) if node_name(e.name or "") == name), None)
        if dead is not None:
            return int(_discard(machine, running, dead)["pages"])
        raise PkramError(nothing_to_free(machine, name))
    try:
        lock = machine.claim(node.tree_id)
    except MachineError:
        raise PkramError(in_use(machine, node)) from None
    try:
        running.store.withdraw(name)
    finally:
        lock.release()
    machine.log(f"pkram: freed node {exact(name)}, {plural(node.pages, 'page')}")
    return node.pages


def nothing_to_free(machine: "Machine", node: bytes) -> str:
    """Return why there is no such node to free."""
    place = _place(machine, node)
    return f"no node {exact(node)} is preserved" + (f": umount {place} frees its tree" if place else "")


def _place(machine: "Machine", node: bytes) -> str | None:
    """Return where a living mount has the tree whose node it would be."""
    name = mount_name(node)
    return next((e.mountpoint for e in machine.mounts() if e.alive and e.name == name and name is not None), None)


def absent(machine: "Machine", node: bytes) -> str:
    """Return why there is no such node: the name is unknown, or belongs to a live mount."""
    name, place = mount_name(node), _place(machine, node)
    if name is not None and any(entry.outlived and entry.name == name for entry in machine.mounts()):
        return f"the daemon of {name} has died, and its tree is in RAM: mount {name} to see it"
    if name is None or place is None:
        return f"no node {exact(node)} is preserved"
    return (
        f"{name} is mounted on {place} and not preserved, so it may change at any time: look there, or preserve it: "
        f"mount -o remount,preserve,ro {place}"
    )


def _discard(machine: "Machine", running: "Running", entry: "MountEntry") -> dict[str, Any]:
    """Give up the tree of a daemon that has died; the next sweep frees it. Return its name and its pages."""
    pages = running.leases.blocks_of(entry.tree_id).total * BLOCK_PAGES
    machine.claim(entry.tree_id).release()
    machine.log(f"pkramfs: gave up the tree of {entry.name}, whose daemon had died, {plural(pages, 'page')}")
    return {"name": entry.name, "pages": pages}


def in_use(machine: "Machine", node: "Node") -> str:
    """Return why a node cannot be freed: its user, and the remedy."""
    place = next((entry.mountpoint for entry in machine.mounts() if entry.tree_id == node.tree_id), "a mount")
    return (
        f"{exact(node.name)} is in use by {place}: `mount -o remount,rw {place}` takes it back, umount and free drop it"
    )


def _say_freed(args: argparse.Namespace, freed: list[dict[str, Any]], *, refused: bool) -> None:
    if arguments.wants_json(args):
        render.emit_json(freed)
        return
    if args.all and not freed and not refused:
        render.say("no nodes are preserved")
    for node in freed:
        size = format_size(node["pages"] * PAGE_SIZE)
        render.say(f"{node['name']}: {plural(node['pages'], 'page')} ({size}) given back")
