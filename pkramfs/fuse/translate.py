# SPDX-License-Identifier: GPL-2.0-or-later
"""Attributes of an inode in pyfuse3's structures, without a new object for each answer.

Answers are sent before the handler's coroutine yields, so one EntryAttributes and
one StatvfsData, made once, serve every request. That keeps a look-up or a line of a listing at a
dozen stores.

Timeouts are endless: only the daemon changes the tree, and every change comes through the kernel. But the
blocks of a file with writers grow at the write-back, and the kernel does not update them. So attributes
of such a file are valid for WRITTEN seconds, and `du` sees a download grow.

A file without blocks has no data, and tar and others rely on that without reading it. So while the kernel may have data
of a file that have not arrived, the file is shown with at least a page, until the last writer is gone (RELEASE comes
after the last write-back, also of mappings). Then the kernel is told to ask again for attributes that were `guessed`.

Kernel: include/uapi/linux/fuse.h (fuse_attr, fuse_entry_out), fs/fuse/inode.c (fuse_change_attributes)
"""

import contextlib
import errno
import os
import sys
from collections.abc import Collection

import pyfuse3

from pkramfs.fs.inode import BLOCKS_PER_PAGE, Inode
from pkramfs.fs.limits import StatFs
from pkramfs.fs.tree import Tree
from pkramfs.units import PAGE_SIZE

FOREVER = 1e9
"""Seconds; the kernel's clock of jiffies takes any number."""
WRITTEN = 0.5


class Asker:
    """The caller, with the supplementary groups that FUSE does not send: /proc is read if a rule needs them."""

    __slots__ = ("_context", "umask")

    def __init__(self, context: pyfuse3.RequestContext) -> None:
        self._context, self.umask = context, context.umask

    @property
    def uid(self) -> int:
        """Return the user."""
        return self._context.uid

    @property
    def gid(self) -> int:
        """Return the group."""
        return self._context.gid

    @property
    def groups(self) -> Collection[int]:
        """Return the supplementary groups, read from /proc."""
        return supplementary_groups(self._context.pid)

    def capable(self, capability: int) -> bool:
        """Return True if the calling thread has a capability by /proc; if that cannot be read, if it is root."""
        return capable(self._context.pid, capability) if self._context.pid else self.uid == 0


def status_fields(pid: int, *names: bytes, base: int = 10) -> list[list[int]]:
    """Return the numbers of fields of /proc/PID/status, e.g. `Groups`, read once; raise OSError if it is gone.

    The file is read as bytes and in lines that end with a newline: its first field is the name of the command, which
    may hold any other character, a carriage return and `Groups:` among them.
    """
    with open(f"/proc/{pid}/status", "rb") as file:
        found = {name: words for name, _, words in (line.partition(b":") for line in file) if name in names}
    if len(found) < len(names):
        raise OSError(errno.EIO, "a field is missing", f"/proc/{pid}/status")
    return [[int(word, base) for word in found[name].split()] for name in names]


def supplementary_groups(pid: int) -> Collection[int]:
    """Return the supplementary groups of a process; none if it is gone, or in a pid namespace that is not visible."""
    try:
        return status_fields(pid, b"Groups")[0]
    except OSError:
        return ()


def capable(pid: int, capability: int) -> bool:
    """Return True if a thread has a capability. Capabilities in another user namespace do not count.

    A daemon without privileges cannot read the namespaces of others; then uid 0 counts as root.
    """
    try:
        if not status_fields(pid, b"CapEff", base=16)[0][0] >> capability & 1:
            return False
        try:
            return os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user")
        except PermissionError:
            return status_fields(pid, b"Uid")[0][3] == 0
    except OSError:
        return False


def file_size_limit(pid: int) -> int:
    """Return the RLIMIT_FSIZE of a process; no limit if that cannot be read."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/limits", encoding="ascii") as file:
        for line in file:
            if line.startswith("Max file size"):
                return int(line.split()[3])  # or ValueError: unlimited
    return sys.maxsize


class Translator:
    """Fills the answers of one mount."""

    def __init__(self, tree: Tree, generation: int = 0) -> None:
        self._tree = tree
        self._entry = entry = pyfuse3.EntryAttributes()
        entry.entry_timeout = FOREVER
        self._generation = generation  # the same for all: a tree never uses an inode number twice
        self._absent = absent = pyfuse3.EntryAttributes()
        absent.st_ino = 0
        absent.entry_timeout = FOREVER
        self._statfs = pyfuse3.StatvfsData()
        self._opened = pyfuse3.FileInfo(keep_cache=True)
        self.attributes = self.entry
        self.guessed: set[int] = set()

    def entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """Return the answer that describes `inode`; valid until the next call."""
        entry = self._entry
        entry.attr_timeout = WRITTEN if inode.writers else FOREVER
        # The kernel has made the root itself, of generation 0: with another it would be stale.
        entry.generation = 0 if inode is self._tree.root else self._generation
        entry.st_ino = inode.ino
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        blocks = inode.blocks
        if not blocks and inode.writers:
            blocks = BLOCKS_PER_PAGE
            self.guessed.add(inode.ino)
        entry.st_blocks = blocks
        entry.st_blksize = PAGE_SIZE if self._tree.huge == "never" else self._tree.block_size(inode)
        entry.st_atime_ns = inode.atime
        entry.st_mtime_ns = inode.mtime
        entry.st_ctime_ns = inode.ctime
        return entry

    def absent(self) -> pyfuse3.EntryAttributes:
        """Return the answer that the name does not exist, which the kernel may cache."""
        return self._absent

    def opened(self, handle: int) -> pyfuse3.FileInfo:
        """Return the answer that a file is open, whose pages the kernel may keep."""
        opened = self._opened
        opened.fh = handle
        return opened

    def statfs(self, found: StatFs, room: int) -> pyfuse3.StatvfsData:
        """Return the answer to statfs(2). `room` pages are available: df's Avail is no more, whatever size= allows."""
        answer = self._statfs
        answer.f_bsize = answer.f_frsize = found.block_size
        answer.f_blocks = found.blocks
        answer.f_bfree, answer.f_bavail = found.blocks_free, min(found.blocks_free, room)
        answer.f_files = found.files
        answer.f_ffree = answer.f_favail = found.files_free
        answer.f_namemax = found.name_max
        return answer
