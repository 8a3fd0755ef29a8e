# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree made of the members of a tar archive, as `tar -x` would make it on an empty mount.

    member ─▶ its name, checked ─▶ a file of the tree ─▶ contents, owner, xattrs, ACL, times
                                                     directories get times and ACLs when all is in them

Names lead through the tree that is being built and nowhere else: an absolute name, one with `..`, and one that leads
through a symbolic link are errors. A member that comes twice replaces the first. All or nothing: the tree is nobody's
until it is saved.

Who is not root owns all that he imports, gets no devices, and neither security.* and trusted.* attributes nor
IMMUTABLE and APPEND: the rules of tar(1) and of mknod(2).

Counterparts: GNU tar (extract.c)
"""

import errno
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pkramfs.archive import keywords
from pkramfs.archive.export import LeftOut, Report
from pkramfs.archive.stream import ArchiveError
from pkramfs.archive.tarreader import Member
from pkramfs.errors import ExhaustedError
from pkramfs.fs import acl, clock
from pkramfs.fs.inode import Inode
from pkramfs.fs.picture import Progress
from pkramfs.fs.protection import APPEND, IMMUTABLE
from pkramfs.fs.rules import NAME_MAX
from pkramfs.fs.tree import Tree
from pkramfs.text import exact

_ACLS = (acl.ACCESS, acl.DEFAULT)
_PRIVILEGED = (b"security.", b"trusted.")
_FOLDER_MODE = 0o755


class _Fault(Exception):
    """A member that must not be in a tree."""


class Owner(NamedTuple):
    """The user that imports."""

    uid: int
    gid: int

    @property
    def privileged(self) -> bool:
        """Return True for root."""
        return self.uid == 0


def fill(
    tree: Tree, archive: str, members: Iterable[Member], owner: Owner, *, total: int = 0
) -> Generator[Progress, None, Report]:
    """Put the members of an archive into an empty, private tree; raise ArchiveError that names the member at fault.

    `total` is how many bytes the archive has, if that is known.
    """
    filling = _Filling(tree, owner)
    names = done = 0
    for member in members:
        with _naming(archive, member):
            for size in filling.add(member):
                done += size
                yield Progress("import", done, max(total, done))
        names += 1
    for member, inode in filling.folders():
        with _naming(archive, member):
            filling.end(inode, member)
    filling.flag()
    return Report(names, done, filling.left_out)


@contextmanager
def _naming(archive: str, member: Member) -> Iterator[None]:
    """Name archive and member in the errors of a block."""
    try:
        yield
    except ExhaustedError as error:
        raise ExhaustedError(f"{archive}: {exact(member.path)}: {error}; nothing was imported") from None
    except _Fault as error:
        raise ArchiveError(f"{archive}: {error}") from None
    except OSError as error:
        raise ArchiveError(f"{archive}: {exact(member.path)}: {error.strerror}") from None


class _Filling:
    """A tree that is being filled."""

    def __init__(self, tree: Tree, owner: Owner) -> None:
        self._tree, self._owner = tree, owner
        self._folders: dict[int, tuple[Inode, Member]] = {}
        self._flagged: dict[int, tuple[Inode, int]] = {}
        self.left_out: list[LeftOut] = []

    def add(self, member: Member) -> Iterable[int]:
        """Make one file; yield how many bytes of it are written, now and then."""
        names = _names(member.path)
        if not names:
            if member.kind != stat.S_IFDIR:
                raise _Fault(f"{exact(member.path)}: the root of the tree is a directory, and nothing else")
            self._attributes(self._tree.root, member)
            return
        folder = self._folder(names[:-1], member)
        if not member.kind:
            self._link(folder, names[-1], member)
            return
        inode = self._make(folder, names[-1], member)
        if member.kind == stat.S_IFREG:
            for offset, data in member.data():
                if self._tree.write(inode.ino, offset, data, stamp=False) < len(data):
                    raise ExhaustedError("RAM is full")
                yield len(data)
            if member.size > inode.size:
                self._tree.setattr(inode.ino, size=member.size)
        self._attributes(inode, member)

    def _folder(self, names: list[bytes], member: Member) -> Inode:
        """Return the directory that leads to a member, made as far as the archive has none."""
        tree, inode = self._tree, self._tree.root
        for name in names:
            below = tree.lookup(inode.ino, name)
            if below is None:
                below = tree.mkdir(inode.ino, name, _FOLDER_MODE)
                tree.setattr(below.ino, mode=_FOLDER_MODE, uid=self._owner.uid, gid=self._owner.gid)
            if below.entries is None:
                what = "a symbolic link" if below.target is not None else "a file"
                raise _Fault(f"{exact(member.path)}: its name leads through {what}, {exact(name)}")
            inode = below
        return inode

    def _make(self, folder: Inode, name: bytes, member: Member) -> Inode:
        """Make a file without attributes, in the place of one that the archive had before."""
        tree, kind = self._tree, member.kind
        there = tree.lookup(folder.ino, name)
        if there is not None and there.entries is not None:
            if kind != stat.S_IFDIR:
                raise _Fault(f"{exact(member.path)}: it is a directory already")
            return there
        if there is not None:
            self._forget(there)
            tree.unlink(folder.ino, name)
        if kind == stat.S_IFDIR:
            return tree.mkdir(folder.ino, name, 0o700)
        if kind == stat.S_IFLNK:
            return tree.symlink(folder.ino, name, member.target)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            if not self._owner.privileged:
                raise _Fault(f"{exact(member.path)}: it is a device, and only root may make one")
            return tree.mknod(folder.ino, name, kind | 0o600, _device(member))
        return tree.mknod(folder.ino, name, kind | 0o600)

    def _forget(self, inode: Inode) -> None:
        """Drop pending attributes of a file that is replaced."""
        if inode.nlink == 1:
            self._flagged.pop(inode.ino, None)

    def _link(self, folder: Inode, name: bytes, member: Member) -> None:
        """Give a file that the archive had before another name."""
        tree, inode = self._tree, self._tree.root
        for part in _names(member.target):
            below = tree.lookup(inode.ino, part) if inode.entries is not None else None
            if below is None:
                raise _Fault(f"{exact(member.path)}: it links to {exact(member.target)}, which is not before it")
            inode = below
        there, changed = tree.lookup(folder.ino, name), inode.ctime
        if there is inode:
            return
        if there is not None:
            self._forget(there)
            tree.unlink(folder.ino, name)
        tree.link(inode.ino, folder.ino, name)
        inode.ctime = changed

    # -- attributes -----------------------------------------------------------------------------

    def _attributes(self, inode: Inode, member: Member) -> None:
        """Give a file its attributes; a directory the others when everything is in it."""
        uid, gid = (member.uid, member.gid) if self._owner.privileged else self._owner
        if not 0 <= uid < 0xFFFF_FFFF or not 0 <= gid < 0xFFFF_FFFF:
            raise _Fault(f"{exact(member.path)}: invalid owner {uid}:{gid}")
        mode = None if member.kind == stat.S_IFLNK else member.mode
        self._tree.setattr(inode.ino, mode=mode, uid=uid, gid=gid)
        for key, value in member.records.items():
            if key.startswith(keywords.XATTR) and keywords.xattr_name(key) not in _ACLS:
                self._xattr(inode, member, keywords.xattr_name(key), _bytes(value))
        flags = keywords.parse_flags(member.records.get(keywords.FLAGS, ""))
        if flags & ~(0 if self._owner.privileged else IMMUTABLE | APPEND):
            self._flagged[inode.ino] = inode, flags & ~(0 if self._owner.privileged else IMMUTABLE | APPEND)
        if inode.entries is not None:
            self._folders[inode.ino] = inode, member
        else:
            self.end(inode, member)

    def _xattr(self, inode: Inode, member: Member, name: bytes, value: bytes) -> None:
        if not self._owner.privileged and name.startswith(_PRIVILEGED):
            self.left_out.append(LeftOut(member.path, f"{exact(name)}, which only root may set"))
            return
        try:
            self._tree.setxattr(inode.ino, name, value)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            self.left_out.append(LeftOut(member.path, f"{exact(name)}: {error.strerror}"))

    def end(self, inode: Inode, member: Member) -> None:
        """Set ACLs, which files below would inherit, and times."""
        for key, said in member.records.items():
            if key.startswith(keywords.XATTR) and keywords.xattr_name(key) in _ACLS:
                self._xattr(inode, member, keywords.xattr_name(key), _bytes(said))
        for key, name in ((keywords.ACL_ACCESS, acl.ACCESS), (keywords.ACL_DEFAULT, acl.DEFAULT)):
            if text := member.records.get(key):
                try:
                    value = keywords.parse_acl(text)
                except ValueError as error:
                    raise _Fault(f"{exact(member.path)}: {error}") from None
                self._xattr(inode, member, name, value)
        inode.mtime = clock.clamp(member.mtime)
        inode.atime = inode.mtime if member.atime is None else clock.clamp(member.atime)
        inode.ctime = inode.ctime if member.ctime is None else clock.clamp(member.ctime)

    def folders(self) -> list[tuple[Member, Inode]]:
        """Return the directories, which get ACLs and times when all is in them."""
        return [(member, inode) for inode, member in self._folders.values()]

    def flag(self) -> None:
        """Give files the flags that would have kept them from being made."""
        for inode, flags in self._flagged.values():
            if inode.nlink:
                self._tree.set_flags(inode.ino, flags, stamp=False)


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")


def _device(member: Member) -> int:
    """Return the number of a device, which the kernel has 12 bits and 20 for."""
    major, minor = member.rdev
    if not 0 <= major < 1 << 12 or not 0 <= minor < 1 << 20:
        raise _Fault(f"{exact(member.path)}: no device has the number {major}:{minor}")
    return os.makedev(major, minor)


def _names(path: bytes) -> list[bytes]:
    """Return the names of a member's path, all of which are safe; none for the root."""
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    longest = max(map(len, names), default=0)
    if path.startswith(b"/"):
        raise _Fault(f"{exact(path)}: an absolute name, which leads out of the tree; `tar -C /` makes others")
    if b".." in names:
        raise _Fault(f"{exact(path)}: its name has `..`, which may lead out of the tree")
    if longest > NAME_MAX:
        raise _Fault(f"{exact(path)}: a name of {longest} bytes, and at most {NAME_MAX} are possible")
    if b"\0" in path:
        raise _Fault(f"{exact(path)}: its name contains NUL")
    return names
