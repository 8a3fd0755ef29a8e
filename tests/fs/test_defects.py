# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong or unguarded in the original where tmpfs meets PKRAM, by number: it cannot happen here."""

import contextlib
import errno

import pytest

from pkramfs.errors import FormatError
from pkramfs.fs.limits import Limits
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.pkram import superblock
from pkramfs.pkram.check import check
from pkramfs.pkram.store import Store
from pkramfs.pkram.treeformat import TreeStream
from pkramfs.spans import Spans

NAME, SUPER_PFN, TREE_ID = b"shmem-x", 9, 0xABCDEF


class Kernel:
    """A tree over real frames and a real store."""

    def __init__(self, ram) -> None:
        self.ram = ram
        superblock.create(ram, SUPER_PFN, generation=1)
        self.store = Store(ram, SUPER_PFN, contextlib.nullcontext)
        self.leases = Leases(ram, 1, ram.pages // 512, contextlib.nullcontext)
        self.leases.ids[0] = KERNEL
        self.frames = Frames(ram, self.leases, TREE_ID)
        self.tree = Tree(ram, self.frames, Limits())

    def preserve(self, sh, **words) -> None:
        self.tree.freeze()
        sh.exhaust(save(self.tree, self.store, NAME, **words))

    def saved(self) -> bytes:
        """The pages that the node names, whoever uses them now."""
        with self.store.prepare_load(NAME) as load:
            _, pfn, count = list(load)[1].load_runs()
        return b"".join(bytes(self.ram.page(*run)) for run in zip(pfn.tolist(), count.tolist(), strict=True))

    def restored(self, sh) -> Tree:
        """What a mount of the name would show now."""
        frames = Frames(self.ram, self.leases, TREE_ID)
        return sh.exhaust(restore(self.store, NAME, self.ram, frames, Limits()))


@pytest.fixture
def kernel(ram):
    made = Kernel(ram)
    yield made
    assert check(ram, SUPER_PFN).problems == []


def test_d5_what_is_preserved_never_changes(kernel, sh) -> None:
    """In the original, writing after a preserve changes what was saved, in part."""
    tree = kernel.tree
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"before" * 5000)
    kernel.preserve(sh)
    with pytest.raises(OSError) as caught:
        tree.write(ino, 0, b"after")
    assert caught.value.errno == errno.EROFS
    assert sh.content(ino, kernel.restored(sh)) == b"before" * 5000
    tree.thaw()
    seen = []
    tree.preservation.on_withdrawn = lambda: seen.append(sh.content(ino, tree))
    tree.write(ino, 0, b"after")
    assert seen == [b"before" * 5000], "the node is gone before the first byte is another"
    assert kernel.store.nodes() == []


def test_d7_copies_of_moved_pages_are_never_stale(kernel, sh) -> None:
    """In the original the copy stays what it was while the file goes on."""
    tree = kernel.tree
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"old!" * 20_000)
    banned = Spans((pfn, pfn + count) for _, pfn, count in tree.inode(ino).pages)
    kernel.preserve(sh, banned=banned)
    node = kernel.store.find(NAME)
    assert node.relocated == banned.total > 0 and not kernel.store.pages_of(node) & banned
    assert kernel.saved()[:80_000] == b"old!" * 20_000
    tree.thaw()
    used = kernel.frames.used_pages
    tree.write(ino, 0, b"new!")
    assert kernel.frames.used_pages == used - node.pages, "metadata and copies are free again"
    kernel.preserve(sh, banned=banned)
    assert kernel.saved()[:80_000] == b"new!" + b"old!" * 19_999
    assert sh.content(ino, kernel.restored(sh))[:8] == b"new!old!"


def test_d17_a_tree_answers_while_it_is_saved(kernel, sh) -> None:
    """The original saves with the lock of tmpfs' statistics held, and sleeps meanwhile."""
    tree = kernel.tree
    ino = tree.create(1, b"f", 0o644).ino
    tree.write(ino, 0, b"data" * 3000)
    tree.freeze()
    steps, looks = save(tree, kernel.store, NAME), 0
    for _ in steps:
        assert tree.counts().files == 1 and tree.statfs() and sh.content(ino, tree) == b"data" * 3000
        looks += 1
    assert looks >= 4 and kernel.store.find(NAME) is not None


@pytest.mark.parametrize("name", [b"/abs", b"a/b", b".", b"..", b"nul\0", b"x" * 255])
def test_d34_names_are_not_believed(kernel, sh, name) -> None:
    """The original creates whatever file the byte stream names."""
    tree = kernel.tree
    tree.create(1, b"y" * len(name), 0o644)
    tree.freeze()
    picture = b"y" * len(name)
    saved = kernel.store.prepare_save

    def spoiled(*args, **words):
        """A store that writes another name into the stream, with checksums that fit."""
        saving = saved(*args, **words)
        begin = saving.object

        def spoil():
            writer = begin()
            write = writer.write
            writer.write = lambda data: write(bytes(data).replace(picture, name))
            return writer

        saving.object = spoil
        return saving

    kernel.store.prepare_save = spoiled
    sh.exhaust(save(tree, kernel.store, NAME))
    with kernel.store.prepare_load(NAME) as load:
        assert TreeStream(next(iter(load)).read()).names.startswith(name)
    if len(name) == 255:
        assert sh.exhaust(restore(kernel.store, NAME, kernel.ram, kernel.frames, Limits())).lookup(1, name)
    else:
        with pytest.raises(FormatError, match="name"):
            kernel.restored(sh)
    assert kernel.store.find(NAME) is not None
