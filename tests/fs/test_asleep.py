# SPDX-License-Identifier: GPL-2.0-or-later
"""Restored trees sleep until somebody asks: a tree half asleep is the same tree, to look at, to change and to save."""

import errno
import gc
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkramfs.fs import asleep, clock, picture
from pkramfs.fs.access import NOATIME
from pkramfs.fs.asleep import SleepingDirectory
from pkramfs.fs.limits import Limits
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT
from tests.fs.conftest import SmallFrames, SmallStore, audit, exhaust, small_ram
from tests.fs.test_save import apply, describe, fill, steps


@pytest.fixture(autouse=True, scope="module")
def small_slices():
    """Runs are joined two and cut three at a time, so that all that is done in slices meets their edges here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pkramfs.fs.save._SLICE", 2)
        patch.setattr(asleep, "_SLICE", 3)
        patch.setattr("pkramfs.fs.picture._STEP", 3)
        yield


def preserved(tree: Tree) -> SmallStore:
    store = SmallStore()
    tree.freeze()
    exhaust(save(tree, store, b"shmem-x"))
    return store


def restored(store: SmallStore, ram) -> Tree:
    tree = exhaust(restore(store, b"shmem-x", ram, SmallFrames(ram), Limits()))
    tree.access = lambda: NOATIME  # that a look is no change
    return tree


def pictured(tree: Tree) -> list[object]:
    """All that a save would write."""
    found = exhaust(picture.take(tree))
    columns = {f"{part} {name}": list(c) for part, table in found.columns.items() for name, c in table.items()}
    return [columns, found.blobs, found.runs.tolist(), tree.next_ino]


def sleepers(tree: Tree) -> int:
    return tree.asleep.count if tree.asleep is not None else 0


def rouse(tree: Tree, numbers: list[int], chance: random.Random) -> None:
    """Look at some inodes, by number or by way of the names above them."""
    for number in numbers:
        if chance.random() < 0.5:
            assert tree.inode(number).ino == number
        else:
            folders = [inode for inode in list(tree.inodes.values()) if inode.entries is not None]
            list(chance.choice(folders).entries.after(0))


@given(steps, st.integers(0, 1 << 30))
@settings(max_examples=80, deadline=None)
def test_a_tree_half_asleep_is_saved_as_if_it_were_awake(small_round_trip, changes, seed) -> None:
    tree, _ = small_round_trip()
    for step in changes:
        apply(tree, step)
    before, store, chance = pictured(tree), preserved(tree), random.Random(seed)
    copy = restored(store, tree.ram)
    assert pictured(copy) == before, "all of it asleep"
    numbers = [number for number in tree.inodes if chance.random() < 0.3]
    rouse(copy, numbers, chance)
    assert pictured(copy) == before, f"{len(copy.inodes)} of {len(tree.inodes)} awake"
    assert describe(copy) == describe(tree)
    assert copy.asleep is None and pictured(copy) == before
    audit(copy)


@pytest.fixture(scope="module")
def other_ram():
    with small_ram() as ram:
        yield ram


@given(steps, steps, st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_a_tree_half_asleep_changes_as_if_it_were_awake(small_round_trip, other_ram, changes, more, seed) -> None:
    """Beside a twin that is awake, on memory of its own, with the same clock."""
    tree, _ = small_round_trip()
    for step in changes:
        apply(tree, step)
    store, chance = preserved(tree), random.Random(seed)
    other_ram.punch(Spans([(16, other_ram.pages)]))
    for start, end in tree.frames.used():
        other_ram.page(start, end - start)[:] = tree.ram.page(start, end - start)
    twins = restored(store, tree.ram), restored(store, other_ram)
    twins[1].wake()
    rouse(twins[0], [number for number in tree.inodes if chance.random() < 0.2], chance)
    with pytest.MonkeyPatch.context() as patch:
        for moment, step in enumerate(more):
            patch.setattr(clock, "now", lambda moment=moment: 10**18 + moment)
            patch.setattr(clock, "coarse", clock.now)
            folders = [inode.ino for inode in twins[1].inodes.values() if inode.entries is not None]
            for twin in twins:
                apply(twin, step, folders)
    assert len(twins[0].inodes) + sleepers(twins[0]) == len(twins[1].inodes)
    assert _without_frames(pictured(twins[0])) == _without_frames(pictured(twins[1]))
    assert describe(twins[0]) == describe(twins[1])
    for twin in twins:
        audit(twin)


def _without_frames(found: list[object]) -> list[object]:
    """Which frames a twin got is its own business, and so is into how many runs its files fell."""
    columns, blobs, runs, number = found
    pages = [sum(count for _, _, count in runs)]  # type: ignore[attr-defined]
    return [columns, blobs, pages, number]


# -- one by one ---------------------------------------------------------------------------------------


@pytest.fixture
def sleepy(tree, sh, ram) -> Tree:
    """One of everything, asleep but for the root's own inode."""
    fill(tree, sh)
    return restored(preserved(tree), ram)


