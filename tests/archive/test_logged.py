# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree that a log holds looks as one that was written whole, to everybody who reads nodes."""

from typing import Any

import pytest

from pkramfs.archive import copying
from pkramfs.archive.salvage import salvage
from pkramfs.cli.verify import check
from pkramfs.errors import FormatError
from pkramfs.fs.picture import complete
from pkramfs.fs.tree import Tree
from pkramfs.journal.layout import CHUNK, SEGMENT, read_base, read_seal
from tests.support.preserved import Trees, write


def fill(tree: Tree) -> None:
    """Names of all kinds; each step is a request."""
    for number in range(20):
        inode = write(tree, b"below/%d" % number, bytes([number + 1]) * 10_000)
        tree.setxattr(inode.ino, b"user.a", b"%d" % number)
        tree.commit()
    tree.symlink(1, b"link", b"below/3")
    tree.link(tree.lookup(1, b"link").ino, 1, b"other")  # type: ignore[union-attr]
    tree.unlink(tree.lookup(1, b"below").ino, b"7")  # type: ignore[union-attr]
    tree.commit()


@pytest.fixture
def both(trees: Trees) -> Trees:
    trees.plant("log", fill, by_log=True)
    trees.plant("whole", fill)
    logged, whole = (trees.up().store.find(name) for name in (b"shmem-log", b"shmem-whole"))
    assert logged is not None and logged.log_pfn and whole is not None and not whole.log_pfn
    return trees


def names(tree: Any) -> list[tuple[bytes, bytes]]:
    return [(path, b"".join(data for _, data in tree.data(place))) for path, place in tree.walk()]


def test_it_is_opened_and_checked(both: Trees) -> None:
    assert names(both.open("log")) == names(both.open("whole"))
    assert check(both.up(), []) == (2, [])


def test_it_is_copied_and_renamed(both: Trees) -> None:
    node = complete(copying.copy(both.up(), b"shmem-log", b"shmem-copy"))
    assert node.objects == 2 and not node.log_pfn
    copying.rename(both.up(), b"shmem-log", b"shmem-new")
    assert names(both.open("new")) == names(both.open("copy")) == names(both.open("whole"))
    assert check(both.up(), []) == (3, [])


@pytest.mark.usefixtures("damaged")
def test_of_a_damaged_log_comes_out_what_is_before_the_damage(both: Trees) -> None:
    kernel = both.up()
    node = kernel.store.find(b"shmem-log")
    assert node is not None
    base = read_base(kernel.ram, read_seal(kernel.ram, node.log_pfn, node.tree_id).base, node.tree_id)
    at, chunks = (base.segment << 12) + SEGMENT.size, list[int]()
    while (size := int.from_bytes(kernel.ram.bytes[at : at + 4], "little")) > 0:
        chunks.append(at)
        at += size
    assert len(chunks) == 1 + 20 + 1
    kernel.ram.bytes[chunks[11] + CHUNK.size] ^= 1
    with pytest.raises(FormatError, match="checksum at position"):
        both.open("log")
    assert len(check(kernel, [])[1]) == 1
    found = salvage(kernel, b"shmem-log")
    lost = found.tree.find(b"below/7")
    assert found.damage == {lost: "deleted later, and overwritten"}, "by the seal"
    for path, place in list(found.tree.walk())[2:]:
        content = b"".join(data for _, data in found.tree.data(place))
        assert place == lost or content == bytes([int(path.removeprefix(b"below/")) + 1]) * 10_000
    assert [path for path, _ in found.tree.walk()][2:] == [b"below/%d" % number for number in range(10)]
    assert len(found.problems) == 1 and "what was done from there on is missing" in found.problems[0]
