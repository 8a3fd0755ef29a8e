# SPDX-License-Identifier: GPL-2.0-or-later
"""Write a frozen tree into a node of preserved memory.

    tree ──▶ object 0: byte stream   all inodes, names, xattrs, holes, as columns (pkram/treeformat)
         ──▶ object 1: page stream   all files' frames in one index space, without gaps

Pages are not copied; the node names them. Runs of frames that continue each other, also from one file to
the next, become one run. So the cost is proportional to inodes and runs, not to bytes. The node
appears when it is complete, by one store, or never: a failure before that discards it.

Every kind of inode is kept, FIFOs and sockets as names; files that are deleted but still open are
not, and the report names them. `strict` refuses inodes that PKRAM itself refuses, and writes an entry for each
page, or for each huge page where the mount's huge= asks for them: the two columns of the announcement.

Long work: a generator that yields Progress and returns the report; the tree must stay frozen.

Kernel: mm/shmem_pkram.c (shmem_save_pkram), patches 24 and 38
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pkramfs.errors import ExhaustedError, PkramError
from pkramfs.fs.picture import Picture, Progress, take
from pkramfs.fs.tree import Tree
from pkramfs.pkram import treeformat
from pkramfs.pkram.treeformat import BLOBS, TREE, Array
from pkramfs.spans import Spans
from pkramfs.text import exact
from pkramfs.units import BLOCK_ORDER, BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.pkram.node import Node
    from pkramfs.pkram.store import Store
    from pkramfs.pkram.streams.writer import ObjectWriter


_SLICE = 1 << 20
"""Runs that are joined and saved at once: columns of 8 MiB, and work enough for all CPUs."""


class SaveReport(NamedTuple):
    """The result of a save. `deleted` has the paths of the first few open files without a name, which were left out."""

    files: int
    directories: int
    pages: int
    bytes: int
    stream_bytes: int
    runs: int
    moved: int
    """Pages that were relocated, by the name that JSON has for them."""
    deleted: list[str]
    seconds: float
    deleted_count: int = 0
    unsummed: int | None = None
    """Pieces of files without a checksum; None where nobody makes any."""
    damaged: int = 0
    """Pieces of files that are damaged."""


def save(
    tree: Tree,
    store: Store,
    node_name: bytes,
    *,
    strict: bool = False,
    banned: Spans | None = None,
    instead: bool = False,
) -> Generator[Progress, None, SaveReport]:
    """Save a frozen tree as node `node_name` and publish it; the tree is preserved from then on.

    With `instead` the tree is preserved already, and the new node replaces the old one by one store.
    """
    require_frozen(tree)
    if strict:
        refuse_strict(tree)
    began = time.monotonic()
    picture = yield from take(tree)
    with store.prepare_save(
        node_name,
        tree_id=tree.frames.tree_id,
        frames=tree.frames,
        banned=banned or Spans(),
        strict=strict,
        instead=instead,
    ) as saving:
        stream_bytes = 0
        with saving.object() as writer:
            for part in stream(tree, picture):
                writer.write(part)
                stream_bytes += len(part)
        yield Progress("pages", 0, len(picture.runs))
        with saving.object() as writer:
            if strict and tree.huge in ("always", "within_size"):
                runs = _save_huge(writer, picture.runs)
            else:
                runs = save_runs(writer, picture.runs)
        yield Progress("publish", 0, 1)
        node = saving.finish()
        moved = sum(count for _, count in saving.relocated)
    tree.preservation.preserve(partial(store.withdraw, node_name), saving.taken)
    _begin_with(tree, node, moved)
    return report(tree, began, stream_bytes, runs)._replace(
        pages=int(picture.runs[:, 2].sum()),
        moved=moved,
        unsummed=picture.unsummed,
        damaged=len(picture.columns["damaged"]["ino"]),
    )


def report(tree: Tree, began: float, described: int, runs: int) -> SaveReport:
    """Return the report on a finished save that began at a time; `described` are the bytes besides the files'."""
    counts = tree.counts()
    return SaveReport(
        files=counts.files - len(tree.orphans),
        directories=counts.directories,
        pages=counts.pages,
        bytes=counts.bytes,
        stream_bytes=described,
        runs=runs,
        moved=0,
        deleted=[exact(path) for path in tree.deleted()],
        seconds=time.monotonic() - began,
        deleted_count=tree.deleted_count,
        unsummed=None if tree.sums is None else tree.sums.lacking,
        damaged=0 if tree.sums is None else len(tree.sums.damaged),
    )


def require_frozen(tree: Tree) -> None:
    """Raise PkramError (EBUSY) unless the tree refuses changes."""
    if not tree.frozen:
        raise PkramError("a tree must be frozen while it is saved", errno.EBUSY)


def _begin_with(tree: Tree, node: Node, moved: int) -> None:
    """Begin the tree's log with the node, if that is complete: without relocated copies and deleted files."""
    if tree.journal is None or moved or tree.orphans:
        return
    with contextlib.suppress(ExhaustedError):  # the log keeps its beginning
        tree.journal.rebase(node.pfn, Spans())
        if tree.sums is not None:
            tree.sums.table.tell(slice(None), tree.sums.table.untold)


