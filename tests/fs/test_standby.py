# SPDX-License-Identifier: GPL-2.0-or-later
"""A copy that follows a log is what a recovery makes of it, with the same frames, at every moment."""

import pytest

from pkramfs.errors import FormatError
from pkramfs.fs.limits import Limits
from pkramfs.fs.recover import recover
from pkramfs.fs.standby import Follower
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from tests.support.journals import TREE, Checkpoint, Driver, Memory, contents, end, live, state


def follower(memory: Memory, tree: Tree) -> Follower:
    """Another process that follows a tree's log, and has come to its end."""
    frames = Frames(memory.ram, memory.leases, TREE)
    made = Follower(memory.store, live(tree), memory.ram, frames, Limits())
    end(made.prepare())
    return made


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("begins", ["with nothing", "with a checkpoint"])
def test_what_follows_is_what_would_be_recovered(memory: Memory, seed: int, begins: str) -> None:
    tree = memory.tree(huge="always" if seed & 1 else "never")
    driver = Driver(tree, seed)
    for _ in range(60):
        driver.step()
    if begins == "with a checkpoint":
        Checkpoint(memory, tree).finish()
    for number in (1, 7, 60):
        copy = follower(memory, tree)
        for step in range(number * 2):
            driver.step()
            if step % number == 0:
                assert copy.follow()
        found, expected = copy.finish(), memory.rebuild(live(tree))
        assert found is not None
        assert state(found.tree) == state(expected.tree) == state(tree)
        assert found.data == expected.data and found.metadata == expected.metadata
        assert found.replay.done == expected.replay.done and found.log == expected.log
        assert found.replay.requests == expected.replay.requests


def test_it_goes_on_with_the_tree(memory: Memory) -> None:
    tree = memory.tree()
    driver, copy = Driver(tree, 5), follower(memory, tree)
    for _ in range(100):
        driver.step()
        assert copy.follow()
    before = contents(tree)
    found = copy.finish()
    assert found is not None
    again = end(recover(memory.store, live(tree), memory.ram, found.tree.frames, Limits(), 1, b"none", found))
    assert contents(again) == before
    driver = Driver(again, 6)
    for _ in range(50):
        driver.step()
    assert state(memory.rebuild(live(again)).tree) == state(again)


def test_what_was_done_stays_known_when_nothing_new_came(memory: Memory) -> None:
    """The request that was not answered may have been read long ago."""
    tree = memory.tree()
    copy = follower(memory, tree)
    inode = tree.create(1, b"new", 0o600)
    tree.commit(4711)
    assert copy.follow() and copy.follow()
    found = copy.finish()
    assert found is not None and found.replay.done == {4711: inode.ino}


def test_another_checkpoint_ends_it(memory: Memory) -> None:
    tree = memory.tree()
    driver, copy = Driver(tree, 3), follower(memory, tree)
    for _ in range(20):
        driver.step()
    assert copy.follow()
    Checkpoint(memory, tree).finish()
    driver.step()
    tree.create(1, b"another", 0o600)
    tree.commit()
    assert not copy.follow()
    assert copy.finish() is None


def test_what_is_damaged_is_refused(memory: Memory) -> None:
    tree = memory.tree()
    copy = follower(memory, tree)
    tree.create(1, b"new", 0o600)
    tree.commit()
    assert tree.journal is not None
    segment = tree.journal.log.segments[-1]
    memory.ram.page(segment.pfn)[200] ^= 1
    memory.ram.page(segment.pfn)[300] ^= 1
    with pytest.raises(FormatError):
        copy.follow()


def test_a_frame_in_two_files_is_refused(memory: Memory) -> None:
    tree = memory.tree()
    one = tree.create(1, b"one", 0o600)
    two = tree.create(1, b"two", 0o600)
    handle = tree.open(one.ino, 2)
    tree.write(handle, 0, memoryview(b"x" * 4096))
    tree.commit()
    copy = follower(memory, tree)
    assert one.pages is not None and tree.journal is not None
    ((_, pfn, _),) = list(one.pages)
    tree.journal.put(two, [(0, pfn, 1)])
    tree.commit()
    assert copy.follow()
    with pytest.raises(FormatError, match="a frame in two files"):
        copy.finish()
