# SPDX-License-Identifier: GPL-2.0-or-later
"""The flags of chattr(1): which calls they forbid, and when they are inherited.

    i  IMMUTABLE   no write but through open descriptors, no new link, no other name or attribute
    a  APPEND      opened for writing only to append; never cut, removed or renamed
    A  NOATIME     no access times
    d  NODUMP      kept for dump(8), and nothing else

For a directory i forbids new names and a the loss of names. The kernel knows no flags of FUSE inodes, so all
that it decides for tmpfs is decided here.

Kernel: fs/namei.c (may_delete, may_open, vfs_link), fs/attr.c (may_setattr), fs/xattr.c (may_write_xattr),
mm/shmem.c (shmem_fileattr_set)
"""

import errno
import os

from pkramfs.fs.failure import fail
from pkramfs.fs.inode import Inode

IMMUTABLE, APPEND, NODUMP, NOATIME = 0x10, 0x20, 0x40, 0x80
"""As FS_IOC_GETFLAGS has them."""
KNOWN = IMMUTABLE | APPEND | NODUMP | NOATIME
INHERITED = NODUMP | NOATIME
_EITHER = IMMUTABLE | APPEND


def refuse_change(inode: Inode) -> None:
    """Raise EPERM if attributes, times and links of an inode must not change."""
    if inode.flags & _EITHER:
        raise fail(errno.EPERM)


def refuse_entry(folder: Inode) -> None:
    """Raise EPERM if a directory takes no new names."""
    if folder.flags & IMMUTABLE:
        raise fail(errno.EPERM)


def refuse_removal(folder: Inode, inode: Inode) -> None:
    """Raise EPERM if a name must not be taken out of a directory."""
    if (folder.flags | inode.flags) & _EITHER:
        raise fail(errno.EPERM)


def refuse_open(inode: Inode, flags: int) -> None:
    """Raise EPERM if a file must not be opened with these flags."""
    if not inode.flags & _EITHER or inode.entries is not None:
        return
    writing = flags & os.O_ACCMODE != os.O_RDONLY
    if writing and (inode.flags & IMMUTABLE or not flags & os.O_APPEND):
        raise fail(errno.EPERM)
    if flags & os.O_TRUNC:
        raise fail(errno.EPERM)


def refuse_size(inode: Inode, *, opened: bool) -> None:
    """Raise EPERM if the size of a file must not change; `opened`: through a descriptor that may write."""
    if inode.flags & APPEND or (inode.flags & IMMUTABLE and not opened):
        raise fail(errno.EPERM)


def refuse_space(inode: Inode, *, punch: bool) -> None:
    """Raise EPERM if fallocate(2) must not add or remove pages."""
    if inode.flags & IMMUTABLE or (punch and inode.flags & APPEND):
        raise fail(errno.EPERM)


def refuse_times(inode: Inode, *, given: bool) -> None:
    """Raise EPERM if times must not be set: `given` ones or one alone, or both to the current time."""
    if inode.flags & (_EITHER if given else IMMUTABLE):
        raise fail(errno.EPERM)
