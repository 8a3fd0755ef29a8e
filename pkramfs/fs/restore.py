"""Make a tree from a node of preserved memory: all of it, or nothing and a reason.

    load ──▶ verify ──▶ within limits? ──▶ build inodes ──▶ adopt the frames
    store    every       size=, nr_inodes=   Python objects     the first moment at which
             rule        with the figures                       anything is changed

Before the last step nothing has happened: whatever fails leaves the node as it was, published,
to be tried again with other options. After it the node stays too: the tree is *preserved* until its
first change (see core). Inode numbers, hard links, holes, times and places in listings are those
of the tree that was saved.

Long work: a generator that yields Progress and returns the tree.

Kernel: mm/shmem_pkram.c (shmem_load_pkram), patches 23-24 and 36-41
"""

from __future__ import annotations

import stat
from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np

from pkramfs.errors import ExhaustedError, FormatError
from pkramfs.fs import collector
from pkramfs.fs.directory import Directory
from pkramfs.fs.inode import Inode
from pkramfs.fs.limits import INLINE_TARGET, INODE_SPACE, Limits
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.save import Progress
from pkramfs.fs.tree import Tree
from pkramfs.fs.verify import Runs, verify
from pkramfs.pkram.treeformat import EXTENTS, TreeStream
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.store import Store


def restore(
    store: Store, node_name: bytes, ram: Ram, frames: Frames, limits: Limits
) -> Generator[Progress, None, Tree]:
    """The tree that node `node_name` holds; `frames` must have the node's tree id."""
    yield Progress("load", 0, 1)
    stream, runs, metadata = _load(store, node_name)
    yield Progress("verify", 0, 1)
    parts = TreeStream(stream)
    allowed = frames.leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES)
    verify(parts, runs, allowed)
    pages, space = _needs(parts)
    _check_limits(limits, pages, space)
    yield Progress("inodes", 0, parts.header.inodes)
    with collector.paused():
        inodes = _build_inodes(parts)
        _give_pages(parts, inodes, runs)
        _give_xattrs(parts, inodes)
    yield Progress("names", 0, parts.header.entries)
    with collector.paused():
        directories = _build_directories(parts, inodes)
    yield Progress("adopt", 0, 1)
    frames.adopt(Spans.from_runs(runs[1], runs[2]) | metadata)
    tree = Tree(ram, frames, limits)
    size = sum(parts.inodes["size"][_positions(parts, stat.S_IFREG)].tolist())
    tree.install(
        inodes,
        parts.header.next_ino,
        directories=directories,
        size=size,
        stream_bytes=len(stream) - EXTENTS.width * parts.header.extents,
        runs=sum(inode.pages.runs for inode in inodes if inode.pages is not None),
    )
    tree.node_pages = metadata
    limits.pages, limits.inode_space = pages, space
    tree.preserved = True
    return tree


def _load(store: Store, node_name: bytes) -> tuple[bytes, Runs, Spans]:
    """Both objects of the node, read whole, and the frames that the node uses for itself."""
    with store.prepare_load(node_name) as load:
        objects = iter(load)
        first, second = next(objects, None), None
        stream = b"" if first is None else bytes(first.read())
        second = next(objects, None)
        if second is None:
            raise FormatError("Node", "objects", found="fewer", expected="2: a byte stream and a page stream")
        index, pfn, count = second.load_runs()
        if next(objects, None) is not None:
            raise FormatError("Node", "objects", found="more", expected="2: a byte stream and a page stream")
        metadata = load.metadata()
        load.finish()
    return stream, (index, pfn, count), metadata


def _needs(parts: TreeStream) -> tuple[int, int]:
    """Pages and inode space that the tree takes, counted as `limits` does."""
    kinds, size = parts.inodes["mode"] & np.uint32(0o170000), parts.inodes["size"]
    long_targets = int(((kinds == stat.S_IFLNK) & (size >= INLINE_TARGET)).sum())
    folders = kinds == stat.S_IFDIR
    further_links = int((parts.inodes["nlink"][~folders].astype(np.int64) - 1).sum())
    space = (len(kinds) + further_links) * INODE_SPACE
    at = 0
    for names, values in zip(
        parts.xattrs["name_length"].tolist(), parts.xattrs["value_length"].tolist(), strict=True
    ):
        if not parts.values.startswith(b"system.", at):
            space += 40 + names + values
        at += names + values
    return parts.header.pages + long_targets, space


