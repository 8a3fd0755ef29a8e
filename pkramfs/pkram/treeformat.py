# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract, second half: a file tree as a byte stream of a header, columns and blobs.

Everything that crosses a kexec in RAM is declared in two modules: `format` declares a node, under FORMAT_VERSION;
this module declares the streams of a file tree in its node, under TREE_VERSION. `fs` fills and verifies the columns,
and declares no layout of its own. The node of a tree has two objects, in this order:

    object 0   byte stream    this module
    object 1   page stream    the pages of all files, one after the other, without gaps

    +--------+-------------------+----------------+-------------+---------------+-----------------------+
    | header | inodes            | entries        | extents     | xattrs        | names targets xattrs  |
    |        | ino[] mode[] uid[]| parent[] child[]| first[] …  | inode[] …     | (bytes, no separators)|
    +--------+-------------------+----------------+-------------+---------------+-----------------------+

A *column* is one field of all rows as a little-endian array, padded with zeros to 8 bytes. So a
hundred thousand files are a few array operations to write, to verify and to read: about 100 bytes
and a microsecond each. Rows name inodes by their *position* in the inode columns.

    inodes    in rising order of inode number, the root first. The n-th inode's extents, target and
              xattrs follow those of the inodes before it.
    entries   all names: of the directory at position `parent`, oldest first
    extents   places of a file's pages: the next `count` pages of the page stream are the file's pages
              from `first` on. Between extents are holes.
    xattrs    name and value, one behind the other in the blob
    unwritten pages of extents that read as zeros, and count as holes (SEEK_HOLE)
    sums      checksums of the files' data, a row for each piece of 1 MiB that has one, in any order
    damaged   pages that did not match their sum, a row for each piece with such pages

Sums and damage name inodes by their number, so that they stand for themselves.

Later additions are present only if the header's flags have their bits. So streams without them keep their form, and a
reader that does not know a flag refuses the stream.

Kernel: the 48-byte header that shmem writes for each file (patch 24), here for every kind of inode
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pkramfs.errors import FormatError, VersionError
from pkramfs.record import F, Record

TREE_MAGIC = int.from_bytes(b"pkTREE01", "little")
TREE_VERSION = 1
BIRTH, HAS_FLAGS, HAS_UNWRITTEN, HAS_SUMS = 1, 2, 4, 8
"""Features of a stream: flags of its header."""
FEATURES = BIRTH | HAS_FLAGS | HAS_UNWRITTEN | HAS_SUMS

TREE = Record(
    "Tree",
    128,
    "Header of the byte stream of a file tree.",
    [
        F("magic", "u8", 0, "TREE_MAGIC"),
        F("version", "u4", 8, "TREE_VERSION"),
        F("flags", "u4", 12, "features: BIRTH 1, FLAGS 2, UNWRITTEN 4, SUMS 8"),
        F("inodes", "u8", 16, "rows of the inode columns"),
        F("entries", "u8", 24, "rows of the entry columns"),
        F("extents", "u8", 32, "rows of the extent columns"),
        F("xattrs", "u8", 40, "rows of the xattr columns"),
        F("names", "u8", 48, "bytes of the blob of names"),
        F("targets", "u8", 56, "bytes of the blob of symlink targets"),
        F("values", "u8", 64, "bytes of the blob of xattr names and values"),
        F("pages", "u8", 72, "pages in the page stream"),
        F("next_ino", "u8", 80, "first inode number that was never used"),
        F("saved_ns", "i8", 88, "when the tree was saved, ns since the epoch"),
        F("unwritten", "u8", 96, "rows of the unwritten columns; 0 without UNWRITTEN"),
        F("sums", "u8", 104, "rows of the columns of sums; 0 without SUMS"),
        F("damaged", "u8", 112, "rows of the columns of damage; 0 without SUMS"),
        F("unsummed", "u8", 120, "pieces that have frames and no sum; 0 without SUMS"),
    ],
)


class Column(NamedTuple):
    """One field of all rows of a section."""

    name: str
    code: str
    meaning: str
    feature: int = 0
    """The flag of the header without which the column is not there, and all its values are 0."""

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Return the column's type in memory."""
        return np.dtype(f"<{self.code}")


class Section:
    """Columns of equal length; the header's field `name` is that length, `width` the bytes of one row."""

    def __init__(self, name: str, columns: tuple[Column, ...]) -> None:
        self.name, self.columns = name, columns
        self.width = sum(column.dtype.itemsize for column in columns)

    def present(self, features: int) -> list[Column]:
        """Return the columns that a stream with these features has."""
        return [column for column in self.columns if column.feature & ~features == 0]


