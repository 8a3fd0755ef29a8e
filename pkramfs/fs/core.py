# SPDX-License-Identifier: GPL-2.0-or-later
"""What every part of the tree stands on: the inode table, the gate, and who holds an inode alive.

**The gate.** Every change of a tree passes through `_change`, after all checks and before the
first mutation. It is the one narrow place at which a tree can be frozen, at which a preserved
tree lets go of its node, and where a journal can be hung in:

    live ──────── freeze ──────▶ frozen     every change is EROFS, reading goes on
      ▲ ◀──────── thaw ────────────┘
      │
    preserved ─── first change: on_first_change() withdraws the node, then the change is applied

`freeze` and `preserved` are independent: a saved tree is both, a restored one only preserved.
Access times are no change: they are kept when nothing else happens, and skipped while frozen.

**Handles.** The number of an open file is its inode number, with WRITING set when it may write, UNNOTED when it was
opened with O_NOATIME, and DIRECT when with O_DIRECT, so that a door needs no table of handles and one that is
replaced can go on. All methods accept either.

**Sleep.** `inodes` has the inodes that somebody asked for since the tree was restored; see asleep. Only what
is found by a name or a number passes by there, so whoever goes through all of `inodes` sees every inode that is
open, looked up, deleted or changed. `wake` is for those who want the others, too.

**References.** The door adds 1 to `lookups` for every entry it replies to the kernel, and calls
`forget`. An inode without name, reference and handle is reaped: its pages go back at once.

Kernel: mm/shmem.c (shmem_get_inode, shmem_evict_inode), fs/super.c (freeze_super)
"""

from __future__ import annotations

import errno
import math
import stat
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from pkramfs.fs import clock
from pkramfs.fs.access import RELATIME, Access, relatime
from pkramfs.fs.asleep import Asleep, SleepingDirectory
from pkramfs.fs.directory import Directory
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import EMPTY_DIRECTORY_SIZE, Inode
from pkramfs.fs.limits import INODE_SPACE, Limits, StatFs, xattr_space
from pkramfs.fs.lost import Losses
from pkramfs.fs.pagecache import END, PageMap
from pkramfs.fs.protection import NOATIME
from pkramfs.pkram.store import estimate
from pkramfs.pkram.treeformat import EXTENTS, INODES, TREE, UNWRITTEN, XATTRS
from pkramfs.spans import Spans

if TYPE_CHECKING:
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram

ROOT_INO = 1
WRITING = 1 << 62
"""Set in the handle of a file that is open for writing."""
UNNOTED = 1 << 61
"""Set in the handle of a file that was opened with O_NOATIME."""
DIRECT = 1 << 60
"""Set in the handle of a file that was opened with O_DIRECT."""
INO_MASK = DIRECT - 1

RUN_WEIGHT = 1152
"""Bytes that a run of frames costs a save at worst: an extent, entries, a share of the page table."""

NAMED = 10
"""How many files an answer names; it counts the others."""
PATH_MAX = 4096
_SEARCH = 1 << 16
"""Entries that are looked at for the other name of a file with several."""
_HOLD_AHEAD = 1 << 20
_DAY = 86_400 * 10**9


