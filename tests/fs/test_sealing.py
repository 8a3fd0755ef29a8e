# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree that is preserved by its log comes back as one that is written whole, and its log goes on."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pkramfs.errors import FormatError, PkramError, VersionError
from pkramfs.fs import sealing
from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.nodes import objects
from pkramfs.fs.recover import begin
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.sealing import preserve
from pkramfs.fs.tree import Tree
from pkramfs.fs.verify import verify
from pkramfs.journal import layout
from pkramfs.pkram.check import check
from pkramfs.pkram.treeformat import TreeStream
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE
from tests.support.journals import SUPER_PFN, Checkpoint, Driver, Memory, contents, end, live, state

NODE = b"shmem-x"
Audit = Callable[[Tree], None]


def driven(memory: Memory, seed: int, steps: int = 150, *, checkpoint: int = 0) -> Driver:
    """A tree after random requests; with `checkpoint`, its log begins with that of such a moment."""
    driver = Driver(memory.tree(huge="always" if seed & 1 else "never"), seed)
    for number in range(steps):
        driver.step()
        if number == checkpoint > 0:
            Checkpoint(memory, driver.tree).finish()
    return driver


def restored(memory: Memory) -> Tree:
    tree: Tree = end(restore(memory.store, NODE, memory.ram, memory.frames, Limits()))
    return tree


def preserved(memory: Memory, tree: Tree, **how: Any) -> Any:
    tree.freeze()
    return end(preserve(tree, memory.store, NODE, **how))


def found(tree: Tree) -> tuple[dict[str, Any], dict[int, bytes]]:
    """All that a restore brings back, and the files' bytes."""
    return state(tree), contents(tree)


@pytest.mark.parametrize("checkpoint", [0, 60, 149])
@pytest.mark.parametrize("seed", range(4))
def test_it_comes_back_as_if_it_was_written_whole(memory: Memory, audit: Audit, seed: int, checkpoint: int) -> None:
    """The last checkpoint is of the very moment: there is nothing to replay."""
    tree = driven(memory, seed, checkpoint=checkpoint).tree
    tree.losses.forget()
    tree.commit()
    with memory.copy() as other:
        again = other.recover(live(tree), taken=None)
        preserved(other, again, whole=True)
        with other.copy() as third:
            expected = found(restored(third))
    report = preserved(memory, tree)
    node = memory.store.find(NODE)
    assert node is not None and node.log_pfn and not node.objects
    assert report.moved == 0 and report.bytes == tree.counts().bytes
    with memory.copy() as other:
        again = restored(other)
        assert again.preserved and not again.frozen
        audit(again)
        assert found(again) == expected


@pytest.mark.parametrize("seed", range(4))
def test_its_log_goes_on(memory: Memory, audit: Audit, seed: int) -> None:
    preserved(memory, driven(memory, seed).tree)
    with memory.copy() as other:
        again = restored(other)
        driver = Driver(again, seed)
        for number in range(80):
            did = driver.step()
            if number in (0, 1, 2, 5, 20, 50, 79):
                assert state(other.rebuild(live(again)).tree) == state(again), f"request {number}: {did}"
        audit(again)
        again.preservation.withdraw() if again.preserved else None
        for inode in [one for one in again.inodes.values() if one.opens or not one.nlink]:
            again.close_all(inode)
        again.commit()
        again.losses.forget()
        expected = found(again)
        preserved(other, again)
        with other.copy() as third:
            assert found(restored(third)) == expected


def test_what_comes_behind_the_seal_does_not_count(memory: Memory) -> None:
    """Files are opened while it is preserved: the log grows, into frames that the node does not name, too."""
    driver = driven(memory, 1, 40)
    tree = driver.tree
    ino = tree.create(1, b"opened", 0o600, Credentials()).ino
    tree.commit()
    preserved(memory, tree)
    node = memory.store.find(NODE)
    assert node is not None and tree.journal is not None
    before = memory.store.pages_of(node)
    while not tree.journal.log.pages() - before:
        tree.release(tree.open(ino, 0, Credentials()))
        tree.tell()
    with memory.copy() as other:
        assert restored(other).inode(ino).opens == 0
    tree.thaw()
    tree.write(ino, 0, b"changed")
    tree.commit()
    assert not tree.preserved and memory.store.find(NODE) is None
    assert state(memory.rebuild(live(tree)).tree) == state(tree)