INODES = Section(
    "inodes",
    (
        Column("ino", "u8", "inode number, rising"),
        Column("mode", "u4", "type and permissions, as st_mode"),
        Column("uid", "u4", "owner"),
        Column("gid", "u4", "group"),
        Column("nlink", "u4", "links, as st_nlink"),
        Column("rdev", "u8", "device number of a device node, else 0"),
        Column("size", "u8", "bytes, as st_size"),
        Column("atime", "i8", "access, ns since the epoch"),
        Column("mtime", "i8", "modification"),
        Column("ctime", "i8", "change"),
        Column("extents", "u4", "how many extents are this file's"),
        Column("btime", "i8", "birth, 0 where nobody knows; only with BIRTH", BIRTH),
        Column("flags", "u4", "as FS_IOC_GETFLAGS has them; only with FLAGS", HAS_FLAGS),
    ),
)
ENTRIES = Section(
    "entries",
    (
        Column("parent", "u4", "position of the directory"),
        Column("child", "u4", "position of the inode"),
        Column("cookie", "u8", "place in the listing, rising within a directory"),
        Column("length", "u1", "bytes of the name"),
    ),
)
EXTENTS = Section(
    "extents",
    (
        Column("first", "u8", "file page index"),
        Column("count", "u8", "pages"),
    ),
)
XATTRS = Section(
    "xattrs",
    (
        Column("inode", "u4", "position of the inode, rising"),
        Column("name_length", "u2", "bytes of the name"),
        Column("value_length", "u4", "bytes of the value"),
    ),
)
UNWRITTEN = Section(
    "unwritten",
    (
        Column("inode", "u4", "position of the inode, rising"),
        Column("first", "u8", "file page index, rising within an inode"),
        Column("count", "u8", "pages that were allocated and never written"),
    ),
)
SUMS = Section(
    "sums",
    (
        Column("ino", "u8", "inode number of a regular file"),
        Column("piece", "u8", "piece of the file: 256 pages, aligned"),
        Column("sum", "u8", "XXH3-64 of the piece's frames, seeded with ino << 32 ^ piece"),
    ),
)
DAMAGED = Section(
    "damaged",
    (
        Column("ino", "u8", "inode number of a regular file"),
        Column("piece", "u8", "piece of the file"),
        Column("pages0", "u8", "a bit for each damaged page, the first 64"),
        Column("pages1", "u8", "the next 64"),
        Column("pages2", "u8", "the next 64"),
        Column("pages3", "u8", "the last 64"),
    ),
)
SECTIONS = (INODES, ENTRIES, EXTENTS, XATTRS, UNWRITTEN, SUMS, DAMAGED)
BLOBS = ("names", "targets", "values")

Array = npt.NDArray[Any]
Columns = dict[str, Array]


def padding(size: int) -> int:
    """Return the number of zero bytes after a column or blob of `size` bytes."""
    return -size % 8


def stream_length(header: Any) -> int:
    """Return the length in bytes of the whole stream, as the header says."""
    length = TREE.size
    for section in SECTIONS:
        rows = getattr(header, section.name)
        for column in section.present(header.flags):
            size = rows * column.dtype.itemsize
            length += size + padding(size)
    for blob in BLOBS:
        size = getattr(header, blob)
        length += size + padding(size)
    return length


def features(columns: dict[str, Columns]) -> int:
    """Return the features that a stream of these sections needs."""
    found = BIRTH
    if np.any(columns["inodes"]["flags"]):
        found |= HAS_FLAGS
    return found | HAS_UNWRITTEN if len(columns["unwritten"]["inode"]) else found


def encode(section: Section, columns: Columns, flags: int) -> Iterator[bytes]:
    """Yield the bytes of a section, column by column, in a stream with these features."""
    for column in section.present(flags):
        data = np.ascontiguousarray(columns[column.name], dtype=column.dtype).tobytes()
        yield data
        if padding(len(data)):
            yield bytes(padding(len(data)))


class TreeStream:
    """A tree's byte stream, taken apart. Only lengths are checked here; `fs.verify` checks the rest."""

    def __init__(self, stream: bytes | memoryview) -> None:
        self.header = _read_header(stream)
        self._at = TREE.size
        sections = (self._section(stream, section) for section in SECTIONS)
        self.inodes, self.entries, self.extents, self.xattrs, self.unwritten, self.sums, self.damaged = sections
        self.names, self.targets, self.values = (self._blob(stream, name) for name in BLOBS)

    @classmethod
    def of(cls, header: bytes, columns: dict[str, Columns], blobs: dict[str, bytes]) -> "TreeStream":
        """Return the TreeStream that reading a stream of these columns would give, without writing it."""
        made = cls.__new__(cls)
        made.header = TREE.read(header)
        for section in SECTIONS:
            found = {column.name: columns[section.name][column.name].astype(column.dtype) for column in section.columns}
            setattr(made, section.name, found)
        made.names, made.targets, made.values = (blobs[name] for name in BLOBS)
        return made

    def _section(self, stream: bytes | memoryview, section: Section) -> Columns:
        rows, columns = getattr(self.header, section.name), {}
        for column in section.columns:
            if column.feature & ~self.header.flags:
                columns[column.name] = np.zeros(rows, dtype=column.dtype)
                continue
            columns[column.name] = np.frombuffer(stream, dtype=column.dtype, count=rows, offset=self._at)
            size = rows * column.dtype.itemsize
            self._at += size + padding(size)
        return columns

    def _blob(self, stream: bytes | memoryview, name: str) -> bytes:
        size, at = getattr(self.header, name), self._at
        self._at += size + padding(size)
        return bytes(stream[at : at + size])


def _read_header(stream: bytes | memoryview) -> Any:
    if len(stream) < TREE.size:
        raise FormatError("Tree", "length", found=len(stream), expected=f"at least {TREE.size}")
    header = TREE.read(stream)
    if header.magic != TREE_MAGIC:
        raise FormatError("Tree", "magic", found=f"{header.magic:#x}", expected=f"{TREE_MAGIC:#x}")
    if header.version != TREE_VERSION:
        raise VersionError("Tree", "version", found=header.version, expected=TREE_VERSION)
    summed = header.sums or header.damaged or header.unsummed
    if (
        header.flags & ~FEATURES
        or (header.unwritten and not header.flags & HAS_UNWRITTEN)
        or (summed and not header.flags & HAS_SUMS)
    ):
        raise FormatError("Tree", "flags", found=f"{header.flags:#x}", expected=f"none but {FEATURES:#x}")
    if stream_length(header) != len(stream):
        raise FormatError("Tree", "length", found=len(stream), expected=stream_length(header))
    return header
