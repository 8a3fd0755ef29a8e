# SPDX-License-Identifier: GPL-2.0-or-later
"""A frozen tree as the columns of treeformat: awake inodes from their objects, sleeping ones from their columns.

    awake inodes ──┐                          ┌── positions: inodes of both, by inode number
                   ├──▶ merged by position ──▶│   names, extents, xattrs, targets: those of the first inode first
    asleep ────────┘                          └── the same as if all inodes were awake

Nothing is woken to be saved, and a tree without lookups is mostly copied. The work is done in a
few steps, between which a caller may do something else. An inode that wakes meanwhile is saved as it slept.

Kernel: mm/shmem_pkram.c (shmem_save_pkram), patches 24 and 38: inode by inode
"""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterator
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from pkramfs.fs import collector
from pkramfs.fs.asleep import SleepingDirectory
from pkramfs.fs.directory import Directory
from pkramfs.fs.inode import FIELDS, Inode
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.pieces import pieces_of
from pkramfs.pkram.treeformat import DAMAGED, SUMS, Array, Columns
from pkramfs.spans import among

if TYPE_CHECKING:
    from pkramfs.fs.asleep import Snapshot
    from pkramfs.fs.tree import Tree
    from pkramfs.pkram.streams.runs import Runs

T = TypeVar("T")

_Rows = tuple[Columns, list[tuple[int, bytes]]]
"""Columns, and pieces of the blob that belongs to them, each with the place of its owner."""
_STEP = 1 << 12
"""Inodes that are read together: what is read of them, and what it becomes, stays in the cache."""
_NO_PAGES = PageMap()
_NOTHING = np.empty(0, dtype=np.uint64)


class Progress(NamedTuple):
    """The progress of long work: `done` of `total` steps of this stage."""

    stage: str
    done: int
    total: int


def complete(work: Generator[Progress, None, T]) -> T:
    """Run long work to its end and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            value: T = done.value
            return value


class Picture(NamedTuple):
    """A tree as columns."""

    columns: dict[str, Columns]
    blobs: dict[str, bytes]
    runs: Array  # rows of (file index, pfn, count), all files after one another
    unsummed: int | None = None  # number of pieces without a checksum; None if no checksums are made

    def page_stream(self) -> Runs:
        """Return (index, pfn, count) of all runs, by their place in the stream of all files' pages."""
        pfn, count = self.runs[:, 1].astype(np.uint64), self.runs[:, 2].astype(np.uint64)
        return np.cumsum(count, dtype=np.uint64) - count, pfn, count


class _Inodes(NamedTuple):
    """Inodes with an object, by number, and the place of each among all; and the sleeping rest, if there is one."""

    awake: list[Inode]
    kinds: Array
    places: Array
    numbers: Array
    rest: _Rest | None

    def of_kind(self, kind: int) -> tuple[Array, list[Inode]]:
        """Return the places and objects of the awake inodes of a kind."""
        found = np.flatnonzero(self.kinds == kind)
        return self.places[found], [self.awake[number] for number in found.tolist()]

    def with_names(self) -> Iterator[tuple[int, Directory]]:
        """Return places and names of the directories whose names were awake when the picture was begun.

        Without the rest, of those that sleep the names that they have beside those in their columns.
        """
        places, folders = self.of_kind(stat.S_IFDIR)
        if self.rest is None:
            pairs = zip(places.tolist(), map(_awake_names, folders), strict=True)
            return ((place, names) for place, names in pairs if names is not None)
        named = ((place, inode.entries) for place, inode in zip(places.tolist(), folders, strict=True))
        slept = self.rest.slept(np.array([inode.ino for inode in folders], dtype=np.uint64))
        return compress(named, (~slept).tolist())  # type: ignore[arg-type]


