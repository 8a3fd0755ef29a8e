# SPDX-License-Identifier: GPL-2.0-or-later
"""The counters of a tree: the room that a save needs is looked at again when the tree has let go of its node.

That the counters agree with the tree is checked after every test (conftest, `audit`), and that nobody else counts in
tests/architecture.
"""

from typing import Any

import pytest

from pkramfs.spans import Spans


@pytest.fixture
def held(tree: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many frames the tree asks to be held, each time."""
    found = list[int]()
    monkeypatch.setattr(tree.frames, "hold", found.append)
    return found


def test_nothing_is_held_that_nobody_asked_for(tree: Any, held: list[int]) -> None:
    for number in range(20_000):
        tree.create(1, b"%d" % number, 0o644)
    assert held == []


def test_a_tree_that_was_preserved_holds_again_at_its_next_growth(tree: Any, held: list[int]) -> None:
    tree.hold_for_save()
    tree.freeze()
    tree.preservation.preserve(lambda: None, Spans())
    tree.thaw()
    tree.create(1, b"first", 0o644)
    assert not tree.preserved and len(held) == 1, "the gate comes after the look at what is held"
    tree.create(1, b"second", 0o644)
    assert len(held) == 2
    tree.create(1, b"third", 0o644)
    assert len(held) == 2, "once is enough until the tree has grown"


def test_a_preserved_tree_holds_nothing(tree: Any, held: list[int]) -> None:
    tree.preservation.restore(lambda: None, Spans())
    tree.hold_for_save()
    assert held == []
