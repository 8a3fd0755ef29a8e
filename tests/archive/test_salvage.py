# SPDX-License-Identifier: GPL-2.0-or-later
"""Of a damaged node comes out what verifies, never anything else, and the rest is named."""

import random
import re
import stat
from typing import Any

import numpy as np
import pytest

from pkramfs.archive.salvage import Salvaged, salvage
from pkramfs.errors import FormatError, PkramError
from pkramfs.fs.tree import Tree
from pkramfs.pkram.format import LINK, NEXT, OBJECT, OTHER
from pkramfs.pkram.treeformat import SECTIONS, TREE, TreeStream, padding
from tests.support.preserved import Trees, write
from tests.support.sums import enable, rest

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


@pytest.mark.parametrize("field", ["next of the node", "next", "other"])
def test_a_damaged_word_that_nothing_needs(trees: Trees, node: Any, field: str) -> None:
    """All files come out, but the tree would be refused, and why is said."""
    flip(trees, node.pfn if " " in field else node.object_pfn, OTHER if field == "other" else NEXT)
    found, whole = look(trees)
    assert (found.damage, len(whole), len(found.problems)) == ({}, FILES, 1)
    assert f"{field.split()[0]} is 0x" in found.problems[0]


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


def description(trees: Trees, name: bytes = b"shmem-x") -> tuple[int, bytes]:
    """Return the address of a tree's description, which has neighbouring frames here, and its bytes."""
    with trees.up().store.prepare_load(name) as load:
        reader = next(iter(load))
        stream = bytes(reader.read())
    ((first, _),) = reader.byte_frames
    return first << 12, stream


def cell(stream: bytes, section: str, column: str, row: int) -> tuple[int, np.dtype[Any]]:
    """Return where a value of a column is in the stream."""
    header, at = TreeStream(stream).header, TREE.size
    for one in SECTIONS:
        for part in one.present(header.flags):
            size = getattr(header, one.name) * part.dtype.itemsize
            if (one.name, part.name) == (section, column):
                return at + row * part.dtype.itemsize, part.dtype
            at += size + padding(size)
    raise AssertionError(column)


def test_a_description_that_breaks_no_rule_is_taken(trees: Trees, node: Any) -> None:
    at, stream = description(trees)
    name = at + stream.index(b"user.a")
    flip(trees, name >> 12, name % 4096 + 5)
    found, whole = look(trees)
    assert found.problems == ["the description of the tree is damaged: names and attributes may be wrong"]
    assert len(whole) == FILES
    flip(trees, name >> 12, name % 4096)
    found, whole = look(trees)
    assert found.problems[2] == "1 extended attribute given up, of inodes 2" and len(whole) == FILES
    assert found.tree.xattrs(1) == {} and found.tree.xattrs(2) == {b"user.a": b"1"}


def test_a_description_that_cannot_be_trusted(trees: Trees, node: Any) -> None:
    at, stream = description(trees)
    for offset in (16, cell(stream, "inodes", "extents", 3)[0]):
        flip(trees, at >> 12, offset)
        with pytest.raises(FormatError, match="Tree"):
            salvage(trees.up(), b"shmem-x")
        flip(trees, at >> 12, offset)


def mixed(tree: Tree) -> None:
    """Positions: 0 the root, 1 and 2 directories, 3 to 5 files, 6 and 7 links, 8 a device, 9 a file with two names."""
    for name in (b"one", b"two"):
        tree.mkdir(tree.root.ino, name, 0o755)
    for number, path in enumerate((b"one/f0", b"one/f1", b"two/f2")):
        write(tree, path, bytes([65 + number]) * 9000)
    tree.symlink(tree.root.ino, b"l0", b"one/f0")
    tree.symlink(tree.root.ino, b"l1", b"two/f2/and/more")
    tree.mknod(tree.root.ino, b"dev", stat.S_IFCHR | 0o600, 5)
    write(tree, b"gone")
    tree.unlink(tree.root.ino, b"gone")  # numbers are not positions
    hard = write(tree, b"h0", b"H" * 9000)
    tree.link(hard.ino, tree.lookup(tree.root.ino, b"two").ino, b"h1")
    tree.setxattr(hard.ino, b"user.a", b"v")


