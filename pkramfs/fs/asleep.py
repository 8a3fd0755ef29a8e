# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of a restored tree that was not looked up yet, in the form in which it was read: columns and blobs.

    columns of inodes, names, runs, xattrs  ── a directory is asked for ──▶  its names, and the inodes they name

A million inodes are two seconds of Python and a gigabyte of objects, most of which no one may ever look at; as
columns, checked and complete, they take 170 bytes each and are ready at once. So a mount serves a tree whose
directories *sleep*. Each wakes when it is first touched, with all its children. A sleeping part has
not changed, because every change begins with a lookup of a name, which wakes the directory of that name. So it
can be saved from the columns without waking it (see picture). The replay of a log may change names of a directory
without waking it (see amended).

    awake   its Inode is in tree.inodes; a child of an awake directory is awake
    asleep  a directory whose Inode is awake and whose names are not: SleepingDirectory
    beyond  everything below a sleeping directory: it has no objects, but can be found by number (NFS handles)

A file may be awake under a name that sleeps: by its number, or through another name. A request waits until the
directory that it asks for is awake, so large directories (LARGE) are woken before the mount serves.

Kernel: iget_locked() of file systems on disk: an inode is made when it is looked up
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pkramfs.fs import collector
from pkramfs.fs.amended import Amended
from pkramfs.fs.directory import MOST_COOKIE, Directory
from pkramfs.fs.inode import FIELDS, Inode
from pkramfs.fs.pagecache import RUN_BYTES, PageMap
from pkramfs.pkram.treeformat import Array, TreeStream
from pkramfs.spans import distinct

if TYPE_CHECKING:
    from pkramfs.pkram.streams.runs import Runs

_ALONE = 4
"""Of so many names of a directory one may be asked for by its inode's number before all of them wake."""
LARGE = 10_000
"""Entries of a directory that is not left asleep: some 20 ms to wake."""
_TYPE = np.uint32(0o170000)
_SLICE = 1 << 15
"""Runs that are cut at once: what they become stays in the cache."""


class SleepingDirectory(Directory):
    """A directory whose names are in columns. The first access to them turns it into a Directory."""

    __slots__ = ()
    asleep = True

    def __init__(self, parent: Inode, inode: Inode, packed: Asleep) -> None:
        self.parent = parent
        self.bed = (inode, packed)

    def __getattr__(self, name: str) -> Any:
        """Wake the directory, then return the attribute that it lacked while it slept."""
        if name not in Directory.__slots__:
            raise AttributeError(name)
        self.wake()
        return getattr(self, name)

    def wake(self) -> None:
        """Make the names and their inodes."""
        inode, packed = self.bed
        packed.wake(inode, self)

    def amend(self) -> Directory | Amended:
        """Return what takes changes of the names: the amendments of a directory that sleeps on, or itself, awake."""
        inode, packed = self.bed
        found = packed.amended.get(inode.ino) or packed.amend(inode)
        if found is None or found.left <= 0:
            self.wake()
            return self
        return found

    @property
    def added(self) -> Directory | None:
        """Return the names that it has beside those in the columns."""
        inode, packed = self.bed
        found = packed.amended.get(inode.ino)
        return None if found is None else found.added


class Snapshot(NamedTuple):
    """The sleeping inodes, and directories with sleeping names, at one moment, by position in the columns."""

    packed: Asleep
    inodes: Array
    folders: Array
    gone: Array
    """Rows of the entries that count no more."""

    @property
    def sleepers(self) -> int:
        """Return the number of inodes that had no object."""
        return int(np.count_nonzero(self.inodes))


