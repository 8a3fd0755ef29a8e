# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl cp and rename: a second node like the first, and another name for a node.

A NEW that has no `shmem-` in front is the NAME of a mount, as NAME was; the node of a program gets NEW as it is.
"""

import argparse
import os
from typing import TYPE_CHECKING

from pkramfs.cli import arguments, nodes, opening, progress, render
from pkramfs.cli.arguments import need
from pkramfs.mounting.names import expect_name, mount_name, node_name
from pkramfs.text import exact
from pkramfs.units import PAGE_SIZE, format_size, plural

if TYPE_CHECKING:
    from pkramfs.pkram.node import Node


def act_cp(args: argparse.Namespace) -> None:
    """Run `pkramctl cp NAME NEW`."""
    from pkramfs.archive.copying import copy
    from pkramfs.kernel import running

    machine = arguments.existing(args)
    with machine.lifecycle(shared=True, timeout=nodes.LOCK_SECONDS):
        kernel = running.look(machine)
        source = opening.resolved(machine, kernel, args.name)
        node = progress.drive(copy(kernel, source, _new(args.new, source)), args)
    machine.log(f"pkram: copied node {exact(source)} to {exact(node.name)}, {plural(node.pages, 'page')}")
    _say(args, source, node)


def act_rename(args: argparse.Namespace) -> None:
    """Run `pkramctl rename NAME NEW`."""
    from pkramfs.archive.copying import rename
    from pkramfs.kernel import running

    machine = arguments.existing(args)
    with machine.lifecycle(shared=True, timeout=nodes.LOCK_SECONDS):
        kernel = running.look(machine)
        source = opening.resolved(machine, kernel, args.name)
        node = rename(kernel, source, _new(args.new, source))
    machine.log(f"pkram: renamed node {exact(source)} to {exact(node.name)}")
    _say(args, source, node)


def _new(name: str, source: bytes) -> bytes:
    """Return the node's name that NEW means."""
    raw = os.fsencode(name)
    if mount_name(source) is None:
        need(name, "NEW is empty: give a name")
        return raw
    mount = mount_name(raw) or name
    expect_name(mount, "NEW")
    return node_name(mount)


def _say(args: argparse.Namespace, source: bytes, node: "Node") -> None:
    if arguments.wants_json(args):
        render.emit_json({"from": exact(source), "name": exact(node.name), "pages": node.pages, "pfn": node.pfn})
        return
    size = format_size(node.pages * PAGE_SIZE)
    render.say(f"{exact(source)} -> {exact(node.name)}: {plural(node.pages, 'page')} ({size})")
