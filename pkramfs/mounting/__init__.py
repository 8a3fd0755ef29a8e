# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting: the meaning of `-o`, the mount table, and the system calls that change it.

    mount.pkramfs ──▶ options, mountpoints ──▶ starting ──▶ the daemon ──▶ syscalls ──▶ mount(2)
                          │                                 (fuse/session)
                          └──▶ patience ──▶ a child asks, where an answer may never come
    /proc/self/mountinfo ──▶ syscalls.Table ──▶ binds            which mount lies on which, and bind mounts

The mount helper, the commands and the daemon all need this, and none of it needs a tree or a machine. So it
stands below all of them and imports only the standard library and modules as light (units, errors,
schema): a command that needs nothing else starts as fast as Python does.

* Only a child process asks a question that a daemon would have to answer, because the daemon may be stopped or dead.
  The mount table answers most questions without a daemon.
* A path is only a hint. Every change acts on a descriptor, after a check of the file that the descriptor holds.
* Words that mount(8) or the kernel adds to the options are ignored; an unknown word is an error.

In reading order: helper (conventions of mount(8)), options (the words), names (NAMEs and nodes), syscalls
(mount(2), umount2(2) and the mount table), patience (bounded waiting), mountpoints (the directory), starting
(daemons), binds (bind mounts).

Kernel: fs/namespace.c, fs/fs_context.c, mm/shmem.c (shmem_fs_parameters)
"""
