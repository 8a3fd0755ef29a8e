# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramfs: a tmpfs whose file tree survives a kexec.

The chapters, in reading order; imports only point to what stands above in this list:

    units errors record spans    the words used everywhere,
    stdio text schema            output, text for people, JSON
    mounting/                    mount options, mount(2), the mount table, bind mounts
    machine/                     RAM, firmware map, memblock, leases, frames
    pkram/                       what survives: super block, nodes, objects, streams
    kernel/                      one kernel dies, the next is born: image, kaslr, kexec, boot
    fs/                          a tmpfs whose pages are physical
    fuse/                        the kernel's door (the only importer of pyfuse3)
    control/                     talking to a running mount daemon
    daemon                       one mount: the place that builds everything
    cli/                         mount.pkramfs, pkram-kexec, pkramctl
"""

__version__ = "0.1.0"