def test_nothing_is_made_before_it_is_asked_for(tree, sleepy) -> None:
    assert list(sleepy.inodes) == [1] and sleepy.counts() == tree.counts()
    assert isinstance(sleepy.root.entries, SleepingDirectory)
    folder = sleepy.lookup(1, b"folder")
    assert not isinstance(sleepy.root.entries, SleepingDirectory)
    assert isinstance(folder.entries, SleepingDirectory) and folder.entries.parent is sleepy.root
    assert 1 < len(sleepy.inodes) < len(tree.inodes)
    assert len(sleepy.inodes) + sleepy.asleep.count == len(tree.inodes)
    assert sleepy.counts() == tree.counts()
    sleepy.wake()
    assert sleepy.asleep is None and sorted(sleepy.inodes) == sorted(tree.inodes)


def test_a_file_with_names_in_two_directories_is_one_file(tree, sleepy) -> None:
    linked = sleepy.lookup(1, b"hard link")
    folder = sleepy.lookup(1, b"folder")
    sleepy.unlink(1, b"hard link")
    deep = sleepy.lookup(folder.ino, b"deep")
    assert sleepy.lookup(deep.ino, b"big") is linked and linked.nlink == 1
    assert bytes(sleepy.read(linked.ino, 0, 100)) == bytes(tree.read(linked.ino, 0, 100))
    sleepy.unlink(deep.ino, b"big")
    audit(sleepy)


def test_two_names_in_one_directory(tree, sh, ram) -> None:
    ino = sh.write(b"one", b"1")
    tree.link(ino, 1, b"two")
    copy = restored(preserved(tree), ram)
    assert copy.lookup(1, b"one") is copy.lookup(1, b"two")
    assert copy.asleep is None
    audit(copy)


def test_an_inode_is_found_by_its_number(tree, sleepy) -> None:
    deep = tree.lookup(tree.lookup(1, b"folder").ino, b"deep").ino
    big = tree.lookup(deep, b"big").ino
    assert sleepy.lookup(deep, b".").ino == deep, "what NFS asks with a handle"
    assert sleepy.lookup(deep, b"..").ino == tree.lookup(1, b"folder").ino
    assert sleepy.lookup(big, b".").size == 1 << 20
    for number in (2**40, 2**63, 0):
        with pytest.raises(OSError) as caught:
            sleepy.inode(number)
        assert caught.value.errno == errno.ESTALE


def test_what_was_deleted_does_not_come_back(tree, sleepy) -> None:
    one = sleepy.lookup(1, b"one").ino
    sleepy.unlink(1, b"one")
    with pytest.raises(OSError) as caught:
        sleepy.inode(one)
    assert caught.value.errno == errno.ESTALE
    assert sleepy.asleep is not None and one not in sleepy.inodes


def test_a_sleeping_directory_is_not_empty(sleepy) -> None:
    with pytest.raises(OSError) as caught:
        sleepy.rmdir(1, b"folder")
    assert caught.value.errno == errno.ENOTEMPTY


def test_a_directory_sleeps_on_where_it_is_moved_to(tree, sleepy) -> None:
    there = sleepy.mkdir(1, b"there", 0o755)
    folder = sleepy.lookup(1, b"folder")
    sleepy.rename(1, b"folder", there.ino, b"moved")
    assert isinstance(folder.entries, SleepingDirectory) and folder.entries.parent is there
    deep = sleepy.lookup(folder.ino, b"deep")
    assert deep.entries.parent is folder
    assert sleepy.path_of_directory(deep) == b"/there/moved/deep"
    audit(sleepy)


def test_large_directories_do_not_sleep(tree, sh, ram, monkeypatch) -> None:
    monkeypatch.setattr(asleep, "LARGE", 20)
    small = tree.mkdir(1, b"small", 0o755).ino
    large = tree.mkdir(small, b"large", 0o755).ino
    for number in range(30):
        tree.create(large, b"%d" % number, 0o644)
    below = tree.mkdir(large, b"below", 0o755).ino
    tree.create(below, b"last", 0o644)
    copy = restored(preserved(tree), ram)
    assert not isinstance(copy.inodes[large].entries, SleepingDirectory)
    assert isinstance(copy.inodes[below].entries, SleepingDirectory)
    assert copy.asleep.count == 1


def test_who_writes_is_told_without_waking_anybody(sleepy) -> None:
    handle = sleepy.open(sleepy.lookup(1, b"one").ino, 1)
    before = len(sleepy.inodes)
    assert sleepy.writers() == [b"/one"]
    sleepy.release(handle)
    assert len(sleepy.inodes) == before


