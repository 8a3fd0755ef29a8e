# SPDX-License-Identifier: GPL-2.0-or-later
"""The records of a journal: the changes of a request, as results.

A record holds a state, never an operation: the present attributes of an inode, not that it was truncated. So a reader
needs none of the rules that led to the state, and a later version may have other rules.

    INODE     all attributes of an inode, how it is open, and the target of a symbolic link
    OPENED    how an inode is open, alone
    ENTER     a directory has a name, for an inode, at a place of the listing; LEAVE: the name is gone
    RUN       pages of a file are in these frames; CUT: a range of a file has none
    RESERVED  pages of a file were never written (fallocate); USED: a range has no such pages
    ZERO      bytes of a page that was cut are zeros
    XATTR     an extended attribute has a value; UNSET: it is gone
    REAPED    an inode is gone
    LOST      which pages of a file are lost (see lost), perhaps none
    SUMMED    checksums of pieces of files (see sums); UNSUMMED: pieces without one; with inode 0: no piece has one
    DAMAGED   which pages of a piece of a file are damaged, perhaps none
    MADE, GONE, MOVED, TIMES, WROTE: see brief

A record begins with its kind, a 16-bit number that some use, and its length, a multiple of 8. Bytes are padded with
zeros.

Kernel: fs/ext4/fast_commit.h (EXT4_FC_TAG_…), whose tags are results, too
"""

import enum
from collections.abc import Callable, Container, Sequence
from struct import Struct, error
from typing import Any

from pkramfs.errors import FormatError
from pkramfs.fs.inode import Inode


class Kind(enum.IntEnum):
    """Kinds of records."""

    INODE = 1
    OPENED = 2
    ENTER = 3
    LEAVE = 4
    RUN = 5
    CUT = 6
    RESERVED = 7
    USED = 8
    ZERO = 9
    XATTR = 10
    UNSET = 11
    REAPED = 12
    LOST = 13
    SUMMED = 14
    UNSUMMED = 15
    DAMAGED = 16
    MADE = 17
    GONE = 18
    MOVED = 19
    TIMES = 20
    WROTE = 21


Values = tuple[Any, ...]

UNPRIVILEGED, UNNAMED = 1, 2
"""Marks of an inode: somebody has it open whose writes drop set-id bits; it may still get its first name."""

_HEAD = Struct("<HHI")
MADE, GONE, MOVED = Struct("<HHIQQQqIIIIIIIIQQQQ"), Struct("<HHIQQqQIIIIII"), Struct("<HHIQQQQQqQQIIII")
TIMES, WROTE = Struct("<HHIQqqq"), Struct("<HHIQQqqQQQ")
_INODE = Struct("<HHIQIIIIQqqqqQIIII")
OPENED = Struct("<HHIQIIII")
_ENTER = Struct("<HHIQQQ")
_TWO = Struct("<HHIQQ")
_ONE = Struct("<HHIQ")
_RUN = Struct("<HHIQQQQ")
_RANGE = Struct("<HHIQQQ")
_LOST = Struct("<HHIQIIq")
_PIECE = Struct("<Q64s")
_SUM = Struct("<QQQ")
_DAMAGED = Struct("<HHIQQ32s")

_PADS = [bytes(-size % 8) for size in range(8)]
"""What is behind so many bytes, modulo 8, up to the next multiple of 8."""

RUN_BYTES = _RUN.size
"""Bytes of a record of a run; one of a range is shorter."""
LOST_MOST = 60
"""2 MiB pieces of a file in which lost pages are told one by one; of a file with more everything counts as lost."""


def pack_inode(i: Inode, unnamed: Container[int]) -> bytes:
    """Return the record of an inode's attributes; the inode may be one of the `unnamed`."""
    target, marks = i.target, UNPRIVILEGED if i.unprivileged else 0
    if not i.nlink and i.ino in unnamed:
        marks |= UNNAMED
    size, tail = (0, b"") if target is None else (len(target), target + _PADS[len(target) & 7])
    return _INODE.pack(
        1, size, 96 + len(tail), i.ino, i.mode, i.uid, i.gid, i.nlink, i.size, i.atime, i.mtime, i.ctime, i.btime,
        i.rdev, i.flags, i.opens, i.writers, marks,
    ) + tail  # fmt: skip


