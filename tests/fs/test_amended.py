# SPDX-License-Identifier: GPL-2.0-or-later
"""Directories that sleep on while a log changes their names: what becomes of them, and what is refused."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from pkramfs.errors import FormatError
from pkramfs.fs import records
from pkramfs.fs.records import Kind
from pkramfs.fs.tree import Tree
from tests.support.journals import Checkpoint, Memory, live, state
from tests.support.whole import Both

FOLDERS, FILES = [b"one", b"two", b"three"], 24


def make(memory: Memory) -> Tree:
    """Three directories of files, some with a second name in another, as a checkpoint."""
    tree = memory.tree()
    for name in FOLDERS:
        folder = tree.mkdir(1, name, 0o755).ino
        for number in range(FILES):
            made = tree.create(folder, b"%d" % number, 0o644)
            if number % 5 == 0:
                tree.write(made.ino, 0, name * 3000)
            if number % 7 == 0 and name != b"one":
                tree.link(made.ino, ino(tree, b"one"), name + b"%d" % number)
    Checkpoint(memory, tree).finish()
    return tree


def ino(tree: Tree, *path: bytes) -> int:
    number = 1
    for name in path:
        found = tree.lookup(number, name)
        assert found is not None
        number = found.ino
    return number


@pytest.fixture(scope="module")
def saved() -> Iterator[Memory]:
    with Memory.make(8) as memory:
        memory.tree_made = make(memory)  # type: ignore[attr-defined]
        yield memory


def change(tree: Tree, dice: random.Random) -> None:
    """One request about names that there are, or about a file that has one."""
    source, target = (ino(tree, dice.choice(FOLDERS)) for _ in range(2))
    entries = tree.inode(source).entries
    assert entries is not None
    name, new = dice.choice(sorted(entries.entries)), b"new%d" % dice.randrange(1 << 30)
    act = dice.choice(["create", "unlink", "rename", "replace", "link", "chmod", "write", "mkdir"])
    if act == "create":
        tree.create(source, new, 0o600)
    elif act == "mkdir":
        tree.rmdir(source, tree.mkdir(source, new, 0o700) and new)
    elif act == "unlink":
        tree.unlink(source, name)
    elif act == "rename":
        tree.rename(source, name, target, new)
    elif act == "replace":
        tree.rename(source, name, target, dice.choice(sorted(tree.inode(target).entries.entries)))
    elif act == "link":
        tree.link(entries.entries[name][0].ino, target, new)
    else:
        found = tree.lookup(source, name)
        assert found is not None
        if act == "chmod":
            tree.setattr(found.ino, mode=0o640)
        else:
            tree.write(found.ino, 5000, b"more")
    tree.commit()


@pytest.mark.parametrize("seed", range(4))
def test_a_log_wakes_no_directory_for_a_few_names(seed: int) -> None:
    """What is recovered is what there was, verified as a whole, woken, and saved again as the next checkpoint."""
    with Memory.make(8) as memory, pytest.MonkeyPatch.context() as patch:
        tree, dice, both = make(memory), random.Random(seed), Both(patch)
        for round in range(6):
            for _ in range(5):
                change(tree, dice)
            rebuilt = memory.rebuild(live(tree)).tree
            assert (both.whole, both.awake) == (None, None)
            assert both.amended or round > 2
            assert state(rebuilt) == state(tree)
        with pytest.MonkeyPatch.context() as again:
            Both(again)
            Checkpoint(memory, tree).finish()
        assert state(memory.rebuild(live(tree)).tree) == state(tree)


def test_only_what_was_asked_for_is_awake(saved: Any) -> None:
    """A new name, a name that is gone, attributes of a file: one inode each."""
    tree: Tree = saved.tree_made
    with saved.copy() as other:
        mine = other.recover(live(tree))
        for name in FOLDERS:
            folder = ino(mine, name)
            mine.create(folder, b"new", 0o600)
            mine.unlink(folder, b"3")
            mine.setattr(ino(mine, name, b"4"), mode=0o600)
        mine.commit()
        found = other.rebuild(live(tree)).tree
        assert found.asleep is not None and len(found.asleep.amended) == 3
        awake = [b"/", *(b"/" + name + rest for name in FOLDERS for rest in (b"", b"/new", b"/3 (deleted)", b"/4"))]
        assert len(found.inodes) == len(awake)
        assert sorted(found.path(one) for one in list(found.inodes.values())) == sorted(awake)
        assert found.lookup(ino(found, b"one"), b"3") is None and found.lookup(ino(found, b"one"), b"new")
        assert found.asleep is None, "a path was asked for in each directory"


@pytest.mark.parametrize(
    ("told", "refused"),
    [
        (lambda one, two: [records.pack_enter(one, b"5", two, 999)], "expected a name that is not there yet"),
        (lambda one, two: [records.pack_leave(one, b"none")], "expected a name of the directory"),
        (
            lambda one, two: [records.pack_leave(one, b"5"), records.pack_leave(one, b"5")],
            "expected a name of the directory",
        ),
        (lambda one, two: [records.pack_leave(one, b"5")], "expected"),
        (lambda one, two: [records.pack_range(Kind.CUT, one, 0, 1)], "expected a file with pages"),
    ],
)
def test_what_does_not_fit_to_names_that_sleep_is_refused(saved: Any, told: Any, refused: str) -> None:
    tree: Tree = saved.tree_made
    with saved.copy() as other:
        mine = other.recover(live(tree))
        assert mine.journal is not None
        mine.journal.log.write(told(ino(tree, b"one"), ino(tree, b"two")))
        mine.journal.log.commit()
        with pytest.raises(FormatError, match=refused):
            other.rebuild(live(tree))