WHOLE = {
    *("one", "two", "one/f0=AA", "one/f1=BB", "two/f2=CC", "l0 -> one/f0", "l1 -> two/f2/and/more"),
    *("dev", "h0=HH", "two/h1=HH"),
}
MENDED = [
    # section, column, row, new value, what is not there any more, what is instead
    ("inodes", "ino", 4, 1, set(), set()),
    ("inodes", "mode", 3, 0o644, {"one/f0=AA"}, set()),
    ("inodes", "mode", 1, 0o140755, set(), set()),
    ("inodes", "mode", 1, 0, set(), set()),
    ("inodes", "mode", 6, 0o777, {"l0 -> one/f0"}, set()),
    ("inodes", "mode", 8, 0o070600, {"dev"}, set()),
    ("inodes", "nlink", 9, 77, set(), set()),
    ("inodes", "nlink", 2, 0, set(), set()),
    ("inodes", "rdev", 4, 9, {"one/f1=BB"}, set()),
    ("inodes", "size", 5, 1 << 63, {"two/f2=CC"}, set()),
    ("inodes", "size", 7, 1 << 40, set(), set()),  # it follows from the others
    ("inodes", "size", 2, 1, set(), set()),
    ("inodes", "size", 6, 5, {"l0 -> one/f0", "l1 -> two/f2/and/more"}, set()),
    ("extents", "first", 1, 1 << 62, {"one/f1=BB"}, set()),
    ("extents", "count", 2, 0, set(), set()),
    ("entries", "child", 2, 99, {"l0 -> one/f0"}, {"lost-7 -> one/f0"}),
    ("entries", "child", 0, 0, {"one", "one/f0=AA", "one/f1=BB"}, {"lost-2", "lost-2/f0=AA", "lost-2/f1=BB"}),
    ("entries", "parent", 6, 3, {"one/f0=AA"}, {"lost-4=AA"}),
    ("entries", "parent", 8, 1 << 31, {"two/f2=CC"}, {"lost-6=CC"}),
    ("entries", "cookie", 3, 1, set(), set()),
    ("entries", "length", 0, 0, {"one", "one/f0=AA", "one/f1=BB"}, {"damaged-name-0", "damaged-name-0/f0=AA"}),
    ("xattrs", "inode", 0, 77, set(), set()),
]


def came_out(trees: Trees) -> tuple[set[str], set[str], list[str]]:
    """Return what came out of x, what was given up, and what was wrong."""
    tree, damage, problems = salvage(trees.up(), b"shmem-x")
    found, given_up = set(), set()
    for path, place in tree.walk():
        attributes = tree.attributes(place)
        said = path.decode()
        if stat.S_ISLNK(attributes.mode) and place not in damage:
            said += f" -> {tree.target(place).decode()}"
        elif stat.S_ISREG(attributes.mode) and place not in damage:
            content = b"".join(data for _, data in tree.data(place))
            assert len({*content}) == 1 and len(content) == 9000
            said += f"={content[:2].decode()}"
        (given_up if place in damage else found).add(said)
    return found - {""}, given_up, problems


def test_a_damaged_row_costs_no_other(trees: Trees) -> None:
    def summed(tree: Tree) -> None:
        work = enable(tree)
        mixed(tree)
        rest(work)

    trees.plant("x", summed)
    ram, (start, stream) = trees.up().ram, description(trees)
    assert TreeStream(stream).header.sums == 4
    assert came_out(trees) == (WHOLE, set(), [])
    for section, column, row, value, gone, instead in MENDED:
        at, dtype = cell(stream, section, column, row)
        new = np.array([value], dtype=np.uint64).astype(dtype).tobytes()
        ram.bytes[start + at : start + at + len(new)] = new
        found, given_up, problems = came_out(trees)
        ram.bytes[start + at : start + at + len(new)] = stream[at : at + len(new)]
        case = section, column, row
        assert (case, WHOLE - found) == (case, gone) and instead <= found
        assert {re.split("=| ->", name)[0] for name in gone - instead} == given_up or instead, case
        assert problems[1].startswith("the description breaks a rule: Tree"), case
        assert not [line for line in problems if "ACLs are given up" in line], case


def test_a_lost_page_of_the_description(trees: Trees) -> None:
    """Zeros in the place of a page: what comes out is whole, whatever it is called."""

    def many(tree: Tree) -> None:
        for number in range(1200):
            write(tree, b"d%d/name-%d" % (number % 7, number), bytes([65 + number % 26]) * 100)

    trees.plant("x", many)
    start, stream = description(trees)
    ram, survived = trees.up().ram, []
    for page in range(1, len(stream) >> 12):
        kept = bytes(ram.bytes[start + page * 4096 : start + (page + 1) * 4096])
        ram.bytes[start + page * 4096 : start + (page + 1) * 4096] = bytes(4096)
        try:
            tree, damage, _ = salvage(trees.up(), b"shmem-x")
        except FormatError:
            survived.append(0)
        else:
            files = [place for _, place in tree.walk() if not tree.is_directory(place) and place not in damage]
            contents = [b"".join(data for _, data in tree.data(place)) for place in files]
            assert all(len({*content}) < 2 for content in contents)
            survived.append(sum(len(content) == 100 for content in contents))
        ram.bytes[start + page * 4096 : start + (page + 1) * 4096] = kept
    assert sum(count >= 500 for count in survived) >= len(survived) * 2 // 3, survived


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
