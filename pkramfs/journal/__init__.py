# SPDX-License-Identifier: GPL-2.0-or-later
"""A log in RAM of the changes of a tree since its last checkpoint, by which the tree outlives its daemon.

A daemon keeps inodes and names as objects of its process. When it dies they are gone, although every page of every
file is still in RAM. So each request appends its changes to a log in frames of the tree itself, and one
8-byte store commits them:

    anchor ──▶ live page ──base──▶ base page ──node──▶ a checkpoint: a node that no list names, or 0, the empty tree
    (ID.json)      │                   └─────segment──▶ segment ──next──▶ segment ──next──▶ segment
                   └─tail: everything before this position counts                              ▲ chunks are appended

* A *chunk* holds the changes of one request (or a part of a large one), with a checksum and its position.
* A *position* counts the bytes of all chunks ever written; it never falls.
* The *tail* is published after the chunk is whole. Nothing behind it is read.
* A *seal* page repeats the live page at one moment, and never changes: through it a node of the list can name
  this log as its tree.
* A *checkpoint* holds the tree as it was at the base page's position. A new base page is published by one store; the
  frames of the old checkpoint are freed afterwards.

This chapter knows bytes, frames and positions. fs/records defines the meaning of the bytes, and they are written by
fs/journal.

Promised upward: what was published is read back whole, or a FormatError names position and field. Assumed from below:
frames that read as zeros, 8-byte stores that are not torn.

Reading order: layout, log, reader.

Kernel: fs/jbd2/ (a commit block makes a transaction count); no counterpart in tmpfs, which dies with its kernel only
"""