def pack_opened(inode: Inode, unnamed: Container[int]) -> bytes:
    """Return the record of how an inode is open."""
    marks = UNPRIVILEGED if inode.unprivileged else 0
    if not inode.nlink and inode.ino in unnamed:
        marks |= UNNAMED
    return OPENED.pack(2, 0, 32, inode.ino, inode.opens, inode.writers, marks, 0)


def pack_enter(folder: int, name: bytes, child: int, cookie: int) -> bytes:
    """Return the record of a new name."""
    size = len(name)
    return _ENTER.pack(3, size, 39 + size & -8, folder, child, cookie) + name + _PADS[size & 7]


def pack_leave(folder: int, name: bytes) -> bytes:
    """Return the record of a name that is gone."""
    size = len(name)
    return _ONE.pack(4, size, 23 + size & -8, folder) + name + _PADS[size & 7]


def pack_run(ino: int, index: int, pfn: int, count: int) -> bytes:
    """Return the record of pages in frames."""
    return _RUN.pack(5, 0, 40, ino, index, pfn, count)


def pack_range(kind: Kind, ino: int, first: int, second: int) -> bytes:
    """Return a record of a range: CUT, USED, UNSUMMED (first, last), RESERVED (first, count), ZERO (start, end)."""
    return _RANGE.pack(kind, 0, 32, ino, first, second)


def pack_xattr(ino: int, name: bytes, value: bytes) -> bytes:
    """Return the record of an extended attribute."""
    size = len(name) + len(value)
    return b"".join((_TWO.pack(10, len(name), 31 + size & -8, ino, len(value)), name, value, _PADS[size & 7]))


def pack_unset(ino: int, name: bytes) -> bytes:
    """Return the record of an extended attribute that is gone."""
    size = len(name)
    return _ONE.pack(11, size, 23 + size & -8, ino) + name + _PADS[size & 7]


def pack_reaped(ino: int) -> bytes:
    """Return the record of an inode that is gone."""
    return _ONE.pack(12, 0, 16, ino)


def pack_lost(ino: int, error: int, beyond: int, pieces: dict[int, int]) -> bytes:
    """Return the record of lost pages: a mask for each 2 MiB, and the first from which on all is lost (-1: none)."""
    if len(pieces) > LOST_MOST:
        beyond, pieces = 0, {}
    body = b"".join(_PIECE.pack(piece, mask.to_bytes(64, "little")) for piece, mask in pieces.items())
    return _LOST.pack(13, 0, _LOST.size + len(body), ino, error, len(pieces), beyond) + body


def pack_summed(rows: Sequence[tuple[int, int, int]]) -> bytes:
    """Return the record of checksums: inode number, piece and sum of each."""
    return _ONE.pack(14, 0, _ONE.size + _SUM.size * len(rows), len(rows)) + b"".join(_SUM.pack(*row) for row in rows)


def pack_damaged(ino: int, piece: int, mask: int) -> bytes:
    """Return the record of the pages of a piece that are damaged."""
    return _DAMAGED.pack(16, 0, _DAMAGED.size, ino, piece, mask.to_bytes(32, "little"))


def unpack(body: bytes, at: int, position: int, apply: dict[int, Callable[..., None]]) -> int:
    """Call the function in `apply` for the kind of each record of a chunk, from byte `at` on; return their number.

    Its arguments are the values in the order of the record, but names, values and targets (b"" if absent) come last.
    `position` is the chunk's, for errors.
    """
    count, size = 0, len(body)
    while at < size:
        try:
            kind, extra, length = _unpack_head(body, at)
            end = at + length
            numbers = _NUMBERS.get(kind)
            if length < 16 or length & 7 or end > size:
                raise _damaged("length", position, at, length, "a multiple of 8, inside its chunk")
            if numbers is not None:
                values = numbers(body, at)
            elif kind in _READERS:
                values = _READERS[kind](body, at, extra, end)
            else:
                raise _damaged("kind", position, at, kind, f"1 to {len(Kind)}")
        except (error, ValueError) as problem:
            raise _damaged("record", position, at, str(problem), "a whole record") from None
        apply[kind](*values)
        at, count = end, count + 1
    return count


