# SPDX-License-Identifier: GPL-2.0-or-later
"""The base of every part of the tree: the inode table, the gate, and references that keep an inode alive.

**The gate.** Every change of a tree passes through `_change`, after all checks and before the
first mutation. It is the only place at which a tree can be frozen, at which a preserved
tree withdraws its node, and at which the journal learns which inodes will change:

    checks ──▶ gate ──▶ mutation      EROFS while the tree is frozen; ENOSPC if the journal has no room; the first
                                      change of a preserved tree withdraws its node, then it is applied

Below the gate, the code that changes a name, a run of frames or an attribute notes this in the journal; the code that
makes an inode notes the inode.

The states and their transitions are in preservation, the counters in ledger.
Access times are no change: they are kept when nothing else happens, and skipped while frozen.

**Handles.** The handle of an open file is its inode number, with WRITING set if it may write, UNNOTED if it was
opened with O_NOATIME, and DIRECT if with O_DIRECT. So a door (fuse) needs no table of handles, and the next door
can go on with the same handles. All methods accept handles and inode numbers.

**Sleep.** `inodes` has the inodes that were looked up since the tree was restored; see asleep. Only an inode that
is found by a name or a number is put there, so a walk through `inodes` sees every inode that is open, looked up,
deleted or changed. `wake` adds all other inodes.

**References.** The code that serves the kernel calls `remember` for every inode that an answer names, and
`forget` when the kernel gives references back. An inode without name, reference and handle is reaped: its pages go
back at once.

Kernel: mm/shmem.c (shmem_get_inode, shmem_evict_inode), fs/super.c (freeze_super)
"""

from __future__ import annotations

import errno
import stat
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.fs import clock
from pkramfs.fs.access import RELATIME, Access, relatime
from pkramfs.fs.asleep import Asleep, SleepingDirectory
from pkramfs.fs.directory import Directory
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import Inode
from pkramfs.fs.ledger import Figures, Ledger
from pkramfs.fs.limits import Limits, StatFs
from pkramfs.fs.lost import Losses
from pkramfs.fs.pagecache import END, PageMap
from pkramfs.fs.preservation import Preservation
from pkramfs.fs.protection import NOATIME
from pkramfs.fs.rules import EMPTY_DIRECTORY_SIZE, INO_MASK, LABEL, ROOT_INO, WRITING
from pkramfs.journal.log import GROWTH
from pkramfs.spans import Spans

if TYPE_CHECKING:
    from pkramfs.fs.journal import Journal
    from pkramfs.fs.sums import Sums
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram

NAMED = 10
"""How many files an answer names; it counts the others."""
PATH_MAX = 4096
_SEARCH = 1 << 16
"""Entries that are looked at for the other name of a file with several."""
_DAY = 86_400 * 10**9


class Counts(NamedTuple):
    """How much a tree holds. `files` counts everything but directories; `bytes` is the sum of file sizes."""

    files: int
    directories: int
    pages: int
    bytes: int


