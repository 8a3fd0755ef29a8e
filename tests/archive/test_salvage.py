# SPDX-License-Identifier: GPL-2.0-or-later
"""Of a damaged node comes out what verifies, never anything else, and the rest is named."""

import random
from typing import Any

import pytest

from pkramfs.archive.salvage import Salvaged, salvage
from pkramfs.errors import FormatError, PkramError
from pkramfs.fs.tree import Tree
from pkramfs.pkram.format import LINK, OBJECT
from tests.support.preserved import Trees, write

pytestmark = pytest.mark.usefixtures("damaged")
FILES, PAGES = 30, 100


def fill(tree: Tree) -> None:
    """Files in the root only: a strict save has an entry for each page, and so many links."""
    for number in range(FILES):
        inode = write(tree, b"%d" % number, bytes([number + 1]) * (PAGES << 12))
        tree.setxattr(inode.ino, b"user.a", b"%d" % number)


@pytest.fixture
def node(trees: Trees) -> Any:
    trees.plant("x", fill, strict=True)
    (found,) = trees.up().store.nodes()
    return found


def flip(trees: Trees, pfn: int, offset: int) -> None:
    trees.up().ram.bytes[(pfn << 12) + offset] ^= 0x10


def objects(trees: Trees, node: Any) -> list[Any]:
    first = OBJECT.read(trees.up().ram.peek(node.object_pfn))
    return [first, OBJECT.read(trees.up().ram.peek(first.object))]


def links(trees: Trees, head: int) -> list[int]:
    found = [head]
    while following := LINK.read(trees.up().ram.peek(found[-1])).next & ((1 << 40) - 1):
        found.append(following)
    return found


def look(trees: Trees) -> tuple[Salvaged, set[int]]:
    """What comes out, and which files: each must be whole."""
    found = salvage(trees.up(), b"shmem-x")
    whole = set()
    for path, place in found.tree.walk():
        if path and place not in found.damage:
            content = b"".join(data for _, data in found.tree.data(place))
            assert content == bytes([int(path) + 1]) * (PAGES << 12)
            whole.add(int(path))
    return found, whole


def test_a_sound_node(trees: Trees, node: Any) -> None:
    found, whole = look(trees)
    assert (found.damage, found.problems, len(whole)) == ({}, [], FILES)


def test_a_damaged_page_table(trees: Trees, node: Any) -> None:
    flip(trees, node.table_pfn, 0)
    found, whole = look(trees)
    assert len(found.problems) == 1 and len(whole) == FILES


def test_a_damaged_object(trees: Trees, node: Any) -> None:
    second = objects(trees, node)[0].object
    for pfn, offset in ((node.object_pfn, 9), (node.object_pfn, 40), (second, 96), (second, 2000)):
        flip(trees, pfn, offset)
        found, whole = look(trees)
        assert len(found.problems) == 1 and len(whole) == FILES
        flip(trees, pfn, offset)


def test_a_damaged_link_of_contents(trees: Trees, node: Any) -> None:
    chain = links(trees, objects(trees, node)[1].pages_head)
    assert len(chain) == 6
    for number in (0, 2, -1):
        for offset in (16, 40, 500):
            flip(trees, chain[number], offset)
            found, whole = look(trees)
            flip(trees, chain[number], offset)
            if offset == 16:  # the word that leads on has a check of its own, and the next link is a neighbour
                assert found.damage == {} and len(found.problems) == 1
                continue
            assert 5 <= len(found.damage) <= 7 and len(whole) + len(found.damage) == FILES
            lost = [reason.partition(" ") for reason in found.damage.values()]
            assert {text for _, _, text in lost} <= {"pages of it cannot be found", "page of it cannot be found"}
            assert sum(int(count) for count, _, _ in lost) in (504, 3000 - 5 * 504)


def test_a_description_that_breaks_no_rule_is_taken(trees: Trees, node: Any) -> None:
    with trees.up().store.prepare_load(b"shmem-x") as load:
        reader = next(iter(load))
    stream = reader.read()
    at = stream.index(b"user.a")
    flip(trees, int(reader.byte_frames.starts[0]) + at // 4096, at % 4096 + 5)
    found, whole = look(trees)
    assert found.problems == ["the description of the tree is damaged: names and attributes may be wrong"]
    assert len(whole) == FILES
    flip(trees, int(reader.byte_frames.starts[0]) + at // 4096, at % 4096)
    found, whole = look(trees)
    assert "extended attributes and ACLs are given up" in found.problems[1] and len(whole) == FILES
    assert found.tree.xattrs(1) == {}


def test_a_description_that_cannot_be_trusted(trees: Trees, node: Any) -> None:
    with trees.up().store.prepare_load(b"shmem-x") as load:
        frames = next(iter(load)).byte_frames
    flip(trees, int(frames.starts[0]), 128)
    with pytest.raises(FormatError, match=r"Tree inodes: .*; nothing of it can be got out"):
        salvage(trees.up(), b"shmem-x")


def test_a_list_that_is_damaged_before_it(trees: Trees, node: Any) -> None:
    trees.plant("y", fill, strict=True)
    other = trees.up().store.find(b"shmem-y")
    flip(trees, other.pfn, 50)
    assert len(look(trees)[1]) == FILES
    with pytest.raises(PkramError, match="no node shmem-y can be read; unreadable: Node at pfn"):
        salvage(trees.up(), b"shmem-y")


def test_random_damage_gives_nothing_wrong(trees: Trees, node: Any, seed: int) -> None:
    """One flipped bit anywhere in the metadata: out comes what is right, or a FormatError."""
    chance, kernel = random.Random(seed), trees.up()
    own = kernel.store.metadata_pages(b"shmem-x")
    pages = [pfn for start, end in own for pfn in range(start, end) if pfn != node.pfn]
    for _ in range(60):
        address = (chance.choice(pages) << 12) + chance.randrange(4096)
        bit = 1 << chance.randrange(8)
        kernel.ram.bytes[address] ^= bit
        try:
            found = salvage(kernel, b"shmem-x")
            for path, place in found.tree.walk():
                if path.isdigit() and place not in found.damage and not found.problems:
                    assert next(found.tree.data(place))[1][:1] == bytes([int(path) + 1])
        except FormatError:
            pass
        kernel.ram.bytes[address] ^= bit
