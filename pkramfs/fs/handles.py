# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's side of a tree, for the daemon that takes over: open files, references, files without a name.

A node holds a tree, but not its users. When a mount is kept over a kexec, the kernel keeps its side of it, and the
daemon that takes over needs to know it:

    open        how often each file is open, and how, by number             open_files ─▶ reopen
    known       inodes that the kernel may have in its caches               known
    deleted     files without a name: a node has only files with names      shelter ─▶ unshelter

So deleted files get names while they cross: their numbers, in a directory that no program sees. It is made after the
last request was read, and removed before the next one is.

Kernel: fs/nfs/unlink.c (nfs_sillyrename)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pkramfs.fs.rules import ROOT_INO

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree

SHELTER = b".pkramfs-deleted"
"""Where deleted files are while they cross."""
_LINKABLE = b"u"
"""Behind the number of one that never had a name and may get one."""

Row = tuple[int, int, int, bool]


def open_files(tree: Tree) -> list[Row]:
    """Return (inode, handles, those that may write, whether writing drops set-id bits) of each open file."""
    return [(i.ino, i.opens, i.writers, i.unprivileged) for i in tree.inodes.values() if i.opens]


def reopen(tree: Tree, rows: list[Row]) -> None:
    """Count the handles of files that are open under another daemon."""
    for ino, opens, writers, unprivileged in rows:
        inode = tree.inode(ino)
        inode.opens, inode.writers, inode.unprivileged = opens, writers, unprivileged
        if writers:
            tree.writing[ino] = inode
        if tree.journal is not None:
            tree.journal.opened(inode)
    tree.commit()


def known(tree: Tree) -> list[int] | None:
    """Return the inodes to which the kernel has references, or None if it may have one to any inode."""
    if tree.asleep is not None and tree.asleep.lookups:
        return None
    return [inode.ino for inode in tree.inodes.values() if inode.lookups]


def numbers(tree: Tree) -> list[int]:
    """Return the numbers of all inodes, and perhaps of some that are gone."""
    sleeping: list[int] = [] if tree.asleep is None else tree.asleep.parts.inodes["ino"].tolist()
    return list({*tree.inodes, *sleeping})


def shelter(tree: Tree) -> None:
    """Give every deleted file a name, so that a node holds it; raise OSError if there is no room for that."""
    if not tree.orphans:
        return
    times = tree.root.mtime, tree.root.ctime
    place = tree.mkdir(ROOT_INO, SHELTER, 0o700)
    for ino in list(tree.orphans):
        mark = _LINKABLE if ino in tree.unnamed else b""
        tree.name_again(tree.inode(ino), place, b"%d" % ino + mark)
    _set_times(tree, times)


def unshelter(tree: Tree) -> None:
    """Take from deleted files the names that they crossed with."""
    place = tree.lookup(ROOT_INO, SHELTER)
    if place is None or place.entries is None:
        return
    times = tree.root.mtime, tree.root.ctime
    for name, inode, _ in list(tree.readdir(place.ino, 2)):
        if name.removesuffix(_LINKABLE) == b"%d" % inode.ino:  # otherwise the directory is a user's
            tree.unname(inode, place, name, linkable=name.endswith(_LINKABLE))
    if not len(place.entries):
        tree.rmdir(ROOT_INO, SHELTER)
    _set_times(tree, times)


def left_behind(tree: Tree) -> bool:
    """Return True if deleted files still have the names with which they crossed: their users are gone.

    In a sleeping tree this wakes the root alone, and only if some directory has the name.
    """
    if tree.asleep is not None and not tree.asleep.amended and SHELTER not in bytes(tree.asleep.parts.names):
        return False
    place = tree.lookup(ROOT_INO, SHELTER)
    if place is None or not place.entries:
        return False
    return all(name.removesuffix(_LINKABLE) == b"%d" % inode.ino for name, inode, _ in tree.readdir(place.ino, 2))


def _set_times(tree: Tree, times: tuple[int, int]) -> None:
    root: Any = tree.root
    root.mtime, root.ctime = times
    tree.commit()