def test_what_wakes_during_a_save_is_saved_once(tree, sleepy) -> None:
    expected = pictured(tree)
    sleepy.lookup(1, b"folder")
    steps = picture.take(sleepy)
    next(steps)
    sleepy.wake()
    found = exhaust(steps)
    assert [found.blobs, found.runs.tolist()] == expected[1:3]
    columns = {f"{part} {name}": list(c) for part, table in found.columns.items() for name, c in table.items()}
    assert columns == expected[0]


def test_what_was_empty_and_lies_between_sleepers_is_saved_in_its_place(tree, sh, ram) -> None:
    """Directories, links and xattrs: 1 and 3 sleep, 2 had nothing when it was saved and has now."""
    for name in (b"1", b"2", b"3"):
        folder = tree.mkdir(1, name, 0o755).ino
        if name != b"2":
            sh.write(b"in" + name, parent=folder)
            tree.setxattr(sh.write(b"x" + name, parent=folder), b"user.x", name)
    copy = restored(preserved(tree), ram)
    two = copy.lookup(1, b"2").ino
    copy.create(two, b"new", 0o644)
    copy.setxattr(two, b"user.y", b"2")
    assert copy.asleep is not None
    half = pictured(copy)
    copy.wake()
    assert pictured(copy) == half


def test_names_that_hash_alike_are_compared(tree, sh, ram, monkeypatch) -> None:
    monkeypatch.setattr("pkramfs.fs.verify._WEIGHTS", np.zeros(257, dtype=np.uint64))
    fill(tree, sh)
    assert describe(restored(preserved(tree), ram)) == describe(tree)


def test_a_writer_whose_last_name_sleeps_is_told(tree, sh, ram) -> None:
    """Found by one name, which goes away; the other is under a directory that nobody looked into."""
    folder = tree.mkdir(1, b"folder", 0o755).ino
    ino = sh.write(b"here", b"1")
    tree.link(ino, folder, b"there")
    copy = restored(preserved(tree), ram)
    copy.thaw()
    handle = copy.open(copy.lookup(1, b"here").ino, 1)
    copy.unlink(1, b"here")
    assert copy.asleep is not None
    assert copy.writers() == [b"/folder/there"]
    copy.release(handle)
    audit(copy)


def test_a_name_that_sleeps_is_told_without_waking_it(tree, sh, ram) -> None:
    parent = one = tree.mkdir(1, b"one", 0o755).ino
    for name in (b"two", b"three"):
        parent = tree.mkdir(parent, name, 0o755).ino
    ino = sh.write(b"here", b"1")
    tree.link(ino, parent, b"there")
    copy = restored(preserved(tree), ram)
    copy.thaw()
    copy.unlink(1, copy.lookup(1, b"here").name)
    awake = set(copy.inodes)
    assert copy.path(copy.inode(ino)) == b"/one/two/three/there"
    copy.rename(1, b"one", 1, b"1")
    assert copy.path(copy.inode(ino)) == b"/1/two/three/there"
    assert set(copy.inodes) == awake and one in awake
    audit(copy)


@pytest.mark.parametrize("seed", range(20))
def test_files_in_pieces_keep_every_page(ram, seed) -> None:
    """Pages here and there, neighbours across files, holes: each page of the copy is the frame that it was."""
    chance = random.Random(seed)
    tree, frames = Tree(ram, SmallFrames(ram), Limits()), list(range(100, 400))
    for _ in range(60):
        place = chance.randrange(len(frames))
        frames[place:place] = [frames.pop(chance.randrange(len(frames)))]
    for number in range(12):
        inode = tree.create(1, b"%d" % number, 0o644)
        inode.pages, at = PageMap(), 0
        for _ in range(chance.randrange(1, 25)):
            at += chance.choice((0, 0, 0, 1, 7))
            inode.pages.insert(at, frames.pop(0), 1)
            at += 1
        inode.size = at << PAGE_SHIFT
    assert sum(inode.pages.runs for inode in tree.inodes.values() if inode.pages) > 50
    copy = restored(preserved(tree), ram)
    copy.wake()
    mapped, expected = (
        {ino: (list(inode.pages), inode.pages.count) for ino, inode in one.inodes.items() if inode.pages}
        for one in (copy, tree)
    )
    assert mapped == expected


def test_waking_is_not_interrupted_by_the_collector(tree, ram) -> None:
    """Half of the time went into collections when names were made outside of the pause."""
    folder = tree.mkdir(1, b"many", 0o755).ino
    for number in range(5000):
        tree.write(tree.create(folder, b"%d" % number, 0o644).ino, 0, b"x")
    copy = restored(preserved(tree), ram)
    below = copy.lookup(1, b"many")
    seen: list[str] = []
    before, threshold = list(gc.callbacks), gc.get_threshold()
    gc.callbacks.append(lambda phase, info: seen.append(phase))
    gc.set_threshold(1000, 10, 10)  # 5000 inodes and as many pairs are more
    try:
        below.entries.wake()
    finally:
        gc.callbacks[:] = before
        gc.set_threshold(*threshold)
    assert len(below.entries) == 5000 and seen.count("start") <= 1
