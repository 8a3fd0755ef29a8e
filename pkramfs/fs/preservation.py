# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of a tree, live or preserved, frozen or not, and its transitions.

    event       live        frozen      preserved   kept         what happens
    --------------------------------------------------------------------------------------------
    freeze      frozen      frozen      kept        kept         no change passes from now on
    thaw        live        live        preserved   preserved    changes pass again
    preserve    refused     kept        refused     kept         a save has published the node; one before it goes
    restore     preserved   refused     refused     refused      a restore has read the node
    change      live        EROFS       live        EROFS        a preserved tree withdraws its node first
    withdraw    refused     refused     live        frozen       the node goes by one store
    lose        refused     refused     live        frozen       the node is gone already (it was damaged)

*Preserved* means that a published node holds this very tree. *Kept* means preserved and frozen, as after `preserve` and
until the kexec. A restored tree is preserved and not frozen: its first change withdraws the node, so nothing that a
published node names is ever changed. If the withdrawal fails the change fails, and the state stays as it is.

Once the node is gone its own pages (metadata and relocated copies, but no page of a file) are free memory.

All users of this object (save, restore, the gate in core, the daemon's verbs, the soak, tests) run in one thread;
it knows neither trio nor the store.

Kernel: fs/super.c (freeze_super, thaw_super); mm/shmem_pkram.c, patch 24
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from pkramfs.errors import PkramError
from pkramfs.fs.failure import fail
from pkramfs.spans import Spans


class State(NamedTuple):
    """The two bits of a state."""

    preserved: bool
    frozen: bool


LIVE, FROZEN = State(preserved=False, frozen=False), State(preserved=False, frozen=True)
PRESERVED, KEPT = State(preserved=True, frozen=False), State(preserved=True, frozen=True)

TABLE = {
    "freeze": {LIVE: FROZEN, FROZEN: FROZEN, PRESERVED: KEPT, KEPT: KEPT},
    "thaw": {LIVE: LIVE, FROZEN: LIVE, PRESERVED: PRESERVED, KEPT: PRESERVED},
    "preserve": {FROZEN: KEPT, KEPT: KEPT},
    "restore": {LIVE: PRESERVED},
    "change": {LIVE: LIVE, PRESERVED: LIVE},
    "withdraw": {PRESERVED: LIVE, KEPT: FROZEN},
    "lose": {PRESERVED: LIVE, KEPT: FROZEN},
}
"""The state that each event leads to. What is missing is refused."""


class Preservation:
    """The state of one tree, and the node that holds it.

    `guarded` is True if a change has to call `change` first. `pages` are those that only the node uses; `free` takes
    them back. `on_withdrawn` is called after each withdrawal of the node.
    """

    __slots__ = ("_free", "_withdraw", "frozen", "guarded", "on_withdrawn", "pages", "preserved")

    def __init__(self, free: Callable[[Spans], None]) -> None:
        self._free = free
        self._withdraw: Callable[[], object] = _nothing
        self.on_withdrawn: Callable[[], object] = _nothing
        self.pages = Spans()
        self.preserved = self.frozen = self.guarded = False

    @property
    def state(self) -> State:
        """Return the state that the tree is in."""
        return State(self.preserved, self.frozen)

    def freeze(self) -> None:
        """Refuse every change from now on with EROFS."""
        self._enter("freeze")

    def thaw(self) -> None:
        """Let changes pass again."""
        self._enter("thaw")

    def preserve(self, withdraw: Callable[[], object], pages: Spans) -> None:
        """Note that a save has published the tree's node, which `withdraw` withdraws by one store.

        If it has replaced an earlier node, the pages of that one are freed.
        """
        self._enter("preserve")
        before, self._withdraw, self.pages = self.pages, withdraw, pages
        if before:
            self._free(before)

    def restore(self, withdraw: Callable[[], object], pages: Spans) -> None:
        """Note that the tree was made from a published node, which `withdraw` withdraws by one store."""
        self._enter("restore")
        self._withdraw, self.pages = withdraw, pages

    def change(self) -> None:
        """Let a change pass once no node holds the tree; raise EROFS if it is frozen."""
        if self.frozen:
            raise fail(errno.EROFS)
        if self.preserved:
            self.withdraw()

    def withdraw(self) -> None:
        """Withdraw the node and free its pages. A node that was given up because it was damaged is gone already."""
        self._check("withdraw")
        try:
            self._withdraw()
        except PkramError as error:
            if error.errno != errno.ENOENT:
                raise
        self.lose()

    def lose(self) -> None:
        """Go on without the node, which is gone, and free its pages."""
        self._enter("lose")
        pages, self.pages, self._withdraw = self.pages, Spans(), _nothing
        self._free(pages)
        self.on_withdrawn()

    def _check(self, event: str) -> State:
        """Return the next state after an event; raise PkramError if the table has none."""
        state = TABLE[event].get(self.state)
        if state is None:
            described = f"{'preserved' if self.preserved else 'live'}{' and frozen' if self.frozen else ''}"
            raise PkramError(f"cannot {event} a tree that is {described}", errno.EBUSY)
        return state

    def _enter(self, event: str) -> None:
        self.preserved, self.frozen = self._check(event)
        self.guarded = self.preserved or self.frozen


def _nothing() -> None:
    """Do nothing."""
