# SPDX-License-Identifier: GPL-2.0-or-later
"""The description of a damaged tree made to hold its rules: rows that break one are given up, all others stay.

    numbers   inode numbers that do not rise are made anew, and checksums, which name files by them, given up
    kinds     a row of no type, or with what its type cannot have: a directory if names lead through it, else given up
    targets   of symbolic links: one length that is wrong follows from the others; else all are given up
    extents   the same; a file whose pages do not rise is given up
    names     one that cannot be is replaced by damaged-name-N; names whose lengths do not add up are lost
    shape     names that lead nowhere are dropped; files without any name go into the root, as lost-N (N: inode number)
    xattrs    those that cannot be are dropped

A file that is given up keeps its name, so that it can be listed. Link counts and sizes of directories are counted anew.
Columns that say which bytes are whose (lengths) and do not add up in more than one place end the work: nothing after
the first of them could be trusted.

Counterpart: e2fsck(8), passes 1 to 4, and its lost+found
"""

from __future__ import annotations

import stat
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.fs import acl
from pkramfs.fs.protection import KNOWN
from pkramfs.fs.rules import (
    EMPTY_DIRECTORY_SIZE,
    ENTRY_SIZE,
    FIRST_COOKIE,
    MAX_SIZE,
    ROOT_INO,
    TARGET_MAX,
    XATTR_NAME_MAX,
    XATTR_SIZE_MAX,
)
from pkramfs.pkram.treeformat import DAMAGED, SUMS
from pkramfs.spans import among
from pkramfs.units import PAGE_SHIFT, plural

if TYPE_CHECKING:
    from pkramfs.pkram.treeformat import Array, TreeStream

_S_IFMT = np.uint32(0o170000)
_TYPES = [stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]
_NAMESPACES = (b"user.", b"trusted.", b"security.")
_NAMED = 20
"""How many inodes are named."""
_PAGES_MAX = (MAX_SIZE >> PAGE_SHIFT) + 1


def mend(parts: TreeStream) -> tuple[dict[int, str], list[str]]:
    """Mend a description in place; return the places that are given up, with reasons, and other faults.

    FormatError if lengths do not add up. Inodes may be left without a name (fs.verify, deleted).
    """
    work = _Mending(parts)
    for step in (
        work.numbers,
        work.kinds,
        work.targets,
        work.extents,
        work.names,
        work.shape,
        work.counts,
        work.xattrs,
    ):
        step()
    return work.damage, work.problems


