# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints, made by another process while the daemon serves.

    daemon                                        shadow
    frames for it, the position S ── JSON ──▶     rebuild the tree from the last checkpoint and the log, up to S
                                                  compare its figures with the daemon's at S
    publish it, free what is older ◀── JSON ──    write it as a node that no list names

The shadow does the same as a daemon that takes over. So each checkpoint is a rehearsal of recovery. A checkpoint whose
figures differ from the daemon's is dropped and reported, and the log continues from the checkpoint before. A shadow
that dies leaves its frames, which the daemon frees. If the daemon dies, the kernel kills the shadow; the holder does
so, too, and waits for its end by its pidfd, before the next daemon takes the shadow's frames as free.

Kernel: fs/jbd2/checkpoint.c
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio

from pkramfs.daemon.holding import Holding
from pkramfs.errors import ExhaustedError, PkramfsError
from pkramfs.fs.checkpoint import Supply, figures, write
from pkramfs.fs.journal import REQUESTS
from pkramfs.fs.limits import Limits
from pkramfs.fs.picture import complete
from pkramfs.fs.recover import rebuild
from pkramfs.fs.sealing import LONG
from pkramfs.fs.tree import Tree
from pkramfs.journal.layout import Figures
from pkramfs.kernel.running import look
from pkramfs.machine import process as this
from pkramfs.machine.directory import Machine
from pkramfs.machine.frames import Frames, Run
from pkramfs.pkram.store import Store
from pkramfs.schema import Invalid, ListOf, Maybe, Object, Row, Text, Whole, parse
from pkramfs.spans import Spans

log = logging.getLogger("pkramfs")

_NICE = 5
_RUN = Row((Whole(), Whole(1)))
_ANSWER = Object({}, optional={"node": Maybe(Whole(1)), "pages": ListOf(_RUN), "records": Whole(), "error": Text()})


