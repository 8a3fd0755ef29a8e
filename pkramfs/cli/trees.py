# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl's commands for preserved trees, and their options.

    ls tree stat cat           look into one                            look.py
    export import              as a tar archive, and back               archives.py
    diff                       against another, or a directory          compare.py
    cp rename                  another node of it, or another name      copies.py

They read a tree where it lies (archive/), without mounting it.
"""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pkramfs.cli import archives, arguments, compare, copies, look, opening, progress
from pkramfs.cli.arguments import need

if TYPE_CHECKING:
    from pkramfs.archive.view import SavedTree

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
    progress.add_option(made)
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
        progress.add_option(made)


def _add_archives(commands: Any, command: Command) -> None:
    made = _of_a_tree(commands, command, "export", None, "write a preserved tree as a tar archive")
    made.add_argument("file", metavar="FILE", help="the archive; - for standard output")
    made.add_argument(
        "--best-effort", action="store_true", help="write what verifies of a damaged tree, and list the rest"
    )
    made.set_defaults(act=archives.act_export)
    progress.add_option(made)
    made = command(commands, "import", archives.act_import, "preserve the tree that is in a tar archive")
    made.add_argument("name", metavar="NAME", help="the NAME of the new tree, for pkram=NAME")
    made.add_argument("file", metavar="FILE", help="the archive; - for standard input")
    progress.add_option(made)


def _of_a_tree(commands: Any, command: Command, name: str, act: Any, text: str) -> argparse.ArgumentParser:
    made = command(commands, name, lambda args: act(args, opening.opened(args, args.name)), text)
    made.add_argument("name", metavar="NAME", help="a mount's NAME, or a node's name")
    return made


def _at_a_path(commands: Any, command: Command, name: str, act: Any, text: str) -> argparse.ArgumentParser:
    made = _of_a_tree(commands, command, name, act, text)
    made.add_argument("path", nargs="?", default="/", metavar="PATH", help="a path in the tree (default: its root)")
    return made


def _diff(args: argparse.Namespace, left: "SavedTree") -> int:
    if "/" in args.other:
        need(os.path.isdir(args.other) or not os.path.exists(args.other), f"{args.other} is not a directory")
        return compare.act_diff(args, left, None)
    if os.path.isdir(args.other):
        arguments.warn("pkramctl", f"{args.other} is taken for a NAME; the directory is ./{args.other}")
    return compare.act_diff(args, left, opening.opened(args, args.other))