class _Rest:
    """The sleeping part, and the place among all of each inode of the columns (meaningless for one that is gone)."""

    def __init__(self, snapshot: Snapshot, numbers: Array) -> None:
        self.packed, self.parts = snapshot.packed, snapshot.packed.parts
        self.inodes, self.folders = snapshot.inodes, snapshot.folders
        self.places = np.searchsorted(numbers, self.parts.inodes["ino"])

    def slept(self, numbers: Array) -> Array:
        """Return a mask of the directories (by inode number) whose names slept when the picture was begun."""
        known = self.parts.inodes["ino"]
        at = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
        found: Array = (known[at] == numbers) & self.folders[at]
        return found


def take(tree: Tree, *, deleted: bool = False) -> Generator[Progress, None, Picture]:
    """Collect all columns of a frozen tree, in a few steps; with `deleted` also inodes without a name."""
    if tree.asleep is not None:
        tree.asleep.wake_amended()
    found = [inode for inode in tree.inodes.values() if inode.nlink or deleted]
    snapshot = tree.asleep.snapshot() if tree.asleep is not None else None
    total = len(found) + (snapshot.sleepers if snapshot is not None else 0)
    yield Progress("inodes", 0, total)
    with collector.paused():
        inodes, table = _inode_columns(found, snapshot)
    yield Progress("names", 0, total)
    with collector.paused():
        entries, names = _entry_columns(inodes)
    yield Progress("extents", 0, total)
    with collector.paused():
        extents, runs = _extent_columns(inodes, table)
        xattrs, values = _xattr_columns(inodes)
        unwritten = _unwritten_columns(inodes)
        targets = _targets(inodes)
        sums, unsummed = _sum_columns(tree, table, extents)
    return Picture(
        {"inodes": table, "entries": entries, "extents": extents, "xattrs": xattrs, "unwritten": unwritten, **sums},
        {"names": names, "targets": targets, "values": values},
        runs,
        unsummed,
    )


def take_awake(tree: Tree) -> Picture:
    """Collect the columns of awake inodes, deleted ones too, without sleeping names; but the sums of all inodes."""
    with collector.paused():
        inodes, table = _inode_columns(list(tree.inodes.values()), None)
        entries, names = _entry_columns(inodes)
        extents, runs = _extent_columns(inodes, table)
        xattrs, values = _xattr_columns(inodes)
        unwritten, targets = _unwritten_columns(inodes), _targets(inodes)
        sums = _no_sums() if tree.sums is None else tree.sums.columns()
    return Picture(
        {"inodes": table, "entries": entries, "extents": extents, "xattrs": xattrs, "unwritten": unwritten, **sums},
        {"names": names, "targets": targets, "values": values},
        runs,
    )


# -- inodes -----------------------------------------------------------------------------------------


def _inode_columns(found: list[Inode], snapshot: Snapshot | None) -> tuple[_Inodes, Columns]:
    fields = _fields(found)
    if (fields[0, 1:] < fields[0, :-1]).any():  # they woke in another order than they were made
        order = np.argsort(fields[0], kind="stable")
        fields, found = fields[:, order], [found[place] for place in order.tolist()]
    table: Columns = dict(zip(FIELDS, fields, strict=True))
    kinds = table["mode"] & 0o170000
    if snapshot is None:
        return _Inodes(found, kinds, np.arange(len(found)), fields[0].view(np.uint64), None), table
    asleep = snapshot.packed.parts.inodes
    table = {name: np.concatenate((table[name], asleep[name][snapshot.inodes].astype(np.int64))) for name in FIELDS}
    order = np.argsort(table["ino"], kind="stable")
    table = {name: column[order] for name, column in table.items()}
    numbers = table["ino"].view(np.uint64)
    places = np.searchsorted(numbers, fields[0].view(np.uint64))
    return _Inodes(found, kinds, places, numbers, _Rest(snapshot, numbers)), table


