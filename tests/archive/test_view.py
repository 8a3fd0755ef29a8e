# SPDX-License-Identifier: GPL-2.0-or-later
"""A preserved tree is read as a mount would show it, and never after its node has gone."""

import errno
import os
import stat

import pytest

from pkramfs.archive.salvage import salvage
from pkramfs.archive.standing import ChangedError
from pkramfs.archive.view import SavedTree
from pkramfs.errors import FormatError, PkramError
from pkramfs.fs.tree import Tree
from tests.support.preserved import Trees, write
from tests.support.sums import enable, flip, rest

PAGE = 4096


def fill(tree: Tree) -> None:
    write(tree, b"a/b/data", b"x" * 10_000)
    write(tree, b"empty")
    sparse = write(tree, b"sparse", b"head")
    tree.write(sparse.ino, 1 << 40, b"middle")
    tree.setattr(sparse.ino, size=(1 << 62) + 5)
    some = write(tree, b"allocated", b"y" * PAGE)
    tree.allocate(some.ino, 0, 5 * PAGE + 1)
    tree.write(some.ino, 3 * PAGE, b"z")
    tree.link(tree.lookup(1, b"empty").ino, 1, b"again")
    tree.symlink(1, b"way", b"a/./b/../b")
    tree.symlink(1, b"out", b"/etc/passwd")
    tree.symlink(1, b"round", b"round")
    tree.symlink(1, b"long", b"t" * 300)
    tree.mknod(1, b"null", stat.S_IFCHR | 0o666, 0x0103)
    tree.setxattr(some.ino, b"user.\xff", b"\0v")


def content(tree: SavedTree, path: bytes) -> bytes:
    place = tree.find(path)
    found = bytearray(tree.attributes(place).size)
    for offset, data in tree.data(place):
        found[offset : offset + len(data)] = data
    return bytes(found)


@pytest.fixture
def tree(trees: Trees) -> SavedTree:
    trees.plant("x", fill)
    return trees.open("x")


def test_names_and_contents(tree: SavedTree) -> None:
    assert [path for path, _ in tree.walk()][:5] == [b"", b"a", b"a/b", b"a/b/data", b"empty"]
    assert content(tree, b"/a/b/data") == content(tree, b"way/data") == b"x" * 10_000
    assert content(tree, b"a//b/../../../allocated") == b"y" * PAGE + bytes(2 * PAGE) + b"z" + bytes(2 * PAGE)
    assert tree.find(b"empty") == tree.find(b"again") and content(tree, b"empty") == b""


def test_what_is_no_data_is_a_hole(tree: SavedTree) -> None:
    assert list(tree.extents(tree.find(b"sparse"))) == [(0, PAGE), (1 << 40, PAGE)]
    assert [(offset, data[:6]) for offset, data in tree.data(tree.find(b"sparse"))] == [
        (0, b"head\0\0"),
        (1 << 40, b"middle"),
    ]
    assert list(tree.extents(tree.find(b"allocated"))) == [(0, PAGE), (3 * PAGE, PAGE)]
    assert list(tree.extents(tree.find(b"empty"))) == []


def test_attributes(tree: SavedTree) -> None:
    assert tree.attributes(tree.find(b"empty")).nlink == 2
    assert tree.attributes(tree.find(b"null")).rdev == 0x0103
    assert tree.attributes(tree.find(b"allocated")).blocks == 6 * 8
    assert tree.attributes(tree.find(b"long", follow=False)).blocks == 8
    assert tree.target(tree.find(b"way", follow=False)) == b"a/./b/../b"
    assert tree.xattrs(tree.find(b"allocated")) == {b"user.\xff": b"\0v"}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (b"nothing", errno.ENOENT),
        (b"empty/x", errno.ENOTDIR),
        (b"empty/", errno.ENOTDIR),
        (b"round", errno.ELOOP),
        (b"out", errno.EXDEV),
        (b"a/b/dat", errno.ENOENT),
    ],
)
def test_a_path_that_leads_nowhere(tree: SavedTree, path: bytes, code: int) -> None:
    with pytest.raises(OSError, match=os.fsdecode(path)) as error:
        tree.find(path)
    assert error.value.errno == code


def test_a_node_that_goes_while_it_is_read(trees: Trees, tree: SavedTree) -> None:
    pieces = tree.data(tree.find(b"a/b/data"))
    trees.free("x")
    with pytest.raises(ChangedError, match=r"shmem-x is no longer preserved"):
        next(pieces)


def test_a_page_that_is_a_node_again(trees: Trees, tree: SavedTree) -> None:
    trees.free("x")
    trees.plant("y", fill)
    with pytest.raises(ChangedError):
        tree.expect_unchanged()


@pytest.mark.usefixtures("damaged")
def test_a_damaged_tree_is_not_opened(trees: Trees) -> None:
    trees.plant("x", fill)
    kernel = trees.up()
    (node,) = kernel.store.nodes()
    kernel.ram.bytes[(node.object_pfn << 12) + 70] ^= 1
    with pytest.raises(FormatError, match="Object at pfn"):
        trees.open("x")


def test_what_no_mount_has_saved_is_no_tree(trees: Trees) -> None:
    trees.preserve("guest", 10)
    from pkramfs.archive.view import open_tree

    with pytest.raises(PkramError, match="node guest holds no file tree"):
        open_tree(trees.up().store, b"guest")


def test_reading_leaves_no_trace(trees: Trees, tree: SavedTree) -> None:
    backed = trees.up().ram.backed
    assert sum(len(data) for _, place in tree.walk() for _, data in tree.data(place)) > 20_000
    assert trees.up().ram.backed == backed


def test_damaged_data_are_not_read(trees: Trees) -> None:
    """Of a file with a flipped bit the rest is; best effort names it."""
    numbers: dict[bytes, int] = {}

    def fill(tree: Tree) -> None:
        for name in (b"dir/bad", b"good"):
            numbers[name] = write(tree, name, name * 400_000).ino
        rest(enable(tree))
        flip(tree, numbers[b"dir/bad"], (1 << 20) + 5)

    trees.plant("x", fill)
    saved = trees.open("x")
    assert b"".join(data for _, data in saved.data(saved.find(b"good"))) == b"good" * 400_000
    parts = saved.data(saved.find(b"dir/bad"))
    assert next(parts)[0] == 0
    with pytest.raises(FormatError, match=r"bytes 1048576-2097151 of /dir/bad is damaged"):
        list(parts)
    found = salvage(trees.up(), b"shmem-x")
    assert found.damage == {saved.find(b"dir/bad"): "1 piece of it, 1 MiB each, damaged"} and not found.problems
