# SPDX-License-Identifier: GPL-2.0-or-later
"""A preserved tree as a tar archive, written as a stream.

    "./"  the root ─▶ "./etc/" ─▶ "./etc/passwd" …     a directory before its entries, oldest names first

    pax header    keywords for facts that do not fit into the old header
    header        as every tar reads it
    data          for a file with holes: its map, then the parts that are no holes

A file with several names is written with its first and linked from the others. Not in the archive: sockets, times of
birth (GNU tar would warn of each), and which pages were allocated without being written. Memory does not grow with
contents, nor with the number of files but for hard links.

The standard library makes the headers (tarfile); it would keep all of them, and reads contents 16 KiB at a time, so
streams are written here.

Counterparts: GNU tar (create.c, sparse.c); POSIX.1-2001, pax
"""

import os
import stat
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import NamedTuple

from pkramfs.archive import keywords
from pkramfs.archive.keywords import BLOCK
from pkramfs.archive.view import Attributes, SavedTree
from pkramfs.fs import acl
from pkramfs.fs.picture import Progress
from pkramfs.text import exact
from pkramfs.units import PAGE_SHIFT

Out = Callable[[bytes | memoryview], object]
"""What takes the next bytes of the archive."""

_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}
_RECORD = 20 * BLOCK
"""Bytes of which an archive is a multiple."""


class LeftOut(NamedTuple):
    """A file that is not in the archive, and why."""

    path: bytes
    reason: str


class Report(NamedTuple):
    """The result: names, bytes of contents without holes, and the files that were left out."""

    names: int
    bytes: int
    left_out: list[LeftOut]


def export(tree: SavedTree, out: Out, *, damage: Mapping[int, str] | None = None) -> Generator[Progress, None, Report]:
    """Write a tree; `damage` says why which places are left out. ChangedError if the node goes meanwhile."""
    damage, total = damage or {}, tree.data_pages << PAGE_SHIFT
    names = done = at = 0
    first, left_out = dict[int, bytes](), list[LeftOut]()
    yield Progress("export", 0, total)
    for path, place in tree.walk():
        found = tree.attributes(place)
        if place in damage or found.kind not in _TYPES:
            left_out.append(LeftOut(path, damage.get(place, "a socket, which no archive can hold")))
            continue
        names += 1
        if found.nlink > 1 and found.kind != stat.S_IFDIR:
            if place in first:
                at += _put(out, _link(path, found, first[place]))
                continue
            first[place] = path
        for part, size in _member(tree, path, place, found):
            at, done = at + _put(out, part), done + size
            if size:
                yield Progress("export", done, total)
    out(bytes(2 * BLOCK + -(at + 2 * BLOCK) % _RECORD))
    tree.expect_unchanged()
    return Report(names, done, left_out)


def _put(out: Out, part: bytes) -> int:
    out(part)
    return len(part)


def _member(tree: SavedTree, path: bytes, place: int, found: Attributes) -> Iterator[tuple[bytes, int]]:
    """Yield the bytes of a member, and how many of them are contents."""
    info = _info(tree, path, place, found)
    extents = list(tree.extents(place))
    if found.kind != stat.S_IFREG or extents == ([(0, found.size)] if found.size else []):
        info.size = found.size if found.kind == stat.S_IFREG else 0
        yield _header(info), 0
    else:
        yield _sparse_header(info, extents, found.size), 0
    size = 0
    for _, data in tree.data(place):
        yield data, len(data)
        size += len(data)
    if size % BLOCK:
        yield bytes(-size % BLOCK), 0


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _name(path: bytes) -> str:
    return exact(b"./" + path)


def _info(tree: SavedTree, path: bytes, place: int, found: Attributes) -> tarfile.TarInfo:
    """Return the header of a file, its size apart."""
    info = _plain(_name(path), found)
    info.type = _TYPES[found.kind]
    if found.kind == stat.S_IFLNK:
        info.linkname = exact(tree.target(place))
    info.devmajor, info.devminor = os.major(found.rdev), os.minor(found.rdev)
    info.pax_headers = more = {name: keywords.time_text(getattr(found, name)) for name in ("mtime", "atime", "ctime")}
    if found.flags:
        more[keywords.FLAGS] = keywords.flags_text(found.flags)
    for name, value in tree.xattrs(place).items():
        if name in (acl.ACCESS, acl.DEFAULT):
            key = keywords.ACL_ACCESS if name == acl.ACCESS else keywords.ACL_DEFAULT
            more[key] = keywords.acl_text(value)
        else:
            more[keywords.xattr_key(name)] = exact(value)
    return info


def _plain(name: str, found: Attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid = stat.S_IMODE(found.mode), found.uid, found.gid
    info.mtime = found.mtime // 10**9
    return info


def _link(path: bytes, found: Attributes, first: bytes) -> bytes:
    """Return the member for a further name of a file."""
    info = _plain(_name(path), found)
    info.type, info.linkname = tarfile.LNKTYPE, _name(first)
    return _header(info)


def _sparse_header(info: tarfile.TarInfo, extents: list[tuple[int, int]], size: int) -> bytes:
    """Return the header and the map of a file with holes, in GNU tar's format 1.0."""
    stored = sum(part for _, part in extents)
    if not extents or sum(extents[-1]) < size:
        extents = [*extents, (size, 0)]
    table = b"%d\n" % len(extents) + b"".join(b"%d\n%d\n" % extent for extent in extents)
    table += bytes(-len(table) % BLOCK)
    info.pax_headers = {
        **info.pax_headers,
        keywords.SPARSE_MAJOR: "1",
        keywords.SPARSE_MINOR: "0",
        keywords.SPARSE_NAME: info.name,
        keywords.SPARSE_SIZE: str(size),
    }
    folder, _, name = info.name.rpartition("/")
    info.name, info.size = f"{folder}/GNUSparseFile.0/{name}", len(table) + stored
    return _header(info) + table
