# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl verify --data: compare all data with their checksums (`-o verify=data`).

    nodes, logs of dead daemons     compared here, from RAM
    live trees                      their daemons compare: they know which data are being changed

One line for each damaged range. Data without a checksum are counted, and never called sound.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.cli import progress
from pkramfs.errors import FormatError, PkramfsError
from pkramfs.mounting.names import mount_name
from pkramfs.text import exact
from pkramfs.units import MIB, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree
    from pkramfs.kernel.running import Running
    from pkramfs.machine.mounts import MountEntry
    from pkramfs.pkram.node import Node

_ASK_SECONDS = 0.1
_STAGE = "verify"


class Found(NamedTuple):
    """The result: bytes compared, pieces without a checksum, trees without any checksum, and problems."""

    bytes: int
    unchecked: int
    without: list[str]
    problems: list[str]

    def describe(self) -> str:
        """Return a clause for people."""
        parts = [f"{format_size(self.bytes)} of data compared"]
        if self.unchecked:
            parts.append(f"up to {format_size(self.unchecked * MIB)} unchecked")
        if self.without:
            parts.append(f"no checksums: {', '.join(self.without)}")
        return "; ".join(parts)


class Check:
    """The check of one machine; `drawn` shows how far it is."""

    def __init__(self, running: "Running", drawn: progress.Bar) -> None:
        self._running, self._drawn = running, drawn
        self._done = self._total = self._unchecked = 0
        self._without, self._problems = list[str](), list[str]()

    def run(self, nodes: list[bytes], names: list[str]) -> Found:
        """Compare the named nodes, or all, and the trees of mounts with these NAMEs, or of all."""
        listed = [one for one in self._nodes() if not nodes or one.name in nodes]
        preserved = {node.tree_id for node in listed}
        mounts = [
            one
            for one in self._running.machine.mounts()
            if one.name and (not names or one.name in names) and one.tree_id not in preserved
        ]
        self._total = sum(node.pages for node in listed) * PAGE_SIZE
        for node in listed:
            self._guarded(exact(node.name), partial(self._node, node))
        for entry in mounts:
            self._guarded(entry.name or "", partial(self._living if entry.alive else self._dead, entry))
        return Found(self._done, self._unchecked, self._without, self._problems)

    def _nodes(self) -> "list[Node]":
        try:
            return [node for node in self._running.store.nodes() if mount_name(node.name) is not None]
        except FormatError:
            return []  # the check of the metadata says so

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Do a part of the check; an unreadable tree is a problem."""
        try:
            work()
        except FormatError:
            return  # the check of the metadata says so
        except PkramfsError as error:
            self._problems.append(f"{name}: its data were not compared: {error}")

    # -- read here ------------------------------------------------------------------------------

    def _node(self, node: "Node") -> None:
        from pkramfs.archive.standing import Standing
        from pkramfs.fs.nodes import read_tree

        standing = Standing(self._running.ram, node)
        self._compare(exact(node.name), read_tree(self._running.store, node), standing.expect)

    def _dead(self, entry: "MountEntry") -> None:
        from pkramfs.fs.limits import Limits
        from pkramfs.fs.recover import rebuild
        from pkramfs.machine.frames import Frames

        running = self._running
        if entry.journal is None or not running.leases.blocks_of(entry.tree_id):
            return  # it has no tree, or one of a kernel that is gone
        frames = Frames(running.ram, running.leases, entry.tree_id)
        work = rebuild(running.store, entry.journal, running.ram, frames, Limits())
        while True:
            try:
                next(work)
            except StopIteration as done:
                self._compare(entry.name or "", done.value.tree, lambda: None)
                return

    def _compare(self, name: str, tree: "Tree", expect: Callable[[], None]) -> None:
        """Compare a tree that no daemon changes; `expect` raises if it was changed anyway."""
        from pkramfs.fs.summing import compare_all
        from pkramfs.pkram.parallel import workers

        if tree.sums is None:
            self._without.append(name)
            return
        for size in compare_all(tree, workers()):
            self._done += size
            self._drawn.show(_STAGE, self._done, max(self._total, self._done))
        expect()
        self._unchecked += tree.sums.table.pending
        self._problems += [f"{name}: {line} are damaged" for line in tree.sums.lines()]

    # -- asked for ------------------------------------------------------------------------------

    def _living(self, entry: "MountEntry") -> None:
        """Have the daemon compare, and wait until it has."""
        from pkramfs.control.commands import Commands

        daemon = Commands(entry.socket)
        before = daemon.status()
        if "unsummed" not in before:
            self._without.append(entry.name or "")
            return
        daemon.compare()
        now = first = daemon.status()
        while now["to_compare"]:
            time.sleep(_ASK_SECONDS)
            now = daemon.status()
            done = (first["to_compare"] - now["to_compare"]) * MIB
            self._drawn.show(_STAGE, self._done + done, self._total + first["to_compare"] * MIB)
        size = max(now["pages"] * PAGE_SIZE - now["unsummed"] * MIB, 0)
        self._done, self._total = self._done + size, self._total + size
        self._unchecked += now["unsummed"]
        self._problems += [f"{entry.name}: {line} are damaged" for line in now["damaged"]]
        if more := now["damaged_count"] - len(now["damaged"]):
            self._problems.append(f"{entry.name}: {more} more ranges are damaged")