class Asleep:
    """The columns of a tree, and which of its inodes are awake.

    `parts` are verified columns; rows of `pieces` are (file page, pfn, count) of all files, one file after the other,
    `edges[p]` the first of the inode at position p. `inodes` is where awake inodes go; `done` is called when all are.
    """

    def __init__(self, parts: TreeStream, runs: Runs) -> None:
        self.parts, self.inodes = parts, dict[int, Inode]()
        self.done: Callable[[], None] = _nobody
        self._columns = parts.inodes
        self.pieces, self.edges, self._pages = _pieces(parts, runs)
        self._raw = self.pieces.reshape(-1).view(np.uint8).data  # the bytes from which a file's map is cut
        self._items = [self._columns[name].item for name in FIELDS]
        self._kinds = self._columns["mode"] & _TYPE
        self._linked = (self._columns["nlink"] > 1) & (self._kinds != stat.S_IFDIR)
        self.name_edges = _sums(parts.entries["length"])
        self.value_edges = _sums(parts.xattrs["name_length"].astype(np.int64) + parts.xattrs["value_length"])
        self.links = np.flatnonzero(self._kinds == stat.S_IFLNK)
        self.target_edges = _sums(self._columns["size"][self.links])
        self._asleep = np.ones(len(self._kinds), dtype=bool)
        self._folders = self._kinds == stat.S_IFDIR
        self.left = int(self._folders.sum())
        self._named: Array | None = None
        self._alone: dict[int, int] = {}
        """How many inodes may still wake without their directory, by its position."""
        self.amended: dict[int, Amended] = {}
        """Directories whose names sleep and have changed, by number."""
        self.names_gone = np.zeros(len(parts.entries["child"]), dtype=bool)
        """Rows of the entries that count no more."""
        self.lookups = 0
        """References that somebody else's kernel may have to each inode, see Tree.assume_known."""

    @property
    def count(self) -> int:
        """Return the number of inodes without an object."""
        return int(np.count_nonzero(self._asleep))

    def snapshot(self) -> Snapshot:
        """Return the inodes and directories that sleep now. Waking changes neither a snapshot nor its columns."""
        return Snapshot(self, self._asleep.copy(), self._folders.copy(), self.names_gone.copy())

    # -- waking ----------------------------------------------------------------------------------

    def wake_root(self) -> Inode:
        """Make the root, whose names sleep, and wake directories that are too large to be woken by a request."""
        (root,) = self._make(np.zeros(1, dtype=np.int64), None)
        parents, sizes = np.unique(self.parts.entries["parent"], return_counts=True)
        for position in parents[sizes > LARGE].tolist():
            self._wake_way(position)
            self._rouse(position)
        return root

    def wake_deleted(self) -> None:
        """Make the inodes without a name, which no lookup would wake."""
        nameless = np.flatnonzero((self._columns["nlink"] == 0) & self._asleep)
        if len(nameless):
            self._make(nameless, self.inodes[int(self._columns["ino"][0])])

    def wake(self, inode: Inode, directory: SleepingDirectory) -> None:
        """Make the names of a directory, and their inodes that have no object yet."""
        position = self._position(inode.ino)
        low, high = self._rows(position)
        children, cookies = (self.parts.entries[name][low:high] for name in ("child", "cookie"))
        amended = self.amended.pop(inode.ino, None)
        with collector.paused():
            edges, blob = self.name_edges[low : high + 1].tolist(), self.parts.names
            names = [blob[start:end] for start, end in pairwise(edges)]
            if amended is not None and amended.gone:
                keep = ~self.names_gone[low:high]
                children, cookies, names = children[keep], cookies[keep], list(compress(names, keep.tolist()))
            inodes = self._children(children, inode)
            directory.__class__ = Directory  # type: ignore[assignment]
            del directory.bed
            directory.fill(names, inodes, cookies.tolist())
            for child, name in zip(inodes, names, strict=True):
                child.folder, child.name = inode, name
            if amended is not None:
                directory.append(amended.added)
        self._folders[position] = False
        self.left -= 1
        if not self.left:
            self.done()

    def find(self, number: int) -> Inode | None:
        """Wake a sleeping inode and return it; None if no inode with this number sleeps.

        The directories that lead to it wake, but for the last, whose names sleep on as long as few are asked for.
        """
        position = self._position(number)
        if position < 0 or not self._asleep[position]:
            return None
        if self._kinds[position] == stat.S_IFREG:
            return self.named(self._row(position))
        self._wake_way(position)
        return self.inodes[number]

    def named(self, row: int) -> Inode:
        """Return the inode that a row of the entries names, awake."""
        position = self.parts.entries["child"].item(row)
        number = self._columns["ino"].item(position)
        if not self._asleep.item(position):
            return self.inodes[number]
        above = self.parts.entries["parent"].item(row)
        self._wake_way(above)
        left = self._alone.get(above)
        if left is None:
            low, high = self._rows(above)
            left = (high - low) // _ALONE
        self._alone[above] = left - 1
        if left <= 0 or self._kinds[position] != stat.S_IFREG:
            self._rouse(above)
            return self.inodes[number]
        folder = self.inodes[self._columns["ino"].item(above)]
        inode = self._make_alone(position, folder)
        inode.folder, inode.name = folder, self._name(row)
        return inode

    def amend(self, folder: Inode) -> Amended | None:
        """Begin the amendments of a directory whose names sleep; return None if it is better woken."""
        low, high = self._rows(self._position(folder.ino))
        if low == high or self.parts.entries["cookie"][high - 1] >= MOST_COOKIE:
            return None
        found = self.amended[folder.ino] = Amended(folder, self, low, high)
        return found

    def wake_amended(self) -> None:
        """Wake the directories whose names have changed: all others are what the columns say."""
        for number in list(self.amended):
            self._rouse(self._position(number))

    def _wake_way(self, position: int) -> None:
        """Wake the directories on the way to an inode, from the top down, until it has an object."""
        way = []
        while self._asleep.item(position):
            position = self.parts.entries["parent"].item(self._row(position))
            way.append(position)
        for above in reversed(way):
            self._rouse(above)

    def name_asleep(self, number: int, most: int) -> tuple[Inode, bytes] | None:
        """Return an awake directory, and the path below it to a sleeping name of the inode with this number.

        A path of more than `most` bytes is cut at its beginning. Return None if no name of the inode sleeps.
        """
        position, entries = self._position(number), self.parts.entries
        rows = np.flatnonzero((entries["child"] == position) & ~self.names_gone).tolist() if position >= 0 else []
        row = next((row for row in rows if self._folders[entries["parent"][row]]), None)
        if row is None:
            return None
        parts, above = [self._name(row)], int(entries["parent"][row])
        while self._asleep[above] and sum(map(len, parts)) + len(parts) <= most:
            row = self._row(above)
            parts.append(self._name(row))
            above = int(entries["parent"][row])
        folder = self.inodes.get(int(self._columns["ino"][above]))
        return folder or self.inodes[int(self._columns["ino"][0])], b"/".join(reversed(parts))

    def runs_between(self, number: int, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return the runs (file page, pfn, pages) in [first, last), cut to it, of an inode that has no object."""
        position = self._position(number)
        if position < 0 or not self._asleep[position]:
            return []
        low, high = self.edges[position : position + 2].tolist()
        start = low + max(int(np.searchsorted(self.pieces[low:high, 0], first, side="right")) - 1, 0)
        end = low + int(np.searchsorted(self.pieces[low:high, 0], last))
        found = []
        for index, pfn, count in self.pieces[start:end].tolist():
            begin, stop = max(index, first), min(index + count, last)
            if begin < stop:
                found.append((begin, pfn + begin - index, stop - begin))
        return found

    def _row(self, position: int) -> int:
        """Return a row of the entries that names the inode at a position."""
        if self._named is None:
            children = self.parts.entries["child"]
            self._named = np.zeros(len(self._asleep), dtype=np.int64)
            self._named[children] = np.arange(len(children))
        row: int = self._named.item(position)
        return row

    def _name(self, row: int) -> bytes:
        return self.parts.names[self.name_edges.item(row) : self.name_edges.item(row + 1)]

    def _rouse(self, position: int) -> None:
        """Wake the directory at a position, whose Inode is awake, if its names sleep."""
        if self._folders[position]:
            directory = self.inodes[int(self._columns["ino"][position])].entries
            assert isinstance(directory, SleepingDirectory)
            directory.wake()

    def _position(self, number: int) -> int:
        """Return the position of an inode number in the columns, -1 if it is not there."""
        numbers, place = self._columns["ino"], number - 1
        if 0 <= place < len(numbers) and numbers.item(place) == number:
            return place  # the usual case: nothing was deleted before it
        place = int(numbers.searchsorted(np.uint64(number)))
        return place if place < len(numbers) and int(numbers[place]) == number else -1

    def _rows(self, position: int) -> tuple[int, int]:
        """Return the rows of a directory's entries."""
        column = self.parts.entries["parent"]
        low, high = np.searchsorted(column, np.array([position, position + 1], dtype=column.dtype))
        return int(low), int(high)

    # -- making objects --------------------------------------------------------------------------

    def _children(self, positions: Array, parent: Inode) -> list[Inode]:
        """Return the inodes that names of `parent` stand for, of which some may be awake already."""
        if self._asleep[positions].all() and not self._linked[positions].any():
            return self._make(positions, parent)
        fresh = distinct(positions[self._asleep[positions]])
        self._make(fresh, parent)
        return [self.inodes[number] for number in self._columns["ino"][positions].tolist()]

    def _make_alone(self, position: int, parent: Inode) -> Inode:
        """Make the inode of a regular file: `_make` of one takes ten times as long."""
        if len(self.parts.xattrs["inode"]) or len(self.parts.unwritten["inode"]):
            return self._make(np.array([position]), parent)[0]
        inode = Inode(*[item(position) for item in self._items])
        inode.lookups = self.lookups
        low, high = self.edges.item(position), self.edges.item(position + 1)
        if low < high:
            inode.pages = PageMap(self._raw[low * RUN_BYTES : high * RUN_BYTES], self._pages.item(position))
        self.inodes[inode.ino] = inode
        self._asleep[position] = False
        return inode

    def _make(self, positions: Array, parent: Inode | None) -> list[Inode]:
        """Make inodes; only the inode table refers to them so far."""
        columns, kinds = self._columns, self._kinds[positions]
        made = list(map(Inode, *(columns[name][positions].tolist() for name in FIELDS)))
        self.inodes.update(zip(columns["ino"][positions].tolist(), made, strict=True))
        self._asleep[positions] = False
        if self.lookups:
            for inode in made:
                inode.lookups = self.lookups
        for place in np.flatnonzero(kinds == stat.S_IFDIR).tolist():
            made[place].entries = SleepingDirectory(parent or made[place], made[place], self)
        self._give_targets(made, positions, np.flatnonzero(kinds == stat.S_IFLNK))
        self._give_pages(made, positions)
        if len(self.parts.xattrs["inode"]):
            self._give_xattrs(made, positions)
        if len(self.parts.unwritten["inode"]):
            self._give_unwritten(made, positions)
        return made

    def _give_targets(self, made: list[Inode], positions: Array, places: Array) -> None:
        at = self.target_edges[np.searchsorted(self.links, positions[places])]
        for place, start in zip(places.tolist(), at.tolist(), strict=True):
            made[place].target = self.parts.targets[start : start + made[place].size]

    def _give_pages(self, made: list[Inode], positions: Array) -> None:
        low, high = self.edges[positions], self.edges[positions.astype(np.int64) + 1]
        places = np.flatnonzero(high > low)
        low, high = low[places], high[places]
        total, raw = self._pages[positions[places]].tolist(), self._raw
        start, end = (low * RUN_BYTES).tolist(), (high * RUN_BYTES).tolist()
        for number, place in enumerate(places.tolist()):
            made[place].pages = PageMap(raw[start[number] : end[number]], total[number])

    def _give_xattrs(self, made: list[Inode], positions: Array) -> None:
        for place, rows in _owned(self.parts.xattrs["inode"], positions):
            made[place].xattrs = dict(self.xattrs(rows))

    def _give_unwritten(self, made: list[Inode], positions: Array) -> None:
        first, count = (self.parts.unwritten[name].astype(np.int64) for name in ("first", "count"))
        for place, rows in _owned(self.parts.unwritten["inode"], positions):
            part = slice(rows.start, rows.stop)
            raw = np.stack((first[part], first[part], count[part]), axis=1).tobytes()
            made[place].unwritten = PageMap(raw, int(count[part].sum()))

    def xattrs(self, rows: Iterable[int]) -> Iterable[tuple[bytes, bytes]]:
        """Name and value of rows of the xattr columns."""
        sizes, blob = self.parts.xattrs["name_length"], self.parts.values
        for row in rows:
            start, end = self.value_edges[row : row + 2].tolist()
            middle = start + int(sizes[row])
            yield blob[start:middle], blob[middle:end]


def _nobody() -> None:
    """Do nothing."""


def _owned(owner: Array, positions: Array) -> Iterator[tuple[int, range]]:
    """Yield, for each inode that owns rows, its place in `positions` and its rows."""
    low, high = (np.searchsorted(owner, positions.astype(owner.dtype), side) for side in ("left", "right"))
    for place in np.flatnonzero(high > low).tolist():
        yield place, range(int(low[place]), int(high[place]))


def _sums(counts: Array) -> Array:
    """Return 0 and the running sums of counts: the beginning of each, and the end of the last."""
    edges = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=edges[1:])
    return edges


