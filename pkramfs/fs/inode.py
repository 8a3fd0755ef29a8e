# SPDX-License-Identifier: GPL-2.0-or-later
"""One file of any kind: its attributes, and the counts that keep it alive.

    names in directories      nlink      0: deleted
    the kernel's references   lookups    counted by Tree.remember and Tree.forget
    open handles              opens      of which `writers` may write

`folder` and `name` are the directory and name that it got last, so that messages can name it without a search. The
name may be gone since then: core.path checks it.

An inode is freed when all three are 0 (a directory counts `nlink` as Unix does: 2 and one for each
subdirectory). Exactly one of `entries` (directory), `pages` (regular file that holds pages) and
`target` (symlink) is in use. Times are nanoseconds since the epoch. Slots keep an empty file with
its name well below 1 KiB.

Kernel: struct inode, struct shmem_inode_info
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pkramfs.fs.limits import INLINE_TARGET

if TYPE_CHECKING:
    from pkramfs.fs.directory import Directory
    from pkramfs.fs.pagecache import PageMap

BLOCKS_PER_PAGE = 8


FIELDS = ("ino", "mode", "uid", "gid", "atime", "mtime", "ctime", "nlink", "size", "rdev", "btime", "flags")
"""The numbers that make an Inode, in the order of its arguments: what crosses a kexec as columns of the same names."""


CHOWN, FOWNER, FSETID, SYS_ADMIN = 0, 3, 4, 21
"""Capabilities, see capabilities(7)."""


class Caller(Protocol):
    """The user of a request; pyfuse3's request context fits.

    `groups`, if present, are supplementary groups; `capable` checks a capability, without it root has all.
    """

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def umask(self) -> int: ...


class Credentials(NamedTuple):
    """A Caller for code without a request: restores, tools, tests."""

    uid: int = 0
    gid: int = 0
    umask: int = 0o022
    pid: int = 0
    groups: tuple[int, ...] = ()


ROOT = Credentials()


def capable(caller: Caller, capability: int) -> bool:
    """Return True if the caller has a capability."""
    known: Callable[[int], bool] | None = getattr(caller, "capable", None)
    return caller.uid == 0 if known is None else known(capability)


def in_group(caller: Caller, gid: int) -> bool:
    """Return True if the caller may keep the set-group-id bit of a file of that group."""
    return caller.gid == gid or gid in getattr(caller, "groups", ()) or capable(caller, FSETID)


class Inode:
    """See the module's page."""

    __slots__ = (
        "atime",
        "btime",
        "ctime",
        "entries",
        "flags",
        "folder",
        "gid",
        "ino",
        "lookups",
        "mode",
        "mtime",
        "name",
        "nlink",
        "opens",
        "pages",
        "rdev",
        "sent",
        "size",
        "target",
        "uid",
        "unprivileged",
        "unwritten",
        "writers",
        "xattrs",
    )

    def __init__(
        self,
        ino: int,
        mode: int,
        uid: int,
        gid: int,
        atime: int,
        mtime: int,
        ctime: int,
        nlink: int = 1,
        size: int = 0,
        rdev: int = 0,
        btime: int = 0,
        flags: int = 0,
    ) -> None:
        self.ino, self.mode, self.uid, self.gid = ino, mode, uid, gid
        self.atime, self.mtime, self.ctime = atime, mtime, ctime
        self.nlink, self.size, self.rdev = nlink, size, rdev
        self.btime, self.flags = btime, flags  # 0: not known; see protection
        self.lookups = self.opens = self.writers = 0
        self.sent = False  # the kernel may cache its attributes for ever, and nobody has opened it for writing since
        self.unprivileged = False  # open for writing by a caller whose writes drop set-id bits
        self.entries: Directory | None = None
        self.pages: PageMap | None = None
        self.unwritten: PageMap | None = None  # see data
        self.target: bytes | None = None
        self.xattrs: dict[bytes, bytes] | None = None
        self.folder: Inode | None = None
        self.name = b""

    def __repr__(self) -> str:
        return f"<inode {self.ino} {stat.filemode(self.mode)} nlink={self.nlink} size={self.size}>"

    @property
    def kind(self) -> int:
        """Return the S_IF bits of the mode."""
        return self.mode & 0o170000

    @property
    def is_file(self) -> bool:
        """Return True for a regular file."""
        return self.mode & 0o170000 == stat.S_IFREG

    @property
    def blocks(self) -> int:
        """Return st_blocks, in units of 512 bytes."""
        if self.pages is not None:
            return self.pages.count * BLOCKS_PER_PAGE
        return self.own_pages * BLOCKS_PER_PAGE

    @property
    def own_pages(self) -> int:
        """Return the pages counted against size= though no file data are in them: a long symlink's target."""
        return 1 if self.target is not None and len(self.target) >= INLINE_TARGET else 0
