# SPDX-License-Identifier: GPL-2.0-or-later
"""A log in RAM: what was done to a tree since its last checkpoint, so that it outlives its daemon.

A daemon keeps inodes and names as objects of its process. When it dies they are gone, though every page of every
file is still in RAM. So each request appends what it has changed to a log in frames of the tree itself, and one
8-byte store makes that count:

    anchor ──▶ live page ──base──▶ base page ──node──▶ a checkpoint: a node that no list names, or 0, the empty tree
    (ID.json)      │                   └─────segment──▶ segment ──next──▶ segment ──next──▶ segment
                   └─tail: everything before this position counts                              ▲ chunks are appended

* A *chunk* is the bytes of one request (of a large one: a part), under a checksum, with its position.
* A *position* counts the bytes of all chunks ever written; it never falls.
* The *tail* is published after the chunk is whole. Nothing behind it is read.
* A *seal* page repeats what the live page says at one moment, and never changes: with it a node of the list can say
  that this log holds its tree.
* A *checkpoint* holds the tree as it was at the base page's position. A new base page is published by one store; what
  the old one led to is freed afterwards.

This chapter knows bytes, frames and positions. What the bytes mean is told in fs/records, and who writes them in
fs/journal.

Promised upward: what was published is read back whole, or a FormatError names position and field. Assumed from below:
frames that read as zeros, 8-byte stores that are not torn.

Reading order: layout, log, reader.

Kernel: fs/jbd2/ (a commit block makes a transaction count); no counterpart in tmpfs, which dies with its kernel only
"""