class Checkpoints:
    """The daemon's end: makes checkpoints of one tree when they are due."""

    def __init__(
        self, tree: Tree, machine: Machine, name: bytes, say: Callable[[str], None], holding: Holding | None = None
    ) -> None:
        self._tree, self._machine, self._name, self._say, self._holding = tree, machine, name, say, holding
        self._due = trio.Event()
        self.made, self.at = 0, time.monotonic()
        self._off = False
        self._store: Store | None = None  # the next checkpoint is made in this process
        self._process: subprocess.Popen[bytes] | None = None
        self._done = trio.Event()
        self._done.set()
        self.instead: Callable[[], object] = _nothing
        """Called when one is due of a preserved tree."""
        assert tree.journal is not None
        tree.journal.due = self.due

    def due(self) -> None:
        """Make a checkpoint soon."""
        self._due.set()

    async def serve(self) -> None:
        """Make checkpoints, one after the other, until cancelled."""
        while True:
            await self._due.wait()
            self._due = trio.Event()
            if self._tree.preserved:
                self._leave_it()
            elif self._store is not None:
                self._make_here(self._store)
            elif not self._off:
                self._done = trio.Event()
                try:
                    await self._make()
                finally:
                    self._done.set()

    async def stop(self) -> None:
        """Stop making checkpoints, and end the process that makes one now."""
        self._off = True
        if self._process is not None:
            self._process.kill()
        await self._done.wait()

    def put_off(self) -> None:
        """Make no checkpoint until `go_on`."""
        self._off = True

    def go_on(self) -> None:
        """Continue making checkpoints; one that was due meanwhile is due at the next request."""
        self._off = False
        assert self._tree.journal is not None
        self._tree.journal.expect_due()

    def all_answered(self, store: Store) -> None:
        """Make a checkpoint in this process if the daemons before have died too soon to make one.

        Otherwise the log would grow with every death, and with it the time of each takeover. It must not be earlier:
        the log that it replaces tells which requests the dead daemons had done and not answered.
        """
        journal = self._tree.journal
        assert journal is not None
        if journal.requests >= 2 * REQUESTS and not self._off:
            self._store = store
            if self._process is not None:
                self._process.kill()
            self.due()

    def _make_here(self, store: Store) -> None:
        tree, journal, self._store = self._tree, self._tree.journal, None
        assert journal is not None
        try:
            runs = tree.frames.allocate(tree.ledger.pages_needed(), held=True)
        except ExhaustedError as error:
            self._put_off(f"no checkpoint: {error}")
            return
        try:
            node, pages = complete(write(tree, store, self._name, Supply(runs)))
            journal.rebase(node, pages)
        except (PkramfsError, OSError) as error:
            _free(tree, runs)
            self._put_off(f"no checkpoint: {error}")
            return
        rest = Spans((start, start + count) for start, count in runs) - pages
        if rest:
            tree.frames.free(rest.starts, rest.counts)
        tree.commit()
        self.made, self.at = self.made + 1, time.monotonic()

    async def _make(self) -> None:
        tree, journal = self._tree, self._tree.journal
        assert journal is not None
        tree.commit()
        position, base, expected = journal.log.tail, journal.log.base, figures(tree)
        try:
            runs = tree.frames.allocate(tree.ledger.pages_needed(), held=True)
        except ExhaustedError as error:
            self._put_off(f"no checkpoint: {error}")
            return
        try:
            answer = await self._ask(position, runs, expected)
        except BaseException:
            _free(tree, runs)
            raise
        pages = Spans((start, start + count) for start, count in answer.get("pages", []))
        if self._store is not None:  # this process makes it
            _free(tree, runs)
            return
        if "error" in answer or journal.log.base != base or tree.preserved:
            _free(tree, runs)
            if tree.preserved:
                self._leave_it()
            elif journal.log.base == base:
                self._put_off(f"no checkpoint: {answer['error']}")
            return
        rest = Spans((start, start + count) for start, count in runs) - pages
        try:
            journal.rebase(answer["node"], pages, position)
        except ExhaustedError as error:
            _free(tree, runs)
            self._put_off(f"no checkpoint: {error}")
            return
        if rest:
            tree.frames.free(rest.starts, rest.counts)
        tree.commit()
        self.made, self.at = self.made + 1, time.monotonic()

    def _leave_it(self) -> None:
        """Skip the checkpoint of a preserved tree: its node needs the log as it is, or is a checkpoint itself."""
        journal = self._tree.journal
        assert journal is not None
        journal.limit = journal.requests + LONG
        self.instead()

    def _put_off(self, why: str) -> None:
        """Try again after as many requests as make a checkpoint due."""
        journal = self._tree.journal
        assert journal is not None
        journal.limit = journal.requests + REQUESTS
        self._say(f"pkramfs: {why}")

    async def _ask(self, position: int, runs: list[Run], expected: Figures) -> dict[str, Any]:
        """Make a shadow write a checkpoint; return its answer, or the reason why there is none."""
        assert self._tree.journal is not None
        request = {
            "machine": self._machine.path(),
            "tree_id": self._tree.frames.tree_id,
            "live": self._tree.journal.log.live,
            "position": position,
            "name": self._name.hex(),
            "figures": expected,
            "runs": runs,
            "parent": os.getpid(),
        }
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        process = subprocess.Popen(  # started by this thread: the kernel kills the shadow when this thread ends
            [sys.executable, "-P", "-m", "pkramfs", "checkpoint"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": package},
            cwd="/",
        )
        self._tell(process)
        try:
            told = partial(process.communicate, json.dumps(request).encode())
            stdout, _ = await trio.to_thread.run_sync(told, abandon_on_cancel=True)
        finally:
            process.kill()
            process.wait()  # before its frames are free
        try:
            answer: dict[str, Any] = _ANSWER.read(parse(stdout))
        except Invalid:
            return {"error": f"its process died with status {process.returncode}"}
        return answer

    def _tell(self, process: subprocess.Popen[bytes]) -> None:
        """Tell the holder for which process to wait. If the daemon dies before that, the shadow has not begun."""
        self._process = process
        if self._holding is not None and self._holding.leash is not None:
            pidfd = os.pidfd_open(process.pid)
            self._holding.leash.shadow(pidfd)
            os.close(pidfd)


def _free(tree: Tree, runs: list[Run]) -> None:
    tree.frames.free([start for start, _ in runs], [count for _, count in runs])


def _nothing() -> None:
    """Do nothing."""


# -- the shadow's end -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Read a request from stdin, make the checkpoint; print the node and its frames."""
    os.nice(_NICE)
    this.die_with_parent()
    request = json.loads(sys.stdin.buffer.read())
    if os.getppid() != request["parent"]:
        return 1  # the daemon has died: the frames may belong to another
    try:
        answer = _make(request)
    except (PkramfsError, OSError) as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    return int("error" in answer)


def _make(request: dict[str, Any]) -> dict[str, Any]:
    machine = Machine(request["machine"])
    kernel = look(machine)
    frames = Frames(kernel.ram, kernel.leases, request["tree_id"])
    position = request["position"]
    rebuilt = complete(rebuild(kernel.store, request["live"], kernel.ram, frames, Limits(), position))
    tree, expected = rebuilt.tree, Figures(*request["figures"])
    if (found := figures(tree)) != expected:
        return {"error": f"the journal comes to {found} at {position}, the daemon had {expected}: please report it"}
    supply = Supply([(start, count) for start, count in request["runs"]])
    node, pages = complete(write(tree, kernel.store, bytes.fromhex(request["name"]), supply))
    runs = [(int(start), int(end - start)) for start, end in pages]
    return {"node": node, "pages": runs, "records": rebuilt.replay.records}