def _check_limits(limits: Limits, pages: int, space: int) -> None:
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


def _build_inodes(parts: TreeStream) -> list[Inode]:
    names = ("ino", "mode", "uid", "gid", "atime", "mtime", "ctime", "nlink", "size", "rdev")
    inodes = list(map(Inode, *(parts.inodes[name].tolist() for name in names)))
    at = 0
    for position in _positions(parts, stat.S_IFLNK):
        inode = inodes[position]
        inode.target = parts.targets[at : at + inode.size]
        at += inode.size
    return inodes


def _positions(parts: TreeStream, kind: int) -> list[int]:
    """Where the inodes of one kind are."""
    return np.flatnonzero((parts.inodes["mode"] & np.uint32(0o170000)) == kind).tolist()


def _give_pages(parts: TreeStream, inodes: list[Inode], runs: Runs) -> None:
    """Cut the page stream into the files' runs: at every edge of a run and of an extent."""
    first, count = (parts.extents[name].astype(np.int64) for name in ("first", "count"))
    index, pfn = (column.astype(np.int64) for column in runs[:2])
    begin = np.cumsum(count) - count  # where each extent begins in the page stream
    cuts = np.union1d(begin, index)
    extent = np.searchsorted(begin, cuts, side="right") - 1
    run = np.searchsorted(index, cuts, side="right") - 1
    pieces = np.empty((len(cuts), 3), dtype=np.int64)
    pieces[:, 0] = first[extent] + cuts - begin[extent]
    pieces[:, 1] = pfn[run] + cuts - index[run]
    pieces[:, 2] = np.diff(cuts, append=parts.header.pages)
    owner = np.repeat(np.arange(len(inodes)), parts.inodes["extents"])[extent]
    # positions of files with pages, where their pieces begin, and how many pages they have
    files, starts = np.unique(owner, return_index=True)
    totals = np.add.reduceat(pieces[:, 2], starts) if len(starts) else starts
    raw, edges = pieces.tobytes(), [*(starts * 24).tolist(), len(pieces) * 24]
    for number, (position, total) in enumerate(zip(files.tolist(), totals.tolist(), strict=True)):
        inodes[position].pages = PageMap(raw[edges[number] : edges[number + 1]], total)


def _give_xattrs(parts: TreeStream, inodes: list[Inode]) -> None:
    table, at = parts.xattrs, 0
    for position, names, values in zip(
        table["inode"].tolist(), table["name_length"].tolist(), table["value_length"].tolist(), strict=True
    ):
        inode, middle = inodes[position], at + names
        if inode.xattrs is None:
            inode.xattrs = {}
        inode.xattrs[parts.values[at:middle]] = parts.values[middle : middle + values]
        at = middle + values


def _build_directories(parts: TreeStream, inodes: list[Inode]) -> int:
    """Fill every directory; returns how many there are."""
    table = parts.entries
    lengths = table["length"].astype(np.int64)
    ends = np.cumsum(lengths)
    names = [parts.names[start:end] for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]
    children = [inodes[position] for position in table["child"].tolist()]
    cookies = table["cookie"].tolist()
    folders = [inodes[position] for position in _positions(parts, stat.S_IFDIR)]
    for inode in folders:
        inode.entries = Directory(inodes[0])
    parents, starts = np.unique(table["parent"], return_index=True)
    edges = [*starts.tolist(), len(names)]
    for position, start, end in zip(parents.tolist(), edges[:-1], edges[1:], strict=True):
        folder = inodes[position]
        assert folder.entries is not None
        folder.entries.fill(names[start:end], children[start:end], cookies[start:end])
        if len(folder.entries) != end - start:
            raise FormatError(
                "Tree entries", f"names of inode {folder.ino}", found="one twice", expected="each name once"
            )
    down = (parts.inodes["mode"][table["child"]] & np.uint32(0o170000)) == stat.S_IFDIR
    for position, child in zip(table["parent"][down].tolist(), table["child"][down].tolist(), strict=True):
        below = inodes[child].entries
        assert below is not None
        below.parent = inodes[position]
    return len(folders)
