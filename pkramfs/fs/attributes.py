# SPDX-License-Identifier: GPL-2.0-or-later
"""Attributes of one inode: mode, owner, times, size, extended attributes, ACLs.

Which time changes when, as tmpfs has it:

    chmod, chown, utimensat, setxattr     ctime
    truncate, also to the same size       mtime and ctime
    write                                 mtime and ctime
    name added or removed                 mtime and ctime of the directory, ctime of the inode

Times that the caller gives are taken as they are: with the writeback cache the kernel owns mtime and
ctime of open files and sends what it has noted.

Set-id bits and file capabilities protect content and owner: chown and truncate drop them here (write
does in `data`). FUSE leaves that to us (HANDLE_KILLPRIV_V2). chmod by a stranger to the group has
lost its set-group-id bit in the kernel already.

xattrs: the namespaces of tmpfs (user., trusted., security.) and ACLs; all but ACLs take inode space.

`ls -l` asks each file for its SELinux label, and no cache remembers that there is none. Only a kernel without SELinux
passes the question on. So until a program stores a label (which is possible) the answer is EOPNOTSUPP instead of
ENODATA: ls(1) applies it to the whole mount, and does not ask again.

Kernel: fs/attr.c (setattr_copy, setattr_should_drop_sgid), mm/shmem.c (shmem_setattr,
shmem_xattr_handler_set), fs/xattr.c (simple_xattr_set)
"""

import errno
import stat

from pkramfs.fs import acl, clock
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import CHOWN, FOWNER, FSETID, ROOT, SYS_ADMIN, Caller, Inode, capable, in_group
from pkramfs.fs.limits import xattr_space
from pkramfs.fs.protection import KNOWN, refuse_change, refuse_size, refuse_times
from pkramfs.fs.rules import LABEL, MAX_SIZE, WRITING, XATTR_NAME_MAX, XATTR_SIZE_MAX
from pkramfs.fs.truncation import Truncation
from pkramfs.journal.log import LESS

XATTR_CREATE, XATTR_REPLACE = 1, 2
CAPABILITY = b"security.capability"

_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)


