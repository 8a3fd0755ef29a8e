# SPDX-License-Identifier: GPL-2.0-or-later
"""A damaged or hostile description of a tree: each field wrong once, and what is said about it."""

import numpy as np
import pytest

from pkramfs.errors import FormatError, VersionError
from pkramfs.fs.restore import restore
from pkramfs.fs.verify import verify
from pkramfs.pkram.treeformat import BIRTH, ENTRIES, HAS_FLAGS, HAS_UNWRITTEN, INODES, SECTIONS, TREE, TreeStream
from pkramfs.spans import Spans


@pytest.fixture
def saved(tree, sh, small_store):
    """A small tree as its two objects: positions 0 root, 1 d, 2 d/e, 3 f (3 pages, a hole), 4 l, 5 p, 6 g."""
    one = sh.mkdir(b"d")
    sh.mkdir(b"e", parent=one)
    file = sh.write(b"f", b"x" * 8192)
    tree.write(file, 40_960, b"y")
    tree.symlink(1, b"l", b"target")
    tree.mknod(one, b"p", 0o010644)
    sh.write(b"g", b"z")
    tree.link(file, one, b"hard")
    tree.setxattr(file, b"user.a", b"value")
    tree.freeze()
    sh.exhaust(sh.save(tree, small_store, b"shmem-x"))
    return small_store.saved[b"shmem-x"]


