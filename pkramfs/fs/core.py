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

**Handles.** The number of an open file is its inode number, with WRITING set when it may write, so
that a door needs no table of handles and one that is replaced can go on. All methods accept either.

**References.** The door adds 1 to `lookups` for every entry it replies to the kernel, and calls
`forget`. An inode without name, reference and handle is reaped: its pages go back at once.

Kernel: mm/shmem.c (shmem_get_inode, shmem_evict_inode), fs/super.c (freeze_super)
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pkramfs.fs.directory import Directory
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import EMPTY_DIRECTORY_SIZE, Inode
from pkramfs.fs.limits import INODE_SPACE, Limits, StatFs, xattr_space

if TYPE_CHECKING:
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram

ROOT_INO = 1
WRITING = 1 << 62
"""Set in the handle of a file that is open for writing."""
INO_MASK = WRITING - 1

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
        self.next_ino = ROOT_INO
        self.on_first_change: Callable[[], None] | None = None
        self.journal: Callable[[str, dict[str, Any]], None] | None = None
        self.relatime = True
        self.orphans: dict[int, tuple[Inode, bytes]] = {}
        self._frozen = self._preserved = self._guarded = False
        self._directories = 0
        self._bytes = 0
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
            raise fail(errno.ESTALE)
        return inode

    getattr = inode

    def directory(self, number: int) -> Inode:
        """The directory with this number; ENOTDIR if it is something else."""
        inode = self.inode(number)
        if inode.entries is None:
            raise fail(errno.ENOTDIR)
        return inode

    def _allocate_inode(self, mode: int, uid: int, gid: int) -> Inode:
        now = time.time_ns()
        inode = Inode(self.next_ino, mode, uid, gid, now, now, now)
        self.inodes[self.next_ino] = inode
        self.next_ino += 1
        self.limits.inode_space += INODE_SPACE
        return inode

    def _make_directory(self, inode: Inode, parent: Inode) -> None:
        inode.entries = Directory(parent)
        inode.nlink, inode.size = 2, EMPTY_DIRECTORY_SIZE
        self._directories += 1

    def install(self, inodes: list[Inode], next_ino: int, directories: int, size: int) -> None:
        """Make these inodes, the root first, the whole tree: what a restore has built."""
        self.inodes = {inode.ino: inode for inode in inodes}
        self.root, self.next_ino = inodes[0], next_ino
        self.root.lookups = 1
        self._directories, self._bytes = directories, size

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
        del self.inodes[inode.ino]
        space = INODE_SPACE
        for name, value in (inode.xattrs or {}).items():
            space += xattr_space(name, value)
        self.limits.inode_space -= space
        self.limits.pages -= inode.own_pages
        if inode.pages is not None:
            self._free_runs(inode.pages.remove(0))
        if inode.entries is not None:
            self._directories -= 1
        elif inode.is_file:
            self._bytes -= inode.size

    def _free_runs(self, runs: list[tuple[int, int]]) -> None:
        """Give frames back to the host."""
        if runs:
            starts, counts = zip(*runs, strict=True)
            self.limits.pages -= sum(counts)
            self.frames.free(starts, counts)

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
            if not inode.nlink:
                self._reap(inode)

    def _read_time(self, inode: Inode) -> None:
        """relatime: note an access if the last one noted is older than the last change, or than a day."""
        if self.relatime and not self._frozen and (inode.atime <= inode.mtime or inode.atime <= inode.ctime):
            inode.atime = time.time_ns()
        elif self.relatime and not self._frozen and (now := time.time_ns()) - inode.atime >= _DAY:
            inode.atime = now

    # -- figures --------------------------------------------------------------------------------

    def statfs(self) -> StatFs:
        return self.limits.statfs()

    def counts(self) -> Counts:
        """What the tree holds, without a walk."""
        directories = self._directories
        return Counts(len(self.inodes) - directories, directories, self.limits.pages, self._bytes)

    def writers(self) -> list[bytes]:
        """Paths of the files that are open for writing."""
        return self.paths({ino for ino, inode in self.inodes.items() if inode.writers})

    def deleted(self) -> list[bytes]:
        """Former paths of files that are deleted but still held open (directories: still somebody's cwd)."""
        return [
            self.path_of_directory(parent).rstrip(b"/") + b"/" + name + b" (deleted)"
            for ino, (parent, name) in self.orphans.items()
            if self.inodes[ino].opens
        ]

    def paths(self, wanted: set[int]) -> list[bytes]:
        """A path from the root for each of these inodes, in order of the walk; one that is deleted is named so."""
        found: list[bytes] = []
        left = set(wanted)
        stack: list[tuple[bytes, Inode]] = [(b"", self.root)]
        while stack and left:
            prefix, inode = stack.pop()
            if inode.ino in left:
                left.discard(inode.ino)
                found.append(prefix or b"/")
            if inode.entries is not None:
                stack += [(prefix + b"/" + name, child) for name, (child, _) in inode.entries.entries.items()]
        for ino in sorted(left & self.orphans.keys()):
            parent, name = self.orphans[ino]
            found.append(self.path_of_directory(parent).rstrip(b"/") + b"/" + name + b" (deleted)")
        return found

    def path_of_directory(self, inode: Inode) -> bytes:
        """The path of a directory from the root, by asking each parent for the name."""
        parts: list[bytes] = []
        while inode.entries is not None and inode is not self.root:
            parent = inode.entries.parent
            siblings = parent.entries.entries if parent.entries is not None else {}
            parts.append(next((name for name, (child, _) in siblings.items() if child is inode), b"(deleted)"))
            inode = parent
        return b"/" + b"/".join(reversed(parts))
