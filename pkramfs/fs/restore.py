# SPDX-License-Identifier: GPL-2.0-or-later
"""Make a tree from a node of preserved memory: all of it, or nothing and a reason.

    load ──▶ verify ──▶ within limits? ──▶ build the root ──▶ adopt the frames
    store    every       size=, nr_inodes=   all else sleeps     the first moment at which
             rule        with the figures                        anything is changed

All is read and checked, but inodes are made when somebody asks for them: see asleep. Before the last step
nothing has happened: whatever fails leaves the node as it was, published, to be tried again with other
options. After it the node stays too: the tree is *preserved* until its first change (see preservation). Inode
numbers, hard links, holes, times and places in listings are those of the tree that was saved.

Long work: a generator that yields Progress and returns the tree.

Kernel: mm/shmem_pkram.c (shmem_load_pkram), patches 23-24 and 36-41
"""

from __future__ import annotations

import stat
from collections.abc import Generator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pkramfs.errors import ExhaustedError, FormatError
from pkramfs.fs.asleep import Asleep
from pkramfs.fs.ledger import Figures
from pkramfs.fs.limits import INLINE_TARGET, INODE_SPACE, Limits
from pkramfs.fs.picture import Progress
from pkramfs.fs.tree import Tree
from pkramfs.fs.verify import verify
from pkramfs.pkram.treeformat import EXTENTS, INODES, TreeStream
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.store import Load, Store
    from pkramfs.pkram.streams.runs import Runs


def restore(
    store: Store, node_name: bytes, ram: Ram, frames: Frames, limits: Limits
) -> Generator[Progress, None, Tree]:
    """Restore the tree that node `node_name` holds; `frames` must have the node's tree id."""
    yield Progress("load", 0, 1)
    saved = _load(store.prepare_load(node_name))
    yield Progress("verify", 0, 1)
    parts = TreeStream(saved.stream)
    allowed = frames.leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES)
    verify(parts, saved.runs, allowed, saved.data)
    pages, space = _needs(parts)
    check_limits(limits, pages, space)
    yield Progress("inodes", 0, parts.header.inodes)
    tree = Tree(ram, frames, limits)
    _fill(tree, parts, saved, pages, space)
    yield Progress("adopt", 0, 1)
    frames.adopt(saved.data | saved.metadata)
    tree.preservation.restore(partial(store.withdraw, node_name), saved.metadata)
    return tree


def load_checkpoint(store: Store, node_pfn: int, tree: Tree, allowed: Spans) -> Spans:
    """Fill an empty tree with what an unlisted node holds, deleted inodes too; return the node's own frames.

    Nothing is adopted: the tree is brought up to date first.
    """
    saved = _load(store.open_unlisted(node_pfn, allowed))
    parts = TreeStream(saved.stream)
    verify(parts, saved.runs, allowed, saved.data, deleted=True)
    _fill(tree, parts, saved, *_needs(parts))
    return saved.metadata


class _Saved(NamedTuple):
    """What a node holds: the byte stream, the runs of the page stream, their frames, and those of the node itself."""

    stream: bytes
    runs: Runs
    data: Spans
    metadata: Spans


def _fill(tree: Tree, parts: TreeStream, saved: _Saved, pages: int, space: int) -> None:
    """Put a verified tree into an empty one: its root and what has no name are awake."""
    packed = Asleep(parts, saved.runs)
    packed.wake_root()
    packed.wake_deleted()
    kinds, sizes = parts.inodes["mode"] & np.uint32(0o170000), parts.inodes["size"]
    figures = Figures(
        pages=pages,
        inode_space=space,
        directories=int(np.count_nonzero(kinds == stat.S_IFDIR)),
        bytes=sum(sizes[kinds == stat.S_IFREG].tolist()),
        runs=len(packed.pieces),
        stream_bytes=_weight(parts, len(saved.stream)),
    )
    tree.install(packed, parts.header.next_ino, figures)


def _load(opened: AbstractContextManager[Load]) -> _Saved:
    """Read both objects of a node."""
    with opened as load:
        objects = iter(load)
        first, second = next(objects, None), None
        stream = b"" if first is None else bytes(first.read())
        second = next(objects, None)
        if second is None:
            raise FormatError("Node", "objects", found="fewer", expected="2: a byte stream and a page stream")
        runs, data = second.load_runs(), second.data
        if next(objects, None) is not None:
            raise FormatError("Node", "objects", found="more", expected="2: a byte stream and a page stream")
        metadata = load.metadata()
        load.finish()
    return _Saved(stream, runs, data, metadata)


def _needs(parts: TreeStream) -> tuple[int, int]:
    """Return the pages and inode space that the tree takes, counted as `limits` does."""
    kinds, size = parts.inodes["mode"] & np.uint32(0o170000), parts.inodes["size"]
    long_targets = int(((kinds == stat.S_IFLNK) & (size >= INLINE_TARGET)).sum())
    folders = kinds == stat.S_IFDIR
    further_links = int((np.maximum(parts.inodes["nlink"][~folders].astype(np.int64), 1) - 1).sum())
    space = (len(kinds) + further_links) * INODE_SPACE
    at = 0
    for names, values in zip(parts.xattrs["name_length"].tolist(), parts.xattrs["value_length"].tolist(), strict=True):
        if not parts.values.startswith(b"system.", at):
            space += 40 + names + values
        at += names + values
    return parts.header.pages + long_targets, space


def _weight(parts: TreeStream, length: int) -> int:
    """Return the bytes of the stream to be saved, without extents; an older kernel's stream lacks columns."""
    lacking = INODES.width - sum(column.dtype.itemsize for column in INODES.present(parts.header.flags))
    return length + lacking * int(parts.header.inodes) - EXTENTS.width * int(parts.header.extents)


def check_limits(limits: Limits, pages: int, space: int) -> None:
    """Refuse, with the figures, a tree that is larger than the mount allows."""
    if limits.max_pages and pages > limits.max_pages:
        size = pages * PAGE_SIZE
        raise ExhaustedError(
            f"the preserved tree holds {format_size(size)} ({size} bytes), but size= allows "
            f"{limits.max_pages * PAGE_SIZE} bytes; nothing is lost: mount with a larger size="
        )
    used = -(-space // INODE_SPACE)
    if limits.max_inodes and used > limits.max_inodes:
        raise ExhaustedError(
            f"the preserved tree has {used} inodes (further links and xattrs count), but nr_inodes= allows "
            f"{limits.max_inodes}; nothing is lost: mount with a larger nr_inodes="
        )
