# SPDX-License-Identifier: GPL-2.0-or-later
"""Preserve a tree by its log, which takes the same few milliseconds whatever it holds, or write it whole.

    a log?  ──no──▶ whole: every inode and run is written (save)
      │yes
    seal    one page: where the log begins and ends, and the figures of the tree
    node    a page table of the tree's frames, the seal; published by one store

The log and the checkpoint with which it begins are in the tree's frames already, so only the seal has to be written.
The page table names every frame that the tree uses. If the frames are so scattered that the table would take long, it
names whole page blocks, including free frames.

A long log is quick to seal and slow to replay. So the tree is written whole afterwards (save), while programs can read
it. That node replaces the first one by one store, and the log begins with it.

While the node is published its daemon makes no checkpoint, and appends behind the seal only which files are open. The
first change withdraws the node by one store; checkpoint and log continue.

These are always written whole: a strict node (PKRAM's own way), a node of format 1 (which older releases can load), and
a tree with frames where a loaded kernel will be copied: these frames are relocated, and the log does not name the
copies.

Kernel: mm/shmem_pkram.c (shmem_save_pkram); fs/jbd2/journal.c (jbd2_journal_flush), which must write the journal back
"""

from __future__ import annotations

import time
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

from pkramfs.fs.checkpoint import figures
from pkramfs.fs.picture import Progress, complete
from pkramfs.fs.save import SaveReport, report, require_frozen, save
from pkramfs.fs.summing import tell
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree
    from pkramfs.pkram.store import Store

SCATTERED = 4096
"""Free runs in a tree's page blocks above which the page table has whole blocks."""
LONG = 4096
"""Requests in a log that take a restore longer than is worth saving: a tenth of a second."""


def preserve(
    tree: Tree,
    store: Store,
    node_name: bytes,
    *,
    whole: bool = False,
    strict: bool = False,
    banned: Spans | None = None,
) -> Generator[Progress, None, SaveReport]:
    """Preserve a frozen tree as node `node_name`, by its log if it has one; `whole` and `strict` write all of it."""
    began = time.monotonic()
    frames = None if whole or strict else frames_to_name(tree, banned or Spans())
    if frames is None:
        return (yield from save(tree, store, node_name, strict=strict, banned=banned))
    yield Progress("publish", 0, 1)
    _seal(tree, store, node_name, frames)
    assert tree.journal is not None
    return report(tree, began, tree.journal.log.size, tree.ledger.runs)


def is_long(tree: Tree) -> bool:
    """Return True if a tree is preserved and its log is long enough to be shortened."""
    return tree.preserved and tree.journal is not None and tree.journal.requests > LONG


def shorten(tree: Tree, store: Store, node_name: bytes, banned: Spans | None = None) -> Generator[Progress, None, None]:
    """Shorten the log of a tree that is preserved.

    If the log holds the tree, the tree is written whole, and the log begins with that node. If the log begins with the
    node already, it has only recorded open files since, and begins anew. A tree that is not frozen is frozen for this
    one step, during which no request is answered.
    """
    if not tree.frozen:
        tree.freeze()
        try:
            complete(shorten(tree, store, node_name, banned))
        finally:
            tree.thaw()
        return
    node, journal = store.find(node_name), tree.journal
    if node is None or journal is None:
        return
    if node.log_pfn:
        yield from save(tree, store, node_name, banned=banned, instead=True)
    elif journal.log.base.node == node.pfn:
        journal.trim()


def frames_to_name(tree: Tree, banned: Spans) -> Spans | None:
    """Return the frames for the page table; None if there is no log, or some frames have to be relocated."""
    if tree.journal is None:
        return None
    frames = tree.frames
    blocks = frames.leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES)
    used = blocks if frames.free_runs > SCATTERED else frames.used()
    return None if used & banned else used


def _seal(tree: Tree, store: Store, node_name: bytes, frames: Spans) -> None:
    """Seal the log and publish the node."""
    journal = tree.journal
    assert journal is not None
    require_frozen(tree)
    if tree.sums is not None:
        tell(tree, tree.sums)
    tree.tell()
    tree.commit()
    with store.prepare_save(node_name, tree_id=tree.frames.tree_id, frames=tree.frames) as saving:
        (pfn,) = saving.pages(1)
        journal.log.seal(pfn, figures(tree), None if tree.sums is None else tree.sums.lacking)
        saving.log(pfn, frames)
        saving.finish()
    tree.preservation.preserve(partial(store.withdraw, node_name), saving.taken)