def _fields(inodes: list[Inode]) -> Array:
    """Return a row for each of FIELDS."""
    values, read = np.empty((len(FIELDS), len(inodes)), dtype=np.int64), attrgetter(*FIELDS)
    for low in range(0, len(inodes), _STEP):
        some = inodes[low : low + _STEP]
        flat = np.fromiter(chain.from_iterable(map(read, some)), np.int64, len(some) * len(FIELDS))
        values[:, low : low + len(some)] = flat.reshape(len(some), -1).T
    return values


# -- names ------------------------------------------------------------------------------------------


def _entry_columns(inodes: _Inodes) -> tuple[Columns, bytes]:
    """Return the names of all directories, oldest first in each."""
    asleep = _sleeping_entries(inodes.rest) if inodes.rest is not None else None
    return _merged(_awake_entries(inodes), asleep, "parent")


def _awake_entries(inodes: _Inodes) -> _Rows:
    parts, chunks = [_name_columns([], [], [], [], [])], list[tuple[int, bytes]]()
    for folders in _folders(inodes):
        names, children, cookies = list[bytes](), list[Inode](), list[int]()
        for place, entries in folders:
            more, below, numbers = entries.columns()
            names += more
            children += below
            cookies += numbers
            chunks.append((place, b"".join(more)))
        places, sizes = [place for place, _ in folders], [len(entries) for _, entries in folders]
        parts.append(_name_columns(names, children, cookies, places, sizes))
    columns: Columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns["child"] = _places(inodes.numbers, columns["child"])
    return columns, chunks


def _awake_names(folder: Inode) -> Directory | None:
    """Return the names of a directory that are awake."""
    entries = folder.entries
    return entries.added if isinstance(entries, SleepingDirectory) else entries


def _places(numbers: Array, wanted: Array) -> Array:
    """Return the place of each wanted number among ascending numbers; their length for one that is not there."""
    places = np.searchsorted(numbers, wanted)
    places[numbers[np.minimum(places, len(numbers) - 1)] != wanted] = len(numbers)
    return places


def _folders(inodes: _Inodes) -> Iterator[list[tuple[int, Directory]]]:
    """Yield the directories with names, and their places: several at a time, with _STEP names or somewhat more."""
    some, number = list[tuple[int, Directory]](), 0
    for place, entries in inodes.with_names():
        if size := len(entries):
            some.append((place, entries))
            number += size
        if number >= _STEP:
            yield some
            some, number = [], 0
    if some:
        yield some


def _name_columns(
    names: list[bytes], children: list[Inode], cookies: list[int], places: list[int], sizes: list[int]
) -> Columns:
    """Return columns of names in directories at `places`, `sizes[k]` in the k-th; children are inode numbers."""
    return {
        "parent": np.repeat(np.array(places, dtype=np.int64), sizes),
        "child": np.fromiter(map(attrgetter("ino"), children), np.uint64, len(children)),
        "cookie": np.array(cookies, dtype=np.int64),
        "length": np.fromiter(map(len, names), np.uint8, len(names)),
    }


def _sleeping_entries(rest: _Rest) -> _Rows:
    entries, edges = rest.parts.entries, rest.packed.name_edges
    rows = np.flatnonzero(rest.folders[entries["parent"]])
    parents = rest.places[entries["parent"][rows]]
    columns: Columns = {
        "parent": parents,
        "child": rest.places[entries["child"][rows]],
        "cookie": entries["cookie"][rows].astype(np.int64),
        "length": entries["length"][rows],
    }
    return columns, _chunks(rest.parts.names, edges, rows, parents)


def _chunks(blob: bytes, edges: Array, rows: Array, places: Array) -> list[tuple[int, bytes]]:
    """Cut the bytes of rows from a blob: a piece for each stretch without a gap, with the place of its owner.

    Owners may share a stretch only if nothing comes between them, so a stretch ends where places jump, too.
    """
    if not len(rows):
        return []
    # (stretches - 1,): the rows with which a new stretch begins; (stretches,): first and last row of each.
    fresh = np.flatnonzero((rows[1:] != rows[:-1] + 1) | (places[1:] > places[:-1] + 1)) + 1
    first, last = np.append(0, fresh), np.append(fresh - 1, len(rows) - 1)
    spans = zip(places[first].tolist(), edges[rows[first]].tolist(), edges[rows[last] + 1].tolist(), strict=True)
    return [(place, blob[start:end]) for place, start, end in spans]


