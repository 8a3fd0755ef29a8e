# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal of a tree: the changes of each request, written to a log before the request is answered.

    request ──▶ the tree changes, and notes it here ──▶ commit ──▶ frames are freed ──▶ the request is answered

Nothing is stored before `commit`. Then all records of a request become one chunk, and one store makes it count. Actions
that cannot be undone wait for this store: only afterwards the daemon frees the frames that files have given up, and
clears the rest of a page that was cut. So a daemon that dies before the store has changed nothing. If it dies after the
store, the request is done, and recovery repeats the rest.

Attributes are not noted one by one. The gate (core) names the inodes that will change, and `commit` writes their new
attributes. For the most frequent requests one short record holds everything (brief): the first change that a request
notes may be of this kind, and further notes follow it. Data that overwrite data need no record, since they are in their
frames; nor do reads, look-ups and access times.

If RAM is so full that the log gets no frames, the open counts of files are written later, so that opening a file for
reading needs no room. An open for reading of a file with a name is always written late, when no request waits or
together with many others. A daemon that dies before that leaves a successor that does not know the last readers; the
kernel's references keep their files.

A tree without a name cannot be found again and has no journal; then `tree.journal` is None.

Kernel: fs/jbd2/transaction.c (jbd2_journal_get_write_access … stop); the deferred frees are ext4_free_data
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from pkramfs.errors import ExhaustedError
from pkramfs.fs.brief import (
    AHEAD,
    Brief,
    pack_gone,
    pack_made,
    pack_moved,
    pack_open,
    pack_times,
    pack_wrote,
)
from pkramfs.fs.records import (
    Kind,
    pack_damaged,
    pack_enter,
    pack_inode,
    pack_leave,
    pack_lost,
    pack_opened,
    pack_range,
    pack_reaped,
    pack_run,
    pack_summed,
    pack_unset,
    pack_xattr,
)
from pkramfs.journal.log import FREEING, GROWTH, LESS
from pkramfs.spans import Spans

if TYPE_CHECKING:
    from pkramfs.fs.inode import Inode
    from pkramfs.fs.lost import Losses
    from pkramfs.journal.log import Log
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram


REQUESTS, SIZE = 1 << 16, 64 << 20
"""How many requests, or bytes of log, make a checkpoint due."""
_FEW, _MANY = 4, 64
"""Records that surely fit where there is room for a request; readers' opens that are told together at the latest."""
_BRIEF = 1024
"""Bytes in which a chunk with one record of `brief` fits."""
_NO_RUN = (0, 0, 0)
_TELL_OPEN = (pack_made, pack_gone, pack_open)


class Damage(Protocol):
    """The part that knows which data are damaged."""

    def tell_damage(self) -> None:
        """Note all damage."""


class Owner(Protocol):
    """The part of a tree that its journal needs."""

    ram: Ram
    frames: Frames
    losses: Losses
    unnamed: set[int]

    @property
    def sums(self) -> Damage | None:
        """Return the checksums of the data, if there are any."""

    def zero(self, address: int, size: int, *, maybe_hole: bool) -> None:
        """Zero bytes of one page."""


