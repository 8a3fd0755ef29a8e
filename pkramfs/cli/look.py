# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl ls, tree, stat and cat: look into a preserved tree, in the forms that people know.

    drwxr-xr-x  2 root root      60 Nov 29 13:12 etc
    -rw-r--r--+ 1 root adm  1048576 Nov 29 13:12 dump          `+`: it has an ACL

Names are escaped wherever they are shown (`render`), contents never: `cat` is for pipes and files. As JSON a file is
one object with the fields of ENTRY below; `tree` is a flat list of them, because a tree may be deeper than JSON
readers like.

Counterparts: coreutils (ls, stat, cat), tree(1)
"""

import argparse
import errno
import os
import stat
import time
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from pkramfs import stdio
from pkramfs.cli import arguments, render
from pkramfs.text import FILE_KINDS, exact
from pkramfs.units import PAGE_SIZE, plural

if TYPE_CHECKING:
    from pkramfs.archive.view import Attributes, SavedTree

ENTRY = (
    *("path", "type", "ino", "mode", "uid", "gid", "nlink", "rdev", "size", "blocks"),
    *("atime_ns", "mtime_ns", "ctime_ns", "btime_ns", "flags", "target"),
)
"""Fields of a file in JSON, in this order. `target` is null for all but symbolic links."""
_DEVICES = (stat.S_IFCHR, stat.S_IFBLK)
_HALF_A_YEAR = 31_556_952 // 2
_LINES = ("├── ", "└── ", "│   ", "    ")
_ASCII = ("|-- ", "`-- ", "|   ", "    ")
_FLAGS = ((0x10, "immutable"), (0x20, "append"), (0x40, "nodump"), (0x80, "noatime"))


def entry(tree: "SavedTree", path: bytes, place: int) -> dict[str, Any]:
    """Return a file as plain data, for JSON."""
    found = tree.attributes(place)
    plain = found._asdict()
    plain |= {f"{name}_ns": plain.pop(name) for name in ("atime", "mtime", "ctime", "btime")}
    plain |= {"path": exact(path), "type": FILE_KINDS[found.kind]}
    plain["target"] = exact(tree.target(place)) if found.kind == stat.S_IFLNK else None
    return {name: plain[name] for name in ENTRY}


# -- ls ---------------------------------------------------------------------------------------------


def act_ls(args: argparse.Namespace, tree: "SavedTree") -> None:
    """Run `pkramctl ls NAME [PATH]`."""
    path = os.fsencode(args.path)
    place = tree.find(path)
    shown = sorted(tree.children(place)) if tree.is_directory(place) else [(path, tree.find(path, follow=False))]
    if arguments.wants_json(args):
        render.emit_json([entry(tree, name, child) for name, child in shown])
        return
    if tree.is_directory(place):
        render.say(f"total {sum(tree.attributes(child).blocks for _, child in shown) // 2}")
    _columns([_long(tree, name, child, numeric=args.numeric) for name, child in shown])


def _long(tree: "SavedTree", name: bytes, place: int, *, numeric: bool) -> list[str]:
    """Return the columns of `ls -l` for one file."""
    found = tree.attributes(place)
    acl = any(key.startswith(b"system.posix_acl_") for key in tree.xattrs(place))
    owner, group = (str(found.uid), str(found.gid)) if numeric else (user(found.uid), group_of(found.gid))
    device = found.kind in _DEVICES
    size = f"{os.major(found.rdev)}, {os.minor(found.rdev)}" if device else str(found.size)
    shown = exact(name) + (f" -> {exact(tree.target(place))}" if found.kind == stat.S_IFLNK else "")
    mode = stat.filemode(found.mode) + ("+" if acl else "")
    return [mode, str(found.nlink), owner, group, size, _when(found.mtime), shown]


def _columns(rows: list[list[str]]) -> None:
    """Print rows as ls does: figures to the right, one blank between columns, names as they come."""
    widths = [max((len(row[at]) for row in rows), default=0) for at in range(6)]
    right = (1, 4)
    for row in rows:
        cells = [row[at].rjust(widths[at]) if at in right else row[at].ljust(widths[at]) for at in range(6)]
        render.say(" ".join([*cells, row[6]]))


def _when(ns: int) -> str:
    """Return a time as ls shows it: without the time of day when it is long ago, or to come."""
    seconds = ns // 10**9
    try:
        then = time.localtime(seconds)
    except (OverflowError, ValueError, OSError):
        return str(seconds)
    recent = 0 <= time.time() - seconds < _HALF_A_YEAR
    return time.strftime("%b %e %H:%M" if recent else "%b %e  %Y", then)


@cache
def user(number: int) -> str:
    """Return the name of a user of this host, or the number."""
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OverflowError):
        return str(number)


@cache
def group_of(number: int) -> str:
    """Return the name of a group of this host, or the number."""
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except (KeyError, OverflowError):
        return str(number)


# -- tree -------------------------------------------------------------------------------------------


def act_tree(args: argparse.Namespace, tree: "SavedTree") -> None:
    """Run `pkramctl tree NAME [PATH]`."""
    path = os.fsencode(args.path)
    place = tree.find(path)
    if arguments.wants_json(args):
        render.emit_json([entry(tree, below, child) for below, child in tree.walk(place)])
        return
    render.say("." if path == b"/" else path)
    folders = files = 0
    for line, is_folder in _branches(tree, place, _LINES if render.can_show(_LINES[0]) else _ASCII):
        render.say(line)
        folders, files = folders + is_folder, files + (not is_folder)
    render.say()
    render.say(f"{plural(folders, 'directory', 'directories')}, {plural(files, 'file')}")


def _branches(tree: "SavedTree", place: int, lines: tuple[str, str, str, str]) -> Iterator[tuple[str, bool]]:
    """Yield a line for each file below a directory, and whether it is a directory; without recursion."""
    fork, last, beside, beneath = lines
    left = [("", sorted(tree.children(place), reverse=True))]
    while left:
        indent, names = left[-1]
        if not names:
            left.pop()
            continue
        name, child = names.pop()
        shown = exact(name) + (f" -> {exact(tree.target(child))}" if _is_link(tree, child) else "")
        yield indent + (fork if names else last) + shown, tree.is_directory(child)
        if tree.is_directory(child):
            left.append((indent + (beside if names else beneath), sorted(tree.children(child), reverse=True)))


def _is_link(tree: "SavedTree", place: int) -> bool:
    return tree.attributes(place).kind == stat.S_IFLNK


# -- stat -------------------------------------------------------------------------------------------


def act_stat(args: argparse.Namespace, tree: "SavedTree") -> None:
    """Run `pkramctl stat NAME [PATH]`."""
    path = os.fsencode(args.path)
    place = tree.find(path, follow=False)
    xattrs = tree.xattrs(place)
    if arguments.wants_json(args):
        extents = [{"offset": offset, "bytes": size} for offset, size in tree.extents(place)]
        named = {exact(name): exact(value) for name, value in xattrs.items()}
        render.emit_json(entry(tree, path, place) | {"xattrs": named, "extents": extents})
        return
    for line in _stat_lines(tree, path, place, tree.attributes(place)):
        render.say(line)
    for name, value in xattrs.items():
        render.say(f" Xattr: {exact(name)} ({plural(len(value), 'byte')})")


def _stat_lines(tree: "SavedTree", path: bytes, place: int, found: "Attributes") -> Iterator[str]:
    link = f" -> {exact(tree.target(place))}" if found.kind == stat.S_IFLNK else ""
    kind = "regular empty file" if found.kind == stat.S_IFREG and not found.size else FILE_KINDS[found.kind]
    yield f"  File: {exact(path)}{link}"
    yield f"  Size: {found.size:<10} Blocks: {found.blocks:<10} IO Block: {PAGE_SIZE:<6} {kind}"
    device = f" Device type: {os.major(found.rdev)},{os.minor(found.rdev)}" if found.kind in _DEVICES else ""
    yield f" Inode: {found.ino:<10} Links: {found.nlink}{device}"
    access = f"({stat.S_IMODE(found.mode):04o}/{stat.filemode(found.mode)})"
    yield f"Access: {access}  Uid: ({found.uid:5}/{user(found.uid):>8})   Gid: ({found.gid:5}/{group_of(found.gid):>8})"
    yield f"Access: {exact_time(found.atime)}"
    yield f"Modify: {exact_time(found.mtime)}"
    yield f"Change: {exact_time(found.ctime)}"
    yield f" Birth: {exact_time(found.btime) if found.btime else '-'}"
    if flags := [name for bit, name in _FLAGS if found.flags & bit]:
        yield f" Flags: {', '.join(flags)}"


def exact_time(ns: int) -> str:
    """Return a time as stat(1) shows it."""
    seconds, rest = divmod(ns, 10**9)
    try:
        then = time.localtime(seconds)
    except (OverflowError, ValueError, OSError):
        return f"{seconds}.{rest:09d}"
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', then)}.{rest:09d} {time.strftime('%z', then)}"


# -- cat --------------------------------------------------------------------------------------------


def act_cat(args: argparse.Namespace, tree: "SavedTree") -> None:
    """Run `pkramctl cat NAME PATH…`. All paths are looked up before anything is written."""
    places = []
    for path in args.paths:
        place = tree.find(os.fsencode(path))
        if tree.is_directory(place):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if tree.attributes(place).kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        places.append(place)
    for place in places:
        for data in contents(tree, place):
            stdio.pour(data)


def contents(tree: "SavedTree", place: int) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file from its beginning to its end, holes as zeros."""
    at, size = 0, tree.attributes(place).size
    zeros = memoryview(bytes(1 << 20))
    for offset, data in tree.data(place):
        yield from _hole(zeros, at, offset)
        yield data
        at = offset + len(data)
    yield from _hole(zeros, at, size)


def _hole(zeros: memoryview, at: int, end: int) -> Iterator[memoryview]:
    while at < end:
        size = min(len(zeros), end - at)
        yield zeros[:size]
        at += size