def refuse_strict(tree: Tree) -> None:
    """Raise PkramError (EINVAL) for an inode that PKRAM itself does not preserve."""
    for name, inode, _ in tree.readdir(tree.root.ino, 2):
        path = exact(b"/" + name)
        if not inode.is_file:
            raise PkramError(f"{path} is not a regular file, and pkram_strict preserves nothing else", errno.EINVAL)
        if inode.nlink != 1:
            raise PkramError(f"{path} has {inode.nlink} hard links, and pkram_strict preserves none", errno.EINVAL)


def save_runs(writer: ObjectWriter, runs: Array) -> int:
    """Save the page stream, a slice at a time; return the number of runs, joined where frames continue each other.

    The last run of a slice may continue in the next slice, so it is held back.
    """
    total, index = 0, 0
    held = np.empty((0, 3), dtype=np.int64)
    for low in range(0, len(runs), _SLICE):
        # (rows, 3): the run held back, and the next slice.
        part = np.concatenate((held, runs[low : low + _SLICE]))
        pfn, count = part[:, 1], part[:, 2]
        # (joined runs,): the first row of each joined run, and its pages.
        starts = _starts(pfn, count)
        joined = np.add.reduceat(count, starts)
        # All but the last are complete, and all of the last slice.
        keep = len(starts) - (low + _SLICE < len(runs))
        # (joined runs,): where each begins in the page stream.
        begins = index + np.cumsum(joined) - joined
        writer.save_runs(*(column[:keep].view(np.uint64) for column in (begins, pfn[starts], joined)))
        held = np.array([(0, pfn[start], size) for start, size in zip(starts[keep:], joined[keep:], strict=True)])
        total, index = total + keep, index + int(joined[:keep].sum())
    return total


def _save_huge(writer: ObjectWriter, runs: Array) -> int:
    """Save the page stream, its huge pages first, an entry each; return the number of runs, as `save_runs`.

    A huge page is 2 MiB of a file that lie aligned in the file and in RAM.
    """
    # Shapes: R runs, H huge pages. (R,): place in the page stream, file page, frame and pages of each run.
    index, (at, pfn, count) = np.cumsum(runs[:, 2]) - runs[:, 2], runs.T
    # (R,): the aligned frames [low, high) inside each run, and how many huge pages they are: none if the file page
    # is not aligned where the frame is.
    low, high = -(-pfn // BLOCK_PAGES) * BLOCK_PAGES, (pfn + count) // BLOCK_PAGES * BLOCK_PAGES
    blocks = np.where((at - pfn) % BLOCK_PAGES == 0, np.maximum(high - low, 0) // BLOCK_PAGES, 0)
    # (R,): the end of the pages before the first huge page of a run.
    end = np.where(blocks, low, pfn + count)
    # (H,): the number of each huge page in its run, and how far behind the begin of the run it lies.
    number = np.arange(int(blocks.sum())) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    offset = np.repeat(low - pfn, blocks) + number * BLOCK_PAGES
    order = np.full(len(offset), BLOCK_ORDER, dtype=np.uint8)
    writer.save_pages(np.repeat(index, blocks) + offset, np.repeat(pfn, blocks) + offset, order)
    # (R,): masks of runs with pages before their huge pages (or without any), and behind them.
    head, tail = end > pfn, (blocks > 0) & (high < pfn + count)
    writer.save_runs(
        np.concatenate((index[head], (index + high - pfn)[tail])),
        np.concatenate((pfn[head], high[tail])),
        np.concatenate(((end - pfn)[head], (pfn + count - high)[tail])),
    )
    return len(_starts(pfn, count))


def _starts(pfn: Array, count: Array) -> Array:
    """Return where frames do not continue those of the run before."""
    fresh = np.ones(len(pfn), dtype=bool)
    np.not_equal(pfn[1:], pfn[:-1] + count[:-1], out=fresh[1:])
    return np.flatnonzero(fresh)


def stream(tree: Tree, picture: Picture, saved_ns: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of object 0, in parts; `saved_ns` is when the tree was saved, by default now."""
    flags = treeformat.features(picture.columns) | (0 if picture.unsummed is None else treeformat.HAS_SUMS)
    yield header(tree, picture, flags, saved_ns)
    for section in treeformat.SECTIONS:
        yield from treeformat.encode(section, picture.columns[section.name], flags)
    for name in BLOBS:
        blob = picture.blobs[name]
        yield blob + bytes(treeformat.padding(len(blob)))


def header(tree: Tree, picture: Picture, flags: int, saved_ns: int | None = None) -> bytes:
    """Return the header of object 0 with these features."""
    rows: dict[str, Any] = {
        section.name: len(picture.columns[section.name][section.columns[0].name]) for section in treeformat.SECTIONS
    }
    rows |= {name: len(picture.blobs[name]) for name in BLOBS}
    return TREE.pack(
        magic=treeformat.TREE_MAGIC,
        version=treeformat.TREE_VERSION,
        pages=int(picture.runs[:, 2].sum()),
        next_ino=tree.next_ino,
        flags=flags,
        saved_ns=time.time_ns() if saved_ns is None else saved_ns,
        unsummed=max(picture.unsummed or 0, 0),
        **rows,
    )
