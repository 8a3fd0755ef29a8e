# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramfs: a tmpfs whose file tree survives a kexec.

The chapters, in reading order; imports only point to what stands above in this list:

    units errors text stdio      counting, errors, escaped text, standard output
    spans record schema          sets of ranges, binary records, checked JSON
    mounting/                    mount options, mount(2), the mount table, starting daemons
    machine/                     a machine's directory: RAM, firmware map, memblock, leases, frames, locks
    pkram/                       what survives a kexec: super block, nodes, objects, streams, page tables
    kernel/                      a kernel loads, dies and boots the next: image, placement, kexec, incoming nodes
    fs/                          a tmpfs whose pages are frames of RAM; saved to a node and restored
    fuse/                        the kernel's requests, read and answered (the only importer of pyfuse3)
    control/                     the control socket of a mount daemon, both ends
    archive/                     preserved trees without a mount
    library                      arrays and bytes that a program preserves, for `from pkramfs.library import …`
    daemon                       one mount: composes all of the above
    cli/                         mount.pkramfs, pkram-kexec, pkramctl
    __main__                     dispatches to a command, or to the daemon
"""

__version__ = "0.1.0"
