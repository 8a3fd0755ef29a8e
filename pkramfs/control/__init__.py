# SPDX-License-Identifier: GPL-2.0-or-later
"""How commands talk to a mount daemon, and what the daemon does for them.

    mount.pkramfs, pkram-kexec, pkramctl             the daemon of one mount
        client.call(socket, verb)  ── JSON line ──▶  server ──▶ keeper ──▶ tree, node
                                   ◀── JSON line ──

The daemon owns the state of its tree, whatever the kernel's ro flag says:

    live ── preserve ──▶ preserved, frozen ── unpreserve ──▶ live
                              │   ▲
              umount, kexec,  │   │ freeze / thaw
              mount again     ▼   │
                         preserved, writable ── first change ──▶ live

*Preserved* means that a published node holds this very tree. *Frozen* means that every change is
EROFS. A restored tree is preserved though writable: its first change withdraws the node.

Verbs: status, preserve, unpreserve (remount,rw), freeze, thaw (back to where freeze found it),
stop. Each is one connection, one line there and one line back; only root and the owner of the daemon
are heard. What is asked twice is done once: a second preserve waits for the first and agrees.

In reading order: protocol, client (blocking, standard library), server (trio), keeper.

Kernel: /sys/kernel/pkram is one file; FUSE's own control file system is /sys/fs/fuse/connections
"""