class Attributes(Truncation):
    """The operations on attributes; the argument is an inode number or handle."""

    def setattr(
        self,
        number: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
        ctime: int | None = None,
        caller: Caller = ROOT,
        keep: bool = False,
    ) -> Inode:
        """Change the given attributes and return the inode.

        With `keep` a new owner takes no privileges away, and a new size no capabilities.
        """
        inode = self.inode(number)
        if size is not None:
            self._check_size(inode, size)
            refuse_size(inode, opened=bool(number & WRITING))
        elif mode is None and uid is None and gid is None:
            return self.set_times(number, atime, mtime, ctime)
        else:
            refuse_change(inode)
            if mode is None and inode.entries is None and inode.mode & 0o6000 and not keep and capable(caller, CHOWN):
                _refuse_mode(inode, without_set_id(inode, caller), caller)  # otherwise the caller owns the file
        if mode is not None and inode.xattrs is not None and acl.ACCESS in inode.xattrs:
            self._expect_records(len(inode.xattrs[acl.ACCESS]))
        self._change(inode, room=LESS)
        now = clock.now()
        if size is not None:
            self._resize(inode, size)
            self.losses.cut(inode.ino, size)
            inode.mtime = now
        if not keep and inode.entries is None and (uid is not None or gid is not None):
            self._drop_privileges(inode, caller, keep_set_id=False)
        self._set_owner_and_mode(inode, mode, uid, gid)
        if size is not None and (inode.mode & 0o6000 or inode.xattrs):
            self._drop_privileges(inode, caller, keep_set_id=capable(caller, FSETID), keep_capabilities=keep)
        inode.atime = inode.atime if atime is None else clock.clamp(atime)
        inode.mtime = inode.mtime if mtime is None else clock.clamp(mtime)
        inode.ctime = now if ctime is None else clock.clamp(ctime)
        return inode

    def set_times(
        self, number: int, atime: int | None, mtime: int | None, ctime: int | None, *, touch: bool = False
    ) -> Inode:
        """Set times alone. The kernel sends this after each write-back and before each deletion, so it is short.

        With `touch` both are set to the current time, as every caller who may append may do. With a handle that may
        write the kernel reports the times of a write; without one, a new ctime alone.
        """
        inode = self.inode(number)
        same = _same_times(inode, atime, mtime, ctime)
        if inode.flags and not number & WRITING and not (atime is None and mtime in (None, inode.mtime)):
            refuse_times(inode, given=not touch)
        if same:
            return inode
        self._change(room=LESS)
        if self.journal is not None:
            self.journal.timed(inode)
        if atime is not None:
            inode.atime = clock.clamp(atime)
        if mtime is not None:
            inode.mtime = clock.clamp(mtime)
        inode.ctime = clock.now() if ctime is None else clock.clamp(ctime)
        return inode

    def set_nothing(self, number: int, ctime: int | None, caller: Caller) -> Inode:
        """Serve a change of nothing, or of ctime alone: so FUSE's kernel says that privileges may go.

        For a file, and without ctime, a write follows by a caller who may not keep them: with CAP_FSETID it removes the
        file's capabilities, which the kernel does itself, otherwise set-id bits. All other cases are chown(-1, -1).
        """
        inode = self.inode(number)
        writes, mode = inode.is_file and ctime is None, inode.mode
        if inode.entries is None and mode & 0o6000 and not (writes and capable(caller, FSETID)):
            mode = without_set_id(inode, caller)
        if writes and mode == inode.mode:
            return inode
        if not writes:
            _refuse_mode(inode, mode, caller)
        self._change(inode, room=LESS)
        inode.mode = mode
        if not writes:  # otherwise the ctime of the write follows
            inode.ctime = clock.now() if ctime is None else clock.clamp(ctime)
        return inode

    def _set_owner_and_mode(self, inode: Inode, mode: int | None, uid: int | None, gid: int | None) -> None:
        inode.uid = inode.uid if uid is None else uid
        inode.gid = inode.gid if gid is None else gid
        if mode is not None:
            inode.mode = inode.kind | mode & 0o7777
            if inode.xattrs is not None and acl.ACCESS in inode.xattrs:
                self.put_xattr(inode, acl.ACCESS, acl.with_mode(inode.xattrs[acl.ACCESS], mode))

    def _drop_privileges(
        self, inode: Inode, caller: Caller, *, keep_set_id: bool, keep_capabilities: bool = False
    ) -> None:
        """Remove set-id bits and capabilities, because content or owner has changed."""
        if inode.entries is not None:
            return
        if not keep_set_id and inode.mode & 0o6000:
            inode.mode = without_set_id(inode, caller)
        if not keep_capabilities and inode.xattrs is not None and CAPABILITY in inode.xattrs:
            self.put_xattr(inode, CAPABILITY, None)

    @staticmethod
    def _check_size(inode: Inode, size: int) -> None:
        if inode.entries is not None:
            raise fail(errno.EISDIR)
        if not inode.is_file or size < 0:
            raise fail(errno.EINVAL)
        if size > MAX_SIZE:
            raise fail(errno.EFBIG)

    # -- flags ----------------------------------------------------------------------------------

    def set_flags(self, number: int, flags: int, *, stamp: bool = True) -> None:
        """Set the flags of chattr(1), those of protection; EOPNOTSUPP for others. Without `stamp` ctime stays."""
        inode = self.inode(number)
        if flags & ~KNOWN:
            raise fail(errno.EOPNOTSUPP)
        self._change(inode)
        inode.flags = flags
        if stamp:
            inode.ctime = clock.now()

    # -- extended attributes --------------------------------------------------------------------

    def getxattr(self, number: int, name: bytes) -> bytes:
        """Return the value; ENODATA if there is none, for labels see the module's page."""
        inode = self.inode(number)
        value = inode.xattrs.get(name) if inode.xattrs is not None else None
        if value is None:
            _check_xattr_name(inode, name)
            raise fail(errno.EOPNOTSUPP if name == LABEL and not self.labelled else errno.ENODATA)
        return value

    def listxattr(self, number: int, caller: Caller = ROOT) -> list[bytes]:
        """Return the names, ACLs first and the others in falling order, as tmpfs does; `trusted.` for CAP_SYS_ADMIN."""
        xattrs = self.inode(number).xattrs
        if not xattrs:
            return []
        names = sorted(xattrs, reverse=True)
        if any(name.startswith(b"trusted.") for name in names) and not capable(caller, SYS_ADMIN):
            names = [name for name in names if not name.startswith(b"trusted.")]
        return [name for name in _ACLS if name in xattrs] + [name for name in names if name not in _ACLS]

    def setxattr(self, number: int, name: bytes, value: bytes, flags: int = 0, caller: Caller = ROOT) -> None:
        """Set a value; with XATTR_CREATE it must not exist yet, with XATTR_REPLACE it must."""
        inode = self.inode(number)
        _check_xattr_name(inode, name)
        if len(value) > XATTR_SIZE_MAX:
            raise fail(errno.E2BIG)
        if flags & ~3:
            raise fail(errno.EINVAL)
        refuse_change(inode)
        if name in _ACLS:
            self._set_acl(inode, name, bytes(value), caller)
            return
        self.ledger.require_space(xattr_space(name, value))
        old = inode.xattrs.get(name) if inode.xattrs is not None else None
        if old is None and flags & XATTR_REPLACE:
            raise fail(errno.ENODATA)
        if old is not None and flags & XATTR_CREATE:
            raise fail(errno.EEXIST)
        self._expect_records(len(name) + len(value))
        self._change(inode)
        self.put_xattr(inode, name, bytes(value))
        inode.ctime = clock.now()

    def removexattr(self, number: int, name: bytes) -> None:
        """Remove a value; ENODATA if there is none (an absent ACL is no error)."""
        inode = self.inode(number)
        _check_xattr_name(inode, name)
        refuse_change(inode)
        if name in _ACLS:
            self._set_acl(inode, name, acl.pack([]), ROOT)
            return
        if inode.xattrs is None or name not in inode.xattrs:
            raise fail(errno.ENODATA)
        self._change(inode, room=LESS)
        self.put_xattr(inode, name, None)
        inode.ctime = clock.now()

    def _set_acl(self, inode: Inode, name: bytes, value: bytes, caller: Caller) -> None:
        entries = acl.parse(value)
        if name == acl.DEFAULT and inode.entries is None:
            if entries:
                raise fail(errno.EACCES)
            return
        self._expect_records(len(value))
        self._change(inode)
        keep = bool(entries)
        if name == acl.ACCESS and entries:
            bits, keep = acl.to_mode(entries)
            inode.mode = inode.mode & ~0o777 | bits
            if not in_group(caller, inode.gid):
                inode.mode &= ~stat.S_ISGID
        self.put_xattr(inode, name, value if keep else None)
        inode.ctime = clock.now()


