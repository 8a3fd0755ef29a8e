# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies share nothing with what they are copies of, and another name is one store, whoever dies before or after."""

from contextlib import suppress
from typing import Any

import pytest

from pkramfs.archive.copying import copy, rename
from pkramfs.archive.standing import ChangedError
from pkramfs.cli import verify
from pkramfs.errors import PkramError
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from pkramfs.machine.ram import Ram
from tests.support.lab import Died
from tests.support.preserved import Trees, outlived, write


def fill(tree: Tree) -> None:
    for number in range(40):
        write(tree, b"d/%d" % number, bytes([number]) * 5000 * number)
    inode = write(tree, b"sparse", b"x")
    tree.write(inode.ino, 1 << 30, b"y" * 3_000_000)
    tree.allocate(inode.ino, 1 << 20, 1 << 20)


def contents(trees: Trees, name: str) -> dict[bytes, Any]:
    tree = trees.open(name)
    return {path: (tree.attributes(place), list(tree.data(place))) for path, place in tree.walk()}


def drive(work: Any) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def sound(trees: Trees) -> list[str]:
    return verify.check(trees.up(), [])[1]


def test_a_copy_is_the_same_and_shares_nothing(trees: Trees) -> None:
    trees.plant("x", fill)
    kernel = trees.up()
    before, free = contents(trees, "x"), kernel.leases.counts()["free"]
    node = drive(copy(kernel, b"shmem-x", b"shmem-y"))
    original = kernel.store.find(b"shmem-x")
    assert contents(trees, "y") == before and node.tree_id != original.tree_id
    assert not kernel.store.pages_of(node) & kernel.store.pages_of(original)
    assert not trees.machine.tree_ids() and sound(trees) == []
    trees.free("x")
    assert contents(trees, "y") == before
    trees.free("y")
    assert kernel.leases.counts()["free"] >= free


def test_what_a_program_saved_is_copied_and_renamed(trees: Trees) -> None:
    trees.preserve("guest", 700)
    drive(copy(trees.up(), b"guest", b"other"))
    rename(trees.up(), b"guest", b"third")
    assert trees.intact("other") and trees.intact("third")
    assert [node.name for node in trees.up().store.nodes()] == [b"other", b"third"]


def test_an_original_that_changes_meanwhile_leaves_no_copy(trees: Trees) -> None:
    trees.plant("x", fill)
    work = copy(trees.up(), b"shmem-x", b"shmem-y")
    next(work)
    trees.up().store.withdraw(b"shmem-x")
    with pytest.raises(ChangedError, match="shmem-x is no longer preserved"):
        drive(work)
    trees.up().sweep()
    assert trees.up().store.nodes() == [] and not trees.up().leases.trees()


def test_a_copy_that_does_not_fit_leaves_nothing(trees: Trees) -> None:
    trees.preserve("guest", 40_000)
    leased = trees.up().leases.trees()
    with pytest.raises(OSError, match="RAM is full"):
        drive(copy(trees.up(), b"guest", b"other"))
    assert trees.up().leases.trees() == leased and trees.intact("guest")


@pytest.mark.parametrize("others", [0, 1, 2])
def test_another_name(trees: Trees, others: int) -> None:
    """First, last or in the middle of the list; only the page of the node and its page table move."""
    for name in ("a", "x", "b")[1 - (others == 2) :]:
        trees.plant(name, fill)
    kernel = trees.up()
    before, order = contents(trees, "x"), [node.name for node in kernel.store.nodes()]
    old = kernel.store.find(b"shmem-x")
    new = rename(kernel, b"shmem-x", b"shmem-new")
    assert (new.tree_id, new.object_pfn, new.pages) == (old.tree_id, old.object_pfn, old.pages)
    assert [node.name for node in kernel.store.nodes()] == [b"shmem-new" if n == b"shmem-x" else n for n in order]
    assert contents(trees, "new") == before and sound(trees) == []
    survey = kernel.survey()
    assert (len(survey.nodes), survey.problems) == (len(order), [])
    trees.cycle()
    assert contents(trees, "new") == before and sound(trees) == []


def test_a_tree_id_of_two_nodes_keeps_both(trees: Trees) -> None:
    trees.preserve("one", 300)
    kernel = trees.up()
    node = kernel.store.find(b"one")
    frames = Frames(kernel.ram, kernel.leases, node.tree_id)
    frames.adopt(kernel.store.pages_of(node))
    runs = frames.allocate(100)
    trees.publish("two", frames, runs, trees.fill(runs, 7))
    rename(kernel, b"one", b"three")
    assert trees.intact("two") and trees.intact("three") and sound(trees) == []


def test_a_death_at_any_store_leaves_the_old_name_or_the_new(trees: Trees, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.plant("x", fill)
    before, stores, limits = contents(trees, "x"), [], [0]
    publish = Ram.publish

    def counted(self: Ram, address: int, value: int) -> None:
        stores.append(address)
        if len(stores) == limits[-1]:
            raise Died("at a store")
        publish(self, address, value)

    names = set()
    for limit in range(1, 8):
        stores.clear()
        limits.append(limit)
        with monkeypatch.context() as patched:
            patched.setattr(Ram, "publish", counted)
            with suppress(Died):
                rename(trees.up(), b"shmem-x", b"shmem-y")
        found = [node.name.decode().removeprefix("shmem-") for node in trees.up().store.nodes()]
        names.update(found)
        assert len(found) == 1 and contents(trees, found[0]) == before and sound(trees) == []
        if found == ["y"]:
            rename(trees.up(), b"shmem-y", b"shmem-x")
    assert names == {"x", "y"}


def test_names_that_are_taken_or_in_use(trees: Trees) -> None:
    trees.plant("x", fill)
    trees.plant("y", fill)
    kernel = trees.up()
    for work in (rename, lambda *words: drive(copy(*words))):
        for name, new, said in (
            (b"shmem-x", b"shmem-y", "node shmem-y exists already"),
            (b"shmem-z", b"shmem-w", "no node shmem-z"),
            (b"shmem-x", b"shmem-" + b"n" * 250, "node name of 256 bytes is too long"),
        ):
            with pytest.raises(PkramError, match=said):
                work(kernel, name, new)
    lock = kernel.machine.claim(kernel.store.find(b"shmem-x").tree_id)
    with pytest.raises(PkramError, match="shmem-x is in use by a mount: umount it first"):
        rename(kernel, b"shmem-x", b"shmem-z")
    lock.release()
    with (
        outlived(trees, "x", kernel.store.find(b"shmem-x").tree_id),
        pytest.raises(PkramError, match="the daemon of shmem-x has died: mount and unmount it first"),
    ):
        rename(kernel, b"shmem-x", b"shmem-z")
    with kernel.store.prepare_load(b"shmem-x"), pytest.raises(PkramError, match="is being loaded"):
        rename(kernel, b"shmem-x", b"shmem-z")
    assert [node.name for node in kernel.store.nodes()] == [b"shmem-y", b"shmem-x"] and sound(trees) == []
