# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl export and import: a preserved tree as a tar archive, and back.

    export NAME FILE|-      FILE appears by rename when it is whole; `-` is standard output
    import NAME FILE|-      the node appears by one store when all is in it; `-` is standard input

Files that could not be put into the archive are listed on stderr, and the status is then 1.

Counterparts: GNU tar, dump(8)
"""

import argparse
import os
import stat
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from pkramfs.cli import arguments, opening, progress, render
from pkramfs.cli.arguments import need
from pkramfs.cli.destination import STDIO, destination
from pkramfs.mounting.names import expect_name, node_name
from pkramfs.text import exact
from pkramfs.units import format_size, plural

if TYPE_CHECKING:
    from pkramfs.archive.export import Report
    from pkramfs.archive.view import SavedTree
    from pkramfs.fs.picture import Progress
    from pkramfs.kernel.running import Running
    from pkramfs.machine.frames import Frames

INCOMPLETE = 1
"""Exit status where an archive lacks files, or holds what is left of a damaged tree."""
_BUFFER = 1 << 20


def act_export(args: argparse.Namespace) -> int:
    """Run `pkramctl export NAME FILE`."""
    from pkramfs.archive.export import export

    tree, damage, whole = _salvaged(args) if args.best_effort else (opening.opened(args, args.name), {}, True)
    with destination(args.file) as out:
        report = progress.drive(export(tree, out, damage=damage), args)
    status = _say_exported(args, report)
    return status if whole else INCOMPLETE


def _salvaged(args: argparse.Namespace) -> "tuple[SavedTree, dict[int, str], bool]":
    """Return the readable part of a damaged tree, the rest, and True if nothing is wrong; list the faults."""
    from pkramfs.archive.salvage import salvage
    from pkramfs.kernel import running

    machine = arguments.existing(args)
    with machine.lifecycle(shared=True, timeout=opening.LOCK_SECONDS):
        kernel = running.look(machine)
        tree, damage, problems = salvage(kernel, opening.resolve_damaged(kernel, args.name))
    for problem in problems:
        arguments.warn("pkramctl", problem)
    return tree, damage, not problems


def act_import(args: argparse.Namespace) -> int:
    """Run `pkramctl import NAME FILE`. The machine is made and booted if need be, as by a mount."""
    from pkramfs.archive.claiming import claimed
    from pkramfs.kernel import running

    expect_name(args.name, "NAME")
    machine, name = arguments.machine(args), node_name(args.name)
    with _source(args.file) as source, running.shared(machine) as kernel, claimed(kernel, name, "import") as frames:
        report = progress.drive(_importing(args.file, source, kernel, name, frames), args)
    machine.log(f"pkram: imported node {exact(name)}, {plural(report.names, 'name')}")
    return _say_imported(args, report)


def _importing(
    file: str, source: "BinaryIO", kernel: "Running", name: bytes, frames: "Frames"
) -> "Generator[Progress, None, Report]":
    """Make a tree of an archive, and save it as a node."""
    from pkramfs.archive.importing import Owner, fill
    from pkramfs.archive.tarreader import read
    from pkramfs.fs.limits import Limits
    from pkramfs.fs.save import save
    from pkramfs.fs.tree import Tree

    owner = Owner(os.geteuid(), os.getegid())
    tree = Tree(kernel.ram, frames, Limits(), uid=owner.uid, gid=owner.gid)
    title = "standard input" if file == STDIO else file
    report = yield from fill(tree, title, read(source.read, title), owner, total=_size(source))
    tree.freeze()
    yield from save(tree, kernel.store, name, banned=kernel.banned())
    return report


def _size(source: "BinaryIO") -> int:
    """Return how many bytes an archive has, 0 for a pipe."""
    found = os.fstat(source.fileno())
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


@contextmanager
def _source(path: str) -> "Iterator[BinaryIO]":
    """Give the archive to read."""
    if path == STDIO:
        need(not sys.stdin.isatty(), "no archive on standard input: name a file, or pipe it")
        yield sys.stdin.buffer
    else:
        with open(path, "rb", buffering=_BUFFER) as file:
            yield file


def _say_imported(args: argparse.Namespace, report: "Report") -> int:
    left_out = [{"path": exact(path), "reason": reason} for path, reason in report.left_out]
    for one in left_out:
        arguments.warn("pkramctl", f"left out: {one['path']}: {one['reason']}")
    if arguments.wants_json(args):
        render.emit_json({"names": report.names, "bytes": report.bytes, "left_out": left_out})
    else:
        render.say(f"{args.name}: {plural(report.names, 'name')}, {format_size(report.bytes)}")
    return INCOMPLETE if left_out else 0


def _say_exported(args: argparse.Namespace, report: "Report") -> int:
    """List the files that the archive lacks, and print its figures unless it is on stdout."""
    left_out = [{"path": exact(path), "reason": reason} for path, reason in report.left_out]
    for one in left_out:
        arguments.warn("pkramctl", f"left out: /{one['path']}: {one['reason']}")
    if args.file != STDIO:
        figures = {"names": report.names, "bytes": report.bytes, "left_out": left_out}
        if arguments.wants_json(args):
            render.emit_json(figures)
        else:
            render.say(f"{args.file}: {plural(report.names, 'name')}, {format_size(report.bytes)}")
    return INCOMPLETE if left_out else 0
