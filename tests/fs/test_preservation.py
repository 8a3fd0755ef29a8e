# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of a tree: every event in every state, as the table of preservation's page says."""

import errno
from collections.abc import Callable

import pytest

from pkramfs.errors import PkramError
from pkramfs.fs import preservation
from pkramfs.fs.preservation import FROZEN, KEPT, LIVE, PRESERVED, TABLE, Preservation, State
from pkramfs.spans import Spans

PAGES = Spans([(10, 12)])
STATES = {"live": LIVE, "frozen": FROZEN, "preserved": PRESERVED, "kept": KEPT}


class Tree:
    """A preservation, and what was done for it."""

    def __init__(self, state: State = LIVE) -> None:
        self.done: list[object] = []
        self.state = Preservation(lambda pages: self.done.append(pages.total))
        self.state.on_withdrawn = lambda: self.done.append("told")
        self.withdraw: Callable[[], object] = lambda: self.done.append("withdrawn")
        if state.preserved:
            self.act("restore")
        if state.frozen:
            self.act("freeze")

    def act(self, event: str) -> None:
        """Have an event happen."""
        words = (lambda: self.withdraw(), PAGES) if event in ("preserve", "restore") else ()
        getattr(self.state, event)(*words)


@pytest.mark.parametrize("before", STATES.values(), ids=STATES)
@pytest.mark.parametrize("event", TABLE)
def test_every_event_in_every_state(event: str, before: State) -> None:
    tree, after = Tree(before), TABLE[event].get(before)
    assert tree.state.state == before
    if after is None:
        with pytest.raises((OSError, PkramError)) as caught:
            tree.act(event)
        assert caught.value.errno == (errno.EROFS if event == "change" else errno.EBUSY)
        after = before
    else:
        tree.act(event)
    assert tree.state.state == after
    assert tree.state.guarded == (after != LIVE)
    given_up = before.preserved and not after.preserved
    if event == "preserve" and before == KEPT:
        assert tree.done == [2], "the node before has gone"
        return
    assert tree.done == ((["withdrawn"] if event != "lose" else []) + [2, "told"] if given_up else [])
    assert tree.state.pages == (PAGES if after.preserved else Spans())


def test_the_table_of_the_page_is_the_table_of_the_program() -> None:
    rows = [line.split() for line in (preservation.__doc__ or "").splitlines()]
    names = {state: name for name, state in STATES.items()}
    for event, leads in TABLE.items():
        (row,) = (row for row in rows if row[:1] == [event] and len(row) > 4)
        refused = "EROFS" if event == "change" else "refused"
        assert row[1:5] == [names[leads[state]] if state in leads else refused for state in STATES.values()], event


def test_where_the_withdrawal_fails_the_state_stays() -> None:
    def fail() -> None:
        raise PkramError("the list is in use", errno.EBUSY)

    tree = Tree(PRESERVED)
    tree.withdraw = fail
    for event in ("change", "withdraw"):
        with pytest.raises(PkramError):
            tree.act(event)
    assert tree.state.state == PRESERVED and tree.state.pages == PAGES and tree.done == []


def test_a_node_that_is_gone_already_is_no_error() -> None:
    def gone() -> None:
        raise PkramError("no such node", errno.ENOENT)

    tree = Tree(PRESERVED)
    tree.withdraw = gone
    tree.act("change")
    assert tree.state.state == LIVE and tree.done == [2, "told"]
