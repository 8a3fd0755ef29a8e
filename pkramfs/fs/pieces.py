# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces of files, and the checksum of a piece, which reveals a flipped bit in preserved memory.

    file        |<---- piece 0, 1 MiB ---->|<------- piece 1 ------->|
    frames      ####....####################......##
                XXH3-64 of all # of piece 0  that of piece 1           . is a hole: no frame, no bytes

The sum of a piece is that of its *frames*, whole, one after the other in the order of the file, so

* a hole costs nothing and is not touched; the description, which has a checksum, records the holes;
* pages that were allocated and never written, or lie behind the end of the file, count: later they may be read;
* a file that grows without a store keeps its sums.

The seed has the number of the inode and of the piece, so that frames of another piece are damage, too.

Why 1 MiB: one request reads at most 1 MiB, so a first read checks one or two pieces, 0.2 ms each. xxhash releases the
interpreter lock for 100 kB or more. 24 bytes of description for each piece are 0.002 % of the data. A smaller piece
would lose fewer bytes to a flipped bit, but the user has to restore a damaged file from elsewhere in either case.

Kernel: fs/btrfs/file-item.c (btrfs_csum_one_bio), there a sum for each 4 KiB
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

from pkramfs.fs.pagecache import Run
from pkramfs.pkram.treeformat import Array
from pkramfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkramfs.machine.ram import Ram

PIECE_SHIFT = 8
"""log2 of the pages of a piece."""
PIECE_PAGES = 1 << PIECE_SHIFT
PIECE_SIZE = PIECE_PAGES << PAGE_SHIFT
KEY_SHIFT = 43
"""A file has fewer than 2**43 pieces: `ino << KEY_SHIFT | piece` is a key."""
_SEED_MASK = (1 << 64) - 1


def buffer() -> memoryview:
    """Return a buffer for `digest`."""
    return memoryview(bytearray(PIECE_SIZE))


def digest(ram: Ram, ino: int, piece: int, runs: Sequence[Run], into: memoryview) -> int:
    """Return the checksum of a piece that has these runs. It is read past the mapping: a hole of RAM stays one."""
    at = 0
    for _, pfn, count in runs:
        end = at + (count << PAGE_SHIFT)
        ram.read(pfn, into[at:end])
        at = end
    return xxhash.xxh3_64_intdigest(into[:at], seed=(ino << 32 ^ piece) & _SEED_MASK)


def bits(piece: int, first: int, last: int) -> int:
    """Return the pages [first, last) of a file as bits of a piece."""
    start = piece << PIECE_SHIFT
    low, high = max(first - start, 0), min(last - start, PIECE_PAGES)
    return (1 << high) - (1 << low) if low < high else 0


def pieces_of(owner: Array, first: Array, count: Array) -> tuple[Array, Array]:
    """Return owner and number of each piece that has pages.

    Pages are given as runs: owner, first page and number of pages of each, sorted by owner and page.
    """
    # Shapes: R runs, P pieces.
    # (R,): the first and the last piece of each run.
    low, high = first >> PIECE_SHIFT, (first + count - 1) >> PIECE_SHIFT
    # A run that begins in the piece in which the run before it ends does not count that once more.
    low[1:] += (owner[1:] == owner[:-1]) & (low[1:] == high[:-1])
    # (R,): how many pieces each run adds; (P,): their runs, and by how much they are behind the first of their run.
    adds = high - low + 1
    run = np.repeat(np.arange(len(adds)), adds)
    behind = np.arange(len(run)) - (np.cumsum(adds) - adds)[run]
    return owner[run], low[run] + behind
