# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes behind a mount: the only place that builds everything.

    mount.pkramfs ──starts──▶ daemon
                                │  claim: a NAME has one tree, and a tree one daemon
                                │         ├─ a node has the NAME          restore
                                │         ├─ a dead daemon had the NAME   recover
                                │         └─ neither                      a new tree
                                ▼
                              mount: build, serve, take down

No chapter below knows both the machine and FUSE; above are only the commands, which talk to a daemon
through its socket. A daemon answers the kernel only after the change is in RAM, so that its death loses nothing.

Reading order: job, leash, holding, mountlog, tasks, claim, notices, shadow, summing, crossing, standby, mount, serving,
code, holder, forking.

Kernel: fs/super.c (get_tree_nodev), mm/shmem.c (shmem_fill_super, shmem_put_super)
"""
