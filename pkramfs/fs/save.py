"""Write a frozen tree into a node of preserved memory.

    tree ──▶ object 0: byte stream   all inodes, names, xattrs, holes, as columns (pkram/treeformat)
         ──▶ object 1: page stream   all files' frames in one index space, without gaps

Pages are not copied, they are named: runs of frames that continue each other, also from one file to
the next, become one run. So the cost is in proportion to inodes and runs, not to bytes. The node
appears when it is complete, by one store, or never: whatever goes wrong before discards it.

Every kind of inode is kept, FIFOs and sockets as names; files that are deleted but still open are
not, and the report names them. `strict` refuses what PKRAM itself refuses, and writes an entry for each
page, or for each huge page where the mount's huge= asks for them: the two columns of the announcement.

Long work: a generator that yields Progress and returns the report; the tree must stay frozen.

Kernel: mm/shmem_pkram.c (shmem_save_pkram), patches 24 and 38
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Generator, Iterator
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pkramfs.errors import PkramError
from pkramfs.fs import collector
from pkramfs.fs.inode import Inode
from pkramfs.fs.tree import Tree
from pkramfs.pkram import treeformat
from pkramfs.pkram.treeformat import BLOBS, ENTRIES, EXTENTS, INODES, TREE, XATTRS, Array, Columns
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_ORDER, BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.pkram.store import Store
    from pkramfs.pkram.streams import ObjectWriter


class Progress(NamedTuple):
    """How far a long work is: `done` of `total` steps of this stage."""

    stage: str
    done: int
    total: int


class SaveReport(NamedTuple):
    """What a save has preserved. `deleted` names what could not be: open files without a name."""

    files: int
    directories: int
    pages: int
    bytes: int
    stream_bytes: int
    runs: int
    moved: int
    deleted: list[str]
    seconds: float


class _Picture(NamedTuple):
    """A tree as columns."""

    columns: dict[str, Columns]
    blobs: dict[str, bytes]
    runs: Array  # rows of (file index, pfn, count), all files after one another


def save(
    tree: Tree, store: Store, node_name: bytes, *, strict: bool = False, banned: Spans | None = None
) -> Generator[Progress, None, SaveReport]:
    """Save a frozen tree as node `node_name` and publish it; the tree is preserved from then on."""
    if not tree.frozen:
        raise PkramError("a tree must be frozen while it is saved", errno.EBUSY)
    if strict:
        _refuse_what_pkram_refuses(tree)
    began = time.monotonic()
    picture = yield from _picture(tree)
    index, pfn, count = _page_stream(picture.runs)
    runs = len(index)
    with store.prepare_save(
        node_name, tree_id=tree.frames.tree_id, frames=tree.frames, banned=banned or Spans(), strict=strict
    ) as saving:
        stream_bytes = 0
        with saving.object() as writer:
            for part in _stream(tree, picture):
                writer.write(part)
                stream_bytes += len(part)
        yield Progress("pages", 0, len(index))
        with saving.object() as writer:
            if strict and tree.huge in ("always", "within_size"):
                index, pfn, count = _save_huge(writer, picture.runs)
            writer.save_runs(index, pfn, count)
        yield Progress("publish", 0, 1)
        node = saving.finish()
        moved = sum(count for _, count in saving.moved)
    tree.node_pages = store.pages_of(node) - Spans.from_runs(picture.runs[:, 1], picture.runs[:, 2])
    tree.preserved = True
    counts = tree.counts()
    return SaveReport(
        files=counts.files - len(tree.orphans),
        directories=counts.directories,
        pages=int(picture.runs[:, 2].sum()),
        bytes=counts.bytes,
        stream_bytes=stream_bytes,
        runs=runs,
        moved=moved,
        deleted=[os.fsdecode(path) for path in tree.deleted()],
        seconds=time.monotonic() - began,
    )


def withdraw(tree: Tree, store: Store, node_name: bytes) -> None:
    """Take back a tree's node by one store and free what only the node used: metadata and moved copies.

    What a daemon does at `remount,rw`, and at the first change of a restored tree (on_first_change). A node
    that was given up because it was damaged is gone already; what it used is free all the same.
    """
    try:
        store.withdraw(node_name)
    except PkramError as error:
        if error.errno != errno.ENOENT:
            raise
    pages = tree.node_withdrawn()
    if pages:
        tree.frames.free(pages.starts, pages.counts)


def _refuse_what_pkram_refuses(tree: Tree) -> None:
    for name, inode, _ in tree.readdir(tree.root.ino, 2):
        path = os.fsdecode(b"/" + name)
        if not inode.is_file:
            raise PkramError(f"{path} is no regular file, and pkram_strict preserves nothing else", errno.EINVAL)
        if inode.nlink != 1:
            raise PkramError(f"{path} has {inode.nlink} hard links, and pkram_strict preserves none", errno.EINVAL)


def _picture(tree: Tree) -> Generator[Progress, None, _Picture]:
    """All columns, in a few steps between which a caller may do something else."""
    inodes = [inode for inode in tree.inodes.values() if inode.nlink]
    yield Progress("inodes", 0, len(inodes))
    with collector.paused():
        table = _inode_columns(inodes)
    yield Progress("names", 0, len(inodes))
    with collector.paused():
        entries, names = _entry_columns(inodes, table["ino"])
    yield Progress("extents", 0, len(inodes))
    with collector.paused():
        extents, runs = _extent_columns(inodes, table)
        xattrs, values = _xattr_columns(inodes)
    targets = b"".join([inode.target for inode in inodes if inode.target is not None])
    return _Picture(
        {"inodes": table, "entries": entries, "extents": extents, "xattrs": xattrs},
        {"names": names, "targets": targets, "values": values},
        runs,
    )


def _inode_columns(inodes: list[Inode]) -> Columns:
    size = len(inodes)
    columns: Columns = {
        "ino": np.fromiter([i.ino for i in inodes], np.uint64, size),
        "mode": np.fromiter([i.mode for i in inodes], np.uint32, size),
        "uid": np.fromiter([i.uid for i in inodes], np.uint32, size),
        "gid": np.fromiter([i.gid for i in inodes], np.uint32, size),
        "nlink": np.fromiter([i.nlink for i in inodes], np.uint32, size),
        "rdev": np.fromiter([i.rdev for i in inodes], np.uint64, size),
        "size": np.fromiter([i.size for i in inodes], np.uint64, size),
        "atime": np.fromiter([i.atime for i in inodes], np.int64, size),
        "mtime": np.fromiter([i.mtime for i in inodes], np.int64, size),
        "ctime": np.fromiter([i.ctime for i in inodes], np.int64, size),
    }
    return columns


def _entry_columns(inodes: list[Inode], numbers: Array) -> tuple[Columns, bytes]:
    """Names of all directories; inode numbers rise, so positions are found by searching."""
    names: list[bytes] = []
    rows: list[tuple[Inode, int]] = []
    parents: list[Iterator[int]] = []
    for position, inode in enumerate(inodes):
        if inode.entries is not None and inode.entries.entries:
            more, pairs = inode.entries.columns()
            names += more
            rows += pairs
            parents.append(repeat(position, len(more)))
    size = len(names)
    children = np.fromiter([child.ino for child, _ in rows], np.uint64, size)
    columns: Columns = {
        "parent": np.fromiter(chain.from_iterable(parents), np.uint32, size),
        "child": np.searchsorted(numbers, children),
        "cookie": np.fromiter([cookie for _, cookie in rows], np.uint64, size),
        "length": np.fromiter(map(len, names), np.uint8, size),
    }
    return columns, b"".join(names)


def _extent_columns(inodes: list[Inode], table: Columns) -> tuple[Columns, Array]:
    """Where pages belong (a new extent after every hole), and all runs one after the other."""
    positions = [position for position, inode in enumerate(inodes) if inode.pages is not None]
    files = [inode.pages for inode in inodes if inode.pages is not None]
    raw = b"".join([leaf for pages in files for leaf in pages.leaves])
    runs = np.frombuffer(raw, dtype=np.int64).reshape(-1, 3)
    lengths = np.fromiter([pages.runs for pages in files], np.int64, len(files))
    owner = np.repeat(np.array(positions, dtype=np.int64), lengths)
    ends = runs[:, 0] + runs[:, 2]
    fresh = np.ones(len(runs), dtype=bool)
    fresh[1:] = (owner[1:] != owner[:-1]) | (runs[1:, 0] != ends[:-1])
    starts = np.flatnonzero(fresh)
    table["extents"] = np.bincount(owner[starts], minlength=len(inodes))
    counts = np.add.reduceat(runs[:, 2], starts) if len(starts) else runs[:, 2]
    return {"first": runs[starts, 0], "count": counts}, runs


def _xattr_columns(inodes: list[Inode]) -> tuple[Columns, bytes]:
    rows = [
        (position, name, value)
        for position, inode in enumerate(inodes)
        if inode.xattrs
        for name, value in inode.xattrs.items()
    ]
    columns: Columns = {
        "inode": np.array([position for position, _, _ in rows], dtype=np.uint32),
        "name_length": np.array([len(name) for _, name, _ in rows], dtype=np.uint16),
        "value_length": np.array([len(value) for _, _, value in rows], dtype=np.uint32),
    }
    return columns, b"".join([part for _, name, value in rows for part in (name, value)])


def _page_stream(runs: Array) -> tuple[Array, Array, Array]:
    """(index, pfn, count) in the index space of the node, joined where frames continue each other."""
    pfn, count = runs[:, 1], runs[:, 2]
    fresh = np.ones(len(runs), dtype=bool)
    fresh[1:] = pfn[1:] != pfn[:-1] + count[:-1]
    starts = np.flatnonzero(fresh)
    index = np.cumsum(count) - count
    joined = np.add.reduceat(count, starts) if len(starts) else count
    return index[starts].astype(np.uint64), pfn[starts].astype(np.uint64), joined.astype(np.uint64)


def _save_huge(writer: ObjectWriter, runs: Array) -> tuple[Array, Array, Array]:
    """Save the huge pages, an entry each; the (index, pfn, count) of what is left.

    A huge page is 2 MiB of a file that lie aligned in the file and in RAM.
    """
    index, (at, pfn, count) = np.cumsum(runs[:, 2]) - runs[:, 2], runs.T
    low, high = -(-pfn // BLOCK_PAGES) * BLOCK_PAGES, (pfn + count) // BLOCK_PAGES * BLOCK_PAGES
    blocks = np.where((at - pfn) % BLOCK_PAGES == 0, np.maximum(high - low, 0) // BLOCK_PAGES, 0)
    end = np.where(blocks, low, pfn + count)  # of what comes before the first huge page of a run
    number = np.arange(int(blocks.sum())) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    offset = np.repeat(low - pfn, blocks) + number * BLOCK_PAGES
    order = np.full(len(offset), BLOCK_ORDER, dtype=np.uint8)
    writer.save_pages(np.repeat(index, blocks) + offset, np.repeat(pfn, blocks) + offset, order)
    head, tail = end > pfn, (blocks > 0) & (high < pfn + count)
    return (
        np.concatenate((index[head], (index + high - pfn)[tail])),
        np.concatenate((pfn[head], high[tail])),
        np.concatenate(((end - pfn)[head], (pfn + count - high)[tail])),
    )


def _stream(tree: Tree, picture: _Picture) -> Iterator[bytes]:
    """The bytes of object 0, in parts."""
    header: dict[str, Any] = {
        section.name: len(picture.columns[section.name][section.columns[0].name]) for section in treeformat.SECTIONS
    }
    header |= {name: len(picture.blobs[name]) for name in BLOBS}
    yield TREE.pack(
        magic=treeformat.TREE_MAGIC,
        version=treeformat.TREE_VERSION,
        pages=int(picture.runs[:, 2].sum()),
        next_ino=tree.next_ino,
        saved_ns=time.time_ns(),
        **header,
    )
    for section in (INODES, ENTRIES, EXTENTS, XATTRS):
        yield from treeformat.encode(section, picture.columns[section.name])
    for name in BLOBS:
        blob = picture.blobs[name]
        yield blob + bytes(treeformat.padding(len(blob)))
