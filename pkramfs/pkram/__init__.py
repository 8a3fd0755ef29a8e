# SPDX-License-Identifier: GPL-2.0-or-later
"""Chapter 2, what survives.

PKRAM keeps memory over a kexec by name: a *node* holds *objects*, an object holds a stream of bytes
and a stream of pages, and one number, the pfn of the *super block*, finds it all again.

    pkram=34f ─► super block ─► node ─► node            names
                      │          └─► object ─► object   a byte stream and a page stream each
                      └─► region list                   what early boot must not touch

Nothing is copied to be preserved: a page stream names frames. Nothing is visible before it is
whole: a node is written first and published by one 8-byte store. Nothing is consumed by being read.
And nothing read is trusted: every page has a checksum, every pointer a check, and what the streams
name must agree with the node's page table.

Promised upward: `Store` saves, loads, lists and withdraws nodes, and a crash at any store leaves the
old state or the new one. Assumed from below: frames that read as zeros, a lock for the node list,
claims on names, 8-byte stores that are not torn.

In reading order: format, page, superblock; parallel, relocate, saveframes, frameset; streams/ (link,
scattered, linkwriter, bytewriter, pagewriter, writer; linkreader, runs, reader); table/ (reader,
writer); node, save, store; regions; check, which reads it all and trusts none of it. treeformat
declares what a file tree writes into its byte stream.

Kernel: mm/pkram.c, mm/pkram_pagetable.c, include/linux/pkram.h
"""
