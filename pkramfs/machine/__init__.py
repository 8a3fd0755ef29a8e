# SPDX-License-Identifier: GPL-2.0-or-later
"""Chapter 1, the hardware and its allocators.

A machine is a directory. Its memory is one sparse file, `ram`, whose offset is the physical
address; its firmware map says which addresses are memory. Everything that outlives a
process lies in that file, at a pfn, and is reached through an array view of it.

    power-on        early boot              after boot                   in a mount daemon
    firmware  ───►  memblock        ───►    leases (2 MiB blocks)  ───►  frames (4 KiB pages)
    what is RAM     what is reserved        owner of each block          pages of one owner

Three allocators, because three users must not trust one another: early boot may not touch what the
last kernel preserved, mounts must not touch each other, and a mount that dies must leave nothing
behind. A page block belongs to one owner, named by a tree id that is never used twice; only
its owner allocates inside a block, so no page ever needs a lock.

Promised upward: a frame that was just allocated reads as zeros; a change becomes visible to other
processes through one 8-byte store (`Ram.publish`) or under the table lock; memory is refused, as
ENOSPC, before the host behind it is full. Assumed from below: a file that can be mapped shared, on a
file system that can punch holes (otherwise pages are zeroed).

The memory of a machine may lie elsewhere, where it outlives the host's own kernel (backing). Then it has a header in
page 0, from which the directory is made again.

In reading order: cgroups, ram, firmware, memblock, policy, leases, frames; host, backing, mapped, header, conf, named;
locks, files, claims, mounts, directory; process.

Kernel: mm/memblock.c, mm/page_alloc.c, arch/x86/kernel/e820.c
"""