class Counts(NamedTuple):
    """How much a tree holds. `files` is everything that is no directory; `bytes` the sum of file sizes."""

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
        self.inodes: dict[int, Inode] = {}
        self.writing: dict[int, Inode] = {}  # those that are open for writing
        self.asleep: Asleep | None = None
        self.next_ino = ROOT_INO
        self.on_first_change: Callable[[], None] | None = None
        self.journal: Callable[[str, dict[str, Any]], None] | None = None
        self.access: Callable[[], Access] = relatime
        self._access, self._asked = RELATIME, 0
        self.orphans: dict[int, tuple[Inode, bytes]] = {}
        self.tails: set[int] = set()  # see filling
        self.losses = Losses()
        self.unnamed: set[int] = set()  # orphans that never had a name, and may get one
        self.node_pages = Spans()
        self._frozen = self._preserved = self._guarded = False
        self._directories = 0
        self._bytes = 0
        self._stream_bytes = TREE.size
        self._runs = 0
        self._hold_above: float = math.inf  # weights at which to hold more or fewer frames
        self._hold_below = -1
        self.root = self._allocate_inode(stat.S_IFDIR | root_mode & 0o7777, uid, gid)
        self.root.lookups = 1  # the mount itself
        self._make_directory(self.root, self.root)

    # -- the gate -------------------------------------------------------------------------------

    def _change(self, kind: str, **record: Any) -> None:
        """Let a change pass, or refuse it; see the module's page."""
        if self._guarded:
            self._pass_gate()
        if self.journal is not None:
            self.journal(kind, record)

    def _pass_gate(self) -> None:
        if self._frozen:
            raise fail(errno.EROFS)
        if self.on_first_change is not None:
            self.on_first_change()
        self.preserved = False

    @property
    def frozen(self) -> bool:
        return self._frozen

    def freeze(self) -> None:
        """From now on every change is EROFS."""
        self._frozen = self._guarded = True

    def thaw(self) -> None:
        """Changes are allowed again."""
        self._frozen, self._guarded = False, self._preserved

    @property
    def preserved(self) -> bool:
        """Whether a published node holds this very tree."""
        return self._preserved

    @preserved.setter
    def preserved(self, value: bool) -> None:
        self._preserved = value
        self._guarded = value or self._frozen

    # -- inodes ---------------------------------------------------------------------------------

    def inode(self, number: int) -> Inode:
        """The inode with this number or handle; ESTALE if it is gone."""
        inode = self.inodes.get(number & INO_MASK)
        if inode is None:
            inode = self._find_asleep(number & INO_MASK)
        return inode

    getattr = inode

    def _find_asleep(self, number: int) -> Inode:
        """The inode with this number that nobody has asked for since the tree was restored; ESTALE if there is none."""
        inode = self.asleep.find(number) if self.asleep is not None else None
        if inode is None:
            raise fail(errno.ESTALE)
        return inode

    def directory(self, number: int) -> Inode:
        """The directory with this number; ENOTDIR if it is something else."""
        inode = self.inode(number)
        if inode.entries is None:
            raise fail(errno.ENOTDIR)
        return inode

    def _allocate_inode(self, mode: int, uid: int, gid: int) -> Inode:
        now = clock.now()
        inode = Inode(self.next_ino, mode, uid, gid, now, now, now, btime=now)
        self.inodes[self.next_ino] = inode
        self.next_ino += 1
        self.limits.inode_space += INODE_SPACE
        self._stream_bytes += INODES.width
        return inode

    def _make_directory(self, inode: Inode, parent: Inode) -> None:
        inode.entries = Directory(parent)
        inode.nlink, inode.size = 2, EMPTY_DIRECTORY_SIZE
        self._directories += 1

    def install(
        self, packed: Asleep, next_ino: int, *, directories: int, size: int, stream_bytes: int, runs: int
    ) -> None:
        """Make this, whose root is awake, the whole tree: what a restore has built."""
        self.inodes, self.asleep = packed.inodes, packed if packed.left else None
        packed.done = self._all_awake
        self.root, self.next_ino = self.inodes[ROOT_INO], next_ino
        self.root.lookups = 1
        self._directories, self._bytes = directories, size
        self._stream_bytes, self._runs = stream_bytes, runs

    def _all_awake(self) -> None:
        self.asleep = None

    def wake(self) -> None:
        """Make every inode that sleeps, for those that want to see all."""
        while self.asleep is not None:
            for inode in list(self.inodes.values()):
                if isinstance(inode.entries, SleepingDirectory):
                    inode.entries.wake()

    def forget(self, number: int, count: int = 1) -> None:
        """The kernel gives back `count` references that the door had counted in `lookups`."""
        inode = self.inodes.get(number)
        if inode is not None:
            inode.lookups = max(inode.lookups - count, 0)
            if not inode.nlink:
                self._reap(inode)

    def _reap(self, inode: Inode) -> None:
        """Free an inode that nobody can reach any more."""
        if inode.nlink or inode.lookups or inode.opens:
            return
        self.orphans.pop(inode.ino, None)
        self.unnamed.discard(inode.ino)
        self.tails.discard(inode.ino)
        self.losses.drop(inode.ino)
        del self.inodes[inode.ino]
        self.limits.inode_space -= INODE_SPACE
        self._stream_bytes -= INODES.width
        if inode.target is not None:
            self._stream_bytes -= len(inode.target)
            self.limits.pages -= inode.own_pages
        if inode.xattrs is not None:
            for name in list(inode.xattrs):
                self._put_xattr(inode, name, None)
        if inode.unwritten is not None:
            self._stream_bytes -= UNWRITTEN.width * inode.unwritten.runs
        if inode.pages is not None:
            self._free_pages(inode.pages, 0)
        if inode.entries is not None:
            self._directories -= 1
        elif inode.is_file:
            self._bytes -= inode.size
        if self._stream_bytes < self._hold_below and not self._guarded:
            self.hold_for_save()

    def _free_pages(self, pages: PageMap, first: int, last: int = END) -> None:
        """Give the frames of a range of file pages back to the host."""
        before = pages.runs
        gone = pages.remove(first, last)
        if gone:
            self._runs += pages.runs - before
            starts, counts = zip(*gone, strict=True)
            self.limits.pages -= sum(counts)
            self.frames.free(starts, counts)

    def _put_xattr(self, inode: Inode, name: bytes, value: bytes | None) -> None:
        """Set or remove an xattr, counting inode space (ACLs take none) and what a save will need."""
        xattrs = inode.xattrs or {}
        old = xattrs.pop(name, None)
        for sign, counted in ((-1, old), (1, value)):
            if counted is not None:
                self._stream_bytes += sign * (XATTRS.width + len(name) + len(counted))
                if not name.startswith(b"system."):
                    self.limits.inode_space += sign * xattr_space(name, counted)
        if value is not None:
            xattrs[name] = value
        inode.xattrs = xattrs or None

    # -- room for the save ----------------------------------------------------------------------

    def hold_for_save(self) -> None:
        """From now on keep as many frames free as saving this tree needs, while it grows and shrinks.

        So writers meet ENOSPC before the tree can no longer be preserved. ExhaustedError if there
        is no room now. A preserved tree needs none before its first change, which frees its node.
        """
        if self._preserved:
            self._hold_above = 0
            return
        self.frames.hold(self.pages_needed(_HOLD_AHEAD))
        weight = self._weight()
        self._hold_above, self._hold_below = weight + _HOLD_AHEAD, weight // 2 - _HOLD_AHEAD // 2

    def _grow(self) -> None:
        """Before a change that makes the tree larger: hold more frames if it has outgrown those held."""
        if self._stream_bytes + self._runs * RUN_WEIGHT > self._hold_above and not self._guarded:  # _weight()
            self.hold_for_save()

    def pages_needed(self, growth: int = 0) -> int:
        """Frames that a save needs for itself, if the tree grows by so many bytes of description."""
        extents = EXTENTS.width * self._runs
        return estimate(self._runs + growth // RUN_WEIGHT, self._stream_bytes + extents + growth)

    def node_withdrawn(self) -> Spans:
        """The tree is live again; returns the pages that only its node used, for the caller to free."""
        self.preserved = False
        if self._hold_above != math.inf:
            self._hold_above = -1  # at the next growth
        pages, self.node_pages = self.node_pages, Spans()
        return pages

    def _weight(self) -> int:
        """How much there is to save besides pages, in bytes."""
        return self._stream_bytes + self._runs * RUN_WEIGHT

    # -- handles --------------------------------------------------------------------------------

    def release(self, handle: int) -> None:
        """Close what `open` returned."""
        inode = self.inodes.get(handle & INO_MASK)
        if inode is None:
            return
        inode.opens = max(inode.opens - 1, 0)
        if handle & WRITING:
            inode.writers = max(inode.writers - 1, 0)
        if not inode.opens:
            inode.writers, inode.unprivileged = 0, False
        if not inode.writers:
            self.writing.pop(inode.ino, None)
        if not inode.opens and not inode.nlink:
            self._reap(inode)

    def _read_time(self, inode: Inode) -> None:
        """Note an access, if the mount's flags want it. They are asked for when it is due, and else once a tick."""
        if self._frozen or inode.flags & NOATIME:
            return
        now = clock.now()
        due = inode.atime <= inode.mtime or inode.atime <= inode.ctime or now - inode.atime >= _DAY
        if due or now != self._asked:
            self._access, self._asked = self.access(), now
        wanted = self._access
        if (due or wanted.always) and (wanted.files if inode.entries is None else wanted.directories):
            inode.atime = now

    # -- figures --------------------------------------------------------------------------------

    def statfs(self) -> StatFs:
        return self.limits.statfs()

    def counts(self) -> Counts:
        """What the tree holds, without a walk."""
        inodes = len(self.inodes) + (self.asleep.count if self.asleep is not None else 0)
        return Counts(inodes - self._directories, self._directories, self.limits.pages, self._bytes)

    # -- names for people -----------------------------------------------------------------------

    def writers(self, most: int = NAMED) -> list[bytes]:
        """Paths of the first few files that are open for writing; `writer_count` says how many there are."""
        return [self.path(inode) for inode in islice(self.writing.values(), most)]

    @property
    def writer_count(self) -> int:
        return len(self.writing)

    def lost(self, most: int = NAMED) -> list[bytes]:
        """Return paths of the first few files of which data are lost; `lost_count` says how many there are."""
        return [self.path(self.inodes[ino]) for ino in islice(self._lost(), most)]

    @property
    def lost_count(self) -> int:
        return sum(1 for _ in self._lost())

    def _lost(self) -> Iterator[int]:
        """Yield the files that have a name: of one that is deleted nothing would be preserved anyway."""
        return (ino for ino in self.losses.files if self.inodes[ino].nlink)

    def deleted(self, most: int = NAMED) -> list[bytes]:
        """Former paths of the first few files that are deleted but still held open (directories: still a cwd)."""
        return [self.path(inode) for inode in islice(self._deleted(), most)]

    @property
    def deleted_count(self) -> int:
        return sum(1 for _ in self._deleted())

    def _deleted(self) -> Iterator[Inode]:
        return (inode for inode in map(self.inodes.__getitem__, self.orphans) if inode.opens)

    def path(self, inode: Inode) -> bytes:
        """A path of an inode from the root, for people; only the end of one that is longer than PATH_MAX.

        It is found from below, by what each inode knows of its name, so that neither the size nor the depth of the
        tree matters. An inode that is deleted is named so, and by its number if nobody knows its name.
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
        """The path of a directory, whether it has been deleted or not."""
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
        """A name of an inode that has lost the one it was given last: one that sleeps, or is found in a short walk."""
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
    """Whether a directory, which is awake, has this name for this inode."""
    return folder.entries is not None and folder.entries.find(name) is inode
