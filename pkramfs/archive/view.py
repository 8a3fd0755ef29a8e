# SPDX-License-Identifier: GPL-2.0-or-later
"""A saved tree as it lies in its node, to be read: names, attributes, contents.

    with open_tree(store, b"shmem-x") as tree:
        place = tree.find(b"/etc/passwd")
        tree.attributes(place).size
        for offset, data in tree.data(place): …

A file is named by its *place*, the position of its inode in the columns; 0 is the root. Paths lead through the tree
only: `..` of the root is the root, and a symbolic link to an absolute path leads out and is an error.

Nothing is adopted, claimed or woken: see the chapter's page. Columns are `fs.asleep`'s, which a mount serves from
while directories sleep.

Kernel: fs/namei.c (link_path_walk), fs/seq_file.c
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pkramfs.archive.sound import Sound
from pkramfs.archive.standing import Standing
from pkramfs.errors import FormatError, PkramError
from pkramfs.fs.asleep import Asleep
from pkramfs.fs.inode import BLOCKS_PER_PAGE
from pkramfs.fs.limits import INLINE_TARGET
from pkramfs.fs.nodes import objects
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.verify import verify
from pkramfs.mounting.names import mount_name
from pkramfs.pkram.node import Node, shown
from pkramfs.pkram.treeformat import Array, TreeStream
from pkramfs.spans import Spans, distinct
from pkramfs.text import exact
from pkramfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.store import Store
    from pkramfs.pkram.streams.runs import Runs

ROOT = 0
"""The place of the root."""
LINKS_MAX = 40
"""Symbolic links that one path may lead through, as the kernel allows."""
_PIECE = 256
"""Pages that are read at once: 1 MiB."""
_ROWS = 1 << 14
"""Runs of a file that are taken from its columns at once."""


class Attributes(NamedTuple):
    """The attributes of a file, as stat(2) shows them. Times are ns since the epoch; `btime` is 0 if not known."""

    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    atime: int
    mtime: int
    ctime: int
    btime: int
    flags: int
    blocks: int

    @property
    def kind(self) -> int:
        """Return the S_IF bits of the mode."""
        return stat.S_IFMT(self.mode)


_COLUMNS = Attributes._fields[:-1]


class SavedTree:
    """See the module's page. `node` is what it was read from."""

    def __init__(self, ram: Ram, node: Node, parts: TreeStream, runs: Runs) -> None:
        self.node, self.parts = node, parts
        self._ram, self._runs = ram, runs
        self._standing = Standing(ram, node)
        self._kinds = parts.inodes["mode"] & np.uint32(0o170000)

    @cached_property
    def _packed(self) -> Asleep:
        return Asleep(self.parts, self._runs)

    @cached_property
    def sound(self) -> Sound:
        """Return the checksums of the files' data."""
        return Sound(self._ram, self.parts, self._packed.runs_between)

    def __len__(self) -> int:
        return len(self._kinds)

    def expect_unchanged(self) -> None:
        """Raise ChangedError if the node was withdrawn."""
        self._standing.expect()

    # -- names ----------------------------------------------------------------------------------

    def children(self, place: int) -> list[tuple[bytes, int]]:
        """Return (name, place) of each entry of a directory, oldest first; none for a file."""
        low, high = self._rows(place)
        edges = self._packed.name_edges[low : high + 1].tolist()
        places = self.parts.entries["child"][low:high].tolist()
        return [(self.parts.names[edges[at] : edges[at + 1]], child) for at, child in enumerate(places)]

    def _rows(self, place: int) -> tuple[int, int]:
        parents = self.parts.entries["parent"]
        low, high = np.searchsorted(parents, np.array([place, place + 1], dtype=parents.dtype))
        return int(low), int(high)

    def child(self, place: int, name: bytes) -> int | None:
        """Return the place of a name in a directory, None if it has no such name."""
        low, high = self._rows(place)
        for row in (low + np.flatnonzero(self.parts.entries["length"][low:high] == len(name))).tolist():
            start = int(self._packed.name_edges[row])
            if self.parts.names.startswith(name, start):
                return int(self.parts.entries["child"][row])
        return None

    @cached_property
    def _above(self) -> Array:
        """Return the directory above each directory; the root is above itself."""
        found = np.zeros(len(self), dtype=np.int64)
        down = self._kinds[self.parts.entries["child"]] == stat.S_IFDIR
        found[self.parts.entries["child"][down]] = self.parts.entries["parent"][down]
        return found

    def find(self, path: bytes, *, follow: bool = True) -> int:
        """Return the place of a path; raise ENOENT, ENOTDIR, ELOOP, or EXDEV for a link that leads out of the tree.

        `follow` says whether a symbolic link at its end is followed.
        """
        place, left, links = ROOT, _names(path), 0
        while left:
            name = left.pop()
            if not self.is_directory(place):
                raise _fail(errno.ENOTDIR, path)
            if name == b"..":
                place = int(self._above[place])
                continue
            found = self.child(place, name)
            if found is None:
                raise _fail(errno.ENOENT, path)
            if self._kinds[found] != stat.S_IFLNK or (not left and not follow and not path.endswith(b"/")):
                place = found
                continue
            links += 1
            target = self.target(found)
            if links > LINKS_MAX:
                raise _fail(errno.ELOOP, path)
            if target.startswith(b"/"):
                raise OSError(errno.EXDEV, "a symbolic link leads out of the tree", os.fsdecode(path))
            left += _names(target)
        if path.endswith(b"/") and not self.is_directory(place):
            raise _fail(errno.ENOTDIR, path)
        return place

    def walk(self, place: int = ROOT, path: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """Yield (path, place) of a file and of all below it, directories before their entries, oldest first."""
        left = [(path, place)]
        while left:
            path, place = left.pop()
            yield path, place
            if self.is_directory(place):
                left += [
                    (path + b"/" + name if path else name, child) for name, child in reversed(self.children(place))
                ]

    # -- attributes -----------------------------------------------------------------------------

    def is_directory(self, place: int) -> bool:
        """Return True for a directory."""
        return int(self._kinds[place]) == stat.S_IFDIR

    def attributes(self, place: int) -> Attributes:
        """Return the attributes of a file."""
        columns = self.parts.inodes
        numbers = [int(columns[name][place]) for name in _COLUMNS]
        return Attributes._make([*numbers, self._pages_of(place) * BLOCKS_PER_PAGE])

    def _pages_of(self, place: int) -> int:
        if self._kinds[place] == stat.S_IFLNK:
            return int(self.parts.inodes["size"][place] >= INLINE_TARGET)
        low, high = self._packed.edges[place : place + 2].tolist()
        return int(self._packed.pieces[low:high, 2].sum())

    def target(self, place: int) -> bytes:
        """Return where a symbolic link leads to."""
        number = int(np.searchsorted(self._packed.links, place))
        start, end = self._packed.target_edges[number : number + 2].tolist()
        return self.parts.targets[start:end]

    def xattrs(self, place: int) -> dict[bytes, bytes]:
        """Return the extended attributes of a file, ACLs included."""
        owner = self.parts.xattrs["inode"]
        low, high = np.searchsorted(owner, np.array([place, place + 1], dtype=owner.dtype))
        return dict(self._packed.xattrs(range(int(low), int(high))))

    # -- contents -------------------------------------------------------------------------------

    def extents(self, place: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, size) of the parts of a file that are no hole, as SEEK_DATA would find them."""
        size, begin, end = int(self.parts.inodes["size"][place]), 0, 0
        for index, _, count in self._data_runs(place):
            if index << PAGE_SHIFT > end or begin == end:
                if begin < end:
                    yield begin, min(end, size) - begin
                begin = index << PAGE_SHIFT
            end = index + count << PAGE_SHIFT
        if begin < end:
            yield begin, min(end, size) - begin

    def data(self, place: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of the parts that are no holes, in order, up to 1 MiB at a time.

        Raise ChangedError if that is over, FormatError where data are not what their checksums say.
        """
        size, ino, sound = int(self.parts.inodes["size"][place]), int(self.parts.inodes["ino"][place]), self.sound
        for index, pfn, count in self._data_runs(place):
            for at in range(0, count, _PIECE):
                offset = index + at << PAGE_SHIFT
                if sound:
                    self.expect_unchanged()
                    sound.expect(ino, index + at, index + min(at + _PIECE, count), lambda: self._path(place))
                data = self._ram.peek(pfn + at, min(count - at, _PIECE))
                self.expect_unchanged()
                yield offset, data if offset + len(data) <= size else data[: size - offset]

    def _data_runs(self, place: int) -> Iterator[tuple[int, int, int]]:
        """Yield the runs of a file that hold data before its end; pages that were only allocated count as holes."""
        if self._kinds[place] != stat.S_IFREG:
            return
        unwritten, end = self._unwritten(place), -(-int(self.parts.inodes["size"][place]) >> PAGE_SHIFT)
        low, high = self._packed.edges[place : place + 2].tolist()
        for first in range(low, high, _ROWS):
            for index, pfn, count in self._packed.pieces[first : min(first + _ROWS, high)].tolist():
                stop = min(index + count, end)
                if stop <= index:
                    return
                for start, size in unwritten.holes(index, stop) if unwritten else [(index, stop - index)]:
                    yield start, pfn + start - index, size

    def _unwritten(self, place: int) -> PageMap | None:
        table = self.parts.unwritten
        if not len(table["inode"]):
            return None
        low, high = np.searchsorted(table["inode"], np.array([place, place + 1], dtype=table["inode"].dtype))
        if low == high:
            return None
        first, count = (table[name][low:high].astype(np.int64) for name in ("first", "count"))
        return PageMap(np.stack((first, first, count), axis=1).tobytes(), int(count.sum()))

    def _path(self, place: int) -> str:
        """Return a path of a file, for people."""
        names, rows = list[bytes](), self.parts.entries
        while place != ROOT:
            row = int(np.flatnonzero(rows["child"] == place)[0])
            start, end = self._packed.name_edges[row : row + 2].tolist()
            names.append(self.parts.names[start:end])
            place = int(rows["parent"][row])
        return exact(b"/" + b"/".join(reversed(names)))

    def damaged_data(self) -> dict[int, int]:
        """Return the number of pieces that do not match their checksums, by place; all data are read."""
        found = self.sound.damaged() if self.sound else {}
        return {int(np.searchsorted(self.parts.inodes["ino"], ino)): count for ino, count in found.items()}

    def lost_pages(self, beyond: int) -> dict[int, int]:
        """Return how many pages of which places have frames from `beyond` on, which salvage gives to what is lost."""
        pieces, edges = self._packed.pieces, self._packed.edges
        rows = np.flatnonzero(pieces[:, 1] >= beyond)
        owners = np.searchsorted(edges, rows, side="right") - 1
        places, where = np.unique(owners, return_inverse=True)
        counts = np.bincount(where, weights=pieces[rows, 2], minlength=len(places))
        return dict(zip(places.tolist(), counts.astype(np.int64).tolist(), strict=True))

    def places_in(self, frames: Spans) -> list[int]:
        """Return the files that have pages in some frames."""
        pieces = self._packed.pieces
        rows = np.zeros(len(pieces), dtype=bool)
        for start, end in frames:  # the segments of a log: a few
            rows |= (pieces[:, 1] < end) & (pieces[:, 1] + pieces[:, 2] > start)
        owners = np.searchsorted(self._packed.edges, np.flatnonzero(rows), side="right") - 1
        return [int(place) for place in distinct(owners)]

    # -- figures --------------------------------------------------------------------------------

    @property
    def saved_ns(self) -> int:
        """Return when the tree was saved, ns since the epoch."""
        return int(self.parts.header.saved_ns)

    @cached_property
    def data_pages(self) -> int:
        """Return how many pages hold data, those that were only allocated not counted."""
        return int(self.parts.header.pages) - int(self.parts.unwritten["count"].astype(np.int64).sum())


def open_tree(store: Store, name: bytes) -> SavedTree:
    """Read and check the tree that a node holds; PkramError (ENOENT) if there is none, FormatError if it is damaged."""
    with store.prepare_load(name) as load:
        if mount_name(name) is None:
            raise PkramError(f"node {shown(name)} holds no file tree, but what a program saved", errno.ENOTDIR)
        found = objects(store, load)
        if len(found) != 2:
            raise FormatError("Node", "objects", found=len(found), expected="2: a byte stream and a page stream")
        parts, runs = TreeStream(found[0][0]), found[1][1]
        data = Spans.from_runs(runs[1], runs[2])
        verify(parts, runs, data, data)
        return SavedTree(store.ram, load.node, parts, runs)


def _names(path: bytes) -> list[bytes]:
    """Return the names of a path, the last one first."""
    return [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]


def _fail(code: int, path: bytes) -> OSError:
    return OSError(code, os.strerror(code), os.fsdecode(path))
