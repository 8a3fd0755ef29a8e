# SPDX-License-Identifier: GPL-2.0-or-later
"""size= and nr_inodes=: what a mount may use, counted exactly as tmpfs counts it.

Pages: 4 KiB pages that files hold, and one for each symlink target too long for the inode
(tmpfs keeps up to 128 bytes inline). Directories and empty files cost no pages.

Inodes: tmpfs turns nr_inodes into *inode space* of 1 KiB each and takes from it one KiB for every
inode, one for every further hard link (its name pins memory too) and for each xattr 40 bytes plus
name and value. df -i shows the space that is left in units of inodes.

0 means no limit, as in tmpfs. Use is counted even then, so that a limit can be judged on restore.

Kernel: mm/shmem.c (shmem_reserve_inode, shmem_inode_acct_blocks, shmem_reconfigure, shmem_statfs)
"""

import errno
from typing import NamedTuple

from pkramfs.fs.failure import fail
from pkramfs.fs.rules import NAME_MAX
from pkramfs.units import PAGE_SIZE

INODE_SPACE = 1024
"""BOGO_INODE_SIZE: what one inode or link takes from the inode space."""

INLINE_TARGET = 128
"""Symlink targets of this length or more (with their NUL: longer than this) take a page."""

_XATTR_OVERHEAD = 40


class StatFs(NamedTuple):
    """What statfs(2) reports, in pages and inodes."""

    block_size: int
    blocks: int
    blocks_free: int
    files: int
    files_free: int
    name_max: int


class Limits:
    """The limits of one mount and what is used of them.

    First `require_…`, then the change passes the gate, then ledger counts `pages` and `inode_space`: a refused change
    counts nothing.
    """

    __slots__ = ("inode_space", "max_inodes", "max_pages", "pages")

    def __init__(self, max_pages: int = 0, max_inodes: int = 0) -> None:
        self.max_pages, self.max_inodes = max_pages, max_inodes
        self.pages = 0
        self.inode_space = 0

    def require_pages(self, count: int) -> None:
        """Raise ENOSPC if this many more pages would pass the size limit."""
        if self.max_pages and self.pages + count > self.max_pages:
            raise fail(errno.ENOSPC)

    def require_space(self, size: int = INODE_SPACE) -> None:
        """Raise ENOSPC if this much more inode space would pass nr_inodes."""
        if self.max_inodes and self.inode_space + size > self.max_inodes * INODE_SPACE:
            raise fail(errno.ENOSPC)

    def resize(self, max_pages: int | None = None, max_inodes: int | None = None) -> None:
        """Change the limits of a mounted tree, with tmpfs's refusals; None leaves one as it is."""
        if max_pages and not self.max_pages:
            raise OSError(errno.EINVAL, "cannot limit the size of a mount that was made without a limit")
        if max_pages and self.pages > max_pages:
            raise OSError(
                errno.EINVAL,
                f"too small a size for current use: {self.pages * PAGE_SIZE} bytes are used, "
                f"size={max_pages * PAGE_SIZE} was asked for",
            )
        if max_inodes and not self.max_inodes:
            raise OSError(errno.EINVAL, "cannot limit the inodes of a mount that was made without a limit")
        if max_inodes and self.inode_space > max_inodes * INODE_SPACE:
            used = -(-self.inode_space // INODE_SPACE)
            raise OSError(
                errno.EINVAL, f"too few inodes for current use: {used} are used, nr_inodes={max_inodes} was asked for"
            )
        self.max_pages = self.max_pages if max_pages is None else max_pages
        self.max_inodes = self.max_inodes if max_inodes is None else max_inodes

    def statfs(self) -> StatFs:
        """Return the figures for df and df -i; without a limit they are 0, as tmpfs shows them."""
        free_space = max(self.max_inodes * INODE_SPACE - self.inode_space, 0)
        return StatFs(
            PAGE_SIZE,
            self.max_pages,
            max(self.max_pages - self.pages, 0),
            self.max_inodes,
            free_space // INODE_SPACE,
            NAME_MAX,
        )


def xattr_space(name: bytes, value: bytes) -> int:
    """Return the inode space that one xattr takes (tmpfs fixes the 40 for all architectures)."""
    return _XATTR_OVERHEAD + len(name) + len(value)
