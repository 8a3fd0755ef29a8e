# SPDX-License-Identifier: GPL-2.0-or-later
"""Two trees compared: preserved ones, or one with a directory of the host.

    names        merged in order, directory by directory; a directory on one side only is one difference
    attributes   type, permissions, owner, links, size, device, target, mtime, extended attributes and ACLs
    contents     a piece at a time, holes against holes without reading them

Sizes and links of directories are not compared: they follow from the entries, which are. Times of access, change and
birth are not compared, nor inode numbers: a copy has its own.

Counterparts: diff(1) with -r, cmp(1), rsync(1) with -nic
"""

import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from pkramfs.archive.view import Attributes, SavedTree
from pkramfs.fs.inode import BLOCKS_PER_PAGE
from pkramfs.fs.picture import Progress
from pkramfs.text import FILE_KINDS, exact
from pkramfs.units import PAGE_SHIFT

_PIECE = 1 << 20
_ZEROS = memoryview(bytes(_PIECE))

Data = Iterator[tuple[int, bytes]]


class Difference(NamedTuple):
    """One difference. `what` names the attribute; it is `only` for a name on one side, whose other value is None."""

    path: bytes
    what: str
    left: Any
    right: Any


class Side(Protocol):
    """One side of a comparison. The side defines the type of a place."""

    def children(self, place: Any, /) -> list[tuple[bytes, Any]]: ...
    def attributes(self, place: Any, /) -> Attributes: ...
    def target(self, place: Any, /) -> bytes: ...
    def xattrs(self, place: Any, /) -> dict[bytes, bytes]: ...
    def data(self, place: Any, /) -> Data: ...


class HostTree:
    """A directory of the host. A place is a path; nothing is followed, nothing leaves the file system."""

    def __init__(self, top: bytes) -> None:
        self.top = top

    def children(self, place: bytes) -> list[tuple[bytes, bytes]]:
        """Return (name, place) of each entry of a directory."""
        return [(name, os.path.join(place, name)) for name in os.listdir(place)]

    def attributes(self, place: bytes) -> Attributes:
        """Return the attributes, as lstat(2) does."""
        s = os.lstat(place)
        times = (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns, 0)
        blocks = s.st_blocks // BLOCKS_PER_PAGE * BLOCKS_PER_PAGE
        return Attributes(
            s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_rdev, s.st_size, *times, flags=0, blocks=blocks
        )

    def target(self, place: bytes) -> bytes:
        """Return where a symbolic link leads to."""
        return os.readlink(place)

    def xattrs(self, place: bytes) -> dict[bytes, bytes]:
        """Return the extended attributes."""
        names = os.listxattr(place, follow_symlinks=False)
        return {os.fsencode(name): os.getxattr(place, name, follow_symlinks=False) for name in names}

    def data(self, place: bytes) -> Data:
        """Yield (offset, bytes) of the parts that are no holes."""
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            at, size = 0, os.fstat(fd).st_size
            while at < size:
                try:
                    at = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:
                    return  # a hole to the end
                end = os.lseek(fd, at, os.SEEK_HOLE)
                while at < end:
                    part = os.pread(fd, min(end - at, _PIECE), at)
                    if not part:
                        return
                    yield at, part
                    at += len(part)
        finally:
            os.close(fd)


def compare(left: SavedTree, right: Side, top: Any, *, times: bool = True) -> Iterator[Difference | Progress]:
    """Yield differences in the order of names, and Progress in between; `top` is the right one's root."""
    done, total = 0, left.data_pages << PAGE_SHIFT
    waiting: list[tuple[bytes, int, Any]] = [(b"/", 0, top)]
    yield Progress("compare", 0, total)
    while waiting:
        path, here, there = waiting.pop()
        ours, theirs = left.attributes(here), right.attributes(there)
        if ours.kind != theirs.kind:
            yield Difference(path, "type", FILE_KINDS[ours.kind], FILE_KINDS[theirs.kind])
            continue
        yield from _attributes(path, ours, theirs, times)
        yield from _xattrs(path, left.xattrs(here), right.xattrs(there))
        if ours.kind == stat.S_IFLNK and left.target(here) != right.target(there):
            yield Difference(path, "target", exact(left.target(here)), exact(right.target(there)))
        if ours.kind == stat.S_IFREG:
            at = first_difference(left.data(here), right.data(there), min(ours.size, theirs.size))
            if at is not None:
                yield Difference(path, "content", at, at)
            done += ours.blocks // BLOCKS_PER_PAGE << PAGE_SHIFT
            yield Progress("compare", min(done, total), total)
        elif ours.kind == stat.S_IFDIR:
            both, single = _merged(path, left.children(here), right.children(there))
            yield from single
            waiting += reversed(both)


def _merged(
    path: bytes, ours: list[tuple[bytes, int]], theirs: list[tuple[bytes, Any]]
) -> tuple[list[tuple[bytes, int, Any]], list[Difference]]:
    """Return the names that both directories have, in order, and those that only one has."""
    here, there, above = dict(ours), dict(theirs), path if path.endswith(b"/") else path + b"/"
    both = [(above + name, here[name], there[name]) for name in sorted(here.keys() & there.keys())]
    single = [
        Difference(above + name, "only", *((exact(name), None) if name in here else (None, exact(name))))
        for name in sorted(here.keys() ^ there.keys())
    ]
    return both, single


def _attributes(path: bytes, ours: Attributes, theirs: Attributes, times: bool) -> Iterator[Difference]:
    pairs: list[tuple[str, Any, Any]] = [
        ("mode", f"{stat.S_IMODE(ours.mode):04o}", f"{stat.S_IMODE(theirs.mode):04o}"),
        ("owner", f"{ours.uid}:{ours.gid}", f"{theirs.uid}:{theirs.gid}"),
        ("device", ours.rdev, theirs.rdev),
    ]
    if times:
        pairs.append(("mtime", ours.mtime, theirs.mtime))
    if ours.kind != stat.S_IFDIR:
        pairs += [("links", ours.nlink, theirs.nlink), ("size", ours.size, theirs.size)]
    for what, mine, other in pairs:
        if mine != other:
            yield Difference(path, what, mine, other)


def _xattrs(path: bytes, ours: dict[bytes, bytes], theirs: dict[bytes, bytes]) -> Iterator[Difference]:
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name), theirs.get(name)
        if mine != other:
            values = (None if value is None else exact(value) for value in (mine, other))
            yield Difference(path, f"xattr {exact(name)}", *values)


def first_difference(ours: Data, theirs: Data, size: int) -> int | None:
    """Return the first byte before `size` in which two contents differ, None if they do not; holes read as zeros."""
    at, (mine, a), (other, b) = 0, next(ours, (size, b"")), next(theirs, (size, b""))
    while at < size:
        if mine + len(a) <= at and mine < size:
            mine, a = next(ours, (size, b""))
        elif other + len(b) <= at and other < size:
            other, b = next(theirs, (size, b""))
        elif at < mine and at < other:
            at = min(mine, other)
        else:
            end = min(size, *(edge for edge in (mine, mine + len(a), other, other + len(b)) if edge > at), at + _PIECE)
            x, y = _part(mine, a, at, end), _part(other, b, at, end)
            if x != y:
                return at + next(place for place, (p, q) in enumerate(zip(x, y, strict=True)) if p != q)
            at = end
    return None


def _part(begin: int, data: bytes, at: int, end: int) -> memoryview:
    """Return the bytes [at, end) of a piece, or zeros before it."""
    return memoryview(data)[at - begin : end - begin] if begin <= at < begin + len(data) else _ZEROS[: end - at]
