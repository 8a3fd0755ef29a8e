# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the tree of a daemon that has died: its checkpoint, and what it did since.

    live page ──▶ checkpoint ──▶ replay ──▶ verify ──▶ within limits? ──▶ adopt the frames, go on with the log
                  a node, or     every      every       size=,
                  nothing        record     rule        nr_inodes=

Before the last step nothing has been changed: whatever fails leaves log and frames as they were, to be tried again.

Checkpoints are made the same way: another process recovers the tree from the last one, and saves it as a node that no
list names (`checkpoint`). So each checkpoint is a rehearsal of recovery.

Kernel: fs/jbd2/recovery.c (jbd2_journal_recover)
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.errors import ExhaustedError
from pkramfs.fs.journal import Journal
from pkramfs.fs.picture import Picture, Progress, take
from pkramfs.fs.replay import Replay
from pkramfs.fs.restore import check_limits, load_checkpoint
from pkramfs.fs.save import stream
from pkramfs.fs.tree import Tree
from pkramfs.fs.verify import verify
from pkramfs.journal.log import Log
from pkramfs.journal.reader import Opened, chunks, open_log
from pkramfs.pkram.treeformat import TreeStream
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.fs.limits import Limits
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.store import Store


class Rebuilt(NamedTuple):
    """A tree made from a log, which nothing was adopted for yet."""

    tree: Tree
    log: Opened
    metadata: Spans
    """Frames of the checkpoint itself."""
    data: Spans
    """Frames of all files, deleted ones too."""
    replay: Replay


def rebuild(
    store: Store, live: int, ram: Ram, frames: Frames, limits: Limits, position: int | None = None
) -> Generator[Progress, None, Rebuilt]:
    """Make the tree that a log describes, as it was at `position`, by default the tail; change nothing."""
    yield Progress("load", 0, 1)
    allowed = frames.leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES)
    log = open_log(ram, live, allowed)
    tree, metadata = Tree(ram, frames, limits), Spans()
    if log.base.node:
        metadata = load_checkpoint(store, log.base.node, tree, allowed)
    yield Progress("replay", 0, 1)
    replay = Replay(tree, log.live.zeroed)
    replay.run(chunks(ram, log, position))
    yield Progress("verify", 0, 1)
    picture = yield from take(tree, deleted=True)
    data = _verified(tree, picture, allowed)
    replay.finish()
    return Rebuilt(tree, log, metadata, data, replay)


def _verified(tree: Tree, picture: Picture, allowed: Spans) -> Spans:
    """Raise FormatError unless all rules hold; return the frames of all files."""
    parts = TreeStream(b"".join(stream(tree, picture)))
    pfn, count = picture.runs[:, 1].astype("u8"), picture.runs[:, 2].astype("u8")
    index = count.cumsum() - count
    verify(parts, (index, pfn, count), allowed, deleted=True)
    return Spans.from_runs(pfn, count)


def recover(
    store: Store, live: int, ram: Ram, frames: Frames, limits: Limits, generation: int, taken: bytes | None = None
) -> Generator[Progress, None, Tree]:
    """Recover the tree of a log and go on with both.

    Who has taken over a mount says so by the name of the tree's node, which may hold it still. Otherwise nobody has
    anything open, and what has no name goes.
    """
    rebuilt = yield from rebuild(store, live, ram, frames, limits)
    tree, log = rebuilt.tree, rebuilt.log
    check_limits(limits, tree.limits.pages, tree.limits.inode_space)
    yield Progress("adopt", 0, 1)
    resumed = Log.resume(ram, frames, live, generation, log.live.base, log.base, log.segments, log.live.tail)
    node = store.find(taken) if taken is not None else None
    kept = Spans() if node is None else store.pages_of(node) - rebuilt.data
    frames.adopt(rebuilt.data | rebuilt.metadata | kept | log.pages())
    rebuilt.replay.clear()
    with contextlib.suppress(OSError):  # it is gone
        tree.clear_behind(tree.inode(log.live.growing), log.live.grown)
    resumed.note_zeroed()  # before anything else is written there
    tree.journal = Journal(tree, resumed, rebuilt.metadata)
    tree.journal.resume(rebuilt.replay.requests, rebuilt.replay.done)
    if node is not None:
        tree.preservation.restore(partial(store.withdraw, node.name), kept)
    for inode in tree.inodes.values():
        if inode.opens:
            tree.journal.opened(inode)
    if taken is None:
        with contextlib.suppress(ExhaustedError):
            resumed.write([])  # another connection begins
            resumed.commit()
        _close_all(tree)
    return tree


def _close_all(tree: Tree) -> None:
    """Close what the dead had open, and free what has no name."""
    tree.writing.clear()
    for inode in [inode for inode in tree.inodes.values() if inode.opens or not inode.nlink]:
        tree.close_all(inode)
    tree.commit()


def begin(tree: Tree, name: bytes, generation: int, node: int = 0) -> None:
    """Begin the journal of a tree: one that was restored from `node`, or a new one, which is empty."""
    tree.journal = Journal(tree, Log.create(tree.ram, tree.frames, name, generation, node))
    if not node:
        tree.journal.touch(tree.root)
    tree.commit()
