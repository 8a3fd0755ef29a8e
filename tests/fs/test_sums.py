# SPDX-License-Identifier: GPL-2.0-or-later
"""Checksums of data: always right or not there, whatever is done; and a flipped bit is an error where it is."""

import contextlib
import errno
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pkramfs.daemon.summing import Background
from pkramfs.errors import ExhaustedError, FormatError
from pkramfs.fs.inode import ROOT
from pkramfs.fs.limits import Limits
from pkramfs.fs.nodes import read_tree
from pkramfs.fs.recover import begin, recover
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.sealing import preserve
from pkramfs.fs.tree import Tree
from pkramfs.fs.verify import verify
from pkramfs.pkram import treeformat
from pkramfs.pkram.treeformat import TreeStream
from pkramfs.spans import Spans
from tests.support.journals import Checkpoint, Memory, end, live
from tests.support.stores import Recording, deaths
from tests.support.stores import restore as remember
from tests.support.sums import PAGE, PIECE, enable, expected, flip, hold, known, rest

SIZES = [1, 100, PAGE, 5000, 70_000, PIECE, PIECE + 100, 2 * PIECE + PAGE]
PLACES = [0, 100, PAGE, 9000, PIECE - PAGE, PIECE, PIECE + 50, 2 * PIECE, 3 * PIECE - 1]


