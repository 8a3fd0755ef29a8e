# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl's commands for preserved trees: their options, and how they find the tree that NAME means.

    ls tree stat cat           look into one                            look.py
    export import              as a tar archive, and back               archives.py
    diff                       against another, or a directory          compare.py
    cp rename                  another node of it, or another name      copies.py

They read a tree where it lies (archive/). The machine's lock is held while a tree is found and its columns are checked,
not while its contents are read, so a long work keeps nobody from mounting or from a kexec; if the node goes
meanwhile the work ends with an error.
"""

import argparse
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pkramfs.cli import archives, arguments, compare, copies, look, nodes
from pkramfs.errors import FormatError, PkramError
from pkramfs.mounting.names import mount_name
from pkramfs.text import exact

if TYPE_CHECKING:
    from pkramfs.archive.view import SavedTree
    from pkramfs.kernel.running import Running
    from pkramfs.machine.directory import Machine

Command = Callable[[Any, str, Any, str], argparse.ArgumentParser]


def add(commands: Any, command: Command) -> None:
    """Add the commands; `command` adds one with the options that all have."""
    made = _at_a_path(commands, command, "ls", look.act_ls, "list a directory of a preserved tree, as ls -l does")
    made.add_argument("-n", "--numeric", action="store_true", help="show owners as numbers")
    _at_a_path(commands, command, "tree", look.act_tree, "draw a preserved tree, as tree(1) does")
    _at_a_path(commands, command, "stat", look.act_stat, "show all attributes of a file, as stat(1) does")
    _add_archives(commands, command)
    _add_copies(commands, command)
    made = _of_a_tree(commands, command, "diff", _diff, "compare a preserved tree with another, or with a directory")
    made.add_argument("other", metavar="OTHER", help="another NAME, or a directory: ./DIR")
    made.add_argument("--ignore-times", action="store_true", help="do not compare times of modification")
    made = _of_a_tree(commands, command, "cat", look.act_cat, "write a file of a preserved tree to standard output")
    made.add_argument("paths", nargs="+", metavar="PATH", help="files in the tree")


def _add_copies(commands: Any, command: Command) -> None:
    for name, act, text in (
        ("cp", copies.act_cp, "copy a preserved node"),
        ("rename", copies.act_rename, "give a preserved node another name"),
    ):
        made = command(commands, name, act, text)
        made.add_argument("name", metavar="NAME", help="a mount's NAME, or a node's name")
        made.add_argument("new", metavar="NEW", help="the NAME of the copy" if name == "cp" else "its new NAME")


def _add_archives(commands: Any, command: Command) -> None:
    made = _of_a_tree(commands, command, "export", archives.act_export, "write a preserved tree as a tar archive")
    made.add_argument("file", metavar="FILE", help="the archive; - for standard output")
    made = command(commands, "import", archives.act_import, "preserve the tree that is in a tar archive")
    made.add_argument("name", metavar="NAME", help="the NAME with which the tree will be mounted")
    made.add_argument("file", metavar="FILE", help="the archive; - for standard input")


def _of_a_tree(commands: Any, command: Command, name: str, act: Any, text: str) -> argparse.ArgumentParser:
    made = command(commands, name, lambda args: act(args, opened(args, args.name)), text)
    made.add_argument("name", metavar="NAME", help="a mount's NAME, or a node's name")
    return made


def _at_a_path(commands: Any, command: Command, name: str, act: Any, text: str) -> argparse.ArgumentParser:
    made = _of_a_tree(commands, command, name, act, text)
    made.add_argument("path", nargs="?", default="/", metavar="PATH", help="where in the tree (default: its root)")
    return made


def _diff(args: argparse.Namespace, left: "SavedTree") -> int:
    if "/" in args.other:
        return compare.act_diff(args, left, None)
    if os.path.isdir(args.other):
        arguments.warn("pkramctl", f"{args.other} is taken for a NAME; the directory is ./{args.other}")
    return compare.act_diff(args, left, opened(args, args.other))


def opened(args: argparse.Namespace, name: str) -> "SavedTree":
    """Return the tree that a name means, read and checked."""
    from pkramfs.archive.view import open_tree
    from pkramfs.kernel import running

    machine = arguments.existing(args)
    with machine.lifecycle(shared=True, timeout=nodes.LOCK_SECONDS):
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
        raise PkramError(_absent(machine, found), errno.ENOENT)
    return found


def _absent(machine: "Machine", node: bytes) -> str:
    """Return why there is no such node: nobody has the name, or a mount that goes on changing."""
    name = mount_name(node)
    place = next((entry.mountpoint for entry in machine.mounts() if entry.alive and entry.name == name), None)
    if name is None or place is None:
        return f"no node {exact(node)} is preserved"
    return (
        f"{name} is mounted on {place} and not preserved, so it may change at any time: look there, or preserve it: "
        f"mount -o remount,preserve,ro {place}"
    )
