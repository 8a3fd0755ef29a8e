# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the tree of a daemon that has died, from its checkpoint and its log.

    live page ──▶ checkpoint ──▶ replay ──▶ verify ──▶ within limits? ──▶ adopt the frames, go on with the log
                  a node, or     every      what it     size=,
                  nothing;       record     may have    nr_inodes=
                  every rule                changed

Nothing is changed before the last step: a failure leaves log and frames as they were, to be tried again.

Checkpoints are made the same way: another process recovers the tree from the last one, and saves it as a node that no
list names (`checkpoint`). So each checkpoint is a rehearsal of recovery.

Kernel: fs/jbd2/recovery.c (jbd2_journal_recover)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.errors import ExhaustedError, FormatError
from pkramfs.fs.checkpoint import figures
from pkramfs.fs.journal import Journal
from pkramfs.fs.picture import Progress
from pkramfs.fs.recheck import frames_of_all, recheck
from pkramfs.fs.replay import Replay
from pkramfs.fs.tree import Tree
from pkramfs.fs.unpack import Contents, check_limits, unpack
from pkramfs.journal.log import Log
from pkramfs.journal.reader import Chunk, Opened, chunks, open_log, open_sealed
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.fs.limits import Limits
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.node import Node
    from pkramfs.pkram.store import Store


class Rebuilt(NamedTuple):
    """A tree made from a log; no frames were adopted yet."""

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
    allowed = frames.leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES)
    log = open_log(ram, live, allowed)
    return (yield from _rebuild(store, log, Tree(ram, frames, limits), allowed, position))


def rebuild_sealed(store: Store, node: Node, tree: Tree, allowed: Spans) -> Generator[Progress, None, Rebuilt]:
    """Fill an empty tree from the log of a node, up to its seal; change nothing else."""
    log = open_sealed(store.ram, node.log_pfn, node.tree_id, node.generation, allowed)
    rebuilt = yield from _rebuild(store, log, tree, allowed)
    if (found := figures(rebuilt.tree).stored()) != log.figures:
        raise FormatError("Seal", "figures", pfn=node.log_pfn, found=log.figures, expected=f"{found}, as the log says")
    return rebuilt


def rebuild_sound(
    store: Store, node: Node, tree: Tree, allowed: Spans
) -> Generator[Progress, None, tuple[Rebuilt, str]]:
    """Fill an empty tree from the log of a node, up to the first damage; return the fault."""
    log, wrong = open_sealed(store.ram, node.log_pfn, node.tree_id, node.generation, allowed), list[str]()
    rebuilt = yield from _rebuild(store, log, tree, allowed, sound=wrong)
    return rebuilt, " ".join(wrong)


def _sound(read: Iterator[Chunk], wrong: list[str]) -> Iterator[Chunk]:
    """Yield the chunks of whole requests before the first that cannot be read; note its fault."""
    request = list[Chunk]()
    try:
        for chunk in read:
            request.append(chunk)
            _, _, last, _ = chunk
            if last:
                yield from request
                request.clear()
    except FormatError as error:
        wrong.append(str(error))


def _rebuild(
    store: Store,
    log: Opened,
    tree: Tree,
    allowed: Spans,
    position: int | None = None,
    *,
    sound: list[str] | None = None,
) -> Generator[Progress, None, Rebuilt]:
    """Fill an empty tree. With `sound` the log counts up to where it is damaged, which is told there."""
    yield Progress("load", 0, 1)
    found = Contents(Spans(), Spans())
    if log.base.node:
        with store.open_unlisted(log.base.node, allowed) as load:
            # Files deleted since may have had frames that other files use now: the result is checked.
            found = unpack(load, tree, Spans([(1, store.ram.pages)]), deleted=True)
    yield Progress("replay", 0, 1)
    replay = Replay(tree, log.live.zeroed)
    read = chunks(store.ram, log, position)
    replay.run(read if sound is None else _sound(read, sound))
    data = found.data
    if replay.records:  # otherwise the frames were verified when the checkpoint was unpacked
        yield Progress("verify", 0, 1)
        recheck(tree)
        data = frames_of_all(tree, replay.touched, data)
    if outside := data - allowed:
        pfn = int(outside.starts[0])
        raise FormatError("Tree pages", "pfn", found=f"{pfn:x}", expected="a frame in this tree's page blocks")
    replay.finish()
    return Rebuilt(tree, log, found.metadata, data, replay)


def recover(
    store: Store, live: int, ram: Ram, frames: Frames, limits: Limits, generation: int, taken: bytes | None = None,
    rebuilt: Rebuilt | None = None,
) -> Generator[Progress, None, Tree]:  # fmt: skip
    """Recover the tree of a log, if it is not `rebuilt` already, and continue both.

    A caller that has taken over a mount passes the name of the tree's node, which may still hold the tree. Without it
    no file is open, and inodes without a name are freed.
    """
    if rebuilt is None:
        rebuilt = yield from rebuild(store, live, ram, frames, limits)
    node = store.find(taken) if taken is not None else None
    own = Spans() if node is None else store.own_pages(node)
    log = rebuilt.log
    resumed = partial(Log.resume, ram, frames, live, generation, log.live.base, log.base, log.segments, log.live.tail)
    tree = yield from go_on(rebuilt, resumed, own)
    if node is not None:
        tree.preservation.restore(partial(store.withdraw, node.name), own)
    if taken is None:
        close_all(tree)
    return tree


def go_on(rebuilt: Rebuilt, resume: Callable[[], Log], kept: Spans) -> Generator[Progress, None, Tree]:
    """Adopt all frames, and `kept`, for a tree that was rebuilt, if it is not too large; go on with its log."""
    tree, log = rebuilt.tree, rebuilt.log
    check_limits(tree.limits, tree.limits.pages, tree.limits.inode_space)
    yield Progress("adopt", 0, 1)
    resumed = resume()
    tree.frames.adopt(rebuilt.data | rebuilt.metadata | kept | log.pages())
    rebuilt.replay.clear()
    with contextlib.suppress(OSError):  # it is gone
        tree.clear_behind(tree.inode(log.live.growing), log.live.grown)
    resumed.note_zeroed()  # before other data are written there
    tree.journal = Journal(tree, resumed, rebuilt.metadata)
    tree.journal.resume(rebuilt.replay.requests, rebuilt.replay.done)
    for inode in tree.inodes.values():
        if inode.opens:
            tree.journal.opened(inode)
    return tree


def close_all(tree: Tree) -> None:
    """Begin another connection: close the files of the dead daemon, and free inodes without a name."""
    assert tree.journal is not None
    with contextlib.suppress(ExhaustedError):
        tree.journal.log.write([])
        tree.journal.log.commit()
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
