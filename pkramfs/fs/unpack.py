# SPDX-License-Identifier: GPL-2.0-or-later
"""Make a tree of the two objects of a node.

    read both ──▶ verify ──▶ (within limits?) ──▶ fill an empty tree: its root is awake, all else sleeps

Everything is read and checked, but inodes are made when they are looked up: see asleep. Nothing is adopted here; the
caller that continues the tree does that (restore, recover).

Kernel: mm/shmem_pkram.c (shmem_load_pkram), patches 23-24 and 36-41
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pkramfs.errors import ExhaustedError, FormatError
from pkramfs.fs.asleep import Asleep
from pkramfs.fs.ledger import Figures
from pkramfs.fs.limits import INLINE_TARGET, INODE_SPACE, Limits
from pkramfs.fs.sums import Sums
from pkramfs.fs.verify import exact_sum, verify
from pkramfs.pkram.treeformat import EXTENTS, HAS_SUMS, INODES, TreeStream
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree
    from pkramfs.pkram.store import Load
    from pkramfs.pkram.streams.runs import Runs


class Contents(NamedTuple):
    """The frames of an unpacked tree: those of the node itself, and those of all files."""

    metadata: Spans
    data: Spans


def unpack(load: Load, tree: Tree, allowed: Spans, *, deleted: bool = False) -> Contents:
    """Fill an empty tree from a node; raise FormatError unless its files' frames lie in `allowed`.

    With `deleted`, inodes without a name are allowed, as in checkpoints. Otherwise raise ExhaustedError for a
    tree that is larger than its limits, before anything is filled.
    """
    saved = _load(load)
    parts = TreeStream(saved.stream)
    verify(parts, saved.runs, allowed, saved.data, deleted=deleted)
    pages, space = _needs(parts)
    if not deleted:
        check_limits(tree.limits, pages, space)
    _fill(tree, parts, saved, pages, space)
    if tree.sums is not None and deleted:
        tree.sums.complete = False  # a log may follow
    return Contents(saved.metadata, saved.data)


class _Saved(NamedTuple):
    """The contents of a node: the byte stream, the runs of the page stream, their frames, and the node's own frames."""

    stream: memoryview
    runs: Runs
    data: Spans
    metadata: Spans


def _fill(tree: Tree, parts: TreeStream, saved: _Saved, pages: int, space: int) -> None:
    """Put a verified tree into an empty one: its root and inodes without a name are awake."""
    packed = Asleep(parts, saved.runs)
    packed.wake_root()
    packed.wake_deleted()
    kinds, sizes = parts.inodes["mode"] & np.uint32(0o170000), parts.inodes["size"]
    figures = Figures(
        pages=pages,
        inode_space=space,
        directories=int(np.count_nonzero(kinds == stat.S_IFDIR)),
        bytes=exact_sum(sizes[kinds == stat.S_IFREG]),
        runs=len(packed.pieces),
        stream_bytes=_weight(parts, len(saved.stream)),
    )
    tree.install(packed, parts.header.next_ino, figures)
    if parts.header.flags & HAS_SUMS:
        tree.sums = Sums(tree)
        tree.sums.adopt(parts.sums, parts.damaged, complete=not parts.header.unsummed)


def _load(load: Load) -> _Saved:
    """Read both objects of a node."""
    objects = list(load)
    if len(objects) != 2:
        raise FormatError("Node", "objects", found=len(objects), expected="2: a byte stream and a page stream")
    stream, runs = objects
    return _Saved(stream.load_bytes(), runs.load_runs(), runs.data, load.metadata())


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
