# SPDX-License-Identifier: GPL-2.0-or-later
"""Preserved trees that were made without a mount."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pkramfs.archive.view import SavedTree, open_tree
from pkramfs.fs.limits import Limits
from pkramfs.fs.picture import complete
from pkramfs.fs.recover import begin
from pkramfs.fs.sealing import preserve
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from tests.support.lab import Boots

Fill = Callable[[Tree], object]


class Trees(Boots):
    """A machine and the trees that are preserved in it."""

    def plant(self, name: str, fill: Fill, *, strict: bool = False, by_log: bool = False) -> None:
        """Preserve a tree that `fill` makes, as mount NAME would: whole, or by its log."""
        kernel = self.up()
        tree_id = new_tree_id()
        lock = kernel.machine.claim(tree_id)
        tree = Tree(kernel.ram, Frames(kernel.ram, kernel.leases, tree_id), Limits())
        if by_log:
            begin(tree, name.encode(), kernel.generation)
        fill(tree)
        tree.freeze()
        complete(preserve(tree, kernel.store, b"shmem-" + name.encode(), strict=strict))
        lock.release()

    def open(self, name: str) -> SavedTree:
        return open_tree(self.up().store, b"shmem-" + name.encode())

    def free(self, name: str) -> None:
        self.up().store.withdraw(b"shmem-" + name.encode())
        self.up().sweep()


def write(tree: Tree, path: bytes, data: bytes = b"", mode: int = 0o644) -> Any:
    """Make a file, and the directories that lead to it."""
    *folders, name = path.split(b"/")
    parent = tree.root
    for folder in folders:
        parent = tree.lookup(parent.ino, folder) or tree.mkdir(parent.ino, folder, 0o755)
    inode = tree.create(parent.ino, name, mode)
    if data:
        assert tree.write(inode.ino, 0, data) == len(data)
    return inode


@contextmanager
def outlived(trees: Trees, name: str, tree_id: int | None = None) -> Iterator[None]:
    """Have a daemon of this NAME seem to have died and left a tree: a new one, or that of a node."""
    chosen = new_tree_id() if tree_id is None else tree_id
    lock = trees.machine.claim(chosen)
    if tree_id is None:
        trees.up().leases.lease(chosen, 1)
    lock.write_entry({"name": name, "mountpoint": "/nowhere", "pid": 0, "journal": 5})
    lock.abandon()
    yield
    trees.machine.claim(chosen).release()
    trees.up().sweep()
