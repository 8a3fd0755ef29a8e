# SPDX-License-Identifier: GPL-2.0-or-later
"""Sums made and compared in steps, while a tree is served.

    take ──▶ some pieces and their frames ──▶ digests, in a thread ──▶ settle: noted, if the piece is as it was
             first those that crossed a kexec and were not compared yet,
             then those that have rested, then those that never had a sum

Nothing is locked: a piece that is changed meanwhile loses its row or gets a newer mark, and then its digest is dropped.
A piece that does not match its sum is compared a second time before it is marked as damaged.

A step is about BATCH bytes: some 3 ms of a thread without the interpreter lock, and then a turn among the requests.
While requests keep the interpreter busy, the thread rarely gets the lock, and so does not disturb them.

Kernel: fs/btrfs/scrub.c
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pkramfs.errors import ExhaustedError
from pkramfs.fs.pagecache import Run
from pkramfs.fs.pieces import KEY_SHIFT, buffer, digest
from pkramfs.fs.sumtable import BARE, DOUBTED
from pkramfs.pkram.parallel import Workbenches, each
from pkramfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkramfs.fs.sums import Sums
    from pkramfs.fs.tree import Tree
    from pkramfs.pkram.treeformat import Array

BATCH = 16 << 20
_MOST = 64
"""Pieces of a step, of files that are smaller."""
_TOLD = 1 << 12
"""Sums in one record: 96 KiB."""
_WINDOW = 1 << 14
"""Rows that are looked through at once for one that is to be worked on."""
_PIECE_MASK = (1 << KEY_SHIFT) - 1


class Job(NamedTuple):
    """A piece to be digested: its row or mark in the table, and its frames."""

    ino: int
    piece: int
    found: int
    state: int
    runs: list[Run]


class Summing:
    """The work on the sums of one tree; `threads` is the number of threads that digest at once."""

    def __init__(self, tree: Tree, sums: Sums, threads: int = 1) -> None:
        self._tree, self.sums, self._threads = tree, sums, threads
        self._at = {DOUBTED: 0, BARE: 0}
        self._benches = Workbenches(buffer)

    @property
    def left(self) -> int:
        """Return the number of pieces without a sum, or with a sum that was not compared yet."""
        return self.sums.table.pending + self.sums.table.doubted

    def take(self, *, compare: bool = True, make: bool = True) -> list[Job]:
        """Return the pieces to be digested next: first those to be compared, then those that get a new sum."""
        jobs, size = list[Job](), 0
        for ino, piece, found, state in self._next(compare, make):
            runs = self.sums.runs(ino, piece)
            if not runs:
                self.sums.table.remove(ino, piece)
                continue
            jobs.append(Job(ino, piece, found, state, runs))
            size += sum(count for _, _, count in runs) << PAGE_SHIFT
            if size >= BATCH or len(jobs) == _MOST:
                break
        return jobs

    def _next(self, compare: bool, make: bool) -> Iterator[tuple[int, int, int, int]]:
        """Yield inode number, piece, row or mark, and state of the pieces to work on."""
        table = self.sums.table
        if compare and table.doubted:
            yield from self._rows(DOUBTED)
        if not make:
            return
        while table.resting:
            key, _ = table.resting.popitem()
            if table.late.get(key) == table.rested:
                yield key >> KEY_SHIFT, key & _PIECE_MASK, table.rested, BARE
        if table.pending:
            yield from self._rows(BARE)

    def _rows(self, state: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the rows in a state, from where the last one was found, once round."""
        table = self.sums.table
        end, at = table.used, min(self._at[state], table.used)
        for start, stop in ((at, end), (0, at)):
            for low in range(start, stop, _WINDOW):
                for row in (low + np.flatnonzero(table.state[low : min(low + _WINDOW, stop)] == state)).tolist():
                    self._at[state] = row + 1
                    yield *table.place(row), row, state

    def digests(self, jobs: list[Job]) -> list[int]:
        """Return the digest of each piece; in any thread."""
        ram = self._tree.ram

        def one(number: int) -> int:
            job = jobs[number]
            with self._benches.lend() as into:
                return digest(ram, job.ino, job.piece, job.runs, into)

        return each(one, len(jobs), threads=self._threads)

    def settle(self, jobs: list[Job], digests: list[int]) -> None:
        """Note the sums of pieces that were not changed since they were taken, and find damaged ones."""
        table, made = self.sums.table, list[int]()
        for job, value in zip(jobs, digests, strict=True):
            if not self._is_as_it_was(job):
                continue
            if job.state == BARE:
                if job.found >= 0:
                    table.complete(job.found, value)
                made.append(job.found if job.found >= 0 else table.put(job.ino, job.piece, value))
            elif int(table.sums[job.found]) == value:
                table.agree(job.found)
            else:
                self.sums.compare(job.ino, job.piece, job.found)
        if made:
            self._keep(made)
        self._tree.commit()

    def _is_as_it_was(self, job: Job) -> bool:
        """Return True if a piece was not changed since it was taken."""
        table = self.sums.table
        if 0 <= job.found < table.sorted:  # a row that nothing else ever gets
            return int(table.state[job.found]) == job.state
        return table.find(job.ino, job.piece) == job.found and (
            job.found < 0 or int(table.state[job.found]) == job.state
        )

    def _keep(self, made: list[int]) -> None:
        """Reserve room for new sums in the save, and write them to the log; forget them if there is no room."""
        tree, table = self._tree, self.sums.table
        try:
            tree.ledger.grow()
        except ExhaustedError:
            for row in made:
                table.give_up(*table.place(row))
            return
        if tree.journal is not None and not tree.preserved:
            rows = np.array(made)
            if tree.journal.sum(table.three(rows)):
                table.tell(rows, len(rows))
                tell(tree, self.sums)

    def step(self, *, compare: bool = True) -> int:
        """Digest and settle some pieces in this thread; return their number."""
        self._tree.commit()  # the rest of a cut page is zeros only after the commit
        jobs = self.take(compare=compare)
        self.settle(jobs, self.digests(jobs))
        return len(jobs)


