# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting: what `-o` means, what is mounted where, and the system calls that change it.

    mount.pkramfs ──▶ options ──▶ syscalls ──▶ mount(2)          the daemon, as root
                                  patience ──▶ a child asks      where an answer may never come
    /proc/self/mountinfo ──▶ syscalls.Table ──▶ binds            what lies on what, and what is a part of what

The mount helper, the commands and the daemon all need this, and none of it needs a tree or a machine. So it
stands below all of them and imports only the standard library and the prelude: a command that has nothing
else to do starts in the time that Python takes.

* Nobody here asks a file system a question that its daemon would have to answer, unless somebody else can wait
  for it: the daemon may be stopped, dead, or be ourselves.
* A path is a proposal. What is done is done to a descriptor, after a look at what the descriptor holds.
* Options that a word of mount(8) or of the kernel brings along are known and ignored; any other is an error.

In reading order: options (the words), syscalls (mount(2), umount2(2) and the mount table), patience (bounded
waiting), binds (bind mounts).

Kernel: fs/namespace.c, fs/fs_context.c, mm/shmem.c (shmem_fs_parameters)
"""
