# SPDX-License-Identifier: GPL-2.0-or-later
"""Read the tree that a node holds, in whichever form it was preserved, without taking it over.

    two objects        as they are
    a log              a tree is made of checkpoint and log in this process, and written as two objects

So code that lists, copies or exports nodes has one form to understand: the byte stream and the page stream of
pkram/treeformat. Nothing is adopted, claimed or changed, and files are not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pkramfs.fs.limits import Limits
from pkramfs.fs.picture import complete, take
from pkramfs.fs.recover import Rebuilt, rebuild_sealed, rebuild_sound
from pkramfs.fs.save import stream
from pkramfs.fs.sums import Sums
from pkramfs.fs.tree import Tree
from pkramfs.fs.unpack import unpack
from pkramfs.journal.layout import read_seal
from pkramfs.machine.frames import Frames
from pkramfs.spans import Spans

if TYPE_CHECKING:
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.node import Node
    from pkramfs.pkram.store import Load, Store
    from pkramfs.pkram.streams.runs import Runs


class NoFrames(Frames):
    """An allocator without frames, for a tree that is only read."""

    def __init__(self, ram: Ram, tree_id: int) -> None:
        self.ram, self.tree_id, self.policy = ram, tree_id, None


def objects(store: Store, load: Load) -> list[tuple[bytes, Runs]]:
    """Return the byte stream and the page stream of each object; those of a tree, if a log holds it."""
    if not load.node.log_pfn:
        return [(bytes(reader.read()), reader.load_runs()) for reader in load]
    return _as_objects(_with_sums(read_log(store, load.node, load.frames).tree, load.node), load.node)


def _as_objects(tree: Tree, node: Node) -> list[tuple[bytes, Runs]]:
    picture = complete(take(tree))
    description = b"".join(stream(tree, picture, saved_ns=node.created_ns))
    index, pfn, count = picture.page_stream()
    return [(description, (index[:0], pfn[:0], count[:0])), (b"", (index, pfn, count))]


class Sound(NamedTuple):
    """The readable part of a damaged log: its tree as two objects, the faults, and the log's own frames.

    Files with such frames were deleted in the missing part.
    """

    objects: list[tuple[bytes, Runs]]
    wrong: str
    log: Spans


def sound_part(store: Store, node: Node, allowed: Spans) -> Sound:
    """Read the log of a node as far as it is sound."""
    tree = Tree(store.ram, NoFrames(store.ram, node.tree_id), Limits())
    rebuilt, wrong = complete(rebuild_sound(store, node, tree, allowed))
    seal = Spans([(node.pfn, node.pfn + 1), (node.log_pfn, node.log_pfn + 1)])
    return Sound(_as_objects(tree, node), wrong, rebuilt.log.pages() | seal)


def read_tree(store: Store, node: Node) -> Tree:
    """Make the tree that a node holds and no process serves; raise FormatError if anything about it is wrong."""
    with store.open_unlisted(node.pfn, store.pages_of(node)) as load:
        if node.log_pfn:
            return _with_sums(read_log(store, node, load.frames).tree, node)
        tree = Tree(store.ram, NoFrames(store.ram, node.tree_id), Limits())
        unpack(load, tree, load.frames, deleted=True)
        return tree


def _with_sums(tree: Tree, node: Node) -> Tree:
    """Give a tree of a log the number of pieces without a checksum, which the log does not record."""
    unsummed = read_seal(tree.ram, node.log_pfn, node.tree_id).unsummed
    if unsummed is not None:
        tree.sums = tree.sums or Sums(tree)
        tree.sums.table.pending = unsummed
    return tree


def read_log(store: Store, node: Node, allowed: Spans) -> Rebuilt:
    """Make the tree that the log of a node holds; FormatError if anything about it is wrong."""
    tree = Tree(store.ram, NoFrames(store.ram, node.tree_id), Limits())
    return complete(rebuild_sealed(store, node, tree, allowed))