def _pieces(parts: TreeStream, runs: Runs) -> tuple[Array, Array, Array]:
    """Cut the page stream into the files' runs, at every edge of a run and of an extent; see Asleep.

    Return the pieces, the first piece of each inode (and the end), and the pages of each inode. Runs are worked
    through in slices: if no two pages are neighbours there are millions of runs, and memory that is touched for the
    first time costs more than the arithmetic.
    """
    # Shapes: E extents, R runs, C cuts, P = R + C pieces, I inodes.
    # (E,): first file page and pages of each extent. (R,): place in the page stream and first frame of each run.
    first, count = (parts.extents[name].astype(np.int64) for name in ("first", "count"))
    index, pfn = (column.view(np.int64) for column in runs[:2])
    # (E,): where each extent begins in the page stream, and how far ahead of that its file page is.
    begin = np.cumsum(count) - count
    ahead = first - begin
    # (E,): the run in which each extent begins, and whether in the middle of it.
    run = np.searchsorted(index, begin, side="right") - 1
    inside = begin > index[run]
    # (C,): the runs that an extent begins in the middle of, and where in the page stream they are cut.
    cut, cuts = run[inside], begin[inside]
    # (E + 1,): the first piece of each extent, and the number of pieces.
    place = np.append(run + np.cumsum(inside), len(index) + len(cut))
    # (P, 3): file page, frame and pages of each piece, filled a slice of runs at a time.
    pieces = np.empty((int(place[-1]), 3), dtype=np.int64)
    for low in range(0, len(index), _SLICE):
        high = min(low + _SLICE, len(index))
        # The cuts cut[after:before] lie in this slice; `which` are the runs they cut, counted from `low`.
        after, before = np.searchsorted(cut, (low, high)).tolist()
        which = cut[after:before] - low
        # (pieces of the slice,): where each begins and ends in the page stream.
        begins = np.insert(index[low:high], which + 1, cuts[after:before])
        ends = np.append(begins[1:], index[high] if high < len(index) else parts.header.pages)
        # Each cut before a run moves its piece one row on.
        rows = slice(low + after, high + before)
        pieces[rows, 0] = begins + _spread(ahead, place, rows)
        # (runs of the slice,): how many pieces each run becomes; all of them keep its distance of frame and place.
        times = 1 + np.bincount(which, minlength=high - low)
        pieces[rows, 1] = begins + np.repeat(pfn[low:high] - index[low:high], times)
        pieces[rows, 2] = ends - begins
    # (I + 1,): the first extent of each inode, hence its first piece, and by difference its pages.
    extents = _sums(parts.inodes["extents"])
    return pieces, place[extents], np.diff(np.append(begin, parts.header.pages)[extents])


def _spread(values: Array, edges: Array, rows: slice) -> Array:
    """Return the value of each row in a slice, where values[k] is that of the rows from edges[k] to edges[k + 1]."""
    low, high = np.searchsorted(edges, rows.start, side="right") - 1, np.searchsorted(edges, rows.stop)
    return np.repeat(values[low:high], np.diff(np.clip(edges[low : high + 1], rows.start, rows.stop)))
