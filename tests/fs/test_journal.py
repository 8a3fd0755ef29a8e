# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree that is rebuilt from its journal is the tree, after every request, whatever the log begins with."""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from pkramfs.fs import journal
from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.recover import begin
from pkramfs.fs.restore import restore
from pkramfs.fs.rules import ROOT_INO, WRITING
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.journal import log
from pkramfs.units import BLOCK_SIZE
from tests.support.journals import Checkpoint, Driver, Memory, contents, end, live, state

Audit = Callable[[Tree], None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("huge", ["never", "always"])
def test_what_is_rebuilt_is_the_tree(memory: Memory, audit: Audit, seed: int, huge: str) -> None:
    tree = memory.tree(huge=huge)
    driver = Driver(tree, seed)
    for number in range(250):
        did = driver.step()
        if number % 10 == 0:
            assert state(memory.rebuild(live(tree)).tree) == state(tree), f"seed {seed}, request {number}: {did}"
    assert tree.journal is not None and tree.journal.log.position > 0
    audit(tree)


@pytest.mark.parametrize("seed", range(4))
def test_it_goes_on_from_a_node(memory: Memory, audit: Audit, seed: int) -> None:
    """The tree is restored and its inodes sleep; the log begins with the node, which the first change withdraws."""
    tree = memory.tree()
    driver = Driver(tree, seed)
    for _ in range(150):
        driver.step()
    for inode in [one for one in tree.inodes.values() if one.opens or not one.nlink]:
        tree.close_all(inode)
    tree.commit()
    tree.freeze()
    end(save(tree, memory.store, b"shmem-x"))
    with memory.copy() as other:
        node = other.store.find(b"shmem-x")
        assert node is not None
        again = end(restore(other.store, b"shmem-x", other.ram, other.frames, Limits()))
        begin(again, b"x", 1, node.pfn)
        driver = Driver(again, seed)
        for number in range(80):
            did = driver.step()
            if number in (0, 1, 2, 5, 20, 50, 79):
                assert state(other.rebuild(live(again)).tree) == state(again), f"request {number}: {did}"
        audit(again)


@pytest.mark.parametrize("seed", range(4))
def test_it_goes_on_from_checkpoints(memory: Memory, audit: Audit, seed: int) -> None:
    """Some are of the present, some of a moment that has passed while they were made."""
    tree = memory.tree(huge="always" if seed & 1 else "never")
    driver, made = Driver(tree, seed), Checkpoint(memory, tree)
    for number in range(200):
        did = driver.step()
        if number % 25 == 10:
            made.finish()
        if (number % 25 == 3 and number > 3) or number % 25 == 11:
            made = Checkpoint(memory, tree)
        if number % 25 == 11:
            made.finish()
        if number % 10 == 0 or number % 25 == 11:
            assert state(memory.rebuild(live(tree)).tree) == state(tree), f"seed {seed}, request {number}: {did}"
        if number % 25 == 11:
            audit(tree)


def test_a_checkpoint_may_name_what_was_given_back_since(memory: Memory, audit: Audit) -> None:
    """A large file is deleted after a checkpoint, and its page blocks go back to the machine, where others get them."""
    tree = memory.tree()
    ino = tree.create(1, b"large", 0o600, Credentials()).ino
    for block in range(20):
        tree.write(ino, block * BLOCK_SIZE // 2, bytes(BLOCK_SIZE // 2))
    tree.commit()
    Checkpoint(memory, tree).finish()
    before = memory.leases.blocks_of(memory.frames.tree_id)
    tree.unlink(1, b"large")
    tree.forget(ino, 1 << 20)
    tree.commit()
    assert before - memory.leases.blocks_of(memory.frames.tree_id)
    assert state(memory.rebuild(live(tree)).tree) == state(tree)
    Checkpoint(memory, tree).finish()
    audit(tree)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_recovered_wherever_its_daemon_died(
    memory: Memory, audit: Audit, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Before the commit nothing was done, after it all of it: also what the dead had still to free and to clear."""
    tree = memory.tree(huge="always" if seed & 1 else "never")
    driver, told = Driver(tree, seed), tree.journal
    assert told is not None
    settle, unsettled = told._settle, list[Any]()

    def recovered() -> tuple[dict[str, Any], dict[int, bytes]]:
        with memory.copy() as other:
            found = other.recover(live(tree))
            audit(found)
            return state(found), contents(found)

    def died_before_settling() -> None:
        unsettled.append(recovered())
        settle()

    monkeypatch.setattr(told, "_settle", died_before_settling)
    for number in range(60):
        before = state(tree), contents(tree)
        did = driver.change()
        where = f"seed {seed}, request {number}: {did}"
        if number % 2:
            found = recovered()
            assert found[0] == before[0], where
            for ino in driver.files:  # what is written over data is there already
                before[1].pop(ino, None)
                found[1].pop(ino, None)
            assert found[1] == before[1], where
        unsettled.clear()
        tree.commit()
        tree.tell()
        for found in [*unsettled, *([recovered()] if number % 10 == 0 else [])]:
            assert found == (state(tree), contents(tree)), where
    audit(tree)


def test_who_reads_a_file_is_told_with_others_or_when_nobody_asks(memory: Memory) -> None:
    """But at once who writes, and who has a file that is deleted, which only that keeps."""
    tree = memory.tree()
    made = [tree.create(1, b"%d" % number, 0o644).ino for number in range(70)]
    tree.commit()
    assert tree.journal is not None

    def told(request: Callable[[], object]) -> bool:
        before = tree.journal.log.tail if tree.journal is not None else 0
        request()
        tree.commit()
        return tree.journal is not None and tree.journal.log.tail > before

    def equal() -> bool:
        return state(memory.rebuild(live(tree)).tree) == state(tree)

    assert not any(told(lambda: tree.open(ino)) for ino in made[:60])  # noqa: B023
    assert not equal()
    assert told(lambda: tree.create(1, b"new", 0o644)) and not equal()  # it waits for neither
    tree.tell()
    assert equal() and not told(tree.tell)
    assert not told(lambda: tree.release(made[0]))
    assert told(lambda: [tree.open(ino) for ino in made[1:64]]) and equal()  # together 64
    assert told(lambda: tree.open(made[0], os.O_WRONLY)) and equal()
    assert told(lambda: tree.release(made[0] | WRITING)) and equal()
    assert told(lambda: tree.unlink(1, b"1")) and equal()
    assert told(lambda: tree.release(made[1])) and equal()


def test_who_takes_over_keeps_writers_though_it_does_not_know_the_last_readers(memory: Memory) -> None:
    tree = memory.tree()
    ino = tree.create(1, b"file", 0o644).ino
    tree.open(ino, os.O_WRONLY)
    tree.commit()
    tree.open(ino)
    tree.commit()
    with memory.copy() as other:
        again = other.recover(live(tree))
        inode = again.inode(ino)
        assert (inode.opens, inode.writers) == (1, 1)
        again.release(ino)
        assert (inode.opens, inode.writers, again.writer_count) == (1, 1, 1)
        again.release(ino | WRITING)
        assert (inode.opens, inode.writers, again.writer_count) == (0, 0, 0)


def test_what_was_cut_is_cleared_once(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon dies before it clears the rest of a page; the next one does, and what is written there then stays."""
    tree = memory.tree()
    ino = tree.create(1, b"file", 0o644).ino
    tree.write(ino, 0, b"x" * 4096)
    tree.commit()
    assert tree.journal is not None
    monkeypatch.setattr(tree.journal, "_settle", lambda: None)
    tree.setattr(ino, size=1000)
    tree.commit()
    with memory.copy() as second:
        again = second.recover(live(tree))
        again.write(ino, 0, b"y" * 4096)
        again.commit()
        assert contents(again) == {ino: b"y" * 4096}
        with second.copy() as third:
            assert contents(third.recover(live(tree))) == {ino: b"y" * 4096}


def test_who_asked_is_remembered_as_long_as_the_connection(memory: Memory) -> None:
    """Of several requests that were done and not answered each is known, and the inode that it has made."""
    tree = memory.tree()
    ino = tree.create(1, b"first", 0o644).ino
    tree.commit(10)
    tree.unlink(1, b"first")
    tree.commit(12)
    tree.forget(ino)
    tree.commit()
    assert memory.rebuild(live(tree)).replay.done == {10: ino, 12: 0}
    with memory.copy() as second:
        again = second.recover(live(tree))
        assert again.journal is not None and again.journal.done == {10: ino, 12: 0}
        other = again.tmpfile(1, 0o600).ino
        again.commit(14 | 1 << 63)
        with second.copy() as third:
            assert third.rebuild(live(tree)).replay.done == {10: ino, 12: 0, 14 | 1 << 63: other}
            third.recover(live(tree), taken=None)  # a new mount, whose numbers begin anew
            assert third.rebuild(live(tree)).replay.done == {}


def test_a_checkpoint_that_was_due_is_made_by_the_next_daemon(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if more requests than that were done already."""
    monkeypatch.setattr(journal, "REQUESTS", 10)
    tree = memory.tree()
    for number in range(20):
        tree.mkdir(1, b"%d" % number, 0o755)
        tree.commit()
    with memory.copy() as other:
        again, due = other.recover(live(tree)), list[int]()
        assert again.journal is not None
        again.journal.due = lambda: due.append(1)
        again.mkdir(1, b"another", 0o755)
        again.commit()
        assert due == [1]


@pytest.mark.parametrize("name", ["_digest", "_pack_head", "_pack_asked", "chunk_digest", "guard"])
@pytest.mark.parametrize("seed", range(3))
def test_a_commit_for_which_memory_was_short_is_made_again(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """Nothing of the first attempt counts, whatever failed, and what is noted is there once."""
    tree, choice = memory.tree(), random.Random(seed)
    driver, work, failed = Driver(tree, seed), getattr(log, name), 0

    def short(*args: Any, **named: Any) -> Any:
        if choice.random() < 0.2:
            raise MemoryError
        return work(*args, **named)

    for number in range(150):
        driver.change()
        with monkeypatch.context() as some:
            some.setattr(log, name, short)
            while True:
                try:
                    tree.commit(2 * number)
                    break
                except MemoryError:
                    failed += 1
        tree.tell()
        if number % 10 == 0:
            assert state(memory.rebuild(live(tree)).tree) == state(tree)
    tree.setxattr(ROOT_INO, b"user.large", os.urandom(60_000), 0, Credentials())
    tree.commit()
    assert state(memory.rebuild(live(tree)).tree) == state(tree)
    assert failed or name in ("chunk_digest", "guard")
