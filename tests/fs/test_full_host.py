# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that somebody else has filled: an access to a file ends with the right bytes or an error, never a SIGBUS."""

import contextlib
import errno
import os

import pytest

from pkramfs.fs.limits import Limits
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE
from pkramfs.units import PAGE_SIZE as PAGE

TREE, SUPER_PFN, MIB2 = 0xABCDEF, 9, BLOCK_SIZE


@pytest.fixture
def ram(host, monkeypatch):
    """RAM of 256 MiB on 64: nobody keeps a reserve here, so that the last page can be reached."""
    made = Ram(os.path.join(host.directory, "ram"), 128 * BLOCK_SIZE, create=True)
    monkeypatch.setattr(Ram, "check_room", lambda *_args, **_words: None)
    superblock.create(made, SUPER_PFN, generation=7)
    yield made
    made.close()


@pytest.fixture
def leases(ram):
    made = Leases(ram, 1, 128, contextlib.nullcontext)
    made.ids[0] = KERNEL
    return made


@pytest.fixture
def store(ram):
    return Store(ram, SUPER_PFN, contextlib.nullcontext)


@pytest.fixture
def tree(ram, leases):
    return Tree(ram, Frames(ram, leases, TREE), Limits())


@pytest.fixture
def again(ram, leases, store):
    """Restores the tree of a node."""

    def finish() -> Tree:
        work = restore(store, b"node", ram, Frames(ram, leases, TREE), Limits())
        while True:
            try:
                next(work)
            except StopIteration as done:
                return done.value

    return finish


def make(tree, name=b"f", data=b""):
    ino = tree.create(1, name, 0o644).ino
    if data:
        assert tree.write(ino, 0, data) == len(data)
    return ino


def refused(code=errno.ENOSPC):
    return pytest.raises(OSError, check=lambda error: error.errno == code)


def text(pages, seed=1):
    return b"".join(bytes([seed + page % 200]) * PAGE for page in range(pages))


def preserve(tree, store):
    tree.freeze()
    for _ in save(tree, store, b"node"):
        pass
    tree.thaw()


@pytest.mark.parametrize("size", [1, PAGE, 100 * PAGE])
def test_what_was_allocated_can_be_written(host, tree, size):
    ino = make(tree)
    tree.allocate(ino, 0, 8 << 20)
    host.fill()
    assert tree.write(ino, 3 * PAGE, b"x" * size) == size
    assert bytes(tree.read(ino, 2 * PAGE, PAGE + size)) == bytes(PAGE) + b"x" * size
    assert bytes(tree.read(ino, 4 << 20, 4 << 20)) == bytes(4 << 20)


@pytest.mark.parametrize("keep_size", [True, False])
def test_what_cannot_be_backed_is_not_allocated(host, tree, keep_size):
    ino = make(tree, data=b"data")
    host.fill(leave=1 << 20)
    with refused():
        tree.allocate(ino, 0, 8 << 20, keep_size=keep_size)
    assert (tree.inode(ino).size, tree.limits.pages, tree.frames.used_pages) == (4, 1, 1)
    tree.allocate(ino, 0, 64 << 10, keep_size=keep_size)
    assert tree.limits.pages == 16


def test_a_mixed_file_is_read(host, tree):
    """Written, allocated, a hole, written: in one answer."""
    ino = make(tree, data=text(2))
    tree.allocate(ino, 2 * PAGE, 2 * PAGE)
    assert tree.write(ino, 6 * PAGE, b"end") == 3
    host.fill()
    assert bytes(tree.read(ino, 0, 7 * PAGE)) == text(2) + bytes(4 * PAGE) + b"end"
    tree.setattr(ino, size=2 * PAGE + 5)
    tree.setattr(ino, size=4 * PAGE)
    assert bytes(tree.read(ino, 0, 4 * PAGE)) == text(2) + bytes(2 * PAGE)


