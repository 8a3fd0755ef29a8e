# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies between files, and what they leave of holes."""

import errno
import os

import pytest

from pkramfs.fs import ranges

PAGE = 4096


@pytest.fixture
def source(tree, sh) -> int:
    """Bytes 0-9999, a hole to 100,000, ten bytes."""
    ino = sh.write(b"source", bytes(range(250)) * 40)
    tree.write(ino, 100_000, b"0123456789")
    return ino


@pytest.mark.parametrize("place", [0, 1, 5000, 4096, 200_000])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, 100_010), (1, 20_000), (9_000, 91_005), (20_000, 50_000), (0, 1 << 40)]
)
@pytest.mark.parametrize("before", [0, 150_000])
def test_a_copy_is_what_was_there(tree, sh, source, offset, size, place, before) -> None:
    target = sh.write(b"target", b"z" * before)
    expected = bytearray(sh.content(target))
    part = sh.content(source)[offset : offset + size]
    if len(expected) < place + len(part):
        expected += bytes(place + len(part) - len(expected))
    expected[place : place + len(part)] = part
    assert tree.copy(source, offset, target, place, size) == len(part)
    assert sh.content(target) == bytes(expected)
    if place % PAGE == offset % PAGE == 0 and not before:
        assert tree.inode(target).pages is None or tree.inode(target).blocks <= tree.inode(source).blocks


def test_a_copy_within_one_file(tree, sh, source) -> None:
    before = sh.content(source)
    assert tree.copy(source, 0, source, 200_000, 100_010) == 100_010
    assert sh.content(source) == before + bytes(200_000 - len(before)) + before


def test_what_was_only_allocated_is_a_hole_in_the_copy(tree, sh) -> None:
    one, two = sh.write(b"one"), sh.write(b"two", b"z" * 3 * PAGE)
    tree.allocate(one, 0, 3 * PAGE)
    assert tree.copy(one, 0, two, 0, 3 * PAGE) == 3 * PAGE
    assert sh.content(two) == bytes(3 * PAGE) and tree.inode(two).blocks == 0


def test_nothing_behind_the_end(tree, sh, source) -> None:
    target = sh.write(b"target")
    assert tree.copy(source, 200_000, target, 0, 100) == 0
    assert tree.inode(target).size == 0


def test_a_long_copy_is_a_short_count(tree, sh, monkeypatch) -> None:
    monkeypatch.setattr(ranges, "MOST", 3 * PAGE)
    one, two = sh.write(b"one", b"x" * 10 * PAGE), sh.write(b"two")
    assert tree.copy(one, 0, two, 0, 10 * PAGE) == 3 * PAGE
    assert tree.inode(two).size == 3 * PAGE


def test_no_room_is_a_short_count_and_then_enospc(tree, sh) -> None:
    one, two = sh.write(b"one", b"x" * 8 * PAGE), sh.write(b"two")
    tree.limits.max_pages = 12
    assert tree.copy(one, 0, two, 0, 8 * PAGE) == 4 * PAGE
    with pytest.raises(OSError) as caught:
        tree.copy(one, 4 * PAGE, two, 4 * PAGE, 4 * PAGE)
    assert caught.value.errno == errno.ENOSPC
    assert tree.inode(two).size == 4 * PAGE


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
@pytest.mark.parametrize("offset", [-1, 100_010, 1 << 62])
def test_nothing_is_found_outside(tree, source, whence, offset) -> None:
    with pytest.raises(OSError) as caught:
        tree.seek(source, offset, whence)
    assert caught.value.errno == errno.ENXIO


def test_seeking_is_to_the_byte(tree, source) -> None:
    assert tree.seek(source, 5, os.SEEK_DATA) == 5
    assert tree.seek(source, 5, os.SEEK_HOLE) == 3 * PAGE
    assert tree.seek(source, 3 * PAGE + 7, os.SEEK_HOLE) == 3 * PAGE + 7
    assert tree.seek(source, 3 * PAGE, os.SEEK_DATA) == 24 * PAGE
    assert tree.seek(source, 100_005, os.SEEK_HOLE) == 100_010


def test_only_files_have_ranges(tree, sh, source) -> None:
    folder = sh.mkdir(b"d")
    for call in (lambda: tree.seek(folder, 0, os.SEEK_DATA), lambda: tree.copy(source, 0, folder, 0, 5)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
