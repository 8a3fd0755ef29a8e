# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pieces of a tree have a checksum, which wait for one, and which were changed too recently.

    BARE      has frames and no sum yet        a row of the arrays
    DOUBTED   has a sum that was not compared since it crossed a kexec, or another daemon's death
    SOUND     has a sum that was made or compared here
    marked    was changed in a round: a negative number instead of a row

Rows are in arrays, so that saving them is a copy. Loaded rows come first, sorted, and are found by a search; later
rows are found by `late`. The rows of a sleeping file are like any others; nothing is woken for them.

**Coming to rest.** A piece that is changed is marked with the current round. A round later (`turn`) pieces that still
have the mark may be summed; a piece that was changed again has a newer mark. So the usual write, to a
piece that is marked already, costs one look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pkramfs.fs.pieces import KEY_SHIFT
from pkramfs.pkram.treeformat import Array

GONE, BARE, DOUBTED, SOUND = 0, 1, 2, 3
_LEAST = 64
_GIVEN_UP = -(1 << 62)
"""The mark of no round."""


class Rows(NamedTuple):
    """Columns of a table: inode number, piece, sum."""

    ino: Array
    piece: Array
    sum: Array


class SumTable:
    """See the module's page. `weigh` is called with the number of new (or, negative, dropped) sums to be saved."""

    def __init__(self, weigh: Callable[[int], object]) -> None:
        self._weigh = weigh
        self.mark = -1
        self.late: dict[int, int] = {}
        """By key: a row, or a mark."""
        self.touched: dict[int, None] = {}
        self.resting: dict[int, None] = {}
        self.stirred: Callable[[], object] = _nobody
        """Called when the first piece is marked in a round."""
        self.rested = 0
        """The mark of those in `resting` that were not changed since."""
        empty = np.empty(0, dtype=np.uint64)
        self.load(Rows(empty, empty, empty), np.empty(0, dtype=np.uint8))

    def load(self, rows: Rows, state: Array) -> None:
        """Begin with these rows, sorted by inode and piece; `weigh` has counted their sums already."""
        self._ino, self._piece, self.sums = (np.array(column, dtype=np.uint64) for column in rows)
        self.state = np.array(state, dtype=np.uint8)
        self.told = np.ones(len(self.state), dtype=bool)
        """Whether the tree's log knows the sum of a row, or the node that it begins with."""
        self.untold = 0
        self.sorted = self.used = len(self.state)
        self.last = int(self._ino[-1]) if self.sorted else -1
        """The highest inode number that need be searched for."""
        self.late.clear()
        self.touched.clear()
        self.resting.clear()
        self._unused: list[int] = []
        self.doubted = int(np.count_nonzero(self.state == DOUBTED))
        self.pending = int(np.count_nonzero(self.state == BARE))
        """Pieces that have frames and no sum."""

    # -- looking --------------------------------------------------------------------------------

    def find(self, ino: int, piece: int) -> int | None:
        """Return the row of a piece, or its mark, which is negative; None if the table does not have it."""
        found = self.late.get(ino << KEY_SHIFT | piece)
        return self._search(ino, piece) if found is None and ino <= self.last else found

    def _search(self, ino: int, piece: int) -> int | None:
        low, high = self._rows(ino)
        row = low + int(np.searchsorted(self._piece[low:high], np.uint64(piece)))
        return row if row < high and int(self._piece[row]) == piece and self.state[row] else None

    def _rows(self, ino: int) -> tuple[int, int]:
        column = self._ino[: self.sorted]
        return int(np.searchsorted(column, np.uint64(ino))), int(np.searchsorted(column, np.uint64(ino + 1)))

    def doubtful(self, ino: int, piece: int) -> int | None:
        """Return the row of a piece whose sum was not compared yet, or None."""
        row = self.find(ino, piece) if self.doubted else None
        return row if row is not None and row >= 0 and self.state[row] == DOUBTED else None

    def place(self, row: int) -> tuple[int, int]:
        """Return inode number and piece of a row."""
        return int(self._ino[row]), int(self._piece[row])

    @property
    def known(self) -> int:
        """Return the number of pieces with a sum."""
        return int(np.count_nonzero(self.state[: self.used] >= DOUBTED))

    def rows(self) -> Rows:
        """Return all rows with a sum, in any order."""
        state = self.state[: self.used]
        keep = slice(0, self.used) if state.size and state.min() >= DOUBTED else np.flatnonzero(state >= DOUBTED)
        return Rows(self._ino[keep].copy(), self._piece[keep].copy(), self.sums[keep].copy())

    # -- changing -------------------------------------------------------------------------------

    def touch(self, ino: int, piece: int) -> None:
        """Mark a piece as changed: it no longer has a sum."""
        self.mark_found(ino, piece, self.find(ino, piece))

    def mark_found(self, ino: int, piece: int, found: int | None) -> None:
        """Mark a piece that `find` has found as changed."""
        if found is not None:
            self.pending -= 1
            if found >= 0:
                self.pending += self._clear(found) != BARE
        self.mark_new(ino << KEY_SHIFT | piece)

    def mark_new(self, key: int) -> None:
        """Mark a piece that is not in the table as changed."""
        self.pending += 1
        self.late[key] = self.mark
        if not self.touched:
            self.stirred()
        self.touched[key] = None

    def give_up(self, ino: int, piece: int) -> None:
        """Drop the sum of a piece for want of room; it gets none until it is changed again."""
        self.touch(ino, piece)
        del self.touched[ino << KEY_SHIFT | piece]
        self.late[ino << KEY_SHIFT | piece] = _GIVEN_UP

    def remove(self, ino: int, piece: int) -> None:
        """Forget a piece that has lost its frames, or is damaged."""
        found = self.find(ino, piece)
        if found is None:
            return
        if found < 0:
            self.pending -= 1
        else:
            self.pending -= self._clear(found) == BARE
        self.late.pop(ino << KEY_SHIFT | piece, None)

    def _clear(self, row: int) -> int:
        """Give up a row; return the state that it had."""
        state = int(self.state[row])
        self.state[row] = GONE
        if row >= self.sorted:
            self._unused.append(row)
        if state >= DOUBTED:
            self._weigh(-1)
            self.doubted -= state == DOUBTED
            if not self.told[row]:
                self.tell(row, 1)
        return state

    def put(self, ino: int, piece: int, value: int, state: int = SOUND) -> int:
        """Note the sum of a piece in a row: one that was made (SOUND), or one from a log."""
        self.remove(ino, piece)
        row = self._unused.pop() if self._unused else self._append()
        self._ino[row], self._piece[row], self.sums[row], self.state[row] = ino, piece, value, state
        self.late[ino << KEY_SHIFT | piece] = row
        self.told[row] = state == DOUBTED
        self.doubted += state == DOUBTED
        self.untold += state != DOUBTED
        self._weigh(1)
        return row

    def complete(self, row: int, value: int) -> None:
        """Note the sum of a piece whose row has none."""
        self.sums[row], self.state[row], self.told[row] = value, SOUND, False
        self.pending -= 1
        self.untold += 1
        self._weigh(1)

    def tell(self, rows: Array | slice | int, count: int) -> None:
        """Note that so many more sums are in the log."""
        self.told[rows] = True
        self.untold -= count

    def unknown(self, most: int) -> Array:
        """Return rows with sums that are not in the log, at most so many."""
        return np.flatnonzero(~self.told[: self.used] & (self.state[: self.used] >= DOUBTED))[:most]

    def three(self, rows: Array) -> list[tuple[int, int, int]]:
        """Return inode number, piece and sum of rows."""
        columns = (column[rows].tolist() for column in (self._ino, self._piece, self.sums))
        return list(zip(*columns, strict=True))

    def _append(self) -> int:
        row = self.used
        if row == len(self.state):
            more = max(row, _LEAST)
            self._ino, self._piece, self.sums = (
                np.concatenate((column, np.empty(more, dtype=np.uint64)))
                for column in (self._ino, self._piece, self.sums)
            )
            self.state = np.concatenate((self.state, np.zeros(more, dtype=np.uint8)))
            self.told = np.concatenate((self.told, np.ones(more, dtype=bool)))
        self.used += 1
        return row

    def agree(self, row: int) -> None:
        """Note that the sum of a row was compared and matches."""
        if self.state[row] == DOUBTED:
            self.doubted -= 1
        self.state[row] = SOUND

    def doubt(self) -> None:
        """Mark all sums as not compared."""
        self.state[self.state == SOUND] = DOUBTED
        self.doubted = int(np.count_nonzero(self.state[: self.used] == DOUBTED))

    # -- rounds ---------------------------------------------------------------------------------

    def turn(self) -> None:
        """Begin another round: pieces changed in this one rest from now on, unless they are changed again."""
        self.rested, self.mark = self.mark, self.mark - 1
        left, self.resting, self.touched = self.resting, self.touched, {}
        for key in left:  # of the round before, not summed yet
            if self.late.get(key, 0) < 0:
                self.late[key] = self.rested
                self.resting[key] = None

    def merge(self, rows: Rows, bare: tuple[Array, Array], without: tuple[Array, Array]) -> None:
        """Begin anew with sums to be compared, and with pieces that have frames; a piece without one of the sums is
        BARE.

        Pieces `without` are left out.
        """
        parts = [
            (rows.ino, rows.piece, rows.sum, DOUBTED),
            (*bare, np.zeros(len(bare[0]), dtype=np.uint64), BARE),
            (*without, np.zeros(len(without[0]), dtype=np.uint64), GONE),
        ]
        ino, piece, sums = (np.concatenate([np.asarray(part[n]).astype(np.uint64) for part in parts]) for n in range(3))
        state = np.concatenate([np.full(len(part[0]), part[3], dtype=np.uint8) for part in parts])
        # For each piece: GONE (it is left out), else its sum, else no sum.
        rank = np.array([0, 2, 1, 1], dtype=np.uint8)[state]
        order = np.lexsort((rank, piece, ino))
        ino, piece, sums, state = ino[order], piece[order], sums[order], state[order]
        first = np.ones(len(ino), dtype=bool)
        first[1:] = (ino[1:] != ino[:-1]) | (piece[1:] != piece[:-1])
        keep = first & (state != GONE)
        self.load(Rows(ino[keep], piece[keep], sums[keep]), state[keep])


def _nobody() -> None:
    """Do nothing."""
