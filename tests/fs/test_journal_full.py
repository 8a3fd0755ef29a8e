# SPDX-License-Identifier: GPL-2.0-or-later
"""A journal without room: ENOSPC before anything is done, never afterwards; what needs none goes on."""

import contextlib
import errno
import random
from collections.abc import Iterator
from typing import Any

import pytest

from pkramfs.errors import ExhaustedError
from pkramfs.fs import acl
from pkramfs.fs.tree import Tree
from pkramfs.journal.log import Log
from tests.fs.conftest import audit
from tests.fs.test_journal_stores import REQUESTS, prepare
from tests.support.journals import Checkpoint, Driver, Memory, contents, live, state


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory.make(8) as made:
        yield made


class Refusing:
    """Frames that run out, after so many allocations."""

    def __init__(self, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allocate, self.left = memory.frames.allocate, -1
        monkeypatch.setattr(memory.frames, "allocate", self.allocate)

    def allocate(self, *args: Any, **options: Any) -> Any:
        if self.left == 0:
            raise ExhaustedError("no frames")
        self.left -= 1
        return self._allocate(*args, **options)


def drain(tree: Tree, left: int) -> Log:
    """Use the log up to so many bytes before its end, and take the next segment away."""
    assert tree.journal is not None
    log, ino = tree.journal.log, tree.root.ino
    while log.left > left + 70_000:
        tree.setxattr(ino, b"user.fill", b"x" * 60_000)
        tree.commit()
    while log.left > left:
        log.write([b""])
        log.commit()
    if log._spare is not None:
        tree.frames.free([log._spare[0]], [log._spare[1]])
        log._spare = None
    return log


@pytest.mark.parametrize("left", [320, 28_800], ids=["hardly any", "enough"])
@pytest.mark.parametrize("name", REQUESTS)
def test_all_or_nothing_without_frames(memory: Memory, monkeypatch: pytest.MonkeyPatch, name: str, left: int) -> None:
    """Whichever allocation fails: a request that is refused has changed nothing, and a commit never fails."""
    tree = memory.tree()
    numbers = prepare(tree)
    drain(tree, left)
    refusing = Refusing(memory, monkeypatch)
    for allocations in range(5):
        before, refused = state(tree), False
        refusing.left = allocations
        try:
            REQUESTS[name](tree, numbers)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused = True
        tree.commit()
        refusing.left = -1
        tree.commit()  # how files are open may have had to wait
        tree.tell()
        assert state(memory.rebuild(live(tree)).tree) == state(tree)
        audit(tree)
        if not refused:
            return
        assert state(tree) == before or name in PARTLY
    pytest.fail("it is refused always")


PARTLY = ["copy", "sparsify", "unlink an open file"]
"""Requests of which a part may be done, or that are several."""


def fill(tree: Tree) -> list[int]:
    """Files until RAM has no frame left, then names until the log has no room; returns inode numbers."""
    made, size = list[int](), 1 << 20
    number = 0
    while size:
        number += 1
        try:
            ino = tree.create(1, b"file%d" % number, 0o644).ino
            tree.write(ino, 0, b"x" * size)
            made.append(ino)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            size >>= 1
        tree.commit()
    with contextlib.suppress(OSError):
        while True:
            number += 1
            tree.create(1, b"file%d" % number, 0o644)
            tree.commit()
    return made


@pytest.mark.parametrize(("huge", "checkpoints"), [("never", False), ("always", True)])
def test_a_full_ram_goes_on(huge: str, checkpoints: bool) -> None:
    """What needs no memory is never refused: reading, overwriting, opening, closing, deleting."""
    with Memory.make(4) as memory:
        use_full(memory, memory.tree(huge=huge), checkpoints=checkpoints)


def use_full(memory: Memory, tree: Tree, *, checkpoints: bool) -> None:
    tree.ledger.copies = 2
    tree.hold_for_save()
    due = list[int]()
    assert tree.journal is not None
    tree.journal.due = lambda: due.append(1)

    def go_on() -> None:
        tree.commit()
        if checkpoints and due:
            due.clear()
            Checkpoint(memory, tree).finish()

    files = fill(tree)
    for number in range(300):
        ino = files[number % len(files)]
        tree.read(ino, 0, 10)
        tree.write(ino, 0, b"y" * 100, stamp=False)
        tree.release(tree.open(ino, number % 2))
        if checkpoints or number % 50 == 0:
            tree.write(ino, 0, b"z" * 100)
        go_on()
    audit(tree)
    assert state(memory.rebuild(live(tree)).tree) == state(tree)
    for name in list(tree.root.entries.entries if tree.root.entries is not None else ()):
        tree.unlink(1, name)
        go_on()
    assert state(memory.rebuild(live(tree)).tree) == state(tree)
    if checkpoints:  # else the log has taken it all
        tree.write(tree.create(1, b"after", 0o644).ino, 0, b"x" * (1 << 20))
    go_on()
    audit(tree)


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_on_a_full_ram(seed: int) -> None:
    """Somebody else takes all frames but a few, and gives them back: each request is done, or refused and not done."""
    with Memory.make(3) as memory:
        tree = memory.tree(huge="always" if seed & 1 else "never")
        driver, choice, taken = Driver(tree, seed), random.Random(seed), list[tuple[int, int]]()
        for number in range(200):
            if number % 10 == 0:
                for start, count in taken:
                    memory.frames.free([start], [count])
                spare = memory.frames.free_pages - choice.choice([0, 3, 30, 100])
                taken = memory.frames.allocate(spare) if spare > 0 else []
            driver.step()
            if number % 10 == 5:
                found = memory.rebuild(live(tree)).tree
                assert contents(found) == contents(tree)
        for start, count in taken:
            memory.frames.free([start], [count])
        tree.commit()
        assert state(memory.rebuild(live(tree)).tree) == state(tree)
        audit(tree)


def shatter(memory: Memory) -> None:
    """Leave no two free frames side by side."""
    for start, count in memory.frames.allocate(memory.frames.room()):
        for pfn in range(start, start + count, 2):
            memory.frames.free([pfn], [1])


def test_a_request_of_many_records(memory: Memory) -> None:
    """Frames lie in pieces: a copy makes a record of each page, and comes only as far as the log has room."""
    tree = memory.tree()
    source, target = (tree.create(1, name, 0o644).ino for name in (b"source", b"target"))
    tree.write(source, 0, b"s" * (4 << 20))
    tree.write(target, 0, b"t")
    tree.commit()
    drain(tree, 60_000)
    shatter(memory)
    done = tree.copy(source, 0, target, 0, 4 << 20)
    tree.commit()
    assert 0 < done < 4 << 20
    found = memory.rebuild(live(tree)).tree
    assert state(found) == state(tree)
    assert contents(found) == contents(tree)
    tree.unlink(1, b"target")
    tree.commit()
    assert state(memory.rebuild(live(tree)).tree) == state(tree)


def test_a_checkpoint_for_which_there_is_no_room(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log goes on from the one before, and all frames of the new one can be freed."""
    tree = memory.tree()
    prepare(tree)
    made, refusing = Checkpoint(memory, tree), Refusing(memory, monkeypatch)
    refusing.left = 0
    with pytest.raises(ExhaustedError):
        made.finish()
    memory.frames.free(*zip(*made.runs, strict=True))
    tree.commit()
    assert state(memory.rebuild(live(tree)).tree) == state(tree)
    audit(tree)


def test_an_inherited_acl_that_is_long(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = memory.tree()
    folder = tree.mkdir(1, b"folder", 0o755).ino
    users = [(2, 7, number) for number in range(3000)]
    value = acl.pack([(1, 7, 0xFFFFFFFF), *users, (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)])
    tree.setxattr(folder, acl.DEFAULT, value)
    tree.commit()
    drain(tree, 28_800)
    Refusing(memory, monkeypatch).left = 0
    with pytest.raises(ExhaustedError):
        tree.mkdir(folder, b"new", 0o755)
    tree.commit()
    assert state(memory.rebuild(live(tree)).tree) == state(tree)


def test_tails_of_many_files_go_before_anybody_meets_enospc() -> None:
    """Each is a record or two, of files that the request is not about."""
    with Memory.make(60) as memory:
        tree = memory.tree(huge="always")
        made = [tree.create(1, b"%d" % number, 0o644).ino for number in range(50)]
        for ino in made:
            tree.write(ino, 0, b"x")
            tree.commit()
        drain(tree, 28_700)
        tree.huge = "never"
        tree.write(made[0], 1 << 30, b"y" * (20 << 20))
        tree.commit()
        assert not tree.tails
        assert state(memory.rebuild(live(tree)).tree) == state(tree)
        audit(tree)
