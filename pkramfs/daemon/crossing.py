# SPDX-License-Identifier: GPL-2.0-or-later
"""How a daemon hands its mount over: to a daemon of the next kernel, when the mount is kept over a kexec, or of newer
code.

    daemon of the old kernel                        holder                      daemon of the new kernel
    stop reading, save the tree as a node
    users of the tree ──memfd──▶                    keeps device and lock
    end                                             starts a daemon ──────▶     wait for the machine's lock
                                                                                restore the tree from the node
                                                                                reopen files, RESEND, serve
                                                                                drop the host's caches

Frames and names come from the node, as in every restore. Handles, references and requests belong to the host's side of
the mount, which a kexec of this machine does not end. So they go through the holder, which has the connection. If the
old kernel goes on after all, the tree is recovered from its log, as after any death.

Kernel: kernel/kexec_core.c (kernel_kexec), with CONFIG_KEXEC_JUMP
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import trio

from pkramfs.control.crossing import Crossing, Door
from pkramfs.control.keeper import Keeper
from pkramfs.control.replies import Done
from pkramfs.control.server import Server
from pkramfs.daemon.holding import Holding, parting
from pkramfs.daemon.job import CROSSED, HANDED_OVER, Held
from pkramfs.daemon.shadow import Checkpoints
from pkramfs.daemon.trial import patience, prove
from pkramfs.errors import DaemonError
from pkramfs.fs import handles
from pkramfs.fs.tree import Tree
from pkramfs.fuse.session import Session
from pkramfs.schema import Flag, ListOf, Maybe, Object, Row, Whole, parse

_INO = Whole(1)
_KIND = Object({"open": ListOf(Row((_INO, Whole(1), Whole(), Flag()))), "known": Maybe(ListOf(_INO))})


class Users(NamedTuple):
    """The kernel's side of a tree: open files, and the inodes in its caches (None: perhaps all)."""

    open: list[handles.Row]
    known: list[int] | None


def write_users(tree: Tree) -> int:
    """Write the users of a tree to a file in memory, and return its descriptor."""
    found = Users(handles.open_files(tree), handles.known(tree))
    fd = os.memfd_create("pkramfs-crossing", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps(found._asdict()).encode())
    return fd


def read_users(fd: int) -> Users:
    """Return the users in such a file; it may be read again."""
    return Users(**_KIND.read(parse(os.pread(fd, os.fstat(fd).st_size, 0))))