def _refuse_mode(inode: Inode, mode: int, caller: Caller) -> None:
    """Raise EPERM if an inode does not have this mode yet, and the caller must not set it."""
    if mode != inode.mode and caller.uid != inode.uid and not capable(caller, FOWNER):
        raise fail(errno.EPERM)


def without_set_id(inode: Inode, caller: Caller) -> int:
    """Return the mode after a change by an unprivileged caller. Set-group-ID without group execution is not a
    privilege of a program: only a caller outside the group loses it."""
    mode = inode.mode & ~stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or not in_group(caller, inode.gid)):
        mode &= ~stat.S_ISGID
    return mode


def _same_times(inode: Inode, atime: int | None, mtime: int | None, ctime: int | None) -> bool:
    """Return True if setting these times changes nothing (without ctime it would be now)."""
    if ctime != inode.ctime:
        return atime is None and mtime is None and ctime is None
    return (atime is None or atime == inode.atime) and (mtime is None or mtime == inode.mtime)


def _check_xattr_name(inode: Inode, name: bytes) -> None:
    if name in _ACLS:
        if stat.S_ISLNK(inode.mode):
            raise fail(errno.EOPNOTSUPP)
        return
    space = next((known for known in _NAMESPACES if name.startswith(known)), None)
    if space is None:
        raise fail(errno.EOPNOTSUPP)
    if name == space:
        raise fail(errno.EINVAL)
    if len(name) > XATTR_NAME_MAX:
        raise fail(errno.ERANGE)
    if space == b"user." and inode.entries is None and not inode.is_file:
        raise fail(errno.EPERM)
