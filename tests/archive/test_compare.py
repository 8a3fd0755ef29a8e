# SPDX-License-Identifier: GPL-2.0-or-later
"""Every difference of two trees is found, and none that is not there."""

import io
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pkramfs.archive.compare import Difference, HostTree, compare, first_difference
from pkramfs.archive.export import export
from pkramfs.fs.tree import Tree
from tests.support.preserved import Trees, write

WHEN = 1_600_000_000_123_456_789


def base(tree: Tree) -> None:
    write(tree, b"a/f", b"x" * 10_000)
    sparse = write(tree, b"sparse", b"head")
    tree.write(sparse.ino, 1 << 33, b"tail")
    tree.symlink(1, b"way", b"a")
    tree.mknod(1, b"null", 0o20644, 0x0103)
    tree.setxattr(write(tree, b"x").ino, b"user.a", b"1")
    settle(tree)


def settle(tree: Tree) -> None:
    for inode in tree.inodes.values():
        inode.mtime = WHEN


def differences(trees: Trees, other: Any, top: Any = 0) -> list[Difference]:
    return [one for one in compare(trees.open("x"), other, top) if isinstance(one, Difference)]


def number(tree: Tree, path: bytes) -> int:
    inode = tree.root
    for name in path.split(b"/"):
        inode = tree.lookup(inode.ino, name)
    return inode.ino


CHANGES: list[tuple[Any, list[Difference]]] = [
    (lambda tree: None, []),
    (lambda tree: tree.write(number(tree, b"a/f"), 7777, b"y"), [Difference(b"/a/f", "content", 7777, 7777)]),
    (lambda tree: tree.setattr(number(tree, b"a/f"), size=9999), [Difference(b"/a/f", "size", 10_000, 9999)]),
    (
        lambda tree: tree.write(number(tree, b"sparse"), 1 << 32, b"\0\1"),
        [Difference(b"/sparse", "content", (1 << 32) + 1, (1 << 32) + 1)],
    ),
    (lambda tree: tree.write(number(tree, b"sparse"), 1 << 32, b"\0\0"), []),
    (lambda tree: tree.setattr(number(tree, b"a"), mode=0o700), [Difference(b"/a", "mode", "0755", "0700")]),
    (lambda tree: tree.setattr(number(tree, b"x"), uid=7), [Difference(b"/x", "owner", "0:0", "7:0")]),
    (
        lambda tree: tree.setxattr(number(tree, b"x"), b"user.a", b"2"),
        [Difference(b"/x", "xattr user.a", "1", "2")],
    ),
    (lambda tree: write(tree, b"new/below"), [Difference(b"/new", "only", None, "new")]),
    (lambda tree: tree.unlink(1, b"way"), [Difference(b"/way", "only", "way", None)]),
    (
        lambda tree: (tree.unlink(1, b"x"), tree.mkdir(1, b"x", 0o755)),
        [Difference(b"/x", "type", "regular file", "directory")],
    ),
    (
        lambda tree: (tree.unlink(1, b"way"), tree.symlink(1, b"way", b"b")),
        [Difference(b"/way", "target", "a", "b")],
    ),
    (
        lambda tree: (tree.unlink(1, b"null"), tree.mknod(1, b"null", 0o20644, 0x0105)),
        [Difference(b"/null", "device", 0x0103, 0x0105)],
    ),
]


def test_each_difference_is_found_alone(trees: Trees) -> None:
    trees.plant("x", base)
    for change, expected in CHANGES:
        trees.plant("y", lambda tree, change=change: (base(tree), change(tree), settle(tree)))
        assert differences(trees, trees.open("y")) == expected
        trees.free("y")
    trees.plant("y", lambda tree: (base(tree), setattr(tree.lookup(1, b"x"), "mtime", 5)))
    assert differences(trees, trees.open("y")) == [Difference(b"/x", "mtime", WHEN, 5)]
    assert not [1 for one in compare(trees.open("x"), trees.open("y"), 0, times=False) if isinstance(one, Difference)]


def test_contents_with_holes(seed: int) -> None:
    """Against what the same bytes say without holes."""
    chance = random.Random(seed)
    for _ in range(300):
        size = chance.randrange(1, 60)
        pair = []
        for _side in range(2):
            whole, pieces, at = bytearray(size), [], 0
            while at < size:
                length = chance.randrange(1, 12)
                if chance.random() < 0.5:
                    part = bytes(chance.choice((0, 0, 0, 0, 0, 0, 1)) for _ in range(min(length, size - at)))
                    whole[at : at + len(part)] = part
                    pieces.append((at, part))
                at += length
            pair.append((bytes(whole), pieces))
        expected = next((at for at, (a, b) in enumerate(zip(pair[0][0], pair[1][0], strict=True)) if a != b), None)
        assert first_difference(iter(pair[0][1]), iter(pair[1][1]), size) == expected, pair


def test_a_directory_of_the_host(trees: Trees, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root for owners and devices")
    trees.plant("x", base)
    out = io.BytesIO()
    for _ in export(trees.open("x"), out.write):
        pass
    command = ["tar", "-C", tmp_path, "--xattrs", "-xpf", "-"]
    subprocess.run(command, input=out.getvalue(), check=True)
    top = os.fsencode(tmp_path)
    assert differences(trees, HostTree(top), top) == []
    with open(tmp_path / "a" / "f", "r+b") as file:
        file.seek(5000)
        file.write(b"z")
    os.utime(tmp_path / "a" / "f", ns=(WHEN, WHEN))
    assert differences(trees, HostTree(top), top) == [Difference(b"/a/f", "content", 5000, 5000)]
