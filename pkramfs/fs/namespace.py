# SPDX-License-Identifier: GPL-2.0-or-later
"""Names: look-up, creation, links, removal, renaming, listing.

Rules that are easy to get wrong, each as tmpfs has it:

* A new inode belongs to the caller; in a set-group-ID directory to the directory's group, and a
  new directory inherits the bit. The umask applies unless the directory has a default ACL.
* A directory's link count is 2 and one for each subdirectory; its size 20 bytes for each entry.
* Every further hard link takes inode space, as every inode does.
* rename: onto another name of the same inode does nothing; a directory never goes below itself; a
  directory replaces only an empty directory, a file only a non-directory; `..` follows; the
  whiteout that stays behind is a character device 0:0.
* Times: a change of a name sets mtime and ctime of the directory and ctime of the inode.

The kernel has checked permissions, the sticky bit included (default_permissions), and that both
names are on one mount; everything else is checked here, before the gate.

Kernel: fs/namei.c, fs/libfs.c (simple_rename_exchange), mm/shmem.c (shmem_mknod, shmem_rename2)
"""

import errno
import os
import stat
from collections.abc import Iterator

from pkramfs.fs import acl, clock
from pkramfs.fs.core import Core
from pkramfs.fs.directory import LAST, Directory
from pkramfs.fs.failure import fail
from pkramfs.fs.inode import ROOT, Caller, Inode
from pkramfs.fs.limits import INLINE_TARGET, INODE_SPACE
from pkramfs.fs.protection import INHERITED, refuse_change, refuse_entry, refuse_removal
from pkramfs.fs.rules import ENTRY_SIZE, NAME_MAX, TARGET_MAX, UNNOTED
from pkramfs.journal.log import FREEING, LESS

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

DOT, DOTDOT = b".", b".."
_DOTS = frozenset((DOT, DOTDOT))
_DEVICES = (stat.S_IFCHR, stat.S_IFBLK)
_TYPES = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


