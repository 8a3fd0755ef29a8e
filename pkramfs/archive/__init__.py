# SPDX-License-Identifier: GPL-2.0-or-later
"""Preserved trees without a mount: look into a node, export it, import it, copy it.

    node ──▶ SavedTree ──▶ look: ls, tree, stat, cat
                      ├──▶ a tar archive
                      └──▶ compared with another, or with a directory of the host
    a tar archive ──▶ a private tree   ──▶ node          as a mount would do between mount and umount
    node ──▶ node                                        a copy with frames of its own

A mount adopts the frames of its node. Nobody here does: a SavedTree is columns that were read and checked as a
restore checks them, and pages that are read where they lie, with pread, a piece at a time. So a tree may be looked
at while it waits for its mount, or while a mount serves it, and makes nobody wait.

The node may be withdrawn meanwhile, because its mount changes the tree or somebody frees it. A withdrawal comes before
the first change of any page (fs/core, the gate). So a reader of a piece checks the node afterwards: if it is still
published, the piece is the preserved one; if not, the work ends with an error.

What this chapter promises upward:

* Memory grows with names and runs, as that of a mount does, never with bytes.
* A result becomes visible at the end, by one store or one rename; a failure before that leaves nothing behind.
* Nothing in an archive reaches a file of the host: its names lead through the tree that is being built.

It assumes from below that a load checks every structure, that a save publishes all or nothing, and that frames of a
claimed tree id are nobody else's. It knows neither commands nor daemons.

In reading order: standing, view; keywords, export, stream, sparsemap, tarreader, importing, claiming; copying;
compare; salvage.

Kernel: no counterpart; dump(8) and restore(8) read and make file systems in this way
"""
