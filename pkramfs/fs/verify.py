# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of a tree, all checked on the contents of a node before a single frame is taken.

PKRAM trusts the data that it loads: a name with a slash, a directory inside itself or a frame that two files
share would all be restored. Here a restore begins with these checks. They assume only that the
lengths of the columns agree (TreeStream), and work on whole columns, so that a million
files take a fraction of a second. An error names column, row, the value found and the value expected.

    names     1 to 255 bytes, no NUL, no slash, not `.` and not `..`, each once in its directory
    shape     one root; every other directory has exactly one name, and the way up ends at the root
    links     a file has as many names as it says, a directory 2 and one for each subdirectory
    extents   only in regular files, rising, not overlapping, all pages of the stream and no more
    unwritten each run inside one extent of its file, rising, not overlapping
    frames    inside the page blocks of this tree, none used twice
    sums      of regular files, one for each piece; the same for damage

PKRAM itself checks nothing here (defects D1 and D34).
"""

from __future__ import annotations

import stat
from typing import Any, NamedTuple

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.fs import acl
from pkramfs.fs.pieces import KEY_SHIFT
from pkramfs.fs.protection import KNOWN
from pkramfs.fs.rules import (
    EMPTY_DIRECTORY_SIZE,
    ENTRY_SIZE,
    FIRST_COOKIE,
    INO_MASK,
    MAX_SIZE,
    ROOT_INO,
    TARGET_MAX,
    XATTR_NAME_MAX,
    XATTR_SIZE_MAX,
)
from pkramfs.pkram.streams.runs import Runs
from pkramfs.pkram.treeformat import Array, TreeStream
from pkramfs.spans import Spans, among
from pkramfs.units import PAGE_SHIFT

_SIZED = [stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK]
_DEVICES = [stat.S_IFCHR, stat.S_IFBLK]
_TYPES = [*_SIZED, *_DEVICES, stat.S_IFIFO, stat.S_IFSOCK]
_WEIGHTS = np.arange(1, 258, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_WEIGHTS = (_WEIGHTS ^ _WEIGHTS >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
_WEIGHTS = (_WEIGHTS ^ _WEIGHTS >> np.uint64(27)) * np.uint64(0x94D049BB133111EB) | np.uint64(1)
"""Odd numbers without a pattern (SplitMix64): numpy.random takes 10 ms to import, and 3 MiB."""
_HASHED, _WORD = 1 << 14, 8
_LETTERS = np.array([(1 << 8 * letters) - 1 for letters in range(_WORD + 1)], dtype=np.uint64)
"""What of a word are its first letters."""
_NAMESPACES = (b"user.", b"trusted.", b"security.")


class Beyond(NamedTuple):
    """The part of a tree that the columns leave out: for each inode of the columns, its names there, and of its own
    entries there their number, and the number of directories among them."""

    names: Array
    entries: Array
    folders: Array


def verify(tree: TreeStream, runs: Runs, allowed: Spans, used: Spans | None = None, *, deleted: bool = False) -> None:
    """Raise FormatError unless columns and page stream are a tree whose frames lie in `allowed`.

    With `deleted`, inodes without a name are allowed: programs may have them open.
    `used` are the frames of the runs, if they are known: from millions of runs they take seconds to sort.
    """
    verify_columns(tree, deleted=deleted)
    _verify_frames(tree, runs, allowed, used)


def verify_columns(tree: TreeStream, beyond: Beyond | None = None, *, deleted: bool = False) -> None:
    """Raise FormatError unless columns are a tree, as `verify` does, or a tree without the part `beyond`."""
    kinds = tree.inodes["mode"] & np.uint32(0o170000)
    if beyond is None:
        nothing = np.zeros(len(kinds), dtype=np.int64)
        beyond = Beyond(nothing, nothing, nothing)
    _verify_inodes(tree, kinds)
    _verify_names(tree)
    _verify_shape(tree, kinds, beyond, deleted)
    _verify_each_name_once(tree)
    _verify_links(tree, kinds, beyond, deleted)
    _verify_extents(tree, kinds)
    _verify_unwritten(tree)
    _verify_xattrs(tree)
    _verify_pieces(tree, kinds, "sums")
    _verify_pieces(tree, kinds, "damaged")


def _require(good: Array, record: str, field: str, values: Array, expected: str) -> None:
    """Raise FormatError naming the first row that is not `good`."""
    if not good.all():
        row = int(np.argmin(good))
        raise FormatError(f"Tree {record}", f"{field} of row {row}", found=values[row], expected=expected)


def _require_equal(found: Any, expected: Any, field: str) -> None:
    if int(found) != int(expected):
        raise FormatError("Tree", field, found=int(found), expected=int(expected))


def _verify_inodes(tree: TreeStream, kinds: Array) -> None:
    inodes = tree.inodes
    ino, mode, size, rdev = inodes["ino"], inodes["mode"], inodes["size"], inodes["rdev"]
    if not len(ino) or ino[0] != ROOT_INO or kinds[0] != stat.S_IFDIR:
        raise FormatError("Tree inodes", "first row", found="something else", expected="the root directory")
    rising = np.concatenate(([True], ino[1:] > ino[:-1]))
    _require(rising, "inodes", "ino", ino, "more than the row before")
    _require(ino < tree.header.next_ino, "inodes", "ino", ino, f"less than next_ino {tree.header.next_ino}")
    if tree.header.next_ino > INO_MASK:
        raise FormatError("Tree", "next_ino", found=tree.header.next_ino, expected=f"at most {INO_MASK}")
    _require(_is_one(kinds, _TYPES) & (mode < 1 << 16), "inodes", "mode", mode, "a file type and permissions")
    _require((rdev == 0) | _is_one(kinds, _DEVICES), "inodes", "rdev", rdev, "0, this is no device")
    _require(size <= MAX_SIZE, "inodes", "size", size, f"at most {MAX_SIZE}")
    _require(inodes["flags"] & ~np.uint32(KNOWN) == 0, "inodes", "flags", inodes["flags"], "flags that tmpfs has")
    _require((size == 0) | _is_one(kinds, _SIZED), "inodes", "size", size, "0 for a special file")
    links = kinds == stat.S_IFLNK
    _require(~links | ((size > 0) & (size <= TARGET_MAX)), "inodes", "size", size, f"a target of 1 to {TARGET_MAX}")
    _require_equal(size[links].sum(), len(tree.targets), "bytes of all targets")


def _is_one(kinds: Array, types: list[int]) -> Array:
    """Return a mask of the kinds that are one of these types."""
    known = np.zeros(16, dtype=bool)
    known[np.array(types) >> 12] = True
    found: Array = known[kinds >> np.uint32(12)]
    return found


def _verify_names(tree: TreeStream) -> None:
    length = tree.entries["length"].astype(np.int64)
    _require(length > 0, "entries", "length", length, "a name of 1 to 255 bytes")
    _require_equal(length.sum(), len(tree.names), "bytes of all names")
    letters = np.frombuffer(tree.names, dtype=np.uint8)
    ends = np.cumsum(length)
    starts = ends - length
    for what, letter in (("slash", ord("/")), ("NUL", 0)):
        at = np.flatnonzero(letters == letter)
        if len(at):
            row = int(np.searchsorted(ends, at[0], side="right"))
            name = tree.names[int(starts[row]) : int(ends[row])]
            raise FormatError("Tree entries", f"name of row {row}", found=name, expected=f"a name without {what}")
    dots = (length <= 2) & (letters[starts] == ord(".")) & (letters[ends - 1] == ord("."))
    _require(~dots, "entries", "name", length, "a name other than . and ..")


def _verify_shape(tree: TreeStream, kinds: Array, beyond: Beyond, deleted: bool) -> None:
    """Require one name for every directory but the root, and a way up that ends at the root."""
    entries, total = tree.entries, len(kinds)
    parent, child, cookie = entries["parent"], entries["child"], entries["cookie"]
    _require(parent < total, "entries", "parent", parent, f"less than {total}")
    _require(child < total, "entries", "child", child, f"less than {total}")
    folder = kinds == stat.S_IFDIR
    _require(folder[parent], "entries", "parent", parent, "the position of a directory")
    same = parent[1:] == parent[:-1]
    _require(np.concatenate(([True], parent[1:] >= parent[:-1])), "entries", "parent", parent, "rising positions")
    rising = np.concatenate(([True], ~same | (cookie[1:] > cookie[:-1])))
    _require(rising & (cookie >= FIRST_COOKIE) & (cookie < 1 << 62), "entries", "cookie", cookie, "rising cookies")
    down = folder[child]
    names = np.bincount(child[down], minlength=total) + np.where(folder, beyond.names, 0)
    expected = folder.astype(np.int64)
    expected[0] = 0
    if deleted:
        expected[tree.inodes["nlink"] == 0] = 0
    _require(~folder | (names == expected), "inodes", "names of a directory", names, "one (the root: none)")
    # (inodes,): the position of the directory above each directory, the root's own for the root and for all else.
    up = np.zeros(total, dtype=np.int64)
    up[child[down]] = parent[down]
    for _ in range(max(total.bit_length(), 1)):
        if not up.any():
            break
        up = up[up]  # each round doubles the height that was climbed
    _require(up == 0, "inodes", "way up", up, "an end at the root: directories form a cycle")


def _verify_each_name_once(tree: TreeStream) -> None:
    """Require each name once in its directory: the few names whose hashes collide are compared."""
    parent = tree.entries["parent"].astype(np.uint64)
    # (entries,): a hash of each name and its directory; (rows,): where it is that of another, too; where names end.
    key = _hashes(tree) + parent * _WEIGHTS[-1]
    rows = _shared(key)
    ends = np.cumsum(tree.entries["length"], dtype=np.int64)
    seen = set[tuple[int, bytes]]()
    for row in rows.tolist():
        name = int(parent[row]), tree.names[int(ends[row]) - int(tree.entries["length"][row]) : int(ends[row])]
        if name in seen:
            number = int(tree.inodes["ino"][name[0]])
            raise FormatError("Tree entries", f"names of inode {number}", found="one twice", expected="each name once")
        seen.add(name)


def _shared(keys: Array) -> Array:
    """Return the places of keys that occur more than once. Sorting keys alone is much faster than sorting places."""
    ordered = np.sort(keys)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(among(keys, again)) if len(again) else again


def _hashes(tree: TreeStream) -> Array:
    """Return a number for each name, equal for equal names: words of its letters, weighted by their place in it."""
    length, names = tree.entries["length"], tree.names
    found, at = np.empty(len(length), dtype=np.uint64), 0
    for low in range(0, len(length), _HASHED):
        sizes = length[low : low + _HASHED].astype(np.int64)
        # (names of the slice,): where each begins; (letters of the slice + 1,): a word from each letter on.
        starts, total = np.cumsum(sizes) - sizes, int(sizes.sum())
        words = np.ndarray((total + 1,), "<u8", names[at : at + total] + bytes(_WORD), strides=(1,))
        keys = np.zeros(len(sizes), dtype=np.uint64)
        for place in range(0, int(sizes.max()), _WORD):
            rows = np.flatnonzero(sizes > place) if place else slice(None)
            word = words[starts[rows] + place] & _LETTERS[np.minimum(sizes[rows] - place, _WORD)]
            keys[rows] += (word ^ word >> np.uint64(29)) * _WEIGHTS[place]
        found[low : low + _HASHED], at = keys, at + total
    return found


def _verify_links(tree: TreeStream, kinds: Array, beyond: Beyond, deleted: bool) -> None:
    parent, child = tree.entries["parent"], tree.entries["child"]
    total, nlink, folder = len(kinds), tree.inodes["nlink"], kinds == stat.S_IFDIR
    names = np.bincount(child, minlength=total) + beyond.names
    entries = np.bincount(parent, minlength=total) + beyond.entries
    _require(folder | ((names == nlink) & ((names > 0) | deleted)), "inodes", "nlink", nlink, "the number of its names")
    below = np.bincount(parent[folder[child]], minlength=total) + beyond.folders
    gone = (nlink == 0) & (entries == 0) & deleted
    gone[0] = False
    _require(~folder | gone | (nlink == 2 + below), "inodes", "nlink", nlink, "2 and one for each subdirectory")
    size = EMPTY_DIRECTORY_SIZE + ENTRY_SIZE * entries
    _require(~folder | (tree.inodes["size"] == size), "inodes", "size", tree.inodes["size"], "20 for each entry")


def _verify_extents(tree: TreeStream, kinds: Array) -> None:
    first, count = tree.extents["first"], tree.extents["count"]
    per_inode = tree.inodes["extents"]
    _require((per_inode == 0) | (kinds == stat.S_IFREG), "inodes", "extents", per_inode, "0, this is no file")
    _require_equal(per_inode.sum(), len(first), "extents of all files")
    last = MAX_SIZE >> PAGE_SHIFT
    _require((count > 0) & (count <= last + 1), "extents", "count", count, "at least one page, within a file")
    _require(first <= np.uint64(last + 1) - count, "extents", "first", first, "pages within a file")
    owner = np.repeat(np.arange(len(per_inode)), per_inode)
    after = np.concatenate(([True], (owner[1:] != owner[:-1]) | (first[1:] >= first[:-1] + count[:-1])))
    _require(after, "extents", "first", first, "more than the end of the extent before")
    _require_equal(exact_sum(count), tree.header.pages, "pages of all extents")


def _verify_unwritten(tree: TreeStream) -> None:
    owner, first, count = (tree.unwritten[name] for name in ("inode", "first", "count"))
    _require(owner < len(tree.inodes["ino"]), "unwritten", "inode", owner, "the position of an inode")
    _require(np.concatenate(([True], owner[1:] >= owner[:-1])), "unwritten", "inode", owner, "rising positions")
    last = np.uint64((MAX_SIZE >> PAGE_SHIFT) + 1)
    _require((count > 0) & (count <= last), "unwritten", "count", count, "at least one page, within a file")
    _require(first <= last - count, "unwritten", "first", first, "pages within a file")
    after = np.concatenate(([True], (owner[1:] != owner[:-1]) | (first[1:] >= first[:-1] + count[:-1])))
    _require(after, "unwritten", "first", first, "more than the end of the run before")
    # (inodes + 1,): the first extent of each inode; (runs,): the last extent of the file that begins at or before each.
    edges = np.concatenate(([0], np.cumsum(tree.inodes["extents"], dtype=np.int64)))
    extent = _last_not_behind(tree.extents["first"], first, edges[owner], edges[owner.astype(np.int64) + 1])
    inside = extent >= edges[owner]
    begin, size = (tree.extents[name][np.maximum(extent, 0)] if len(extent) else first for name in ("first", "count"))
    _require(inside & (first + count <= begin + size), "unwritten", "first", first, "pages of an extent of its file")


def _verify_pieces(tree: TreeStream, kinds: Array, name: str) -> None:
    columns = getattr(tree, name)
    owner, piece, known = columns["ino"], columns["piece"], tree.inodes["ino"]
    place = np.minimum(np.searchsorted(known, owner), len(known) - 1)
    file = (known[place] == owner) & (kinds[place] == stat.S_IFREG)
    _require(file, name, "ino", owner, "the number of a regular file")
    _require(piece < 1 << KEY_SHIFT, name, "piece", piece, "a piece of a file")
    order = np.lexsort((piece, owner))
    again = (owner[order][1:] == owner[order][:-1]) & (piece[order][1:] == piece[order][:-1])
    if again.any():
        row = int(order[1:][again][0])
        raise FormatError(f"Tree {name}", f"piece of row {row}", found=piece[row], expected="each once")


def _last_not_behind(values: Array, wanted: Array, low: Array, high: Array) -> Array:
    """Return for each wanted value the last place in [low, high) whose (rising) value is not larger, or low - 1."""
    low, high = low.copy(), high.copy()
    while (low < high).any():
        middle = (low + high) >> 1
        at = np.minimum(middle, max(len(values) - 1, 0))
        behind = (values[at] > wanted) | (low >= high)
        high, low = np.where(behind & (low < high), middle, high), np.where(behind, low, middle + 1)
    return low - 1


def exact_sum(counts: Array) -> int:
    """Return a sum that does not wrap round: it adds the 32-bit halves of fewer than 2**32 numbers."""
    low, high = counts & np.uint64(0xFFFFFFFF), counts >> np.uint64(32)
    return int(low.sum()) + (int(high.sum()) << 32)


def _verify_frames(tree: TreeStream, runs: Runs, allowed: Spans, used: Spans | None) -> None:
    index, pfn, count = runs
    _require((count > 0) & (count < 1 << 52), "pages", "count", count, "at least one page")
    ends = np.cumsum(count)
    _require(index == ends - count, "pages", "index", index, "the end of the run before")
    _require_equal(exact_sum(count), tree.header.pages, "pages of the page stream")
    _require((pfn > 0) & (pfn < 1 << 52), "pages", "pfn", pfn, "a frame")
    used = Spans.from_runs(pfn, count) if used is None else used
    if used.total != tree.header.pages:
        order = np.argsort(pfn, kind="stable")
        again = np.flatnonzero(pfn[order][1:] < pfn[order][:-1] + count[order][:-1])
        raise FormatError("Tree pages", "pfn", found=f"{int(pfn[order][again[0] + 1]):x} twice", expected="once")
    outside = used - allowed
    if outside:
        first = int(outside.starts[0])
        raise FormatError("Tree pages", "pfn", found=f"{first:x}", expected="a frame in this tree's page blocks")


def _verify_xattrs(tree: TreeStream) -> None:
    xattrs = tree.xattrs
    owner, name_length, value_length = xattrs["inode"], xattrs["name_length"], xattrs["value_length"]
    _require(owner < len(tree.inodes["ino"]), "xattrs", "inode", owner, "the position of an inode")
    _require(np.concatenate(([True], owner[1:] >= owner[:-1])), "xattrs", "inode", owner, "rising positions")
    _require((name_length > 0) & (name_length <= XATTR_NAME_MAX), "xattrs", "name_length", name_length, "1 to 255")
    _require(value_length <= XATTR_SIZE_MAX, "xattrs", "value_length", value_length, f"at most {XATTR_SIZE_MAX}")
    total = int(name_length.astype(np.int64).sum()) + int(value_length.astype(np.int64).sum())
    _require_equal(total, len(tree.values), "bytes of all xattrs")
    at = 0
    for row, (names, values) in enumerate(zip(name_length.tolist(), value_length.tolist(), strict=True)):
        name, value = tree.values[at : at + names], tree.values[at + names : at + names + values]
        at += names + values
        if name in (acl.ACCESS, acl.DEFAULT):
            _verify_acl(row, value)
        elif b"\0" in name or not name.startswith(_NAMESPACES):
            raise FormatError("Tree xattrs", f"name of row {row}", found=name, expected="a name that tmpfs has")


def _verify_acl(row: int, value: bytes) -> None:
    try:
        entries = acl.parse(value)
    except OSError:
        entries = []
    if not entries:
        raise FormatError("Tree xattrs", f"ACL of row {row}", found=value[:16].hex(), expected="an ACL")
