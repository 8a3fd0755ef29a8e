# SPDX-License-Identifier: GPL-2.0-or-later
"""The counters of a tree: the only place that adds to them and subtracts from them.

    counted                    for
    ----------------------------------------------------------------------------
    pages, inode space         size= and nr_inodes= (in `limits`, which raises ENOSPC)
    directories, bytes         status
    runs, stream bytes         the room that a save needs

**Room for the save.** A tree with a name keeps as many frames free as its save needs, while it grows and
shrinks, so that writers meet ENOSPC before the tree can no longer be preserved:

    weight     bytes of the description without extents, and RUN_WEIGHT for each run
    held       enough for the weight at the last look, and _HOLD_AHEAD more
    look again when the weight is above that, or has shrunk to half of it

A preserved tree keeps none: its node exists. It keeps frames again at the first growth after it has withdrawn the node.

Kernel: mm/shmem.c (shmem_inode_acct_blocks, shmem_reserve_inode)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.fs.limits import INODE_SPACE, Limits, xattr_space
from pkramfs.pkram.store import estimate
from pkramfs.pkram.treeformat import DAMAGED, ENTRIES, EXTENTS, INODES, SUMS, TREE, UNWRITTEN, XATTRS

if TYPE_CHECKING:
    from pkramfs.fs.inode import Inode
    from pkramfs.fs.preservation import Preservation
    from pkramfs.machine.frames import Frames

RUN_WEIGHT = 1152
"""Bytes that a run of frames costs a save at worst: an extent, entries, a share of the page table."""
_HOLD_AHEAD = 1 << 20
_INODE, _ENTRY, _XATTR, _UNWRITTEN = INODES.width, ENTRIES.width, XATTRS.width, UNWRITTEN.width


class Figures(NamedTuple):
    """All counters of a tree, for one that is restored."""

    pages: int
    inode_space: int
    directories: int
    bytes: int
    runs: int
    stream_bytes: int


class Ledger:
    """The counters of one tree; each method is called for a change that has passed the gate."""

    __slots__ = (
        "_frames",
        "_hold_above",
        "_hold_below",
        "_preservation",
        "bytes",
        "copies",
        "directories",
        "limits",
        "runs",
        "stream_bytes",
    )

    def __init__(self, limits: Limits, frames: Frames, preservation: Preservation) -> None:
        self.limits, self._frames, self._preservation = limits, frames, preservation
        self.directories = self.bytes = self.runs = 0
        self.stream_bytes = TREE.size
        self.copies = 1
        """How many descriptions of the tree may be in RAM: with a log, a checkpoint beside what is saved."""
        self._hold_above: float = math.inf  # weights at which to hold more or fewer frames
        self._hold_below = -1

    def adopt(self, figures: Figures) -> None:
        """Begin with the figures of a tree that was restored."""
        self.limits.pages, self.limits.inode_space = figures.pages, figures.inode_space
        self.directories, self.bytes, self.runs = figures.directories, figures.bytes, figures.runs
        self.stream_bytes = figures.stream_bytes

    # -- names and inodes -----------------------------------------------------------------------

    def add_inode(self) -> None:
        """Count a new inode."""
        self.limits.inode_space += INODE_SPACE
        self.stream_bytes += _INODE

    def remove_inode(self, inode: Inode) -> None:
        """Take an inode out of the count; its pages and xattrs are gone already."""
        weight = _INODE
        limits = self.limits
        limits.inode_space -= INODE_SPACE
        if inode.entries is not None:
            self.directories -= 1
        elif inode.target is not None:
            weight += len(inode.target)
            limits.pages -= inode.own_pages
        else:
            self.bytes -= inode.size
            if inode.unwritten is not None:
                weight += _UNWRITTEN * inode.unwritten.runs
        self.stream_bytes -= weight
        if self.stream_bytes < self._hold_below and not self._preservation.guarded:
            self.hold_for_save()

    def add_directory(self) -> None:
        """Count an inode as a directory."""
        self.directories += 1

    def add_target(self, inode: Inode) -> None:
        """Count the target of a new symbolic link."""
        assert inode.target is not None
        self.stream_bytes += len(inode.target)
        self.limits.pages += inode.own_pages

    def add_link(self) -> None:
        """Count a further hard link."""
        self.limits.inode_space += INODE_SPACE

    def add_links(self, count: int) -> None:
        """Count further hard links (negative: removed ones)."""
        self.limits.inode_space += count * INODE_SPACE

    def remove_link(self) -> None:
        """Take a further hard link out of the count."""
        self.limits.inode_space -= INODE_SPACE

    def add_entry(self, name: bytes) -> None:
        """Count a name in a directory."""
        self.stream_bytes += _ENTRY + len(name)

    def remove_entry(self, name: bytes) -> None:
        """Take a name in a directory out of the count."""
        self.stream_bytes -= _ENTRY + len(name)

    def add_xattr(self, name: bytes, value: bytes, sign: int = 1) -> None:
        """Count an xattr; ACLs take no inode space."""
        self.stream_bytes += sign * (_XATTR + len(name) + len(value))
        if not name.startswith(b"system."):
            self.limits.inode_space += sign * xattr_space(name, value)

    def remove_xattr(self, name: bytes, value: bytes) -> None:
        """Take an xattr out of the count."""
        self.add_xattr(name, value, -1)

    # -- content --------------------------------------------------------------------------------

    def add_bytes(self, count: int) -> None:
        """Count the bytes by which a file grew (negative: shrank)."""
        self.bytes += count

    def add_pages(self, pages: int, runs: int) -> None:
        """Count pages and runs that a file has gained (negative: lost)."""
        self.limits.pages += pages
        self.runs += runs

    def add_unwritten(self, runs: int) -> None:
        """Count runs of pages that were allocated and never written (negative: removed ones)."""
        self.stream_bytes += _UNWRITTEN * runs

    def add_sums(self, count: int) -> None:
        """Count checksums of data (negative: removed ones)."""
        self.stream_bytes += SUMS.width * count

    def add_damaged(self, count: int) -> None:
        """Count damaged pieces of files (negative: repaired ones)."""
        self.stream_bytes += DAMAGED.width * count

    # -- room for the save ----------------------------------------------------------------------

    def hold_for_save(self) -> None:
        """Hold as many frames free from now on as saving the tree needs; raise ExhaustedError if there are too few."""
        if self._preservation.preserved:
            self._hold_above = 0
            return
        self._frames.hold(self.copies * self.pages_needed(_HOLD_AHEAD))
        weight = self.stream_bytes + self.runs * RUN_WEIGHT
        self._hold_above, self._hold_below = weight + _HOLD_AHEAD, weight // 2 - _HOLD_AHEAD // 2

    def hold_again(self) -> None:
        """Compute at the next growth how many frames to hold: the node is gone."""
        if self._hold_above != math.inf:
            self._hold_above = -1

    def require_space(self, size: int) -> None:
        """Raise ENOSPC unless there is inode space for a change, and hold frames for the larger tree."""
        self.limits.require_space(size)
        if self.stream_bytes + self.runs * RUN_WEIGHT > self._hold_above and not self._preservation.guarded:
            self.hold_for_save()

    def grow(self) -> None:
        """Hold more frames, before a change that makes the tree larger, if it has outgrown those held."""
        if self.stream_bytes + self.runs * RUN_WEIGHT > self._hold_above and not self._preservation.guarded:
            self.hold_for_save()

    def pages_needed(self, growth: int = 0) -> int:
        """Return how many frames a save needs for itself, if the description grows by so many bytes."""
        extents = EXTENTS.width * self.runs
        return estimate(self.runs + growth // RUN_WEIGHT, self.stream_bytes + extents + growth)