def _merged(awake: _Rows, asleep: _Rows | None, owner: str) -> tuple[Columns, bytes]:
    """Merge rows of both by the place of their owner, and join the blob that belongs to them."""
    columns, chunks = awake
    if asleep is not None:
        chunks = chunks + asleep[1]
        columns = {name: np.concatenate((columns[name], asleep[0][name])) for name in columns}
        order = _order(columns[owner])
        if order is not None:
            columns = {name: column[order] for name, column in columns.items()}
    return columns, _in_place(chunks)


def _in_place(chunks: list[tuple[int, bytes]]) -> bytes:
    """Join pieces of a blob, by the place of their owner."""
    return b"".join([part for _, part in sorted(chunks, key=itemgetter(0))])


def _order(owners: Array) -> Array | None:
    """Return the stable order of rows by the place of their owner; None if they are sorted."""
    return np.argsort(owners, kind="stable") if (owners[1:] < owners[:-1]).any() else None


# -- pages ------------------------------------------------------------------------------------------


def _extent_columns(inodes: _Inodes, table: Columns) -> tuple[Columns, Array]:
    """Return the extents (a new one after every hole), and all runs one after the other."""
    runs, owner = _awake_runs(inodes)
    if inodes.rest is not None:
        asleep, owners = _sleeping_runs(inodes.rest)
        runs, owner = np.concatenate((runs, asleep)), np.concatenate((owner, owners))
        order = _order(owner)
        if order is not None:
            runs, owner = runs[order], owner[order]
    # (runs,): the file page behind each run, and a mask of the runs that begin an extent: of another file than the
    # run before, or after a hole.
    ends = runs[:, 0] + runs[:, 2]
    fresh = np.ones(len(runs), dtype=bool)
    fresh[1:] = (owner[1:] != owner[:-1]) | (runs[1:, 0] != ends[:-1])
    # (extents,): the first run of each; (inodes,): extents of each inode; (extents,): pages of each.
    starts = np.flatnonzero(fresh)
    table["extents"] = np.bincount(owner[starts], minlength=len(inodes.numbers))
    counts = np.add.reduceat(runs[:, 2], starts) if len(starts) else runs[:, 2]
    return {"first": runs[starts, 0], "count": counts}, runs


def _awake_runs(inodes: _Inodes) -> tuple[Array, Array]:
    """Return the runs of files that are awake, and the place of the file of each."""
    lengths, parts = np.zeros(len(inodes.awake), dtype=np.int64), []
    for low in range(0, len(inodes.awake), _STEP):
        maps = [inode.pages or _NO_PAGES for inode in inodes.awake[low : low + _STEP]]
        lengths[low : low + _STEP] = np.fromiter(map(attrgetter("runs"), maps), np.int64, len(maps))
        parts.append(b"".join(chain.from_iterable(map(attrgetter("leaves"), maps))))
    return np.frombuffer(b"".join(parts), dtype=np.int64).reshape(-1, 3), np.repeat(inodes.places, lengths)


def _sleeping_runs(rest: _Rest) -> tuple[Array, Array]:
    lengths = np.diff(rest.packed.edges)
    asleep = np.repeat(rest.inodes, lengths)
    return rest.packed.pieces[asleep], np.repeat(rest.places, lengths)[asleep]