class Changes:
    """Random changes of a few files of a few MiB."""

    def __init__(self, tree: Tree, seed: int) -> None:
        self.tree, self.random = tree, random.Random(seed)
        self.names = [b"a", b"b", b"c"]
        self.all = [getattr(self, name) for name in dir(self) if name.startswith("do_")] + [self.do_write] * 4

    def step(self) -> str:
        change = self.random.choice(self.all)
        with contextlib.suppress(OSError):  # no room, or damaged
            change()
        self.tree.commit()
        return str(change.__name__)

    def file(self) -> int:
        name = self.random.choice(self.names)
        inode = self.tree.lookup(1, name)
        return (inode or self.tree.create(1, name, 0o644)).ino

    def place(self) -> int:
        return self.random.choice(PLACES)

    def size(self) -> int:
        return self.random.choice(SIZES)

    def do_write(self) -> None:
        self.tree.write(self.file(), self.place(), self.random.randbytes(64) * (self.size() // 64 + 1))

    def do_truncate(self) -> None:
        self.tree.setattr(self.file(), size=self.random.choice([0, 1, PAGE, 5000, PIECE, PIECE + 7, 4 * PIECE]))

    def do_punch(self) -> None:
        self.tree.punch(self.file(), self.place(), self.size())

    def do_allocate(self) -> None:
        self.tree.allocate(self.file(), self.place(), self.size(), keep_size=self.random.random() < 0.5)

    def do_copy(self) -> None:
        source, target = self.file(), self.file()
        if source != target:
            self.tree.copy(source, self.place(), target, self.place(), self.size())

    def do_sparsify(self) -> None:
        self.tree.sparsify(self.file())

    def do_unlink(self) -> None:
        self.tree.unlink(1, self.random.choice(self.names))

    def do_open_and_cut(self) -> None:
        ino = self.file()
        self.tree.release(self.tree.open(ino, os.O_RDWR | os.O_TRUNC))

    def do_leave_open(self) -> None:
        handle = self.tree.open(self.file())
        self.tree.unlink(1, self.random.choice(self.names))
        self.tree.release(handle)


@pytest.mark.parametrize("huge", ["never", "always"])
@pytest.mark.parametrize("seed", range(2))
def test_sums_are_right_or_absent(tree, seed, huge) -> None:
    tree.huge = huge
    work, changes = enable(tree), Changes(tree, seed)
    for number in range(80):
        did = changes.step()
        if number % 3 == 0:
            work.sums.table.turn()
        jobs = work.take()
        digests = work.digests(jobs)
        if number % 2:
            did += f", {changes.step()} meanwhile"
        work.settle(jobs, digests)
        if number % 4 == 0:
            hold(tree), did
    rest(work)
    assert hold(tree) == len(expected(tree)) and not work.left


@pytest.mark.parametrize("seed", range(3))
def test_they_cross_a_kexec_also_of_what_sleeps(tree, sh, round_trip, seed) -> None:
    folder = sh.mkdir(b"d")
    inner = sh.write(b"inner", b"i" * (PIECE + 5), parent=folder)
    work, changes = enable(tree), Changes(tree, seed)
    for _ in range(30):
        changes.step()
    work.sums.table.turn()
    work.step()
    copy = round_trip(tree)
    had = known(tree)
    assert known(copy) == had and copy.sums.table.doubted == len(had)
    again = round_trip(copy)  # nothing of it was looked at
    assert copy.asleep is not None and known(again) == had
    work = enable(again)
    assert work.left == len(expected(copy))
    rest(work)
    assert inner not in again.inodes, "it was woken"
    assert not work.left and hold(again) == len(expected(again))
    copy.sums = again.sums = None


def test_without_the_option_nothing_is_kept(tree, sh, round_trip) -> None:
    sh.write(b"f", b"x" * PIECE)
    copy = round_trip(tree)
    assert copy.sums is None
    rest(enable(tree))
    copy = round_trip(tree)
    size = copy.ledger.stream_bytes
    copy.forget_sums()
    assert copy.sums is None and size - copy.ledger.stream_bytes == 24


@pytest.mark.parametrize(
    ("section", "column", "value", "words"),
    [
        ("sums", "ino", 1, "ino of row 0"),
        ("sums", "ino", 1 << 63, "ino of row 0"),
        ("sums", "piece", 1 << 43, "piece of row 0"),
        ("sums", "piece", 1, "piece of row 1"),
        ("damaged", "ino", 99, "ino of row 0"),
        ("damaged", "piece", 1 << 63, "piece of row 0"),
    ],
)
def test_wrong_columns_are_named(tree, sh, small_store, section, column, value, words) -> None:
    ino = sh.write(b"f", b"x" * 3 * PIECE)
    work = enable(tree)
    rest(work)
    flip(tree, ino, 2 * PIECE)
    work.sums.compare(ino, 2, work.sums.table.find(ino, 2))
    tree.freeze()
    end(save(tree, small_store, b"shmem-x"))
    stream, runs = small_store.saved[b"shmem-x"]
    parts = TreeStream(stream)
    columns = {name: values.copy() for name, values in getattr(parts, section).items()}
    columns[column][0] = value
    setattr(parts, section, columns)
    with pytest.raises(FormatError, match=f"Tree {section}: {words}"):
        verify(parts, runs, Spans([(0, 1 << 40)]))


def test_a_reader_from_before_refuses_by_name(tree, sh, small_store, monkeypatch) -> None:
    sh.write(b"f", b"x")
    enable(tree)
    tree.freeze()
    end(save(tree, small_store, b"shmem-x"))
    monkeypatch.setattr(treeformat, "FEATURES", 7)
    with pytest.raises(FormatError, match="Tree: flags is 0x9, expected none but 0x7"):
        TreeStream(small_store.saved[b"shmem-x"][0])


# -- flipped bits ---------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tree, sh, round_trip) -> Callable[..., tuple[Tree, int]]:
    """A tree that crossed a kexec, in a file of which bits flipped; and the file."""
    ino = sh.write(b"f", random.Random(1).randbytes(3 * PIECE + 100))
    sh.write(b"other", b"o" * PIECE)
    rest(enable(tree))

    def make(*offsets: int) -> tuple[Tree, int]:
        for offset in offsets:
            flip(tree, ino, offset)
        copy = round_trip(tree)
        enable(copy)
        return copy, ino

    return make


def refused(call: Callable[..., Any], *args: Any, **how: Any) -> bool:
    try:
        call(*args, **how)
    except OSError as error:
        assert error.errno == errno.EIO
        return True
    return False


def test_a_flipped_bit_is_an_error_in_its_piece_only(spoiled) -> None:
    tree, ino = spoiled(PIECE + 77_777)
    told: list[tuple[int, int]] = []
    tree.sums.found = lambda *place: told.append(place)
    bad = [page for page in range(3 * 256 + 1) if refused(tree.read, ino, page * PAGE, PAGE)]
    assert bad == list(range(256, 512)) and told == [(ino, 1)]
    assert refused(tree.read, ino, PIECE - PAGE, 2 * PAGE) and refused(tree.read, ino, 0, 4 * PIECE)
    assert not refused(tree.read, tree.lookup(1, b"other").ino, 0, PIECE)
    assert tree.sums.broken() == [(ino, 256, 256)]


def test_a_bit_is_found_without_a_read(spoiled) -> None:
    tree, ino = spoiled(0, 3 * PIECE + 50)
    rest(enable(tree))
    assert tree.sums.broken() == [(ino, 0, 256), (ino, 768, 1)]
    assert not refused(tree.read, ino, PIECE, PIECE) and refused(tree.read, ino, 3 * PIECE, 1)


def test_a_bit_behind_the_end_counts(spoiled) -> None:
    """It would be there when the file grows."""
    tree, ino = spoiled(3 * PIECE + 100)
    assert refused(tree.read, ino, 3 * PIECE, 100)
    tree.write(ino, 3 * PIECE, b"n" * 100)  # the whole page, as far as there is a file
    tree.setattr(ino, size=4 * PIECE)
    assert tree.read(ino, 3 * PIECE, 200) == b"n" * 100 + bytes(100)


CHANGES = {
    "a store": lambda tree, ino: tree.write(ino, PIECE + 5000, b"n"),
    "pages": lambda tree, ino: tree.write(ino, PIECE + 8192, b"n" * 8192),
    "a hole": lambda tree, ino: tree.punch(ino, PIECE + 8192, 8192),
    "a part of a page": lambda tree, ino: tree.punch(ino, PIECE + 100, 100),
    "a cut": lambda tree, ino: tree.setattr(ino, size=PIECE + 200_000),
    "zeros": lambda tree, ino: (tree.punch(ino, PIECE + 8192, 8192), tree.allocate(ino, PIECE + 8192, 8192)),
    "a copy": lambda tree, ino: tree.copy(tree.lookup(1, b"other").ino, 0, ino, PIECE + 8192, 8192),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_part_hides_nothing(spoiled, change) -> None:
    tree, ino = spoiled(PIECE + 77_777)
    refused(CHANGES[change], tree, ino)
    tree.setattr(ino, size=3 * PIECE)
    rest(enable(tree))
    assert refused(tree.read, ino, PIECE + 77_777, 1)
    assert not refused(tree.read, ino, 0, PIECE) and not refused(tree.read, ino, 2 * PIECE, PIECE)
    if change in ("pages", "a copy", "a hole", "zeros"):
        assert not refused(tree.read, ino, PIECE + 8192, 8192), "what was written anew is well"
        assert refused(tree.read, ino, PIECE + 8192, 8193)


def test_a_copy_from_it_is_refused(spoiled) -> None:
    tree, ino = spoiled(PIECE + 77_777)
    other = tree.lookup(1, b"other").ino
    assert refused(tree.copy, ino, PIECE, other, 0, 100)
    assert tree.copy(ino, 0, other, 0, PIECE) == PIECE


def test_what_is_written_whole_is_well_again(spoiled, round_trip) -> None:
    tree, ino = spoiled(PIECE + 77_777)
    assert refused(tree.write, ino, PIECE + 77_770, b"part"), "a part of a damaged page"
    tree.write(ino, PIECE, b"n" * (PIECE - PAGE))
    assert tree.sums.broken() == [(ino, 511, 1)]
    copy = round_trip(tree)
    assert copy.sums.broken() == [(ino, 511, 1)]
    assert refused(copy.read, ino, 2 * PIECE - 1, 1) and not refused(copy.read, ino, PIECE, PIECE - PAGE)
    copy.write(ino, 2 * PIECE - PAGE, b"n" * PAGE)
    work = enable(copy)
    rest(work)
    assert not copy.sums.broken() and not work.left and hold(copy) == len(expected(copy))
    assert not refused(copy.read, ino, 0, 4 * PIECE)


@pytest.mark.parametrize("way", ["unlink", "cut", "punch"])
def test_what_is_gone_is_not_damaged(spoiled, way) -> None:
    tree, ino = spoiled(PIECE + 77_777)
    assert refused(tree.read, ino, PIECE, 1)
    if way == "unlink":
        tree.unlink(1, b"f")
        tree.forget(ino)
    elif way == "cut":
        tree.setattr(ino, size=PIECE)
    else:
        tree.punch(ino, PIECE, PIECE)
    rest(enable(tree))
    assert not tree.sums.broken() and hold(tree) == len(expected(tree))


def test_frames_in_anothers_place_are_damage(tree, sh, round_trip, small_store) -> None:
    one, two = sh.write(b"one", b"1" * PAGE), sh.write(b"two", b"2" * PAGE)
    rest(enable(tree))
    tree.inode(one).pages, tree.inode(two).pages = tree.inode(two).pages, tree.inode(one).pages
    copy = round_trip(tree)
    assert refused(copy.read, one, 0, 1) and refused(copy.read, two, 0, 1)


# -- the log --------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory.make(24) as made:
        yield made


@pytest.mark.parametrize("seed", range(2))
def test_whoever_takes_over_has_sums_that_are_right(memory: Memory, seed: int) -> None:
    tree = memory.tree()
    work, changes = enable(tree), Changes(tree, seed)
    for number in range(60):
        did = changes.step()
        if number % 3 == 0:
            work.sums.table.turn()
        work.step()
        if number == 30:
            made = Checkpoint(memory, tree)
            changes.step()
            made.finish()
        if number % 6 == 0:
            rebuilt = memory.rebuild(live(tree)).tree
            assert rebuilt.sums is None or known(rebuilt) == known(tree), did
    with memory.copy() as other:
        again = other.recover(live(tree))
        work = enable(again)
        assert hold(again) == len(known(tree)) > 0
        rest(work)
        assert not work.left and not again.sums.broken()
    changes.tree.commit()


def test_damage_and_what_mends_it_outlive_the_daemon(memory: Memory) -> None:
    tree = memory.tree()
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"x" * 2 * PIECE)
    rest(enable(tree))
    tree.freeze()
    end(save(tree, memory.store, b"shmem-x"))
    tree.thaw()
    flip(tree, ino, 5 * PAGE)
    work = enable(tree)
    assert refused(tree.read, ino, 0, 1)
    tree.commit()
    with memory.copy() as other:
        assert other.recover(live(tree)).sums.broken() == [(ino, 0, 256)]
    tree.write(ino, 0, b"y" * (PIECE - 2 * PAGE))
    tree.commit()
    with memory.copy() as other:
        assert other.recover(live(tree)).sums.broken() == [(ino, 254, 2)]
    tree.write(ino, PIECE - 2 * PAGE, b"y" * 2 * PAGE)
    tree.commit()
    rest(work)
    with memory.copy() as other:
        again = other.recover(live(tree))
        assert not again.sums.broken() and hold(again) == 2


def test_a_mount_without_the_option_leaves_no_sum_behind(memory: Memory) -> None:
    tree = memory.tree()
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"x" * PIECE)
    rest(enable(tree))
    made = Checkpoint(memory, tree)
    made.finish()
    tree.forget_sums()
    tree.commit()
    tree.write(ino, 0, b"y")
    tree.commit()
    with memory.copy() as other:
        assert other.recover(live(tree)).sums is None


STORES: dict[str, Callable[[Tree, int], object]] = {
    "over data": lambda tree, ino: tree.write(ino, 3000, b"w" * 6000),
    "behind the end": lambda tree, ino: tree.write(ino, PIECE + 20_000, b"w" * 3000),
    "cut": lambda tree, ino: tree.setattr(ino, size=5000),
    "cut within a page": lambda tree, ino: tree.setattr(ino, size=PIECE + 9999),
    "punch": lambda tree, ino: tree.punch(ino, 3000, 12_000),
    "punch within a page": lambda tree, ino: tree.punch(ino, 3000, 100),
    "allocate": lambda tree, ino: tree.allocate(ino, PIECE, 60_000),
    "delete": lambda tree, ino: (tree.unlink(1, b"f"), tree.forget(ino)),
}


@pytest.mark.parametrize("store", STORES)
def test_no_death_leaves_a_wrong_sum(store: str) -> None:
    with Memory.make(8, Recording) as memory:
        tree = memory.tree()
        ino = tree.create(1, b"f", 0o644, ROOT).ino
        tree.write(ino, 0, b"x" * 30_000)
        tree.write(ino, PIECE, b"x" * 10_000)
        tree.commit()
        rest(enable(tree))
        ram = memory.ram
        assert isinstance(ram, Recording)
        held = ram.record()
        STORES[store](tree, ino)
        tree.commit()
        hold(tree)
        for what, image in deaths(held, ram.recorded()):
            other = remember(image, ram.path + ".death", ram.size)
            try:
                found = Memory(other)
                again = end(recover(found.store, live(tree), other, found.frames, Limits(), 1, b"none"))
                enable(again)
                hold(again), what
            finally:
                other.close()
                os.unlink(ram.path + ".death")


def test_no_store_passes_before_the_log_was_told(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where telling it fails the next store tries again."""
    tree = memory.tree()
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"x" * PIECE)
    rest(enable(tree))
    with monkeypatch.context() as patched:
        patched.setattr(tree.journal.log, "append", lambda *_: (_ for _ in ()).throw(MemoryError))
        for _ in range(2):
            with pytest.raises(MemoryError):
                tree.write(ino, 0, b"y")
    assert tree.read(ino, 0, 1) == b"x"
    stored = memory.ram.overwrite
    monkeypatch.setattr(
        memory.ram, "overwrite", lambda *_: (_ for _ in ()).throw(SystemExit) if _[1] == b"y" else stored(*_)
    )
    with pytest.raises(SystemExit):
        tree.write(ino, 0, b"y")
    with memory.copy() as other:
        assert not known(other.recover(live(tree)))


def test_sums_that_were_made_while_it_was_preserved_are_told_before_it_is_again(memory: Memory) -> None:
    """A seal names a log, which lacks them; then they would count as checked and be in no node."""
    tree = memory.tree()
    numbers = [tree.create(1, name, 0o644).ino for name in (b"a", b"b", b"c")]
    for ino in numbers:
        tree.write(ino, 0, b"x" * PIECE)
    tree.freeze()
    end(save(tree, memory.store, b"shmem-x"))
    with memory.copy() as other:
        node = other.store.find(b"shmem-x")
        again = end(restore(other.store, b"shmem-x", other.ram, other.frames, Limits()))
        begin(again, b"x", 1, node.pfn)
        work = enable(again)
        rest(work)
        assert again.preserved and again.sums.table.untold == 3 and hold(again) == 3
        daemon = Background(again, "/mnt", print)
        daemon._work = work
        assert daemon.status()["unsummed"] == 3, "what crosses a kexec without a sum now, not what has none here"
        again.write(numbers[0], 0, b"y")
        again.freeze()
        report = end(preserve(again, other.store, b"shmem-x"))
        assert report.unsummed == 1 and not again.sums.table.untold
        found = read_tree(other.store, other.store.find(b"shmem-x"))
        assert known(found).keys() == {(numbers[1], 0), (numbers[2], 0)}
    tree.thaw()


def test_damage_is_told_again_where_the_log_of_a_preserved_tree_begins_anew(memory: Memory) -> None:
    tree = memory.tree()
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"x" * (PIECE - PAGE))
    rest(enable(tree))
    tree.freeze()
    end(save(tree, memory.store, b"shmem-x"))
    tree.thaw()
    flip(tree, ino, 5 * PAGE)
    enable(tree)
    assert refused(tree.read, ino, 0, 1)
    tree.journal.trim()
    tree.write(ino, PIECE - PAGE, b"y" * PAGE)
    tree.commit()
    with memory.copy() as other:
        assert other.recover(live(tree)).sums.broken() == [(ino, 0, 255)]


def test_where_there_is_no_room_to_save_sums_they_are_given_up(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = memory.tree()
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"x" * 2 * PIECE)
    work = enable(tree)

    def full(_: Any) -> None:
        raise ExhaustedError("RAM is full")

    with monkeypatch.context() as patched:
        patched.setattr(type(tree.ledger), "grow", full)
        rest(work)
        assert hold(tree) == 0 and not work.take(), "and nobody tries again and again"
    tree.write(ino, 0, b"y")
    rest(work)
    assert hold(tree) == 1


def test_a_tree_that_is_preserved_crosses_with_its_log(memory: Memory) -> None:
    """Restored, changed, and recovered: what was not written since keeps its sum, and a bit that flips is found."""
    tree = memory.tree()
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"x" * 3 * PIECE)
    rest(enable(tree))
    tree.freeze()
    end(save(tree, memory.store, b"shmem-x"))
    with memory.copy() as other:
        node = other.store.find(b"shmem-x")
        again = end(restore(other.store, b"shmem-x", other.ram, other.frames, Limits()))
        begin(again, b"x", 1, node.pfn)
        flip(again, ino, 2 * PIECE)
        enable(again)
        again.write(ino, 0, b"y" * PIECE)
        again.commit()
        with other.copy() as third:
            last = third.recover(live(again))
            assert known(last).keys() == {(ino, 1), (ino, 2)}
            rest(enable(last))
            assert last.sums.broken() == [(ino, 512, 256)]
    tree.thaw()