def tell(tree: Tree, sums: Sums) -> None:
    """Write the sums to the log that it does not have: those that were made while the tree was preserved.

    A preserved tree's log may begin anew at any time with a node that lacks them. If the log has no room they stay
    unknown to it.
    """
    table, journal = sums.table, tree.journal
    while journal is not None and table.untold:
        rows = table.unknown(_TOLD)
        if not journal.sum(table.three(rows)):
            return
        table.tell(rows, len(rows))


def compare_all(tree: Tree, threads: int) -> Iterator[int]:
    """Compare all data of an unchanging tree with their sums; yield the number of bytes after each step."""
    assert tree.sums is not None
    begin(tree, tree.sums)
    work = Summing(tree, tree.sums, threads)
    while jobs := work.take(make=False):
        work.settle(jobs, work.digests(jobs))
        yield sum(count for job in jobs for _, _, count in job.runs) << PAGE_SHIFT


def begin(tree: Tree, sums: Sums) -> None:
    """Begin to sum all data of a tree that have no sum yet, and to compare the sums that exist."""
    owner, first, count = _extents(tree)
    sums.begin(owner, first, count)


def _extents(tree: Tree) -> tuple[Array, Array, Array]:
    """Return inode number, first page and pages of the runs of all files, sorted by the first two."""
    awake = sorted((inode.ino, inode.pages) for inode in tree.inodes.values() if inode.pages is not None)
    raw = b"".join(leaf for _, pages in awake for leaf in pages.leaves)
    runs = np.frombuffer(raw, dtype=np.int64).reshape(-1, 3)
    owner = np.repeat(np.array([ino for ino, _ in awake], dtype=np.int64), [pages.runs for _, pages in awake])
    if tree.asleep is None:
        return owner, runs[:, 0], runs[:, 2]
    snapshot = tree.asleep.snapshot()
    packed, lengths = snapshot.packed, np.diff(snapshot.packed.edges)
    sleeping = np.repeat(snapshot.inodes, lengths)
    owners = np.repeat(packed.parts.inodes["ino"].astype(np.int64), lengths)[sleeping]
    runs, owner = np.concatenate((runs, packed.pieces[sleeping])), np.concatenate((owner, owners))
    order = np.lexsort((runs[:, 0], owner))
    return owner[order], runs[order, 0], runs[order, 2]
