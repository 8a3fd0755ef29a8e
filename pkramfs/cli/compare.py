# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl diff: the differences between two preserved trees, or between one and a directory.

    /a/f: size 3 and 5                 the left one's value first
    /a/f: content differs at byte 17
    only in x: /b
    only in /mnt: /c

The status is 1 if anything differs, as diff(1) has it. A second argument with a slash is a directory, one without a
NAME.

Counterparts: diff(1)
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, look, progress, render
from pkramfs.text import exact

if TYPE_CHECKING:
    from pkramfs.archive.compare import Difference, Side
    from pkramfs.archive.view import SavedTree

DIFFERENT = 1


def act_diff(args: argparse.Namespace, left: "SavedTree", right: "SavedTree | None") -> int:
    """Run `pkramctl diff NAME OTHER`; `right` is None for a directory."""
    from pkramfs.archive.compare import HostTree, compare
    from pkramfs.archive.view import ROOT
    from pkramfs.fs.picture import Progress

    found: list[Difference] = []
    other: Side = HostTree(os.fsencode(args.other)) if right is None else right
    top: Any = os.fsencode(args.other) if right is None else ROOT
    count = 0
    for one in progress.shown(compare(left, other, top, times=not args.ignore_times), args):
        if isinstance(one, Progress):
            continue
        count += 1
        if arguments.wants_json(args):
            found.append(one)
        else:
            render.say(_line(args, one))
    if arguments.wants_json(args):
        render.emit_json([{**one._asdict(), "path": exact(one.path)} for one in found])
    return DIFFERENT if count else 0


def _line(args: argparse.Namespace, one: "Difference") -> str:
    path = exact(one.path)
    if one.what == "only":
        return f"only in {args.name if one.right is None else args.other}: {path}"
    if one.what == "content":
        return f"{path}: content differs at byte {one.left:,}"
    left, right = (_value(one.what, value) for value in (one.left, one.right))
    return f"{path}: {one.what} {left} and {right}"


def _value(what: str, value: Any) -> str:
    """Return one side's value as people write it."""
    if value is None:
        return "absent"
    if what == "mtime":
        return look.exact_time(value)
    if what == "device":
        return f"{os.major(value)},{os.minor(value)}"
    if what.startswith("xattr "):
        return _acl(os.fsencode(value)) if what.startswith("xattr system.posix_acl_") else f"'{value}'"
    return str(value)


def _acl(value: bytes) -> str:
    """Return an ACL in its short text form, or its bytes if it is none."""
    from pkramfs.archive.keywords import acl_text

    try:
        return acl_text(value)
    except OSError:
        return f"'{exact(value)}'"