class Journal:
    """The journal of one tree; `pages` are those of the checkpoint that only the log needs."""

    def __init__(self, tree: Owner, log: Log, pages: Spans | None = None) -> None:
        self.log, self.pages = log, pages or Spans()
        self._tree, self._frames = tree, tree.frames
        self.records: list[bytes] = []
        """The records of this request that are noted already."""
        self._size = self._sized = 0  # the bytes of the first `_sized` records of `_measured`
        self._measured = self.records
        self._brief: Brief | None = None
        """What the request has changed first, if one record can tell it: its packer, the inode, what else it needs."""
        self._dirty: dict[int, Inode] = {}
        self._fresh = 0
        """The first inode that was made since the last commit, 0: none was."""
        self._opened: dict[int, Inode] = {}
        self._late: dict[int, Inode] = {}
        self._looked: dict[int, Inode] = {}  # inodes with another access time
        self._looks_due = False
        self._open: dict[int, Inode] = {}  # all inodes with open handles
        self._freed: list[tuple[Sequence[int], Sequence[int]]] = []
        self._cut: list[tuple[int, int, bool]] = []
        self._losing: set[int] = set()
        self.requests, self.limit = 0, REQUESTS
        """Requests that have changed something since the checkpoint, and after how many a new one is due."""
        self.due: Callable[[], object] = _nobody
        """Called when a new checkpoint is due: after `limit` requests, or when the log finds no more frames."""
        log.scarce = self._scarce
        self.done: dict[int, int] = {}
        """The requests that were done last before this process took over, by number, and what inode each has made."""
        tree.losses.changed = self.lose

    def resume(self, requests: int, done: dict[int, int]) -> None:
        """Continue after another process, whose requests were replayed; see `requests` and `done`."""
        self.requests, self.done = requests, done
        self.expect_due()

    def expect_due(self) -> None:
        """Make a checkpoint that was due already due at the next request."""
        self.limit = max(self.limit, self.requests + 1)

    # -- what a request changes -----------------------------------------------------------------

    def ensure(self, size: int = GROWTH) -> None:
        """Take room for so many bytes of records beside those noted already; raise ENOSPC if there is none."""
        frees = size == FREEING
        if self.records:
            if self._measured is not self.records:
                self._measured, self._size, self._sized = self.records, 0, 0
            self._size += sum(map(len, self.records[self._sized :]))
            self._sized = len(self.records)
            size += self._size
        if self.log.left < size:
            self.log.ensure(size, last=frees)

    def change(self, inodes: tuple[Inode, ...], room: int) -> None:
        """Note that attributes of inodes change; take room for so many bytes of records, or raise ENOSPC."""
        if self.records or self.log.left < room:
            self.ensure(room)
        for inode in inodes:
            self._dirty[inode.ino] = inode

    def touch(self, inode: Inode) -> None:
        """Note that attributes of an inode change."""
        self._dirty[inode.ino] = inode

    def add(self, inode: Inode) -> None:
        """Note a new inode."""
        self._dirty[inode.ino] = inode
        if not self._fresh:
            self._fresh = inode.ino

    def opened(self, inode: Inode, *, late: bool = False) -> None:
        """Note that the open counts of an inode change; a record of its attributes includes them.

        For a file with a name an open for reading may be written `late`, with others, or when no request waits: the
        kernel's references keep the file, too.
        """
        ino, brief = inode.ino, self._brief
        if (brief is not None and brief[1] is inode and brief[0] in _TELL_OPEN) or ino in self._dirty:
            pass
        elif late and inode.nlink:
            self._late[ino] = inode
            if len(self._late) >= _MANY:
                self._hurry()
        elif self._is_first() and not self._opened and self.log.left > GROWTH:
            self._brief = pack_open, inode, self._tree.unnamed
        else:
            self._opened[ino] = inode
        if inode.opens:
            self._open[ino] = inode
        else:
            self._open.pop(ino, None)

    def looked(self, inode: Inode) -> None:
        """Note a new access time, which is written late: a read must not fail for want of room."""
        self._looked[inode.ino] = inode
        if len(self._looked) >= _MANY:
            self._hurry()

    def enter(self, folder: Inode, name: bytes, child: Inode, cookie: int) -> None:
        """Note a new name."""
        self.records.append(pack_enter(folder.ino, name, child.ino, cookie))

    def leave(self, folder: Inode, name: bytes) -> None:
        """Note that a name is gone."""
        self.records.append(pack_leave(folder.ino, name))

    def _is_first(self) -> bool:
        """Return True if the request has noted nothing yet that must be written in order."""
        return self._brief is None and not self._dirty and not self.records

    def made(self, folder: Inode, name: bytes, inode: Inode, cookie: int) -> None:
        """Note a new name with a new inode, which has the times of the directory."""
        if self._brief is None and not self._dirty and not self.records:
            self._brief = pack_made, inode, folder, name, cookie, inode.ctime
        else:
            self.touch(folder)
            self.add(inode)
            self.enter(folder, name, inode, cookie)

    def gone(self, folder: Inode, name: bytes, inode: Inode, now: int) -> None:
        """Note that a name is gone, since `now`, and the new attributes of its inode."""
        if self._brief is None and not self._dirty and not self.records:
            self._brief = pack_gone, inode, folder, name, now
        else:
            self.touch(folder)
            self.touch(inode)
            self.leave(folder, name)

    def moved(
        self, source: Inode, name: bytes, inode: Inode, target: Inode, new_name: bytes, cookie: int,
        victim: Inode | None, now: int,
    ) -> None:  # fmt: skip
        """Note that a name was moved, since `now`, perhaps in place of a victim with its new attributes."""
        if self._is_first():
            number = 0 if victim is None else victim.ino
            self._brief = pack_moved, inode, source, name, target, new_name, cookie, number, now
        else:
            for changed in (source, target, inode):
                self.touch(changed)
            self.leave(source, name)
            if victim is not None:
                self.leave(target, new_name)
            self.enter(target, new_name, inode, cookie)
        if victim is not None:
            self.touch(victim)

    def timed(self, inode: Inode) -> None:
        """Note that times of an inode change."""
        if self._brief is None and not self._dirty and not self.records:
            self._brief = pack_times, inode
        else:
            self._dirty[inode.ino] = inode

    def wrote(self, inode: Inode) -> None:
        """Note that size and times of a file change by a write."""
        brief = self._brief
        if brief is None and not self._dirty and not self.records:
            self._brief = pack_wrote, inode, _NO_RUN
        elif brief is None or brief[1] is not inode or brief[0] is not pack_wrote:
            self._dirty[inode.ino] = inode

    def put(self, inode: Inode, runs: list[tuple[int, int, int]]) -> None:
        """Note new runs (file page, pfn, pages) of a file, and its new size and times, as `wrote` does."""
        if len(runs) == 1 and self._brief is None and not self._dirty and not self.records:
            self._brief = pack_wrote, inode, runs[0]
            return
        self._dirty[inode.ino] = inode
        for index, pfn, count in runs:
            self.records.append(pack_run(inode.ino, index, pfn, count))

    def cut(self, inode: Inode, first: int, last: int) -> None:
        """Note that a file has no pages in [first, last)."""
        self.records.append(pack_range(Kind.CUT, inode.ino, first, last))

    def reserve(self, inode: Inode, first: int, count: int) -> None:
        """Note pages that were allocated and never written."""
        self.records.append(pack_range(Kind.RESERVED, inode.ino, first, count))

    def use(self, inode: Inode, first: int, last: int) -> None:
        """Note that no pages in [first, last) are unwritten."""
        self.records.append(pack_range(Kind.USED, inode.ino, first, last))

    def clear(self, inode: Inode, start: int, end: int, address: int, *, maybe_hole: bool) -> None:
        """Note bytes [start, end) of a file, at an address of RAM, to be zeroed after the commit."""
        self.records.append(pack_range(Kind.ZERO, inode.ino, start, end))
        self._cut.append((address, end - start, maybe_hole))

    def set_xattr(self, inode: Inode, name: bytes, value: bytes | None) -> None:
        """Note an extended attribute, or with None that it is gone."""
        self.records.append(pack_unset(inode.ino, name) if value is None else pack_xattr(inode.ino, name, value))

    def reap(self, inode: Inode) -> None:
        """Note that an inode is gone."""
        if not 0 < self._fresh <= inode.ino:
            self._dirty.pop(inode.ino, None)
        self._opened.pop(inode.ino, None)
        self._late.pop(inode.ino, None)
        self._looked.pop(inode.ino, None)
        self._losing.discard(inode.ino)
        self.records.append(pack_reaped(inode.ino))

    def lose(self, ino: int) -> None:
        """Note that the lost pages of a file have changed."""
        self._losing.add(ino)

    def unsum(self, ino: int, low: int, high: int) -> None:
        """Note that pieces [low, high) of a file have lost their checksum; inode 0: no piece has one."""
        self.records.append(pack_range(Kind.UNSUMMED, ino, low, high))

    def sum(self, rows: Sequence[tuple[int, int, int]]) -> bool:
        """Note new checksums (inode number, piece, sum); return False if there is no room for optional records."""
        size = sum(map(len, self.records)) + 24 * len(rows)
        try:
            self.log.ensure(LESS + size)
        except ExhaustedError:
            return False
        self.records.append(pack_summed(rows))
        return True

    def damage(self, ino: int, piece: int, mask: int) -> None:
        """Note which pages of a piece of a file are damaged."""
        self.records.append(pack_damaged(ino, piece, mask))

    def free(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Free frames after the commit."""
        self._freed.append((starts, counts))

    # -- the end of a request -------------------------------------------------------------------

    def commit(self, asker: int = 0) -> None:
        """Commit all notes; `asker` is the number of the request that is about to be answered."""
        brief = self._brief
        if self._dirty or self.records or self._opened or self._losing or self._looks_due:
            self._write(asker)
        elif brief is not None:
            log = self.log
            if log.left > _BRIEF:
                log.put(brief[0](brief, log.position, asker))
                self._brief = None
                self.requests = requests = self.requests + 1
                if requests == self.limit or not requests & 1023:
                    self._look(requests)
                return
            self._write(asker)
        if self._cut or self._freed:
            self._settle()

    def tell(self) -> None:
        """Write the notes that may be written late."""
        if self._late or self._looked:
            self._hurry()
            self.commit()

    def _hurry(self) -> None:
        self._opened |= self._late
        self._late.clear()
        self._looks_due = bool(self._looked)

    def _write(self, asker: int) -> None:
        """Append the notes to the log. No comprehensions and no list[bytes]() here: they take 0.2 and 0.4 µs."""
        unnamed, log, late = self._tree.unnamed, self.log, False
        parts: list[bytes] = []
        dirty: dict[int, Inode] = {}  # now: notes that are in the log must not be kept, even if memory runs out
        records: list[bytes] = []
        if self._brief is not None:
            parts.append(self._brief[0](self._brief, 0, 0)[AHEAD:])
        for inode in self._dirty.values():
            parts.append(pack_inode(inode, unnamed))  # noqa: PERF401
        if self.records:
            parts += self.records
        if self._opened or self._losing or self._looked:
            late = self._tell_late(parts)
            if not parts:
                return
        log.append(parts, asker)
        if late:
            self._opened.clear()
            self._losing.clear()
            self._looked.clear()
            self._looks_due = False
        self._brief, self._dirty, self.records, self._fresh = None, dirty, records, 0
        self.requests = requests = self.requests + 1
        if requests == self.limit or not requests & 1023:
            self._look(requests)

    def _look(self, requests: int) -> None:
        """Ask for a checkpoint if one is due."""
        if requests == self.limit or self.log.size > SIZE:
            self.due()

    def _tell_late(self, parts: list[bytes]) -> bool:
        """Add the late notes: open counts of files whose attributes are not written, access times, losses.

        Return False if there is no room, so that they have to be written later.
        """
        unnamed, log = self._tree.unnamed, self.log
        more: list[bytes] = []
        for inode in self._opened.values():
            more.append(pack_opened(inode, unnamed))  # noqa: PERF401
        for ino, inode in self._looked.items():
            if ino not in self._dirty:
                more.append(pack_times((pack_times, inode), 0, 0)[AHEAD:])
        for ino in self._losing:
            more.append(self._lost(ino))  # noqa: PERF401
        room = (log.left > GROWTH and len(more) < _FEW) or self._has_room(parts, more)
        if room:
            parts += more
        return room

    def _has_room(self, parts: list[bytes], more: list[bytes]) -> bool:
        """Return False if `more` must wait: it would use the last room, which is kept for changes of the tree."""
        try:
            self.log.ensure(LESS + sum(map(len, parts)) + sum(map(len, more)))
        except ExhaustedError:
            return False
        return True

    def _scarce(self) -> None:
        """Ask for a checkpoint before frames run out: it frees segments of the log."""
        self.due()

    def _settle(self) -> None:
        """Do the actions that waited for the commit."""
        if self._cut:
            while self._cut:  # none twice if memory runs out half-way: the bytes may have been written since
                address, size, maybe_hole = self._cut[-1]
                self._tree.zero(address, size, maybe_hole=maybe_hole)
                self._cut.pop()
            self.log.note_zeroed()
        while self._freed:
            self._frames.free(*self._freed[-1])
            self._freed.pop()

    def _lost(self, ino: int) -> bytes:
        found = self._tree.losses.files.get(ino)
        return pack_lost(ino, 0, -1, {}) if found is None else pack_lost(ino, found.error, *found.state())

    # -- checkpoints ----------------------------------------------------------------------------

    def holds(self, pages: Spans) -> bool:
        """Return True if the log's checkpoint is the node that these pages belong to; it needs them from now on."""
        if not self.log.base.node or self.log.base.node not in pages:
            return False
        self.pages = pages
        return True

    def rebase(self, node: int, pages: Spans, position: int | None = None) -> None:
        """Begin the log with another checkpoint: the node with the tree as it was at `position`, by default now.

        `pages` are those that the new node uses for itself, to be freed when it is no longer needed. A node does not
        hold open counts and losses, so these are written again behind the position before the checkpoint counts.
        """
        self.commit()
        position = self.log.tail if position is None else position
        self._opened |= self._open
        self._losing |= self._tree.losses.files.keys()
        self.commit()
        self.log.rebase(node, position)
        old, self.pages = self.pages, pages
        self.requests, self.limit = 0, REQUESTS
        if old and old != pages:
            self._frames.free(old.starts, old.counts)

    def trim(self) -> None:
        """Begin the log with the same node now, since which only open counts and damage were written."""
        self.commit()
        position, sums = self.log.tail, self._tree.sums
        if sums is not None:
            sums.tell_damage()
        self.rebase(self.log.base.node, self.pages, position)


def _nobody() -> None:
    """Do nothing."""
