# SPDX-License-Identifier: GPL-2.0-or-later
"""A dry run of preserving a tree: what prevents it, what would not be preserved, what would be copied.

    refused   files open for writing, lost data, files that pkram_strict does not preserve, no room for the description
    lost      open files without a name; with `lossy`, files that have lost data
    moved     files with pages where a loaded kernel will be copied; they are relocated, and that takes time

Nothing is frozen and nothing changes, so the result holds for this moment only. `seconds` is an estimate of the time
until the node is published, by the measurements of README. Before that the kernel writes back its dirty pages, whose
number only the kernel knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pkramfs.errors import PkramError
from pkramfs.fs.save import refuse_strict
from pkramfs.fs.sealing import frames_to_name
from pkramfs.units import PAGE_SIZE

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree
    from pkramfs.pkram.treeformat import Array
    from pkramfs.spans import Spans

_BASE, _PER_INODE, _PER_RUN, _PER_MOVED = 0.003, 1.0e-6, 0.4e-6, 1.5e-6
"""Seconds: of any, and if it is written whole for each inode, each run, each page that is copied."""
_ALL = 1 << 40
_FEW = 16
"""Pages that a node takes whose tree is in its log: its own, its page table, the seal."""


class Foresight(NamedTuple):
    """See the module's page. `refused` and `moved` have a path and a text for people."""

    refused: list[tuple[bytes, str]]
    lost: list[bytes]
    moved: list[tuple[bytes, int]]
    """Files, and how many of their pages would be copied."""
    files: int
    pages: int
    description: int
    """Bytes that the save writes besides."""
    seconds: float


def foresee(tree: Tree, banned: Spans, *, whole: bool = False, strict: bool = False, lossy: bool = False) -> Foresight:
    """Return the foresight of preserving the tree now; `whole` and `strict` as in sealing."""
    counts, ledger = tree.counts(), tree.ledger
    moved = list(_moved(tree, banned)) if banned else []
    copied = sum(pages for _, pages in moved)
    refused = [(path, "open for writing") for path in tree.writers(_ALL)]
    if not lossy:
        refused += [(path, _loss(tree, ino)) for ino, path in _losses(tree)]
    if strict:
        refused += _strict(tree)
    by_log = not whole and not strict and frames_to_name(tree, banned) is not None
    needed = _FEW if by_log else ledger.pages_needed() + copied
    if not tree.preserved and needed > tree.frames.room() + tree.frames.held_pages:
        refused.append((b"/", f"no room for the {needed:,} pages that saving it takes"))
    inodes = counts.files + counts.directories
    described = needed - copied
    return Foresight(
        refused=refused,
        lost=tree.deleted(_ALL) + [path for _, path in (_losses(tree) if lossy else ())],
        moved=[(tree.path(tree.inode(ino)), pages) for ino, pages in moved],
        files=counts.files - len(tree.orphans),
        pages=counts.pages,
        description=described * PAGE_SIZE,
        seconds=_BASE if by_log else _BASE + inodes * _PER_INODE + ledger.runs * _PER_RUN + copied * _PER_MOVED,
    )


def _losses(tree: Tree) -> Iterator[tuple[int, bytes]]:
    for ino in tree.losses.files:
        if tree.inodes[ino].nlink:
            yield ino, tree.path(tree.inodes[ino])


def _loss(tree: Tree, ino: int) -> str:
    return f"data written to it are lost ({os.strerror(tree.losses.files[ino].error)})"


def _strict(tree: Tree) -> list[tuple[bytes, str]]:
    try:
        refuse_strict(tree)
    except PkramError as error:
        return [(b"/", str(error))]
    return []


def _moved(tree: Tree, banned: Spans) -> Iterator[tuple[int, int]]:
    """Yield the inode numbers of files with banned pages, and how many they are."""
    awake = [inode for inode in tree.inodes.values() if inode.pages is not None and inode.nlink]
    raw = b"".join(chain.from_iterable(inode.pages.leaves for inode in awake if inode.pages is not None))
    runs = np.frombuffer(raw, dtype=np.int64).reshape(-1, 3)
    numbers = np.array([inode.ino for inode in awake], dtype=np.int64)
    owners = np.repeat(numbers, [inode.pages.runs for inode in awake if inode.pages is not None])
    yield from _overlaps(runs, owners, banned)
    if tree.asleep is not None:
        snapshot = tree.asleep.snapshot()
        packed, lengths = snapshot.packed, np.diff(snapshot.packed.edges)
        sleeping = np.repeat(snapshot.inodes, lengths)
        owners = np.repeat(packed.parts.inodes["ino"].astype(np.int64), lengths)
        yield from _overlaps(packed.pieces[sleeping], owners[sleeping], banned)


def _overlaps(runs: Array, owners: Array, banned: Spans) -> Iterator[tuple[int, int]]:
    """Yield each owner of runs (index, pfn, count) with banned pages, and how many they are."""
    pages = np.zeros(len(runs), dtype=np.int64)
    for start, end in banned:  # the segments of a kernel: a few
        low, high = np.maximum(runs[:, 1], start), np.minimum(runs[:, 1] + runs[:, 2], end)
        pages += np.maximum(high - low, 0)
    hit = pages > 0
    numbers, where = np.unique(owners[hit], return_inverse=True)
    counts = np.bincount(where, weights=pages[hit], minlength=len(numbers)).astype(np.int64)
    yield from zip(numbers.tolist(), counts.tolist(), strict=True)