class Namespace(Core):
    """The operations on names. A directory is given by its inode number, a name as bytes."""

    # -- looking --------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        """Return the inode of a name, or None: absent names are looked up all the time, so they are no exception.

        The name `.` finds files, too: the kernel looks up file handles (NFS) like this if it has forgotten the inode. A
        deleted inode is not found, even if its FORGET has not arrived yet.
        """
        inode = self.inodes.get(parent) or self._find_asleep(parent)
        if inode.entries is None:
            if name != DOT:
                raise fail(errno.ENOTDIR)
            return self._linked(inode)
        entry = inode.entries.entries.get(name)
        if entry is not None:
            return entry[0]
        if len(name) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG)
        if name == DOT:
            return self._linked(inode)
        return inode.entries.parent if name == DOTDOT else None

    @staticmethod
    def _linked(inode: Inode) -> Inode:
        """Return the inode if it has a name left; raise ESTALE if not."""
        if not inode.nlink:
            raise fail(errno.ESTALE)
        return inode

    def opendir(self, number: int, flags: int = os.O_RDONLY) -> int:
        """Open a directory and return its handle, which needs no release."""
        ino = self.directory(number).ino
        return ino | UNNOTED if flags & os.O_NOATIME else ino

    def readdir(self, number: int, place: int = 0) -> Iterator[tuple[bytes, Inode, int]]:
        """Yield (name, inode, place to go on from) of the entries from `place` on, `.` and `..` first."""
        inode = self.directory(number)
        entries = self._entries(inode)
        if not number & UNNOTED:
            self._read_time(inode)
        if place < 1:
            yield DOT, inode, 1
        if place < 2:
            yield DOTDOT, entries.parent, 2 if entries.entries else LAST
        yield from entries.after(place)

    def readlink(self, number: int) -> bytes:
        """Return the target of a symbolic link; raise EINVAL for anything else."""
        inode = self.inode(number)
        if inode.target is None:
            raise fail(errno.EINVAL)
        self._read_time(inode)
        return inode.target

    # -- creating -------------------------------------------------------------------------------

    def create(self, parent: int, name: bytes, mode: int, caller: Caller = ROOT) -> Inode:
        """Make an empty regular file."""
        return self.mknod(parent, name, stat.S_IFREG | mode & 0o7777, 0, caller)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int = 0, caller: Caller = ROOT) -> Inode:
        """Make a regular file, FIFO, socket or device; a mode without a type means a regular file."""
        kind = mode & 0o170000 or stat.S_IFREG
        if kind not in _TYPES:
            raise fail(errno.EPERM if kind == stat.S_IFDIR else errno.EINVAL)
        folder = self._place_for(parent, name)
        self._change()
        inode = self._new_inode(folder, kind | mode & 0o7777, caller)
        if kind in _DEVICES:
            inode.rdev = rdev
        self._make(folder, name, inode)
        return inode

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller = ROOT) -> Inode:
        """Make a directory; return its inode."""
        folder = self._place_for(parent, name)
        self._change()
        inode = self._new_inode(folder, stat.S_IFDIR | mode & 0o7777, caller)
        self._make_directory(inode, folder)
        folder.nlink += 1
        self._make(folder, name, inode)
        return inode

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller = ROOT) -> Inode:
        """Make a symbolic link; return its inode."""
        if not target or b"\0" in target:
            raise fail(errno.ENOENT)
        if len(target) > TARGET_MAX:
            raise fail(errno.ENAMETOOLONG)
        pages = 1 if len(target) >= INLINE_TARGET else 0
        folder = self._place_for(parent, name)
        self.limits.require_pages(pages)
        self._change(folder)
        inode = self._new_inode(folder, stat.S_IFLNK | 0o777, caller)
        self._add(inode)
        inode.target, inode.size = bytes(target), len(target)
        self.ledger.add_target(inode)
        self._enter(folder, name, inode)
        return inode

    def link(self, number: int, parent: int, name: bytes) -> Inode:
        """Add a name to a file that has at least one name, or that `tmpfile` made."""
        inode = self.inode(number)
        if inode.entries is not None:
            raise fail(errno.EPERM)
        fresh = inode.ino in self.unnamed
        if not inode.nlink and not fresh:
            raise fail(errno.ENOENT)
        refuse_change(inode)
        folder = self._place_for(parent, name, 0 if fresh else INODE_SPACE)
        self._change(folder, inode)
        inode.nlink += 1
        if fresh:
            self.unnamed.discard(inode.ino)
            del self.orphans[inode.ino]
        else:
            self.ledger.add_link()
        inode.ctime = clock.now()
        self._enter(folder, name, inode)
        return inode

    def tmpfile(self, parent: int, mode: int, caller: Caller = ROOT, *, linkable: bool = True) -> Inode:
        """Make an empty regular file without a name, which lives as long as a handle or a reference.

        Only a `linkable` one can be given a name later.
        """
        folder = self.directory(parent)
        self._check_place(folder, INODE_SPACE)
        self._change()
        inode = self._new_inode(folder, stat.S_IFREG | mode & 0o7777, caller)
        self._add(inode)
        inode.nlink = 0
        self.orphans[inode.ino] = (folder, b"#%d" % inode.ino)
        if linkable:
            self.unnamed.add(inode.ino)
        return inode

    def _place_for(self, parent: int, name: bytes, space: int = INODE_SPACE) -> Inode:
        """Check everything that a new name needs, with `size` bytes of inode space, and return its directory."""
        folder = self.directory(parent)
        if len(name) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG)
        if name in self._entries(folder).entries or name in _DOTS:
            raise fail(errno.EEXIST)
        if not name or b"/" in name or b"\0" in name:
            raise fail(errno.EINVAL)
        self._check_place(folder, space)
        return folder

    def _check_place(self, folder: Inode, space: int) -> None:
        if not folder.nlink:
            raise fail(errno.ENOENT)  # removed, but still the working directory of a program
        if self.preservation.frozen:
            raise fail(errno.EROFS)  # not ENOSPC
        if folder.flags:
            refuse_entry(folder)
        self.ledger.require_space(space)

    def _new_inode(self, folder: Inode, mode: int, caller: Caller) -> Inode:
        gid = caller.gid
        if folder.mode & stat.S_ISGID:
            gid = folder.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        default = folder.xattrs.get(acl.DEFAULT) if folder.xattrs is not None else None
        link = stat.S_ISLNK(mode)
        if default is None or link:
            inode = self._allocate_inode(mode if link else mode & ~caller.umask, caller.uid, gid)
            inode.flags = folder.flags & INHERITED
            return inode
        self._expect_records(2 * len(default))
        mode, inherited = acl.inherit(default, mode)
        inode = self._allocate_inode(mode, caller.uid, gid)
        inode.flags = folder.flags & INHERITED
        for name, value in inherited.items():
            self.put_xattr(inode, name, value)
        return inode

    def _add(self, inode: Inode) -> None:
        if self.journal is not None:
            self.journal.add(inode)

    def _make(self, folder: Inode, name: bytes, inode: Inode) -> None:
        """Give a new inode its name."""
        cookie = self._place(folder, name, inode)
        folder.mtime = folder.ctime = inode.ctime
        if self.journal is not None:
            self.journal.made(folder, name, inode, cookie)

    def _enter(self, folder: Inode, name: bytes, inode: Inode) -> None:
        self._put_in(folder, name, inode)
        folder.mtime = folder.ctime = inode.ctime

    def _put_in(self, folder: Inode, name: bytes, inode: Inode) -> None:
        cookie = self._place(folder, name, inode)
        if self.journal is not None:
            self.journal.enter(folder, name, inode, cookie)

    def _place(self, folder: Inode, name: bytes, inode: Inode) -> int:
        """Put a name into a directory, and return its cookie; the journal is the caller's."""
        assert folder.entries is not None
        cookie = folder.entries.add(name, inode)
        inode.folder, inode.name = folder, name
        self.ledger.add_entry(name)
        folder.size += ENTRY_SIZE
        return cookie

    # -- removing -------------------------------------------------------------------------------

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name; the inode goes with its last name, handle and reference."""
        folder = self.directory(parent)
        inode = self._existing(folder, name)
        if inode.entries is not None:
            raise fail(errno.EISDIR)
        if folder.flags | inode.flags:
            refuse_removal(folder, inode)
        self._change(room=FREEING)
        self._remove(folder, name, inode)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        folder = self.directory(parent)
        if name == DOT:
            raise fail(errno.EINVAL)
        if name == DOTDOT:
            raise fail(errno.ENOTEMPTY)
        inode = self._existing(folder, name)
        refuse_removal(folder, inode)
        if inode.entries is None:
            raise fail(errno.ENOTDIR)
        if inode.entries.entries:
            raise fail(errno.ENOTEMPTY)
        self._change(room=FREEING)
        folder.nlink -= 1
        self._remove(folder, name, inode)

    def _remove(self, folder: Inode, name: bytes, inode: Inode) -> None:
        """Take a name away from an inode; free the inode if nothing else holds it."""
        self._displace(folder, name)
        folder.mtime = folder.ctime = now = clock.now()
        if self.journal is not None:
            self.journal.gone(folder, name, inode, now)
        self._drop_name(inode, folder, name, now)

    def _take_out(self, folder: Inode, name: bytes) -> None:
        self._displace(folder, name)
        if self.journal is not None:
            self.journal.leave(folder, name)

    def _displace(self, folder: Inode, name: bytes) -> None:
        """Take a name out of a directory; the journal is the caller's."""
        assert folder.entries is not None
        folder.entries.remove(name)
        self.ledger.remove_entry(name)
        folder.size -= ENTRY_SIZE

    def _drop_name(self, inode: Inode, folder: Inode, name: bytes, now: int) -> None:
        """Update counters and times of an inode whose name was already taken out of the directory."""
        inode.ctime = now
        if inode.entries is not None:
            inode.nlink = 0
        else:
            inode.nlink -= 1
            if inode.nlink:
                self.ledger.remove_link()
                return
        if inode.lookups or inode.opens:
            self.orphans[inode.ino] = (folder, name)
        else:
            self._reap(inode)

    # -- crossing (see handles) -----------------------------------------------------------------

    def name_again(self, inode: Inode, folder: Inode, name: bytes) -> None:
        """Give a deleted inode a name, and change no time."""
        self._change(folder, inode)
        inode.nlink = 1 if inode.entries is None else 2
        folder.nlink += inode.entries is not None
        del self.orphans[inode.ino]
        self.unnamed.discard(inode.ino)
        self._put_in(folder, name, inode)

    def unname(self, inode: Inode, folder: Inode, name: bytes, *, linkable: bool) -> None:
        """Remove the name that `name_again` gave to an inode."""
        self._change(folder, inode, room=LESS)
        self._take_out(folder, name)
        inode.nlink = 0
        if inode.entries is not None:
            folder.nlink -= 1
            inode.entries.parent = self.root
        self.orphans[inode.ino] = (self.root, name)
        if linkable:
            self.unnamed.add(inode.ino)

    def _existing(self, folder: Inode, name: bytes) -> Inode:
        entry = self._entries(folder).entries.get(name)
        if entry is None:
            raise fail(errno.ENAMETOOLONG if len(name) > NAME_MAX else errno.ENOENT)
        return entry[0]

    @staticmethod
    def _entries(folder: Inode) -> Directory:
        entries = folder.entries
        if entries is None:
            raise fail(errno.ENOTDIR)
        return entries

    # -- renaming -------------------------------------------------------------------------------

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0, caller: Caller = ROOT
    ) -> None:
        """Move a name. `flags` are renameat2's: NOREPLACE, EXCHANGE, WHITEOUT."""
        if flags & ~7 or (flags & RENAME_EXCHANGE and flags & (RENAME_NOREPLACE | RENAME_WHITEOUT)):
            raise fail(errno.EINVAL)
        source, target = self.directory(parent), self.directory(new_parent)
        if name in _DOTS or new_name in _DOTS:
            raise fail(errno.EEXIST if flags & RENAME_NOREPLACE else errno.EBUSY)
        inode = self._existing(source, name)
        victim = self._entries(target).find(new_name)
        if victim is not None and flags & RENAME_NOREPLACE:
            raise fail(errno.EEXIST)
        if victim is None:
            self._check_new_name(target, new_name, flags)
        self._check_ancestry(inode, victim, source, target, flags)
        if inode is victim:
            return
        refuse_removal(source, inode)
        if victim is not None:
            refuse_removal(target, victim)
        refuse_entry(target)
        if victim is not None and not flags & RENAME_EXCHANGE:
            _check_replacement(inode, victim)
        if flags & RENAME_WHITEOUT:
            self.limits.require_space()
        if flags & RENAME_EXCHANGE and victim is not None:
            self._change(source, target, inode, victim)
            self._exchange(source, name, inode, target, new_name, victim)
        elif flags & RENAME_WHITEOUT:
            self._change(source, target, inode, *((victim,) if victim is not None else ()))
            self._move(source, name, inode, target, new_name, victim, self._new_inode(source, stat.S_IFCHR, caller))
        else:
            self._change()
            self._move(source, name, inode, target, new_name, victim, None)

    @staticmethod
    def _check_new_name(target: Inode, name: bytes, flags: int) -> None:
        if flags & RENAME_EXCHANGE or not target.nlink:
            raise fail(errno.ENOENT)
        if len(name) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG)
        if not name or b"/" in name or b"\0" in name:
            raise fail(errno.EINVAL)

    def _check_ancestry(self, inode: Inode, victim: Inode | None, source: Inode, target: Inode, flags: int) -> None:
        """Refuse a rename that puts a directory below itself, or replaces it by an inode inside it."""
        if source is target:
            return
        if inode.entries is not None and self._is_below(target, inode):
            raise fail(errno.EINVAL)
        if victim is not None and victim.entries is not None and self._is_below(source, victim):
            raise fail(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY)

    def _is_below(self, inode: Inode, ancestor: Inode) -> bool:
        while inode is not ancestor:
            if inode is self.root:
                return False
            inode = self._entries(inode).parent
        return True

    def _move(
        self,
        source: Inode,
        name: bytes,
        inode: Inode,
        target: Inode,
        new_name: bytes,
        victim: Inode | None,
        whiteout: Inode | None,
    ) -> None:
        now = clock.now()
        if whiteout is not None:
            self._add(whiteout)
            self._take_out(source, name)
            self._put_in(source, name, whiteout)
            if victim is not None:
                self._take_out(target, new_name)
            self._put_in(target, new_name, inode)
        else:
            self._displace(source, name)
            if victim is not None:
                self._displace(target, new_name)
            cookie = self._place(target, new_name, inode)
            if self.journal is not None:
                self.journal.moved(source, name, inode, target, new_name, cookie, victim, now)
        if inode.entries is not None:
            inode.entries.parent = target
            source.nlink -= 1
            if victim is None:
                target.nlink += 1
        inode.ctime = source.mtime = source.ctime = target.mtime = target.ctime = now
        if victim is not None:
            self._drop_name(victim, target, new_name, now)

    def _exchange(
        self, source: Inode, name: bytes, inode: Inode, target: Inode, new_name: bytes, victim: Inode
    ) -> None:
        now = clock.now()
        self._take_out(source, name)
        self._take_out(target, new_name)
        self._put_in(source, name, victim)
        self._put_in(target, new_name, inode)
        for moved, left, entered in ((inode, source, target), (victim, target, source)):
            if moved.entries is not None:
                moved.entries.parent = entered
                left.nlink -= 1
                entered.nlink += 1
            moved.ctime = now
        source.mtime = source.ctime = target.mtime = target.ctime = now


def _check_replacement(inode: Inode, victim: Inode) -> None:
    if inode.entries is None and victim.entries is not None:
        raise fail(errno.EISDIR)
    if inode.entries is not None:
        if victim.entries is None:
            raise fail(errno.ENOTDIR)
        if victim.entries.entries:
            raise fail(errno.ENOTEMPTY)
