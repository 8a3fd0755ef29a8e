# SPDX-License-Identifier: GPL-2.0-or-later
"""Preserved trees without a mount: what is in a node, and how it gets out, in, and from one node to another.

    node ──▶ SavedTree ──▶ look: ls, tree, stat, cat
                      ├──▶ a tar archive
                      └──▶ compared with another, or with a directory of the host
    a tar archive ──▶ a tree of nobody ──▶ node          what a mount does between mount and umount, without one
    node ──▶ node                                        a copy with frames of its own

A mount adopts the frames of its node. Nobody here does: a SavedTree is columns that were read and checked as a
restore checks them, and pages that are read where they lie, with pread, a piece at a time. So a tree may be looked
at while it waits for its mount, or while a mount serves it, and nobody is held up.

The node may be withdrawn meanwhile, because its mount changes the tree or somebody frees it. A withdrawal comes before
the first change of any page (fs/core, the gate). So whoever reads a piece looks at the node afterwards: if it
still stands the piece is what was preserved, and if not the work ends with an error that says so.

What this chapter promises upward:

* Memory grows with names and runs, as that of a mount does, never with bytes.
* What it makes becomes visible at the end, by one store or one rename; whatever fails before leaves nothing behind.
* Nothing in an archive reaches a file of the host: its names lead through the tree that is being built.

It assumes from below that a load checks every structure, that a save publishes all or nothing, and that frames of a
claimed tree id are nobody else's. It knows neither commands nor daemons.

In reading order: standing, view; keywords, export, stream, sparsemap, tarreader, importing, claiming; copying;
compare; salvage.

Kernel: fs/tar of nobody; dump(8) and restore(8) read and make file systems in this way
"""