def _unwritten_columns(inodes: _Inodes) -> Columns:
    """Return which pages were allocated and never written, by inode."""
    awake = zip(inodes.places.tolist(), inodes.awake, strict=True)
    owners = [(place, inode.unwritten) for place, inode in awake if inode.unwritten is not None]
    raw = b"".join(chain.from_iterable(pages.leaves for _, pages in owners))
    runs = np.frombuffer(raw, dtype=np.int64).reshape(-1, 3)
    places = np.array([place for place, _ in owners], dtype=np.int64)
    columns: Columns = {
        "inode": np.repeat(places, [pages.runs for _, pages in owners]),
        "first": runs[:, 0],
        "count": runs[:, 2],
    }
    if inodes.rest is None:
        return columns
    table = inodes.rest.parts.unwritten
    rows = np.flatnonzero(inodes.rest.inodes[table["inode"]])
    asleep = {"inode": inodes.rest.places[table["inode"][rows]]}
    asleep |= {name: table[name][rows].astype(np.int64) for name in ("first", "count")}
    return _merged((columns, []), (asleep, []), "inode")[0]


def _sum_columns(tree: Tree, table: Columns, extents: Columns) -> tuple[dict[str, Columns], int | None]:
    """Return checksums and damage of the data of all inodes in the table, and the number of pieces without a sum."""
    if tree.sums is None:
        return _no_sums(), None
    found = tree.sums.columns()
    if tree.orphans:  # sums of these may not exist
        for name, columns in found.items():
            keep = among(columns["ino"], table["ino"].view(np.uint64))
            found[name] = {column: values[keep] for column, values in columns.items()}
    owner = np.repeat(np.arange(len(table["ino"])), table["extents"])
    pieces = len(pieces_of(owner, extents["first"], extents["count"])[0])
    return found, pieces - len(found["sums"]["ino"]) - len(found["damaged"]["ino"])


def _no_sums() -> dict[str, Columns]:
    return {section.name: {column.name: _NOTHING for column in section.columns} for section in (SUMS, DAMAGED)}


# -- the rest ---------------------------------------------------------------------------------------


def _xattr_columns(inodes: _Inodes) -> tuple[Columns, bytes]:
    """Return the names and values, by inode."""
    asleep = _sleeping_xattrs(inodes.rest) if inodes.rest is not None else None
    return _merged(_awake_xattrs(inodes), asleep, "inode")


def _awake_xattrs(inodes: _Inodes) -> _Rows:
    owners = [inode for inode in inodes.awake if inode.xattrs]
    places = np.searchsorted(inodes.numbers, np.array([inode.ino for inode in owners], dtype=np.uint64)).tolist()
    rows = [
        (place, name, value)
        for place, inode in zip(places, owners, strict=True)
        for name, value in (inode.xattrs or {}).items()
    ]
    columns: Columns = {
        "inode": np.array([place for place, _, _ in rows], dtype=np.int64),
        "name_length": np.array([len(name) for _, name, _ in rows], dtype=np.int64),
        "value_length": np.array([len(value) for _, _, value in rows], dtype=np.int64),
    }
    return columns, [(place, name + value) for place, name, value in rows]


def _sleeping_xattrs(rest: _Rest) -> _Rows:
    table = rest.parts.xattrs
    rows = np.flatnonzero(rest.inodes[table["inode"]])
    places = rest.places[table["inode"][rows]]
    columns: Columns = {"inode": places}
    columns |= {name: table[name][rows].astype(np.int64) for name in ("name_length", "value_length")}
    return columns, _chunks(rest.parts.values, rest.packed.value_edges, rows, places)


def _targets(inodes: _Inodes) -> bytes:
    """Join the targets of all symbolic links."""
    places, links = inodes.of_kind(stat.S_IFLNK)
    chunks = [(place, inode.target or b"") for place, inode in zip(places.tolist(), links, strict=True)]
    if inodes.rest is not None:
        rest = inodes.rest
        rows = np.flatnonzero(rest.inodes[rest.packed.links])
        places = rest.places[rest.packed.links[rows]]
        chunks += _chunks(rest.parts.targets, rest.packed.target_edges, rows, places)
    return _in_place(chunks)
