# SPDX-License-Identifier: GPL-2.0-or-later
"""A tmpfs whose pages are physical.

A kernel's tmpfs is an index of names over pages of memory. This chapter is the same, but its
pages have known addresses: a file's pages are *runs* of frames of RAM. So a save only records which
runs belong to which file, and copies no page. A tree with a log has recorded that already.

    /                            directory    names to inodes, and a place in the listing
    ├── film      inode 17 ────▶ page map     (index 0, pfn 8200, 262144 pages)
    ├── table     inode 18 ────▶ page map     (0, 270344, 1)  hole  (512, 270345, 3)
    └── link ───▶ inode 17       two names, one inode
                                      │
                 machine.frames ◀─────┘  allocates runs, takes them back, punches what is free

What this chapter promises upward:

* It behaves as tmpfs does, to the errno, except where it says otherwise.
* Every change passes one gate, so a tree can be frozen, and no page that a published node names is
  ever changed: the first change of a preserved tree withdraws its node before it is applied.
* A save publishes everything or nothing; a restore verifies everything before it takes anything.
* A hole costs nothing and is read without touching RAM; pages that a file gives up go back to the host.

It assumes from below: a newly allocated frame reads as zeros, frames are leased under the
tree's id, and a node appears by one store. It knows neither FUSE nor sockets nor threads, and it
does not check permissions: the caller has done that (in a mount, the kernel).

Reading order: failure, rules, clock, access, limits, inode, protection, directory, pagecache, preservation, ledger,
lost, then the tree: core, acl, namespace, truncation, attributes, filling, data, ranges, tree; checksums of its data:
pieces, sumtable, sums, summing; then what outlives a daemon's death: records, journal, replay, recheck, checkpoint,
recover, standby; what crosses a kexec: picture, save, sealing, foresight, verify, unpack, restore, amended, asleep,
handles, nodes (`pkram.treeformat` declares the saved form); and collector, for processes that serve a large tree.

Kernel: mm/shmem.c
"""