class Core:
    """See the module's page; `Tree` adds the operations."""

    def __init__(
        self, ram: Ram, frames: Frames, limits: Limits, *, root_mode: int = 0o1777, uid: int = 0, gid: int = 0
    ) -> None:
        self.ram, self.frames, self.limits = ram, frames, limits
        self.preservation = Preservation(self._node_gone)
        self.ledger = Ledger(limits, frames, self.preservation)
        self.inodes: dict[int, Inode] = {}
        self.writing: dict[int, Inode] = {}  # those that are open for writing
        self.asleep: Asleep | None = None
        self.next_ino = ROOT_INO
        self.journal: Journal | None = None
        self.sums: Sums | None = None
        self.access: Callable[[], Access] = relatime
        self._access, self._asked = RELATIME, 0
        self.orphans: dict[int, tuple[Inode, bytes]] = {}
        self.tails: set[int] = set()  # see filling
        self.losses = Losses()
        self.unnamed: set[int] = set()  # orphans that never had a name, and may get one
        self.labelled = False  # a file has LABEL, or had it: see attributes
        self.root = self._allocate_inode(stat.S_IFDIR | root_mode & 0o7777, uid, gid)
        self.remember(self.root)  # the mount itself
        self._make_directory(self.root, self.root)

    # -- the gate -------------------------------------------------------------------------------

    def _change(self, *inodes: Inode, room: int = GROWTH) -> None:
        """Let a change of these inodes' attributes pass, or refuse it; see the module's page.

        A change that takes no memory passes `room=LESS`, and may use the last room of the journal.
        """
        preservation, journal = self.preservation, self.journal
        if journal is not None and not preservation.frozen and (inodes or journal.records or journal.log.left < room):
            journal.change(inodes, room)
        if preservation.guarded:
            preservation.change()

    def _expect_records(self, size: int) -> None:
        """Raise ENOSPC unless the journal has room for a change with `size` bytes beyond the usual."""
        if self.journal is not None:
            self.journal.ensure(GROWTH + size)

    def _touch(self, inode: Inode) -> None:
        """Note that attributes of an inode change; the gate was passed."""
        if self.journal is not None:
            self.journal.touch(inode)

    def commit(self, asker: int = 0) -> None:
        """Make the changes of this request outlive this process; called before the request is answered."""
        if self.journal is not None:
            self.journal.commit(asker)

    def tell(self) -> None:
        """Make the notes that could wait outlive this process, too: which files are open for reading."""
        if self.journal is not None:
            self.journal.tell()

    @property
    def frozen(self) -> bool:
        """Return True if every change is refused."""
        return self.preservation.frozen

    @property
    def preserved(self) -> bool:
        """Return True if a published node holds this very tree."""
        return self.preservation.preserved

    def freeze(self) -> None:
        """Refuse every change from now on with EROFS."""
        self.preservation.freeze()

    def thaw(self) -> None:
        """Let changes pass again."""
        self.preservation.thaw()

    def hold_for_save(self) -> None:
        """Keep as many frames free from now on as a save of this tree needs; see ledger."""
        self.ledger.hold_for_save()

    def _node_gone(self, pages: Spans) -> None:
        """Free the pages that only the node used; the next growth computes how much a save needs."""
        self.ledger.hold_again()
        if pages and not (self.journal is not None and self.journal.holds(pages)):
            self.frames.free(pages.starts, pages.counts)

    # -- inodes ---------------------------------------------------------------------------------

    def inode(self, number: int) -> Inode:
        """Return the inode with this number or handle; raise ESTALE if it is gone."""
        inode = self.inodes.get(number & INO_MASK)
        if inode is None:
            inode = self._find_asleep(number & INO_MASK)
        return inode

    getattr = inode

    def _find_asleep(self, number: int) -> Inode:
        """Wake and return the inode with this number; raise ESTALE if none sleeps."""
        inode = self.asleep.find(number) if self.asleep is not None else None
        if inode is None:
            raise fail(errno.ESTALE)
        return inode

    def directory(self, number: int) -> Inode:
        """Return the directory with this number; raise ENOTDIR if it is something else."""
        inode = self.inode(number)
        if inode.entries is None:
            raise fail(errno.ENOTDIR)
        return inode

    def _allocate_inode(self, mode: int, uid: int, gid: int) -> Inode:
        now = clock.now()
        inode = Inode(self.next_ino, mode, uid, gid, now, now, now, btime=now)
        self.inodes[self.next_ino] = inode
        self.next_ino += 1
        self.ledger.add_inode()
        return inode

    def _make_directory(self, inode: Inode, parent: Inode) -> None:
        inode.entries = Directory(parent)
        inode.nlink, inode.size = 2, EMPTY_DIRECTORY_SIZE
        self.ledger.add_directory()

    def install(self, packed: Asleep, next_ino: int, figures: Figures) -> None:
        """Replace the whole tree by one that a restore has built, and whose root is awake."""
        self.inodes, self.asleep = packed.inodes, packed if packed.left else None
        packed.done = self._all_awake
        self.labelled = LABEL in packed.parts.values
        self.root, self.next_ino = self.inodes[ROOT_INO], next_ino
        self.remember(self.root)
        self.ledger.adopt(figures)

    def _all_awake(self) -> None:
        self.asleep = None

    def wake(self) -> None:
        """Wake every inode that sleeps, for a walk that must see all."""
        while self.asleep is not None:
            for inode in list(self.inodes.values()):
                if isinstance(inode.entries, SleepingDirectory):
                    inode.entries.wake()

    @staticmethod
    def remember(inode: Inode) -> None:
        """Count a reference of the kernel: an answer names the inode."""
        inode.lookups += 1

    def assume_known(self) -> None:
        """Count one reference to every inode for all that the kernel has; it gives back those of an inode together."""
        for inode in self.inodes.values():
            inode.lookups = max(inode.lookups, 1)
        if self.asleep is not None:
            self.asleep.lookups = 1

    def forget(self, number: int, count: int = 1, *, closed: bool = False) -> None:
        """Take back `count` references that `remember` had counted.

        `closed` says that an inode without references is not open either, even if the log of a dead daemon says so.
        """
        inode = self.inodes.get(number)
        if inode is not None:
            inode.lookups = max(inode.lookups - count, 0)
            if closed and inode.opens and not inode.lookups:
                self.close_all(inode)
            elif not inode.nlink:
                self._reap(inode)

    def _reap(self, inode: Inode) -> None:
        """Free an inode that nobody can reach any more."""
        if inode.nlink or inode.lookups or inode.opens:
            return
        if inode.pages is not None:
            self._free_pages(inode, inode.pages, 0)
        self.drop_inode(inode)
        if self.journal is not None:
            self.journal.reap(inode)

    def drop_inode(self, inode: Inode) -> None:
        """Forget an inode whose pages are freed."""
        self.orphans.pop(inode.ino, None)
        self.unnamed.discard(inode.ino)
        self.tails.discard(inode.ino)
        if self.losses.files:
            self.losses.drop(inode.ino)
        del self.inodes[inode.ino]
        if inode.xattrs is not None:
            for name, value in inode.xattrs.items():
                self.ledger.remove_xattr(name, value)
        self.ledger.remove_inode(inode)

    def _free_pages(self, inode: Inode, pages: PageMap, first: int, last: int = END) -> None:
        """Give the frames of a range of file pages back to the host, once the log has the change."""
        if self.sums is not None:
            self.sums.cut(inode, first, last)
        before = pages.runs
        gone = pages.remove(first, last)
        if not gone:
            return
        starts, counts = zip(*gone, strict=True)
        self.ledger.add_pages(-sum(counts), pages.runs - before)
        if self.journal is None:
            self.frames.free(starts, counts)
        else:
            self.journal.cut(inode, first, last)
            self.journal.free(starts, counts)

    def put_xattr(self, inode: Inode, name: bytes, value: bytes | None) -> None:
        """Set or remove (None) an xattr."""
        if self.journal is not None:
            self.journal.set_xattr(inode, name, value)
        xattrs = inode.xattrs or {}
        old = xattrs.pop(name, None)
        if old is not None:
            self.ledger.remove_xattr(name, old)
        if value is not None:
            self.ledger.add_xattr(name, value)
            xattrs[name] = value
            self.labelled = self.labelled or name == LABEL
        inode.xattrs = xattrs or None

    def forget_sums(self) -> None:
        """Drop all checksums of data and note this in the log: later stores do not note which sums they outdate."""
        if self.sums is not None:
            rows, damaged = self.sums.size
            self.ledger.add_sums(-rows)
            self.ledger.add_damaged(-damaged)
            self.sums = None
            if self.journal is not None:
                self.journal.unsum(0, 0, 0)

    # -- handles --------------------------------------------------------------------------------

    def release(self, handle: int) -> None:
        """Close a handle that `open` returned."""
        inode = self.inodes.get(handle & INO_MASK)
        if inode is None:
            return
        if handle & WRITING:
            inode.writers = max(inode.writers - 1, 0)
            if not inode.writers:
                self.writing.pop(inode.ino, None)
        inode.opens = max(inode.opens - 1, inode.writers)  # a daemon that took over may not know the last readers
        if not inode.opens:
            inode.unprivileged = False
        if self.journal is not None:
            self.journal.opened(inode, late=not handle & WRITING)
        if not inode.opens and not inode.nlink:
            self._reap(inode)

    def close_all(self, inode: Inode) -> None:
        """Take back every handle and reference: their owners are gone."""
        inode.opens = inode.writers = inode.lookups = 0
        inode.unprivileged = False
        self.writing.pop(inode.ino, None)
        if self.journal is not None:
            self.journal.opened(inode)
        if inode is self.root:
            self.remember(inode)
        self._reap(inode)

    def _read_time(self, inode: Inode) -> None:
        """Note an access, if the mount's flags want it. The flags are read if a note is due, or once a tick."""
        if self.preservation.frozen or inode.flags & NOATIME:
            return
        now = clock.coarse()
        due = inode.atime <= inode.mtime or inode.atime <= inode.ctime or now - inode.atime >= _DAY
        if due or now != self._asked:
            self._access, self._asked = self.access(), now
        wanted = self._access
        if (due or wanted.always) and (wanted.files if inode.entries is None else wanted.directories):
            inode.atime = clock.now()
            if self.journal is not None:
                self.journal.looked(inode)

    # -- figures --------------------------------------------------------------------------------

    def statfs(self) -> StatFs:
        """Return the figures of statfs(2)."""
        return self.limits.statfs()

    def counts(self) -> Counts:
        """Return how much the tree holds, without a walk."""
        inodes = len(self.inodes) + (self.asleep.count if self.asleep is not None else 0)
        folders = self.ledger.directories
        return Counts(inodes - folders, folders, self.limits.pages, self.ledger.bytes)

    # -- names for people -----------------------------------------------------------------------

    def writers(self, most: int = NAMED) -> list[bytes]:
        """Return the paths of the first few files that are open for writing; `writer_count` says how many there are."""
        return [self.path(inode) for inode in islice(self.writing.values(), most)]

    @property
    def writer_count(self) -> int:
        """Return the number of files that are open for writing."""
        return len(self.writing)

    def lost(self, most: int = NAMED) -> list[bytes]:
        """Return paths of the first few files with lost data; `lost_count` says how many there are."""
        return [self.path(self.inodes[ino]) for ino in islice(self._lost(), most)]

    @property
    def lost_count(self) -> int:
        """Return the number of files with lost data."""
        return sum(1 for _ in self._lost())

    def _lost(self) -> Iterator[int]:
        """Yield the files with lost data that have a name; deleted files are not preserved anyway."""
        return (ino for ino in self.losses.files if self.inodes[ino].nlink)

    def deleted(self, most: int = NAMED) -> list[bytes]:
        """Return former paths of the first few files that are deleted but open (directories: still a cwd)."""
        return [self.path(inode) for inode in islice(self._deleted(), most)]

    @property
    def deleted_count(self) -> int:
        """Return the number of deleted files that are still open."""
        return sum(1 for _ in self._deleted())

    def _deleted(self) -> Iterator[Inode]:
        return (inode for inode in map(self.inodes.__getitem__, self.orphans) if inode.opens)

    def path(self, inode: Inode) -> bytes:
        """Return a path of an inode from the root, for people. Of a path longer than PATH_MAX only the end is returned.

        The path is built from the inode upwards, by the name that each inode had last, so that the size of the
        tree does not matter. A deleted inode is marked as deleted, and shown by its number if it never had a name.
        """
        if inode is self.root:
            return b"/"
        if not inode.nlink and inode.ino in self.orphans:
            return self._join(*self.orphans[inode.ino]) + b" (deleted)"
        if inode.folder is not None and _named(inode.folder, inode.name, inode):
            return self._join(inode.folder, inode.name)
        place = self._other_name(inode)
        return b"inode %d" % inode.ino if place is None else self._join(*place)

    def path_of_directory(self, inode: Inode) -> bytes:
        """Return the path of a directory, whether it has been deleted or not."""
        return b"/" if inode is self.root or inode.folder is None else self._join(inode.folder, inode.name)

    def _join(self, folder: Inode, name: bytes) -> bytes:
        parts, size = [name], len(name)
        while folder is not self.root and folder.folder is not None:
            parts.append(folder.name)
            folder, size = folder.folder, size + 1 + len(folder.name)
            if size >= PATH_MAX:
                return b".../" + b"/".join(reversed(parts))[-PATH_MAX + 4 :]
        return b"/" + b"/".join(reversed(parts))

    def _other_name(self, inode: Inode) -> tuple[Inode, bytes] | None:
        """Find another name of an inode whose last known name is gone: among sleeping names, or by a short walk."""
        if self.asleep is not None and (place := self.asleep.name_asleep(inode.ino, PATH_MAX)) is not None:
            return place
        folders, left = deque([self.root]), _SEARCH
        while folders and left > 0:
            folder = folders.popleft()
            if folder.entries is None or folder.entries.asleep:
                continue
            for name, (child, _) in islice(folder.entries.entries.items(), left):
                if child is inode:
                    return folder, name
                if child.entries is not None:
                    folders.append(child)
            left -= len(folder.entries.entries) + 1
        return None


def _named(folder: Inode, name: bytes, inode: Inode) -> bool:
    """Return True if a directory, which is awake, has this name for this inode."""
    return folder.entries is not None and folder.entries.find(name) is inode
