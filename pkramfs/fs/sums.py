# SPDX-License-Identifier: GPL-2.0-or-later
"""The checksums of a tree's data (`-o verify=data`): when they are dropped, when compared, and damage.

    a store, a hole filled or made ──▶ the piece has no sum; the log has this before the store
    a read, a copy from it         ──▶ a piece that was not compared since it crossed a kexec is compared first
    a change of a part of it       ──▶ the same: otherwise the new sum would hide a flipped bit in the rest

If a piece does not match its sum, all its pages are *damaged*: reading one of them fails with EIO, and so does a store
to a part of one. A page that is written whole, or freed, is no longer damaged; when no page of a piece is damaged, it
is like any other piece that was written.

Between the tree and its log: a store over data leaves no record. So a record of its own takes the sum away, and is
committed before the first byte is stored. Every other change of frames has a record, from which a reader takes the sum
away by itself. So the result of a log has no wrong sum. New sums are recorded, too.

Sums are made in steps (summing). pieces defines a sum, and sumtable has the state of each piece.

Kernel: fs/btrfs/inode.c (btrfs_data_csum_ok), fs/ext4/extents_status.c
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pkramfs.fs.failure import fail
from pkramfs.fs.pagecache import END, Run
from pkramfs.fs.pieces import KEY_SHIFT, PIECE_PAGES, PIECE_SHIFT, bits, buffer, digest, pieces_of
from pkramfs.fs.sumtable import DOUBTED, Rows, SumTable
from pkramfs.text import exact
from pkramfs.units import PAGE_SHIFT, pages

if TYPE_CHECKING:
    from pkramfs.fs.asleep import Asleep
    from pkramfs.fs.inode import Inode
    from pkramfs.fs.journal import Journal
    from pkramfs.fs.ledger import Ledger
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.treeformat import Array, Columns

_IN_PAGE = (1 << PAGE_SHIFT) - 1
_PIECE_MASK = (1 << KEY_SHIFT) - 1
_PARTS = ("pages0", "pages1", "pages2", "pages3")


class Owner(Protocol):
    """The part of a tree that its sums need."""

    ram: Ram
    ledger: Ledger
    journal: Journal | None
    inodes: dict[int, Inode]
    asleep: Asleep | None

    def inode(self, number: int) -> Inode:
        """Return the inode with this number."""

    def path(self, inode: Inode) -> bytes:
        """Return a path of an inode."""


class Sums:
    """See the module's page. `found` is called with inode number and piece for each new damage."""

    def __init__(self, tree: Owner) -> None:
        self._tree, self._ram = tree, tree.ram
        self.table = SumTable(tree.ledger.add_sums)
        self.damaged: dict[int, int] = {}
        """By key: a mask of the pages of a piece that are damaged."""
        self.found: Callable[[int, int], object] = _nobody
        self._buffer = buffer()
        self.complete = False
        """No piece with frames is missing here, so that `begin` has nothing to add."""

    @property
    def size(self) -> tuple[int, int]:
        """Return the number of sums, and of damaged pieces, that a save writes."""
        return self.table.known, len(self.damaged)

    @property
    def lacking(self) -> int:
        """Return the number of pieces without a sum in the log."""
        return self.table.pending + self.table.untold

    # -- before something is read ----------------------------------------------------------------

    def require(self, inode: Inode, first: int, last: int) -> None:
        """Raise EIO if one of the pages [first, last) is damaged, after comparing pieces that were not compared yet."""
        for piece in range(first >> PIECE_SHIFT, ((last - 1) >> PIECE_SHIFT) + 1):
            row = self.table.doubtful(inode.ino, piece)
            if row is not None:
                self.compare(inode.ino, piece, row)
            if self.damaged and self._mask(inode.ino, piece) & bits(piece, first, last):
                raise fail(errno.EIO)

    def compare(self, ino: int, piece: int, row: int) -> bool:
        """Compare a piece with the sum in a row of the table; return False if it is damaged."""
        runs = self.runs(ino, piece)
        if digest(self._ram, ino, piece, runs, self._buffer) == int(self.table.sums[row]):
            self.table.agree(row)
            return True
        self.table.remove(ino, piece)
        mask = 0
        for index, _, count in runs:
            mask |= bits(piece, index, index + count)
        if mask:
            self._set_damage(ino, piece, mask)
            self.found(ino, piece)
        return False

    def runs(self, ino: int, piece: int) -> list[Run]:
        """Return the frames of a piece; a file that sleeps is not woken."""
        first = piece << PIECE_SHIFT
        inode = self._tree.inodes.get(ino)
        if inode is not None:
            return inode.pages.between(first, first + PIECE_PAGES) if inode.pages is not None else []
        asleep = self._tree.asleep
        return asleep.runs_between(ino, first, first + PIECE_PAGES) if asleep is not None else []

    # -- before something is changed -------------------------------------------------------------

    def before_write(self, inode: Inode, offset: int, end: int) -> bool:
        """Note that bytes [offset, end) are about to be stored.

        Return True if the log must lose sums first: then call `tell`, commit, and `drop`.
        """
        first, last = offset >> PAGE_SHIFT, (end + _IN_PAGE) >> PAGE_SHIFT
        low, high, table = first >> PIECE_SHIFT, (last - 1) >> PIECE_SHIFT, self.table
        if low == high and not self.damaged:  # the usual case: the piece is marked already, or new
            key = inode.ino << KEY_SHIFT | low
            found = table.late.get(key)
            if found == table.mark:
                return False
            if found is None and inode.ino > table.last:
                table.mark_new(key)
                return False
        if table.doubted:
            for piece in {low, high}:
                self._leave(inode, piece, pages(offset), end >> PAGE_SHIFT)
        if self.damaged:
            self._refuse_parts(inode.ino, {first, last - 1} - set(range(*_whole(inode, offset, end))))
        for piece in range(low, high + 1):
            found = table.find(inode.ino, piece)
            if found is not None and found >= 0 and table.state[found] >= DOUBTED:
                return True
            if not self._mask(inode.ino, piece):
                table.mark_found(inode.ino, piece, found)
        return False

    def tell(self, inode: Inode, offset: int, end: int) -> None:
        """Note for the log that bytes [offset, end) no longer have a sum."""
        if self._tree.journal is not None:
            self._tree.journal.unsum(inode.ino, *_pieces(offset, end))

    def drop(self, inode: Inode, offset: int, end: int) -> None:
        """Take the sums of bytes [offset, end) away once the log has this; earlier, the next store would not wait."""
        for piece in range(*_pieces(offset, end)):
            self._touch(inode.ino, piece)

    def stored(self, inode: Inode, offset: int, end: int) -> None:
        """Note that bytes [offset, end) were stored: damaged pages that were written whole are repaired."""
        if not self.damaged:
            return
        page = end >> PAGE_SHIFT
        if (
            end & _IN_PAGE
            and end >= inode.size
            and self._mask(inode.ino, page >> PIECE_SHIFT) & bits(page >> PIECE_SHIFT, page, page + 1)
        ):
            self._clear_behind(inode.ino, end)
        self._mend(inode.ino, *_whole(inode, offset, end), tell=True)

    def _clear_behind(self, ino: int, end: int) -> None:
        """Clear the rest of a page behind the end of its file, where a bit may have flipped, too."""
        page = end >> PAGE_SHIFT
        for index, pfn, count in self.runs(ino, page >> PIECE_SHIFT):
            if index <= page < index + count:
                self._ram.overwrite(((pfn - index) << PAGE_SHIFT) + end, bytes(-end & _IN_PAGE))

    def fill(self, inode: Inode, first: int, count: int) -> None:
        """Note that pages from `first` on, which are a hole, are about to get frames."""
        table, ino = self.table, inode.ino
        for piece in range(first >> PIECE_SHIFT, ((first + count - 1) >> PIECE_SHIFT) + 1):
            if table.late.get(ino << KEY_SHIFT | piece) != table.mark:
                self._leave(inode, piece, 0, 0)
                self._touch(ino, piece)

    def clear(self, inode: Inode, page: int) -> None:
        """Note that a part of a page is about to become zeros."""
        self._leave(inode, page >> PIECE_SHIFT, 0, 0)
        self._touch(inode.ino, page >> PIECE_SHIFT)

    def cut(self, inode: Inode, first: int, last: int = END, *, compare: bool = True) -> None:
        """Note that pages [first, last) are about to lose their frames; without `compare` no piece is compared."""
        there, before = inode.pages, -1
        if there is None:
            return
        if compare and self.table.doubted:
            for piece in {first >> PIECE_SHIFT, (last - 1) >> PIECE_SHIFT}:
                self._leave(inode, piece, first, last)
        if self.damaged:
            self._mend(inode.ino, first, last, tell=False)
        for index, _, count in there.between(first, last):
            for piece in range(max(index >> PIECE_SHIFT, before + 1), ((index + count - 1) >> PIECE_SHIFT) + 1):
                before = piece
                if self._is_all(inode, piece, first, last):
                    self.table.remove(inode.ino, piece)
                else:
                    self._touch(inode.ino, piece)

    def _leave(self, inode: Inode, piece: int, first: int, last: int) -> None:
        """Compare a piece before its pages [first, last) are replaced: a new sum must not hide damage in the rest."""
        row = self.table.doubtful(inode.ino, piece)
        if row is not None and not self._is_all(inode, piece, first, last):
            self.compare(inode.ino, piece, row)

    @staticmethod
    def _is_all(inode: Inode, piece: int, first: int, last: int) -> bool:
        """Return True if no page of a piece outside [first, last) has a frame."""
        start, stop, there = piece << PIECE_SHIFT, (piece + 1) << PIECE_SHIFT, inode.pages
        if there is None or (first <= start and stop <= last):
            return True
        before, after = min(max(first, start), stop), max(min(last, stop), start)
        if before >= after:
            return not there.between(start, stop)
        return not (start < before and there.between(start, before)) and not (
            after < stop and there.between(after, stop)
        )

    def _touch(self, ino: int, piece: int) -> None:
        if not self.damaged or ino << KEY_SHIFT | piece not in self.damaged:
            self.table.touch(ino, piece)

    # -- damage ----------------------------------------------------------------------------------

    def _mask(self, ino: int, piece: int) -> int:
        return self.damaged.get(ino << KEY_SHIFT | piece, 0)

    def _set_damage(self, ino: int, piece: int, mask: int) -> None:
        """Mark these pages of a piece as damaged, and note it for the log."""
        self.mark_damaged(ino, piece, mask)
        if self._tree.journal is not None:
            self._tree.journal.damage(ino, piece, mask)

    def tell_damage(self) -> None:
        """Note all damage for the log again."""
        if self._tree.journal is not None:
            for key, mask in self.damaged.items():
                self._tree.journal.damage(key >> KEY_SHIFT, key & _PIECE_MASK, mask)

    def mark_damaged(self, ino: int, piece: int, mask: int) -> None:
        """Mark the pages of a piece whose bits are set as damaged; with 0 none is, and the piece has no sum."""
        key = ino << KEY_SHIFT | piece
        self._tree.ledger.add_damaged(bool(mask) - (key in self.damaged))
        if mask:
            self.table.remove(ino, piece)
            self.damaged[key] = mask
        else:
            self.damaged.pop(key, None)

    def _refuse_parts(self, ino: int, partly: set[int]) -> None:
        """Raise EIO if a page that would be written in part is damaged."""
        for page in partly:
            if self._mask(ino, page >> PIECE_SHIFT) & bits(page >> PIECE_SHIFT, page, page + 1):
                raise fail(errno.EIO)

    def _mend(self, ino: int, first: int, last: int, *, tell: bool) -> None:
        """Mark the pages [first, last) as not damaged: they are written or gone."""
        low, high = first >> PIECE_SHIFT, (last - 1) >> PIECE_SHIFT
        for key in [key for key in self.damaged if key >> KEY_SHIFT == ino and low <= key & _PIECE_MASK <= high]:
            piece = key & _PIECE_MASK
            mask = self.damaged[key]
            left = mask & ~bits(piece, first, last)
            if left == mask:
                continue
            self.mark_damaged(ino, piece, left)
            if tell and self._tree.journal is not None:
                self._tree.journal.damage(ino, piece, left)
            if not left and self.runs(ino, piece):
                self._touch(ino, piece)

    def broken(self) -> list[tuple[int, int, int]]:
        """Return inode number, first page and number of pages of all damaged ranges, in order."""
        found = []
        for key, mask in sorted(self.damaged.items()):
            start = (key & _PIECE_MASK) << PIECE_SHIFT
            while mask:
                low = (mask & -mask).bit_length() - 1
                count = (~(mask >> low) & ((mask >> low) + 1)).bit_length() - 1
                found.append((key >> KEY_SHIFT, start + low, count))
                mask &= ~(((1 << count) - 1) << low)
        return found

    def lines(self, most: int | None = None) -> list[str]:
        """Return bytes and path of each damaged range, for people."""
        tree = self._tree
        return [
            f"bytes {first << PAGE_SHIFT}-{((first + count) << PAGE_SHIFT) - 1} of {exact(tree.path(tree.inode(ino)))}"
            for ino, first, count in self.broken()[:most]
        ]

    # -- what a log says -------------------------------------------------------------------------

    def forget(self, ino: int, low: int, high: int) -> None:
        """Forget the sums of pieces [low, high)."""
        for piece in range(low, high):
            self.table.remove(ino, piece)

    # -- what crosses a kexec --------------------------------------------------------------------

    def columns(self) -> dict[str, Columns]:
        """Return all sums and all damage as columns of treeformat, in any order."""
        rows = self.table.rows()
        keys, masks = list(self.damaged), list(self.damaged.values())
        damaged = {"ino": _u64(key >> KEY_SHIFT for key in keys), "piece": _u64(key & _PIECE_MASK for key in keys)}
        for number, name in enumerate(_PARTS):
            damaged[name] = _u64(mask >> 64 * number & (1 << 64) - 1 for mask in masks)
        return {"sums": rows._asdict(), "damaged": damaged}

    def adopt(self, sums: Columns, damaged: Columns, *, complete: bool) -> None:
        """Begin with verified `columns`: none of these sums was compared yet, and the ledger counts them already."""
        self.complete = complete
        empty = np.empty(0, dtype=np.uint64)
        self.table.merge(Rows(**{name: sums[name] for name in Rows._fields}), (empty, empty), (empty, empty))
        rows = zip(*(damaged[name].tolist() for name in ("ino", "piece", *_PARTS)), strict=True)
        for ino, piece, *parts in rows:
            mask = sum(part << 64 * number for number, part in enumerate(parts))
            self.damaged[ino << KEY_SHIFT | piece] = mask

    def begin(self, owner: Array, first: Array, count: Array) -> None:
        """Begin to sum every piece that has frames, from the sorted runs (inode, page, pages) of all files.

        Known sums will be compared.
        """
        rows = self.table.rows()
        keys = list(self.damaged)
        without = _u64(key >> KEY_SHIFT for key in keys), _u64(key & _PIECE_MASK for key in keys)
        self.table.merge(rows, pieces_of(owner, first, count), without)


def _pieces(offset: int, end: int) -> tuple[int, int]:
    """Return the pieces [low, high) that bytes [offset, end) lie in."""
    return offset >> (PIECE_SHIFT + PAGE_SHIFT), ((end - 1) >> (PIECE_SHIFT + PAGE_SHIFT)) + 1


def _whole(inode: Inode, offset: int, end: int) -> tuple[int, int]:
    """Return the pages [first, last) that a store to bytes [offset, end) replaces completely."""
    return pages(offset), pages(end) if end >= inode.size else end >> PAGE_SHIFT


def _u64(numbers: object) -> Array:
    return np.array(list(numbers), dtype=np.uint64)  # type: ignore[call-overload]


def _nobody(ino: int, piece: int) -> None:
    """Do nothing."""