class _Mending:
    """A description while it is mended."""

    def __init__(self, parts: TreeStream) -> None:
        self.parts, self.damage, self.problems = parts, dict[int, str](), list[str]()
        for name in ("inodes", "entries", "extents", "xattrs"):
            setattr(parts, name, {key: column.copy() for key, column in getattr(parts, name).items()})
        self.inodes, self.total = parts.inodes, len(parts.inodes["ino"])

    def give_up(self, rows: Array, why: str) -> None:
        """Make rows empty files, which break no rule, and note why."""
        places = np.flatnonzero(rows)
        self.inodes["mode"][places] = stat.S_IFREG
        for name in ("size", "rdev", "flags"):
            self.inodes[name][places] = 0
        for place in places.tolist():
            self.damage.setdefault(place, why)

    @property
    def _kinds(self) -> Array:
        return self.inodes["mode"] & _S_IFMT

    # -- inodes ---------------------------------------------------------------------------------

    def numbers(self) -> None:
        """Have inode numbers rise."""
        ino = self.inodes["ino"]
        if not self.total:
            raise FormatError("Tree inodes", "first row", found="none", expected="the root directory")
        if ino[0] != ROOT_INO or not (ino[1:] > ino[:-1]).all() or ino[-1] >= self.parts.header.next_ino:
            ino[:] = np.arange(self.total) + ROOT_INO
            for section in (SUMS, DAMAGED):  # they name files by these numbers
                setattr(self.parts, section.name, {c.name: np.zeros(0, dtype=c.dtype) for c in section.columns})
            self.problems.append("inode numbers are damaged, and made anew; checksums of data are not compared")

    def kinds(self) -> None:
        """Make inodes with entries directories, and give up inodes that break the rules of their type."""
        mode, size, parent = self.inodes["mode"], self.inodes["size"], self.parts.entries["parent"]
        holds = np.bincount(parent[parent < self.total], minlength=self.total) > 0
        holds[0] = True
        stored, kinds = self.inodes["extents"] > 0, self._kinds
        known = among(kinds, _TYPES) & (mode < 1 << 16)
        special = among(kinds, [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
        folder = holds & ~stored & (kinds != stat.S_IFDIR) & (~known | (special & (size > 0)))
        folder[0] = kinds[0] != stat.S_IFDIR
        mode[folder] = stat.S_IFDIR | np.where(mode[folder] & 0o777, mode[folder] & 0o7777, 0o700)
        for place in np.flatnonzero(folder).tolist():
            self.problems.append(f"inode {int(self.inodes['ino'][place])}: no type; names lead through it: a directory")
        kinds = self._kinds
        directory = kinds == stat.S_IFDIR
        self.inodes["rdev"][directory] = 0
        self.inodes["flags"][directory] &= np.uint32(KNOWN)
        device = among(kinds, [stat.S_IFCHR, stat.S_IFBLK])
        self.typeless = ~known & ~folder & ~stored
        self._was = size.copy()
        self.give_up(~known & ~folder | (stored & (kinds != stat.S_IFREG)), "its type is damaged")
        self.give_up(~directory & (self.inodes["rdev"] != 0) & ~device, "its device number is damaged")
        self.give_up(~directory & (self.inodes["flags"] & ~np.uint32(KNOWN) != 0), "its flags are damaged")
        wrong = (size > MAX_SIZE) | (special & (size > 0))
        self.give_up(~directory & wrong & (kinds != stat.S_IFLNK), "its size is damaged")

    def targets(self) -> None:
        """Have the lengths of targets add up, or give all symbolic links up."""
        size, whole = self.inodes["size"], len(self.parts.targets)
        for more in (np.zeros(self.total, dtype=bool), self.typeless & (self._was > 0) & (self._was <= TARGET_MAX)):
            links = (self._kinds == stat.S_IFLNK) | more
            sizes = np.where(more, self._was, size)
            wrong = links & ((sizes == 0) | (sizes > TARGET_MAX))
            left = whole - int(sizes[links & ~wrong].sum())
            if np.count_nonzero(wrong) == 1 and 0 < left <= TARGET_MAX:
                sizes[wrong], wrong, left = left, np.zeros_like(wrong), 0
            if not left and not wrong.any():
                self.inodes["mode"][more] = stat.S_IFLNK | 0o777  # given up: only their targets' room counts
                size[links] = sizes[links]
                return
        self.give_up(self._kinds == stat.S_IFLNK, "where symbolic links lead to is damaged")
        self.parts.targets = b""

    def extents(self) -> None:
        """Have extents add up, and give up files whose extents do not rise."""
        first, count, per_inode = *(self.parts.extents[name] for name in ("first", "count")), self.inodes["extents"]
        if int(per_inode.sum(dtype=np.int64)) != len(first):
            raise FormatError("Tree", "extents of all files", found=int(per_inode.sum()), expected=len(first))
        wrong = (count == 0) | (count > _PAGES_MAX)
        left = int(self.parts.header.pages) - int(count[~wrong].sum())
        if np.count_nonzero(wrong) == 1 and 0 < left <= _PAGES_MAX:
            count[wrong], left = left, 0
        if left or np.count_nonzero(wrong) > 1:
            raise FormatError("Tree", "pages of all extents", found=left, expected="as many as are stored")
        owner = np.repeat(np.arange(self.total), per_inode)
        good = first <= np.uint64(_PAGES_MAX) - count
        good[1:] &= (owner[1:] != owner[:-1]) | (first[1:] >= first[:-1] + count[:-1])
        bad = np.zeros(self.total, dtype=bool)
        bad[owner[~good]] = True
        self.give_up(bad, "where its pages belong is damaged")
        rows = bad[owner]
        ends = np.cumsum(count)
        first[rows] = (ends - count)[rows]  # anything that rises

    # -- names ----------------------------------------------------------------------------------

    def names(self) -> None:
        """Replace names that cannot be."""
        length, blob = self.parts.entries["length"].astype(np.int64), self.parts.names
        known = np.ones(len(length), dtype=bool)
        starts = np.cumsum(length) - length
        if int(length.sum()) != len(blob) or not (length > 0).all():
            none = np.flatnonzero(length == 0)
            known[:] = False  # one length is wrong, and it is not known which; only lengths of 0 are certain
            if len(none):
                behind = np.arange(len(length)) > none[-1]
                starts = np.where(behind, len(blob) - int(length.sum()) + starts, starts)
                known[: none[0]], known[behind] = True, True
        edges = zip(starts.tolist(), length.tolist(), known.tolist(), strict=True)
        self._names = [blob[at : at + size] if good else b"" for at, size, good in edges]
        bad = 0
        for row, name in enumerate(self._names):
            if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
                self._names[row] = b"damaged-name-%d" % row
                bad += 1
        if bad:
            self.problems.append(f"{plural(bad, 'name')} cannot be read: damaged-name-N stands for each")

    def shape(self) -> None:
        """Drop names that lead nowhere, and give those a name that have none left."""
        parent, child = (self.parts.entries[name].astype(np.int64) for name in ("parent", "child"))
        folder = self._kinds == stat.S_IFDIR
        keep = (parent < self.total) & (child > 0) & (child < self.total)
        keep[keep] &= folder[parent[keep]]
        keep[keep] = _rising(parent[keep])
        keep &= _first_of_each(child, keep & folder[np.where(keep, child, 0)])
        keep &= self._once(parent, keep)
        keep &= ~self._circling(parent, child, keep, folder)
        if dropped := int(np.count_nonzero(~keep)):
            self.problems.append(f"{plural(dropped, 'name')} led nowhere")
        nameless = np.bincount(child[keep], minlength=self.total) == 0
        nameless[0] = False
        lost = np.flatnonzero(nameless)
        if len(lost):
            self.problems.append(f"{plural(len(lost), 'file')} without a name: in the root, as lost-N")
        at = int(np.searchsorted(parent[keep], 0, side="right"))
        names = [name for name, good in zip(self._names, keep.tolist(), strict=True) if good]
        others = {*names[:at]}
        names[at:at] = [self._lost_name(place, others) for place in lost.tolist()]
        columns = {
            "parent": np.insert(parent[keep], at, np.zeros_like(lost)),
            "child": np.insert(child[keep], at, lost),
        }
        columns |= {
            "cookie": np.arange(len(names)) + FIRST_COOKIE,
            "length": np.array([*map(len, names)], dtype=np.int64),
        }
        old = self.parts.entries
        self.parts.entries = {name: columns[name].astype(old[name].dtype) for name in old}
        self.parts.names = b"".join(names)

    def _lost_name(self, place: int, others: set[bytes]) -> bytes:
        """Return a new name for a file without one, unique in the root."""
        name = b"lost-%d" % int(self.inodes["ino"][place])
        while name in others:
            name += b"~"
        return name

    def _once(self, parent: Array, keep: Array) -> Array:
        """Return False for names that their directory has already."""
        seen, found = set[tuple[int, bytes]](), np.ones(len(parent), dtype=bool)
        for row in np.flatnonzero(keep).tolist():
            name = int(parent[row]), self._names[row]
            found[row] = name not in seen
            seen.add(name)
        return found

    def _circling(self, parent: Array, child: Array, keep: Array, folder: Array) -> Array:
        """Return the rows that name directories from which no way leads up to the root."""
        down = np.flatnonzero(keep)
        down = down[folder[child[down]]]
        up = np.zeros(self.total, dtype=np.int64)
        up[child[down]] = parent[down]
        for _ in range(max(self.total.bit_length(), 1)):
            up = up[up]
        found = np.zeros(len(parent), dtype=bool)
        found[down] = up[child[down]] != 0
        return found

    def counts(self) -> None:
        """Count names, subdirectories and entries anew."""
        parent, child = self.parts.entries["parent"], self.parts.entries["child"]
        folder = self._kinds == stat.S_IFDIR
        entries = np.bincount(parent, minlength=self.total)
        below = np.bincount(parent[folder[child]], minlength=self.total)
        self.inodes["nlink"][:] = np.where(folder, 2 + below, np.bincount(child, minlength=self.total))
        self.inodes["size"][folder] = (EMPTY_DIRECTORY_SIZE + ENTRY_SIZE * entries)[folder]

    # -- extended attributes --------------------------------------------------------------------

    def xattrs(self) -> None:
        """Drop extended attributes that cannot be."""
        owner, names, values = (self.parts.xattrs[name].tolist() for name in ("inode", "name_length", "value_length"))
        blob, at, last = self.parts.values, 0, 0
        if sum(names) + sum(values) != len(blob):
            return  # all of them are given up, elsewhere
        kept, lacking = list[tuple[int, bytes, bytes]](), set[int]()
        for place, name_size, value_size in zip(owner, names, values, strict=True):
            name, value = blob[at : at + name_size], blob[at + name_size : at + name_size + value_size]
            at += name_size + value_size
            if last <= place < self.total and _is_xattr(name, value):
                kept.append((place, name, value))
                last = place
            elif place < self.total:
                lacking.add(int(self.inodes["ino"][place]))
        if dropped := len(owner) - len(kept):
            whose = ", ".join(map(str, sorted(lacking)[:_NAMED])) or "?"
            self.problems.append(f"{plural(dropped, 'extended attribute')} given up, of inodes {whose}")
            rows: dict[str, Any] = {"inode": [], "name_length": [], "value_length": []}
            for place, name, value in kept:
                for column, number in zip(rows.values(), (place, len(name), len(value)), strict=True):
                    column.append(number)
            old = self.parts.xattrs
            self.parts.xattrs = {name: np.array(rows[name], dtype=old[name].dtype) for name in old}
            self.parts.values = b"".join(name + value for _, name, value in kept)


def _rising(values: Array) -> Array:
    """Return a mask of as many values as possible that do not fall (the longest such subsequence)."""
    if (values[1:] >= values[:-1]).all():
        return np.ones(len(values), dtype=bool)
    tails, rows, before = list[int](), list[int](), np.full(len(values), -1)
    for row, value in enumerate(values.tolist()):
        at = bisect_right(tails, value)
        tails[at : at + 1], rows[at : at + 1] = [value], [row]
        before[row] = rows[at - 1] if at else -1
    found, row = np.zeros(len(values), dtype=bool), rows[-1]
    while row >= 0:
        found[row] = True
        row = int(before[row])
    return found


def _first_of_each(values: Array, which: Array) -> Array:
    """Return False for those of the rows `which` whose value an earlier one of them has."""
    rows = np.flatnonzero(which)
    _, first = np.unique(values[rows], return_index=True)
    found = np.ones(len(values), dtype=bool)
    found[rows] = False
    found[rows[first]] = True
    return found


def _is_xattr(name: bytes, value: bytes) -> bool:
    """Return True for an extended attribute that a file can have."""
    if not 0 < len(name) <= XATTR_NAME_MAX or len(value) > XATTR_SIZE_MAX:
        return False
    if name not in (acl.ACCESS, acl.DEFAULT):
        return b"\0" not in name and name.startswith(_NAMESPACES)
    try:
        return bool(acl.parse(value))
    except OSError:
        return False