def test_a_huge_page_is_there_whole(host, tree):
    tree.huge = "always"
    ino = make(tree, data=b"begin")
    host.fill()
    assert tree.limits.pages == BLOCK_PAGES
    for offset in (MIB2 // 2, MIB2 - PAGE):
        assert tree.write(ino, offset, text(1, 7)) == PAGE
    assert bytes(tree.read(ino, 0, MIB2)) == b"begin" + bytes(MIB2 // 2 - 5) + text(1, 7) + bytes(
        MIB2 // 2 - 2 * PAGE
    ) + text(1, 7)


def test_where_no_huge_page_is_to_be_had_small_ones_do(host, tree):
    tree.huge = "always"
    ino = make(tree)
    host.fill(leave=64 << 10)
    assert tree.write(ino, 0, text(4)) == 4 * PAGE
    assert tree.limits.pages == 4 and bytes(tree.read(ino, 0, 5 * PAGE)) == text(4)


@pytest.mark.parametrize("offset", [0, 10 * PAGE])
def test_a_write_into_holes_leaves_holes(host, tree, offset):
    """In the midst of a file, too: of what there was not memory enough for nothing is left."""
    ino = make(tree)
    tree.setattr(ino, size=64 * PAGE)
    host.fill(leave=8 * PAGE)
    with refused():
        tree.write(ino, offset, text(40))
    assert tree.limits.pages == tree.frames.used_pages == 0
    assert bytes(tree.read(ino, 0, 64 * PAGE)) == bytes(64 * PAGE)
    assert tree.write(ino, offset, text(4)) == 4 * PAGE
    assert bytes(tree.read(ino, offset, 5 * PAGE)) == text(4) + bytes(PAGE)
    host.empty()
    assert tree.write(ino, 0, text(64)) == 64 * PAGE
    assert bytes(tree.read(ino, 0, 64 * PAGE)) == text(64)


def test_a_write_over_data_and_holes_is_all_or_nothing_behind_the_end(host, tree):
    ino = make(tree, data=b"h" * 100)
    host.fill()
    with refused():
        tree.write(ino, 100 + PAGE, text(8))
    written = tree.write(ino, 100, text(8))
    assert written == PAGE - 100 and tree.inode(ino).size == PAGE
    assert tree.limits.pages == 1
    tree.setattr(ino, size=3 * PAGE)
    assert bytes(tree.read(ino, 0, 3 * PAGE)) == b"h" * 100 + text(8)[: PAGE - 100] + bytes(2 * PAGE)


def test_a_failed_write_takes_no_allocated_page_with_it(host, tree):
    ino = make(tree)
    tree.allocate(ino, 16 * PAGE, 4 * PAGE, keep_size=True)
    host.fill()
    with refused():
        tree.write(ino, 0, text(8))
    assert tree.limits.pages == 4
    assert tree.write(ino, 16 * PAGE, text(4)) == 4 * PAGE


def test_of_a_restored_file_zeros_may_be_holes(host, ram, tree, store, again):
    """A copy of RAM made sparse: pages of zeros are none any more."""
    ino = make(tree, data=text(3) + bytes(3 * PAGE) + text(3))
    pfn = tree.inode(ino).pages.between(3, 4)[0][1]
    preserve(tree, store)
    ram.punch(Spans([(pfn, pfn + 3)]))
    copy = again()
    host.fill()
    assert bytes(copy.read(ino, 0, 9 * PAGE)) == text(3) + bytes(3 * PAGE) + text(3)
    assert bytes(copy.read(ino, 4 * PAGE + 5, 7)) == bytes(7)
    with refused():
        copy.write(ino, 4 * PAGE, b"x")
    assert copy.write(ino, PAGE, b"over") == 4
    copy.setattr(ino, size=4 * PAGE + 10)
    host.fill()
    with refused():
        copy.allocate(ino, 3 * PAGE, PAGE)
    host.empty()
    assert copy.write(ino, 4 * PAGE + 5, b"then") == 4
    assert bytes(copy.read(ino, 3 * PAGE, 2 * PAGE)) == bytes(PAGE + 5) + b"then" + bytes(1)


def test_a_save_ends_with_an_error(host, tree, store):
    """Whatever was missing: the tree goes on, and is saved when there is room."""
    inos = [make(tree, b"%d" % number, b"text") for number in range(3000)]
    tree.hold_for_save()
    for left in (0, 2, 8, 40, 80):
        host.fill(leave=left * PAGE)
        with refused(errno.ENOMEM):
            preserve(tree, store)
        tree.thaw()
        assert store.nodes() == [] and bytes(tree.read(inos[9], 0, 4)) == b"text"
        assert tree.frames.used_pages == 3000
        host.empty()
    preserve(tree, store)
    assert [node.name for node in store.nodes()] == [b"node"]


def test_a_save_that_moves_pages_ends_with_an_error(host, ram, tree, store, again):
    """And what the host has no memory for is moved as the zeros that it is."""
    ino = make(tree, data=text(40))
    scattered = [make(tree, b"%d" % number, b"x") for number in range(40)]
    pfn = tree.inode(ino).pages.between(0, 1)[0][1]
    low = pfn // BLOCK_PAGES * BLOCK_PAGES
    banned = Spans([(low, low + BLOCK_PAGES)])
    tree.freeze()
    host.fill()
    with refused(errno.ENOMEM):
        list(save(tree, store, b"node", banned=banned))
    host.empty()
    alone = tree.inode(scattered[7]).pages.between(0, 1)[0][1]
    ram.punch(Spans([(pfn + 1, pfn + 3), (alone, alone + 1)]))
    list(save(tree, store, b"node", banned=banned))
    copy = again()
    assert bytes(copy.read(ino, 0, 40 * PAGE)) == text(40)[:PAGE] + bytes(2 * PAGE) + text(40)[3 * PAGE :]
    assert [bytes(copy.read(number, 0, 1)) for number in scattered[6:9]] == [b"x", b"\0", b"x"]
