# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree: a POSIX tmpfs as one object, without FUSE, threads or a clock of its own.

    tree = Tree(ram, frames, Limits(max_pages, max_inodes))
    inode = tree.create(tree.root.ino, b"name", 0o644, caller)
    handle = tree.open(inode.ino, os.O_RDWR)
    tree.write(handle, 0, b"bytes"); tree.read(handle, 0, 5); tree.release(handle)

Operations take inode numbers (or handles), raise OSError with the errno that tmpfs would give, and
return inodes, whose attributes the caller (fuse) reads. Each operation is atomic among callers in one
thread. The parts, one page each:

    preservation live or preserved, frozen or not
    ledger       all counters, and the room that a save needs
    core         inode table, the gate for every change, references
    namespace    names: look-up, create, link, unlink, rename, readdir
    truncation   pages that files give up: cut, holes
    attributes   setattr, xattrs, ACLs
    filling      frames for holes, one by one or as huge pages
    data         open, read, write, truncate, holes
    ranges       seek data and holes, copy

Kernel: mm/shmem.c
"""

from pkramfs.fs.namespace import Namespace
from pkramfs.fs.ranges import Ranges


class Tree(Namespace, Ranges):
    """A tmpfs in RAM; see the module's page."""
