# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl verify: check all that would cross a kexec, as the next kernel and the next mount would.

    super block ── its magic, checksum, version
    node list ──── sound, no cycle
    each node ──── page table, objects, links, bytes; its pages are RAM and lie in its own page blocks
    nodes ──────── no page belongs to two
    lease table ── agrees on each page block with nodes, locks and the kernel
    each tree ──── names, links, extents agree (a node of pkramfs's own: shmem-NAME)
    --data ─────── the contents of files match their checksums: datacheck

Every problem is one line. The check goes on after a problem as far as it can. PKRAM itself finds out when it loads.
"""

import argparse
import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkramfs.cli import arguments, nodes, progress, render
from pkramfs.cli.datacheck import Check
from pkramfs.errors import FormatError, PkramError, PkramfsError
from pkramfs.mounting.names import mount_name, node_name
from pkramfs.text import exact
from pkramfs.units import PAGE_SIZE, plural

if TYPE_CHECKING:
    from pkramfs.kernel.running import Running
    from pkramfs.machine.mounts import MountEntry
    from pkramfs.pkram.node import Node
    from pkramfs.pkram.streams.reader import ObjectReader
    from pkramfs.spans import Spans


_ABSENT = "no node {} is preserved"
_ABSENT_NAME = re.compile(_ABSENT.format(".*"))
_LOOKS = 3
"""How often a log that is written to meanwhile is read before damage is believed."""


def act(args: argparse.Namespace) -> int:
    """Run `pkramctl verify [--data] [NAME…]`."""
    machine = arguments.existing(args)
    from pkramfs.kernel.running import look

    with machine.lifecycle(shared=True, timeout=nodes.LOCK_SECONDS):
        running = look(machine)
        names = [nodes.resolve(running, name) for name in args.names]
        with progress.waiting(args, "verify") as drawn:
            checked, problems = check(running, names, drawn)
            logs, more = check_logs(running, args.names)
            data = Check(running, drawn).run(names, args.names) if args.data else None
        problems = [one for one in problems if not _is_absent(one, logs)] + more + (data.problems if data else [])
    if arguments.wants_json(args):
        known = {"data": {key: value for key, value in data._asdict().items() if key != "problems"}} if data else {}
        render.emit_json({"nodes": checked, "logs": len(logs), "problems": problems, **known})
    elif problems:
        for problem in problems:
            render.say(problem)
    else:
        and_logs = f" and {plural(len(logs), 'log')}" if logs else ""
        render.say(f"{plural(checked, 'node')}{and_logs} checked, nothing is wrong")
    if data and not arguments.wants_json(args):
        render.say(data.describe())
    return _status(problems)


def _status(problems: list[str]) -> int:
    """Return the status of damage; of PkramError if names that are not preserved are all that is wrong."""
    damage = not all(_ABSENT_NAME.fullmatch(one) for one in problems)
    return 0 if not problems else FormatError.exit_status if damage else PkramError.exit_status


def check(running: "Running", names: list[bytes], drawn: progress.Bar | None = None) -> tuple[int, list[str]]:
    """Check the named nodes, or all; return how many were checked, and the problems. `drawn` shows how far it is."""
    from pkramfs.pkram.check import check as check_store
    from pkramfs.units import BLOCK_PAGES

    report = check_store(
        running.ram,
        running.store.root(),
        usable=running.machine.hardware().usable,
        owned=lambda tree_id: running.leases.blocks_of(tree_id).scale(BLOCK_PAGES),
        names=names or None,
        visit=_Visits(running, drawn),
        handed_over=False,
    )
    found = {node.name for node in report.nodes}
    absent = [_ABSENT.format(exact(name)) for name in names if name not in found]
    if report.problems:
        report.problems[0] += _out_of_reach(running)
    report.problems += doubts(running)
    checked = sum(not names or node.name in names for node in report.nodes)
    return checked, report.problems + absent


def check_logs(running: "Running", names: list[str]) -> tuple[list[str], list[str]]:
    """Rebuild the tree of each log, of living mounts and of dead ones; return their names, and the problems."""
    checked, problems = [], []
    for entry in running.machine.mounts():
        if entry.journal is None or entry.name is None or (names and entry.name not in names):
            continue
        if not running.leases.blocks_of(entry.tree_id):
            continue  # of a kernel that is gone
        checked.append(entry.name)
        if problem := log_problem(running, entry):
            problems.append(f"{entry.name}: {problem}")
    return checked, problems


def log_problem(running: "Running", entry: "MountEntry") -> str:
    """Return the fault of a log. A live log may be read while its checkpoint changes; then read it again."""
    from pkramfs.fs.limits import Limits
    from pkramfs.fs.recover import rebuild
    from pkramfs.machine.frames import Frames

    problem = ""
    for _ in range(_LOOKS if entry.alive else 1):
        frames = Frames(running.ram, running.leases, entry.tree_id)
        try:
            for _ in rebuild(running.store, entry.journal or 0, running.ram, frames, Limits()):
                pass
        except FormatError as error:
            problem = str(error)
        else:
            return ""
    return problem


def _is_absent(problem: str, logs: list[str]) -> bool:
    """Return True if a problem is only that a mount which has a log has no node."""
    return any(problem == _ABSENT.format(exact(node_name(name))) for name in logs)


def _out_of_reach(running: "Running") -> str:
    """Return a clause that names the whole nodes which a damaged list does not lead to, or nothing."""
    from pkramfs.pkram.node import shown

    found = ", ".join(shown(node.name) for node in running.survey().found)
    return f"; out of reach, but whole: {found}; `pkramctl free --damaged` brings them back" if found else ""


def doubts(running: "Running") -> list[str]:
    """Return where the lease table is wrong about page blocks; those of nodes were checked with their nodes."""
    with running.machine.tables():
        try:
            found = running.ownership.disagreements(running.machine.live_ids(), of_nodes=False)
            return [str(error) for error in found]
        except FormatError:
            return []  # of the list of nodes, which is reported


class _Visits:
    """Looks into each sound node, and counts the bytes of those that are done."""

    def __init__(self, running: "Running", drawn: progress.Bar | None) -> None:
        self._drawn, self._store, self._done, self._total = drawn, running.store, 0, 0
        if drawn is not None:
            with contextlib.suppress(FormatError):  # the check reports it
                self._total = sum(node.pages for node in running.store.nodes()) * PAGE_SIZE

    def __call__(self, node: "Node", objects: list["ObjectReader"], pages: "Spans") -> Iterator[str]:
        """Yield the problem with the tree in a node of ours, if there is one."""
        from pkramfs.fs.nodes import read_log

        if mount_name(node.name) is not None:
            try:
                if node.log_pfn:
                    read_log(self._store, node, pages)
                else:
                    _read_tree(objects, pages)
            except PkramfsError as error:
                yield str(error)
        self._done += node.pages * PAGE_SIZE
        if self._drawn is not None:
            self._drawn.show("verify", self._done, max(self._total, self._done))


def _read_tree(objects: list["ObjectReader"], pages: "Spans") -> None:
    from pkramfs.fs.verify import verify
    from pkramfs.pkram.treeformat import TreeStream

    if len(objects) != 2:
        raise FormatError("Node", "objects", found=len(objects), expected="2, bytes and pages of a tree")
    verify(TreeStream(objects[0].read()), objects[1].load_runs(), pages, objects[1].data)