class Passage:
    """The daemon's part of a crossing: before the kexec, and with `users` after it. `say` writes to the kernel log."""

    def __init__(
        self,
        keeper: Keeper,
        session: Session,
        checkpoints: Checkpoints | None,
        holding: Holding | None,
        held: Held | None,
        say: Callable[[str], None],
    ) -> None:
        self.crossing = Crossing(keeper, Door(self._shut, self._open, self._tell_sheltered))
        self.users: Users | None = None
        """Who used the tree under the last kernel."""
        self._tree, self._session, self._checkpoints, self._holding = keeper.tree, session, checkpoints, holding
        self._facts: dict[str, Any] = {} if held is None else held.facts
        self._trial = -1 if held is None else held.trial
        if self._trial >= 0 and checkpoints is not None:
            checkpoints.put_off()
        self._keeper, self._say = keeper, say
        self._decided, self._leaves = trio.Event(), False

    async def _shut(self) -> bool:
        """Stop reading requests, and stop all other work on the tree's frames."""
        if not await self._session.stand_still():
            return False
        if self._checkpoints is not None:
            await self._checkpoints.stop()
        if self._holding is not None:
            await self._holding.be_alone()
        return True

    def _open(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.go_on()
        if self._holding is not None and self._holding.leash is not None:
            self._holding.leash.alone(yes=False)
        self._session.go_on()

    def _tell_sheltered(self) -> None:
        if self._holding is not None:
            self._holding.tell(sheltered=True)

    async def depart_on_request(self, server: Server) -> None:
        """End for a kexec, and leave the users of the tree to the next daemon."""
        await self.crossing.departing.wait()
        await server.idle()
        self._tree.commit()
        if self._holding is not None and self._holding.leash is not None:
            self._holding.leash.crosses(write_users(self._tree))
        parting(self._holding, CROSSED)

    def verbs(self) -> dict[str, Any]:
        """Return all verbs of the daemon by name."""
        return self._keeper.verbs() | self.crossing.verbs() | {"upgrade": self.upgrade}

    async def upgrade(self) -> Done:
        """Make room for a daemon that runs the code on disk, after the answer; raise DaemonError if it is refused."""
        await self._keeper.upgrade()
        await self._decided.wait()
        if not self._leaves:
            raise DaemonError(self._unchanged)
        return {}

    @property
    def _unchanged(self) -> str:
        return f"the holder of {self._keeper.name} does not become the code on disk: daemon {os.getpid()} goes on"

    def _decide(self, *, leaves: bool) -> None:
        """Tell the caller of `upgrade` whether the code on disk will take over."""
        self._leaves = leaves
        self._decided.set()
        if not leaves:
            self._keeper.leaving, self._decided = trio.Event(), trio.Event()

    async def make_room_on_request(self, server: Server) -> None:
        """End between two requests, so that a daemon of the code on disk takes over as after a death."""
        await self._keeper.leaving.wait()
        while not await self._renew_holder():
            self._say(f"pkramfs: {self._unchanged}")
            self._decide(leaves=False)
            await self._keeper.leaving.wait()
        self._decide(leaves=True)
        await server.idle()
        self._tree.commit()
        self._say(f"pkramfs: daemon {os.getpid()} of {self._keeper.name} makes room for another")
        parting(self._holding, HANDED_OVER)

    async def _renew_holder(self) -> bool:
        """Make the holder run the code on disk while this daemon serves; it could not wait for a shadow meanwhile."""
        if self._checkpoints is not None:
            await self._checkpoints.stop()
        self._say(f"pkramfs: the holder of {self._keeper.name} is to become the code on disk")
        counts, journal = self._tree.counts(), self._tree.journal
        seconds = patience(counts.files + counts.directories, 0 if journal is None else journal.requests)
        if self._holding is not None and await self._holding.renew(seconds):
            return True
        if self._checkpoints is not None:
            self._checkpoints.go_on()
        return False

    async def be_proven(self) -> None:
        """Serve for a while under the eyes of the code before, if we are new code."""
        if self._trial < 0:
            return
        await self._session.ready.wait()
        await prove(self._answered)
        if self._holding is not None and self._holding.leash is not None:
            self._holding.leash.proven()
        os.close(self._trial)
        self._trial = -1
        if self._checkpoints is not None:
            self._checkpoints.go_on()

    def _answered(self) -> int:
        return 0 if self._session.filter is None else self._session.filter.requests

    def outliving(self) -> dict[str, Any]:
        """Return how the tree outlives this process, for its status."""
        journal, holding = self._tree.journal, self._holding
        if journal is None or self._checkpoints is None:
            return {}
        found = {"log_bytes": journal.log.size, "log_requests": journal.requests, "checkpoints": self._checkpoints.made}
        found |= {"log_age": int(time.monotonic() - self._checkpoints.at), "takeovers": self._facts.get("taken", 0)}
        if holding is not None and holding.leash is not None and self._session.sends_again:
            found["holder"] = holding.pid
        if self._trial >= 0:
            found["on_trial"] = True
        return found | ({"went_back": self._facts["went_back"]} if "went_back" in self._facts else {})

    async def arrive(self) -> None:
        """Make the kernel of the host drop all that it cached under the kernel before."""
        if self.users is not None:
            await self._session.ready.wait()
            known = handles.numbers(self._tree) if self.users.known is None else self.users.known
            await self._session.operations.cache.drop_all(known)
        self.crossing.has_arrived.set()