def _damaged(field: str, position: int, at: int, found: object, expected: str) -> FormatError:
    return FormatError("Journal", f"{field} at position {position}, byte {at}", found=found, expected=expected)


def _read_inode(body: bytes, at: int, extra: int, end: int) -> Values:
    return (*_unpack_inode(body, at), _bytes(body, at + _INODE.size, extra, end) if extra else b"")


def _behind(struct: Struct) -> Callable[[bytes, int, int, int], Values]:
    """Return a function that reads a record of numbers with a name behind them."""
    values, size = _behind_head(struct), struct.size

    def read(body: bytes, at: int, extra: int, end: int) -> Values:
        start = at + size
        if start + extra > end:
            raise ValueError("bytes beyond its end")
        return *values(body, at), body[start : start + extra]

    return read


def _read_moved(body: bytes, at: int, extra: int, end: int) -> Values:
    *values, size, _ = _unpack_moved(body, at)
    both = _bytes(body, at + MOVED.size, extra + size, end)
    return *values, both[:extra], both[extra:]


def _read_xattr(body: bytes, at: int, extra: int, end: int) -> Values:
    *_, ino, size = _TWO.unpack_from(body, at)
    both = _bytes(body, at + _TWO.size, extra + size, end)
    return ino, both[:extra], both[extra:]


def _read_lost(body: bytes, at: int, extra: int, end: int) -> Values:
    *_, ino, code, count, beyond = _LOST.unpack_from(body, at)
    raw = _bytes(body, at + _LOST.size, count * _PIECE.size, end)
    return ino, code, beyond, {piece: int.from_bytes(mask, "little") for piece, mask in _PIECE.iter_unpack(raw)}


def _read_summed(body: bytes, at: int, extra: int, end: int) -> tuple[list[tuple[int, int, int]]]:
    *_, count = _ONE.unpack_from(body, at)
    return (list(_SUM.iter_unpack(_bytes(body, at + _ONE.size, count * _SUM.size, end))),)


def _read_damaged(body: bytes, at: int, extra: int, end: int) -> tuple[int, int, int]:
    *_, ino, piece, mask = _DAMAGED.unpack_from(body, at)
    return ino, piece, int.from_bytes(mask, "little")


def _bytes(body: bytes, start: int, size: int, end: int) -> bytes:
    """Return bytes inside a record; raise ValueError if they go beyond its end."""
    if start + size > end:
        raise ValueError("bytes beyond its end")
    return body[start : start + size]


def _behind_head(struct: Struct) -> Callable[[bytes, int], Values]:
    """Return a function that unpacks the values of a record at a place, without its head."""
    return Struct(struct.format.replace("HHI", "8x")).unpack_from


_unpack_head, _unpack_inode, _unpack_moved = _HEAD.unpack_from, _behind_head(_INODE), _behind_head(MOVED)
_NUMBERS: dict[int, Callable[[bytes, int], Values]] = {
    Kind.OPENED.value: _behind_head(OPENED),
    Kind.RUN.value: _behind_head(_RUN),
    Kind.CUT.value: _behind_head(_RANGE),
    Kind.RESERVED.value: _behind_head(_RANGE),
    Kind.USED.value: _behind_head(_RANGE),
    Kind.ZERO.value: _behind_head(_RANGE),
    Kind.REAPED.value: _behind_head(_ONE),
    Kind.UNSUMMED.value: _behind_head(_RANGE),
    Kind.TIMES.value: _behind_head(TIMES),
    Kind.WROTE.value: _behind_head(WROTE),
}
_READERS: dict[int, Callable[[bytes, int, int, int], Values]] = {
    Kind.INODE.value: _read_inode,
    Kind.ENTER.value: _behind(_ENTER),
    Kind.LEAVE.value: _behind(_ONE),
    Kind.XATTR.value: _read_xattr,
    Kind.UNSET.value: _behind(_ONE),
    Kind.LOST.value: _read_lost,
    Kind.SUMMED.value: _read_summed,
    Kind.DAMAGED.value: _read_damaged,
    Kind.MADE.value: _behind(MADE),
    Kind.GONE.value: _behind(GONE),
    Kind.MOVED.value: _read_moved,
}
