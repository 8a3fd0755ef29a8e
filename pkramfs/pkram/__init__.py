# SPDX-License-Identifier: GPL-2.0-or-later
"""Chapter 2, what survives a kexec.

PKRAM keeps memory over a kexec by name: a *node* holds *objects*, an object holds a stream of bytes
and a stream of pages, and one number, the pfn of the *super block*, leads to all of them.

    pkram=34f ─► super block ─► node ─► node            names
                      │          └─► object ─► object   a byte stream and a page stream each
                      └─► region list                   what early boot must not touch

Nothing is copied to be preserved: a page stream names frames (only those in banned memory are
relocated). Nothing is visible before it is whole: a node is written first and published by one 8-byte
store. Reading a node does not consume it. Nothing is trusted: every page of metadata is under a
checksum, every pointer has a check, and the frames in the streams must agree with the node's page table.

Promised upward: `Store` saves, loads, lists and withdraws nodes, and a crash at any store leaves the
old state or the new one. Assumed from below: frames that read as zeros, a lock for the node list,
claims on names, 8-byte stores that are not torn.

In reading order: format, page, superblock; parallel, relocate, saveframes, frameset; streams/ (link,
scattered, linkwriter, bytewriter, pagewriter, writer; linkreader, runs, reader); table/ (reader,
writer); node, save, renaming, store; rescue; regions; check, which reads everything and trusts nothing.

Two modules, and no other, declare what crosses a kexec in RAM: format, the records of PKRAM; and
treeformat, the byte stream in which a file tree is saved. They are one contract, printed as
pkramfs-format(5).

Kernel: mm/pkram.c, mm/pkram_pagetable.c, include/linux/pkram.h
"""
