# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands and mount daemons: how they talk, and how a daemon keeps the state of its tree.

    mount.pkramfs, pkram-kexec, pkramctl             the daemon of one mount
        commands ──▶ client        ── JSON line ──▶  server ──▶ keeper ──▶ tree, node
        replies  ◀── client        ◀── JSON line ──  server ◀── keeper

The daemon owns the state of its tree, whatever the kernel's ro flag says:

    live ── preserve ──▶ preserved, frozen ── unpreserve ──▶ live
                              │   ▲
              umount, kexec,  │   │ freeze / thaw
              mount again     ▼   │
                         preserved, writable ── first change ──▶ live

*Preserved* means that a published node holds this very tree. *Frozen* means that every change is
EROFS. A restored tree is preserved and yet writable: its first change withdraws the node.

Verbs: status, foresee, preserve, unpreserve (remount,rw), freeze, thaw (back to where freeze found it),
reconfigure (remount,size=), stop. Each is one connection with one request line and one reply line; the
daemon answers only root and its own user. A verb that is given twice is done once: a second preserve waits for
the first and gives the same reply.

In reading order: protocol (lines), replies (their content, declared for both ends), client and commands
(blocking, standard library), server (trio), keeper, settings.

Kernel: /sys/kernel/pkram is one file; FUSE's own control file system is /sys/fs/fuse/connections
"""
