# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that were allocated and never written: zeros that count as a hole, and stay so over a kexec."""

import errno
import os

import numpy as np
import pytest

from pkramfs.errors import FormatError
from pkramfs.fs.verify import verify
from pkramfs.pkram.treeformat import SECTIONS, TreeStream
from pkramfs.spans import Spans

PAGE = 4096


def data(tree, ino: int) -> list[tuple[int, int]]:
    """The pages (first, count) with data, by seeking."""
    found, at, size = [], 0, tree.inode(ino).size
    while at < size:
        try:
            start = tree.seek(ino, at, os.SEEK_DATA)
        except OSError:
            break
        at = tree.seek(ino, start, os.SEEK_HOLE)
        found.append((start // PAGE, -(-at // PAGE) - start // PAGE))
    return found


def marks(tree, ino: int) -> list[tuple[int, int]]:
    unwritten = tree.inode(ino).unwritten
    return [] if unwritten is None else [(index, count) for index, _, count in unwritten]


@pytest.fixture
def file(tree, sh) -> int:
    """Pages 0-1 data, 2-9 allocated, 10-11 data, 12-13 a hole."""
    ino = sh.write(b"f", b"x" * 2 * PAGE)
    tree.write(ino, 10 * PAGE, b"y" * 2 * PAGE)
    tree.allocate(ino, 0, 14 * PAGE - 1)
    tree.punch(ino, 12 * PAGE, 2 * PAGE)
    return ino


def test_what_was_allocated_is_zeros_and_no_data(tree, file, sh) -> None:
    assert tree.inode(file).blocks == 12 * 8
    assert data(tree, file) == [(0, 2), (10, 2)]
    assert list(tree.extents(file)) == [(0, 2 * PAGE), (10 * PAGE, 2 * PAGE)]
    assert sh.content(file)[2 * PAGE : 10 * PAGE] == bytes(8 * PAGE)


@pytest.mark.parametrize(
    ("change", "left", "blocks"),
    [
        (lambda tree, ino: tree.write(ino, 4 * PAGE + 5, b"z"), [(2, 2), (5, 5)], 12),
        (lambda tree, ino: tree.write(ino, PAGE, b"z" * 2 * PAGE), [(3, 7)], 12),
        (lambda tree, ino: tree.punch(ino, 3 * PAGE, PAGE), [(2, 1), (4, 6)], 11),
        (lambda tree, ino: tree.punch(ino, 3 * PAGE + 1, PAGE), [(2, 8)], 12),
        (lambda tree, ino: tree.setattr(ino, size=4 * PAGE), [(2, 2)], 4),
        (lambda tree, ino: tree.setattr(ino, size=4 * PAGE + 1), [(2, 3)], 5),
        (lambda tree, ino: tree.setattr(ino, size=0), [], 0),
        (lambda tree, ino: tree.sparsify(ino), [], 4),
        (lambda tree, ino: tree.allocate(ino, 0, 10 * PAGE), [(2, 8)], 12),
        (lambda tree, ino: tree.allocate(ino, 13 * PAGE, PAGE), [(2, 8), (13, 1)], 13),
        (lambda tree, ino: tree.open(ino, os.O_RDWR | os.O_TRUNC), [], 0),
    ],
)
def test_the_mark_goes_with_the_page(tree, file, change, left, blocks) -> None:
    change(tree, file)
    assert (marks(tree, file), tree.inode(file).blocks) == (left, blocks * 8)
    tree.release(file)


def test_marks_are_kept_over_a_kexec(tree, file, sh, round_trip) -> None:
    other = sh.write(b"g", b"x")
    copy = round_trip(tree)
    again = copy.inode(file)
    assert marks(copy, file) == [(2, 8)] and again.blocks == 12 * 8 and data(copy, file) == data(tree, file)
    assert copy.inode(other).unwritten is None
    sh.audit(copy)


def test_marks_of_what_sleeps_are_saved(tree, file, sh, round_trip, ram, frames, small_store) -> None:
    folder = sh.mkdir(b"d")
    inner = sh.write(b"inner", parent=folder)
    tree.allocate(inner, 0, 3 * PAGE, keep_size=True)
    copy = round_trip(tree)
    assert copy.asleep is not None
    copy.inode(file)
    again = round_trip(copy)
    assert marks(again, file) == [(2, 8)] and marks(again, inner) == [(0, 3)]


class Spoiled(TreeStream):
    """A stream whose columns may be written."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        for section in SECTIONS:
            columns = getattr(self, section.name)
            setattr(self, section.name, {name: column.copy() for name, column in columns.items()})


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        ("inode", 0, 99, "inode of row 0"),
        ("inode", 0, 2, "inode of row 1"),
        ("inode", 1, 2, "first of row 1"),
        ("inode", 0, 0, "first of row 0"),
        ("first", 0, 0, None),
        ("first", 1, 8, None),
        ("first", 1, 9, "first of row 1"),
        ("first", 1, 3, "first of row 1"),
        ("first", 1, 1 << 60, "first of row 1"),
        ("first", 1, 20, "first of row 1"),
        ("count", 0, 0, "count of row 0"),
        ("count", 0, 5, "first of row 1"),
        ("count", 1, 9, "first of row 1"),
        ("count", 0, (1 << 64) - 1, "count of row 0"),
    ],
)
def test_wrong_marks_are_named(tree, file, sh, small_store, column, row, value, words) -> None:
    """Rows: pages 2-4 and 6-9 of `f`, whose extent is 0-11; then a file without pages."""
    tree.write(file, 5 * PAGE, b"z")
    sh.write(b"empty")
    tree.freeze()
    sh.exhaust(sh.save(tree, small_store, b"shmem-x"))
    stream, runs = small_store.saved[b"shmem-x"]
    parts = Spoiled(stream)
    assert parts.unwritten["first"].tolist() == [2, 6] and parts.unwritten["count"].tolist() == [3, 4]
    parts.unwritten[column][row] = value
    if words is None:
        verify(parts, runs, Spans([(0, 1 << 40)]))
        return
    with pytest.raises(FormatError, match=words):
        verify(parts, runs, Spans([(0, 1 << 40)]))


def test_many_runs_are_found_without_looking_at_all(tree, sh) -> None:
    ino = sh.write(b"f")
    for page in range(0, 3000, 2):
        tree.write(ino, page * PAGE, b"x")
    assert data(tree, ino) == [(page, 1) for page in range(0, 3000, 2)]
    tree.setattr(ino, size=1 << 60)
    assert tree.seek(ino, 2998 * PAGE + 1, os.SEEK_DATA) == 2998 * PAGE + 1
    with pytest.raises(OSError, match=r"ENXIO|No such"):
        tree.seek(ino, 2999 * PAGE, os.SEEK_DATA)
    assert tree.seek(ino, 2999 * PAGE, os.SEEK_HOLE) == 2999 * PAGE


def test_random_allocations_agree_with_a_model(tree, sh) -> None:
    """Pages as letters: . hole, u allocated, d data."""
    rng, ino = np.random.default_rng(3), sh.write(b"f")
    model = ["."] * 64
    tree.setattr(ino, size=64 * PAGE)
    for _ in range(400):
        first = int(rng.integers(60))
        count = int(rng.integers(1, min(9, 64 - first) + 1))
        pages = range(first, first + count)
        match int(rng.integers(3)):
            case 0:
                tree.write(ino, first * PAGE, b"x" * count * PAGE)
                model[first : first + count] = "d" * count
            case 1:
                tree.allocate(ino, first * PAGE, count * PAGE)
                for page in pages:
                    model[page] = "u" if model[page] == "." else model[page]
            case 2:
                tree.punch(ino, first * PAGE, count * PAGE)
                model[first : first + count] = "." * count
        found = ["."] * 64
        for at, size in data(tree, ino):
            found[at : at + size] = "d" * size
        for at, size in marks(tree, ino):
            assert found[at : at + size] == ["."] * size
            found[at : at + size] = "u" * size
        assert "".join(found) == "".join(model)
        assert tree.inode(ino).blocks == 8 * (64 - model.count("."))


def test_notes_give_way_where_a_save_would_have_no_room(tree, file, monkeypatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "no frames to hold")

    monkeypatch.setattr(type(tree.ledger), "grow", lambda _: full())
    assert tree.write(file, 5 * PAGE, b"z") == 1
    assert marks(tree, file) == [] and data(tree, file) == [(0, 12)]