class Spoiled(TreeStream):
    """A stream whose columns may be written."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        for section in SECTIONS:
            columns = getattr(self, section.name)
            setattr(self, section.name, {name: column.copy() for name, column in columns.items()})


def position(parts: TreeStream, name: bytes) -> int:
    """The row of a name among the entries."""
    ends = np.cumsum(parts.entries["length"].astype(int))
    for row, end in enumerate(ends.tolist()):
        if parts.names[end - int(parts.entries["length"][row]) : end] == name:
            return row
    raise LookupError(name)


EVERYTHING = Spans([(0, 1 << 40)])


def test_the_tree_itself_is_fine(saved) -> None:
    verify(TreeStream(saved[0]), saved[1], EVERYTHING)


COLUMN_SPOILS = [
    ("inodes", "ino", 0, 2, "first row"),
    ("inodes", "ino", 2, 2, "ino of row 2"),
    ("inodes", "ino", 6, 1 << 61, "next_ino"),
    ("inodes", "mode", 0, 0o100644, "first row"),
    ("inodes", "mode", 3, 0o050644, "mode of row 3"),
    ("inodes", "mode", 3, 0o110644, "mode of row 3"),
    ("inodes", "mode", 3, 0o1100644, "mode of row 3"),
    ("inodes", "mode", 3, 0o120777, "bytes of all targets|size of row 3"),
    ("inodes", "mode", 1, 0o100755, "position of a directory"),
    ("inodes", "mode", 3, 0o040755, "names of a directory"),
    ("inodes", "rdev", 3, 5, "rdev of row 3"),
    ("inodes", "size", 3, 1 << 63, "size of row 3"),
    ("inodes", "size", 5, 7, "size of row 5"),
    ("inodes", "size", 4, 7, "bytes of all targets"),
    ("inodes", "size", 4, 0, "size of row 4"),
    ("inodes", "size", 1, 60, "20 for each entry"),
    ("inodes", "nlink", 3, 1, "nlink of row 3"),
    ("inodes", "nlink", 6, 2, "nlink of row 6"),
    ("inodes", "nlink", 1, 2, "nlink of row 1"),
    ("inodes", "nlink", 0, 4, "nlink of row 0"),
    ("inodes", "extents", 3, 1, "extents of all files"),
    ("inodes", "extents", 1, 1, "extents of row 1"),
    ("entries", "parent", 0, 99, "parent of row 0"),
    ("entries", "parent", 0, 4, "position of a directory"),
    ("entries", "parent", 0, 2, "rising positions"),
    ("entries", "child", 0, 99, "child of row 0"),
    ("entries", "child", 0, 0, "names of a directory"),
    ("entries", "cookie", 1, 3, "cookie of row 1"),
    ("entries", "cookie", 0, 2, "cookie of row 0"),
    ("entries", "length", 0, 0, "length of row 0"),
    ("entries", "length", 0, 9, "bytes of all names"),
    ("extents", "first", 1, 1, "first of row 1"),
    ("extents", "first", 1, 1 << 60, "first of row 1"),
    ("extents", "count", 0, 0, "count of row 0"),
    ("extents", "count", 0, 1, "pages of all extents"),
    ("extents", "count", 0, (1 << 64) - 1, "count of row 0"),
    ("xattrs", "inode", 0, 99, "inode of row 0"),
    ("xattrs", "name_length", 0, 0, "name_length of row 0"),
    ("xattrs", "name_length", 0, 7, "bytes of all xattrs"),
    ("xattrs", "value_length", 0, 70_000, "value_length of row 0"),
]


@pytest.mark.parametrize(("section", "column", "row", "value", "words"), COLUMN_SPOILS)
def test_a_wrong_column_is_named(saved, section, column, row, value, words) -> None:
    parts = Spoiled(saved[0])
    getattr(parts, section)[column][row] = value
    with pytest.raises(FormatError, match=words):
        verify(parts, saved[1], EVERYTHING)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        (b"hard", b"ha/d", "slash"),
        (b"hard", b"ha\0d", "NUL"),
        (b"d", b".", "other than . and .."),
    ],
)
def test_a_wrong_name_is_refused(saved, name, wrong, words) -> None:
    parts = Spoiled(saved[0])
    at = int(np.cumsum(parts.entries["length"].astype(int))[position(parts, name)]) - len(name)
    parts.names = parts.names[:at] + wrong + parts.names[at + len(name) :]
    with pytest.raises(FormatError, match=words):
        verify(parts, saved[1], EVERYTHING)


def test_the_parent_of_all_evil(saved) -> None:
    parts = Spoiled(saved[0])
    row = position(parts, b"hard")
    end = int(np.cumsum(parts.entries["length"].astype(int))[row])
    parts.names = parts.names[: end - 4] + b".." + parts.names[end:]
    parts.entries["length"][row] = 2
    with pytest.raises(FormatError, match=r"other than \. and \.\."):
        verify(parts, saved[1], EVERYTHING)


def test_directories_in_a_circle(tree, sh, small_store) -> None:
    one = sh.mkdir(b"a")
    sh.mkdir(b"b", parent=one)
    tree.freeze()
    sh.exhaust(sh.save(tree, small_store, b"shmem-x"))
    stream, runs = small_store.saved[b"shmem-x"]
    parts = Spoiled(stream)
    parts.entries["parent"][:] = [1, 2]
    parts.entries["child"][:] = [2, 1]
    with pytest.raises(FormatError, match="cycle"):
        verify(parts, runs, EVERYTHING)


def test_one_name_twice(tree, sh, small_store, ram, frames) -> None:
    sh.write(b"a")
    sh.write(b"b")
    tree.freeze()
    sh.exhaust(sh.save(tree, small_store, b"shmem-x"))
    objects = small_store.saved[b"shmem-x"]
    objects[0] = objects[0].replace(b"ab\0", b"aa\0")
    with pytest.raises(FormatError, match="one twice"):
        sh.exhaust(restore(small_store, b"shmem-x", ram, type(frames)(ram), tree.limits))


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (([0, 3], [100, 200], [3, 1]), None),
        (([0], [100], [4]), None),
        (([0, 2], [100, 200], [2, 2]), None),
        (([1, 3], [100, 200], [2, 1]), "index of row 0"),
        (([0, 4], [100, 200], [3, 1]), "index of row 1"),
        (([0, 3], [100, 102], [3, 1]), "66 twice"),
        (([0, 3], [100, 0], [3, 1]), "pfn of row 1"),
        (([0, 3], [100, 200], [3, 2]), "pages of the page stream"),
        (([0], [100], [3]), "pages of the page stream"),
        (([0, 3], [100, 5000], [3, 1]), "page blocks"),
        (([0, 4], [100, 200], [4, 0]), "count of row 1"),
    ],
)
def test_frames_are_used_once_and_inside_the_blocks(saved, runs, words) -> None:
    arrays = tuple(np.array(column, dtype=np.uint64) for column in runs)
    allowed = Spans([(0, 1000)])
    if words is None:
        verify(TreeStream(saved[0]), arrays, allowed)
        return
    with pytest.raises(FormatError, match=words):
        verify(TreeStream(saved[0]), arrays, allowed)


def test_headers_that_are_wrong(saved) -> None:
    stream = bytearray(saved[0])
    for field, value, kind in (("magic", 1, FormatError), ("version", 2, VersionError), ("flags", 16, FormatError)):
        spoiled = stream.copy()
        spoiled[TREE.offset(field)] = value
        with pytest.raises(kind, match=field):
            TreeStream(bytes(spoiled))
    for wrong in (b"", bytes(stream[:100]), bytes(stream[:-8]), bytes(stream) + bytes(8)):
        with pytest.raises(FormatError, match="length"):
            TreeStream(wrong)
    spoiled = stream.copy()
    spoiled[TREE.offset("entries") + 7] = 0x7F
    with pytest.raises(FormatError, match="length"):
        TreeStream(bytes(spoiled))


def test_any_flipped_bit_is_refused_or_harmless(saved, small_store, ram, frames, sh, tree) -> None:
    rng = np.random.default_rng(5)
    original = saved[0]
    for _ in range(400):
        spoiled = bytearray(original)
        spoiled[int(rng.integers(len(original)))] ^= 1 << int(rng.integers(8))
        small_store.saved[b"shmem-x"] = [bytes(spoiled), saved[1]]
        limits = type(tree.limits)()
        try:
            copy = sh.exhaust(restore(small_store, b"shmem-x", ram, type(frames)(ram), limits))
        except FormatError:
            continue
        sh.audit(copy)


def test_the_format_is_pinned() -> None:
    """If this fails, the format has changed: bump TREE_VERSION and keep reading the old one."""
    assert TREE.size == 128
    widths = {section.name: section.width for section in SECTIONS}
    later = {"unwritten": 20, "sums": 24, "damaged": 48}
    assert widths == {"inodes": 80, "entries": 17, "extents": 16, "xattrs": 10} | later
    assert sum(column.dtype.itemsize for column in INODES.present(0)) == 68
    assert (BIRTH, HAS_FLAGS, HAS_UNWRITTEN) == (1, 2, 4)
    assert [c.name for c in ENTRIES.columns] == ["parent", "child", "cookie", "length"]
