# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the tree that NAME means, and read it.

The machine's lock is held while a tree is found and its columns are checked, not while its contents are read, so a long
work blocks neither a mount nor a kexec; if the node goes meanwhile the work ends with an error.
"""

import argparse
import errno
import os
from typing import TYPE_CHECKING

from pkramfs.cli import arguments, nodes
from pkramfs.errors import FormatError, PkramError
from pkramfs.mounting.names import mount_name, node_name

if TYPE_CHECKING:
    from pkramfs.archive.view import SavedTree
    from pkramfs.kernel.running import Running
    from pkramfs.machine.directory import Machine

LOCK_SECONDS = nodes.LOCK_SECONDS


def opened(args: argparse.Namespace, name: str) -> "SavedTree":
    """Return the tree that a name means, read and checked."""
    from pkramfs.archive.view import open_tree
    from pkramfs.kernel import running

    machine = arguments.existing(args)
    with machine.lifecycle(shared=True, timeout=LOCK_SECONDS):
        kernel = running.look(machine)
        found = resolved(machine, kernel, name)
        try:
            return open_tree(kernel.store, found)
        except FormatError as error:
            error.remedy = f"`pkramctl verify {name}` shows all that is wrong"
            raise


def resolved(machine: "Machine", kernel: "Running", name: str) -> bytes:
    """Return the node that a name means; raise PkramError (ENOENT) if it is not preserved."""
    found = nodes.resolve(kernel, name)
    if kernel.store.find(found) is None:
        raise PkramError(nodes.absent(machine, found), errno.ENOENT)
    return found


def resolve_damaged(kernel: "Running", name: str) -> bytes:
    """Return the node that a name means where the list of nodes may be damaged."""
    raw = os.fsencode(name)
    known = {node.name for node in kernel.survey().nodes}
    return raw if mount_name(raw) is not None or (raw in known and node_name(name) not in known) else node_name(name)