def test_a_daemon_that_dies_while_it_is_preserved(memory: Memory, audit: Audit) -> None:
    """Who takes the mount over knows what is open, and the node still holds the tree."""
    tree = driven(memory, 2, 60).tree
    ino = tree.create(1, b"opened", 0o600, Credentials()).ino
    tree.commit()
    preserved(memory, tree)
    tree.open(ino, 0, Credentials())
    tree.tell()
    with memory.copy() as other:
        again = other.recover(live(tree), taken=NODE)
        assert again.preserved and again.inode(ino).opens == 1
        again.unlink(1, b"opened")
        again.commit()
        assert not again.preserved and other.store.find(NODE) is None
        audit(again)


def test_scattered_memory_is_named_by_blocks(memory: Memory, audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SCATTERED", 0)
    tree = driven(memory, 3).tree
    blocks = memory.leases.blocks_of(memory.frames.tree_id).scale(BLOCK_PAGES)
    preserved(memory, tree)
    node = memory.store.find(NODE)
    assert node is not None and memory.store.pages_of(node) == blocks
    assert check(memory.ram, SUPER_PFN).problems == []
    with memory.copy() as other:
        audit(restored(other))


def test_a_tree_in_banned_memory_is_written_whole(memory: Memory) -> None:
    tree = driven(memory, 4).tree
    pages = next(inode.pages for inode in tree.inodes.values() if inode.pages and inode.nlink)
    _, pfn, _ = next(iter(pages))
    report = preserved(memory, tree, banned=Spans([(pfn, pfn + 1)]))
    node = memory.store.find(NODE)
    assert report.moved == 1 and node is not None and not node.log_pfn


@pytest.mark.parametrize("seed", range(3))
def test_it_is_written_whole_afterwards(memory: Memory, audit: Audit, seed: int) -> None:
    """The new node takes the place of the first by one store."""
    tree = driven(memory, seed, checkpoint=60).tree
    tree.losses.forget()
    preserved(memory, tree)
    first = memory.store.find(NODE)
    with memory.copy() as other:
        expected = found(restored(other))
    end(save(tree, memory.store, NODE, instead=True))
    (node,) = memory.store.nodes()
    assert first is not None and first.log_pfn and not node.log_pfn and node.pfn != first.pfn
    assert tree.preserved and tree.frozen and first.pfn not in tree.frames.used()
    assert check(memory.ram, SUPER_PFN).problems == []
    with memory.copy() as other:
        assert found(restored(other)) == expected
    with memory.copy() as other:
        again = other.recover(live(tree), taken=NODE)
        assert again.preserved and state(again) == state(tree)
        audit(again)
    tree.thaw()
    tree.mkdir(1, b"changed", 0o700, Credentials())
    tree.commit()
    assert memory.store.nodes() == []
    audit(tree)


@pytest.mark.parametrize("whole", [True, False])
def test_the_log_of_a_tree_that_is_only_read_is_shortened(memory: Memory, audit: Audit, whole: bool) -> None:
    """Who has what open is known afterwards, and what was there is still preserved."""
    tree = driven(memory, 3).tree
    ino = tree.create(1, b"opened", 0o600, Credentials()).ino
    tree.commit()
    preserved(memory, tree, whole=whole)
    with memory.copy() as other:
        again = restored(other)
        if again.journal is None:
            node = other.store.find(NODE)
            assert node is not None
            begin(again, b"x", 1, node.pfn)
        assert again.journal is not None
        expected = found(again)
        handles = [again.open(ino, 0, Credentials()) for _ in range(3)]
        again.tell()
        while again.journal.log.size < 1 << 20:
            again.release(again.open(ino, 0, Credentials()))
            again.tell()
        end(sealing.shorten(again, other.store, NODE))
        assert not again.frozen
        assert again.preserved and again.journal.requests == 0 and again.journal.log.size < 1 << 19
        with other.copy() as third:
            taken = third.recover(live(again), taken=NODE)
            assert taken.preserved and taken.inode(ino).opens == 3
            audit(taken)
        for handle in handles:
            again.release(handle)
        again.tell()
        audit(again)
        with other.copy() as third:
            assert found(restored(third)) == expected


def test_what_cannot_be_written_whole_stays_preserved(memory: Memory) -> None:
    tree = driven(memory, 5).tree
    preserved(memory, tree)
    node = memory.store.find(NODE)
    memory.frames.hold(0)
    while (free := memory.frames.room()) > 0:
        memory.frames.allocate(free)
    with pytest.raises(PkramError, match="no memory to save node shmem-x"):
        end(save(tree, memory.store, NODE, instead=True))
    assert tree.preserved and memory.store.nodes() == [node]
    with memory.copy() as other:
        assert restored(other).preserved


def test_no_room_leaves_the_tree_as_it_was(memory: Memory) -> None:
    tree = driven(memory, 5).tree
    before = memory.frames.used()
    memory.frames.hold(0)
    while (free := memory.frames.room()) > 0:
        memory.frames.allocate(free)
    full = memory.frames.used()
    with pytest.raises(PkramError, match="no memory to save node shmem-x"):
        preserved(memory, tree)
    assert not tree.preserved and memory.frames.used() == full and memory.store.nodes() == []
    assert not before - full


@pytest.mark.parametrize("what", ["seal", "base", "segment", "tail", "figures", "version", "outside"])
def test_damage_is_refused_and_nothing_is_taken(memory: Memory, what: str) -> None:
    tree = driven(memory, 6).tree
    preserved(memory, tree)
    node = memory.store.find(NODE)
    assert node is not None
    seal = layout.read_seal(memory.ram, node.log_pfn, node.tree_id)

    def rewrite(**fields: Any) -> None:
        layout.write_seal(memory.ram, node.log_pfn, seal._replace(**fields), node.tree_id, node.generation)

    match what:
        case "tail":
            rewrite(tail=seal.tail - 8)
        case "figures":
            rewrite(figures=seal.figures._replace(bytes=seal.figures.bytes + 1))
        case "outside":
            rewrite(base=SUPER_PFN)
        case "version":
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(layout, "VERSION", layout.VERSION + 1)
                rewrite()
        case _:
            pfn = {"seal": node.log_pfn, "base": seal.base, "segment": seal.segment}[what]
            memory.ram.page(pfn)[40] ^= 1
    with memory.copy() as other:
        with pytest.raises(VersionError if what == "version" else FormatError):
            restored(other)
        assert other.frames.used() == other.leases.blocks_of(other.frames.tree_id).scale(BLOCK_PAGES)
        assert other.store.find(NODE) is not None


@pytest.mark.parametrize("seed", range(2))
def test_it_is_read_as_two_objects(memory: Memory, seed: int) -> None:
    """Who looks into nodes sees the same tree, without what had no name."""
    tree = driven(memory, seed, checkpoint=60).tree
    preserved(memory, tree)
    with memory.store.prepare_load(NODE) as load:
        (description, _), (_, runs) = objects(memory.store, load)
    parts = TreeStream(description)
    data = Spans.from_runs(runs[1], runs[2])
    verify(parts, runs, data, data)
    named = [inode for inode in tree.inodes.values() if inode.nlink]
    assert parts.inodes["ino"].tolist() == sorted(inode.ino for inode in named)
    assert data.total == sum(inode.pages.count for inode in named if inode.pages)
    assert PAGE_SIZE * data.total <= tree.counts().pages * PAGE_SIZE


def test_a_node_that_is_loaded_is_not_replaced(memory: Memory) -> None:
    """Whoever reads a node reads it to the end; the log stays long until then."""
    tree = driven(memory, 1).tree
    preserved(memory, tree)
    node = memory.store.find(NODE)
    with memory.store.prepare_load(NODE) as load:
        with pytest.raises(PkramError, match="shmem-x is being loaded") as caught:
            end(save(tree, memory.store, NODE, instead=True))
        assert caught.value.errno == errno.EBUSY
        assert len(objects(memory.store, load)) == 2
    assert tree.preserved and memory.store.nodes() == [node]
    end(save(tree, memory.store, NODE, instead=True))


def test_sparse_files_may_add_up_to_more_than_a_seal_can_say(memory: Memory) -> None:
    tree = memory.tree()
    for name in (b"a", b"b", b"c"):
        tree.setattr(tree.create(1, name, 0o600).ino, size=(1 << 63) - 1)
    tree.commit()
    preserved(memory, tree)
    with memory.copy() as other:
        assert restored(other).counts().bytes == 3 * ((1 << 63) - 1)


def test_access_times_are_preserved(memory: Memory) -> None:
    """They change without a request that changes the tree: the log is told of them late, at the latest by the seal."""
    tree = memory.tree()
    inode = tree.create(1, b"file", 0o600)
    tree.write(inode.ino, 0, b"x" * 5000)
    tree.set_times(inode.ino, 5, 5, 5)
    tree.commit()
    tree.read(inode.ino, 0, 10)
    list(tree.readdir(1, 0))
    read = [tree.inode(ino).atime for ino in (1, inode.ino)]
    assert read[1] != 5
    preserved(memory, tree)
    with memory.copy() as other:
        again = restored(other)
        assert [again.inode(ino).atime for ino in (1, inode.ino)] == read
