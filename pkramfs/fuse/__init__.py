# SPDX-License-Identifier: GPL-2.0-or-later
"""The door: how requests of the kernel's FUSE reach the tree in RAM.

    program ── write(2) ──▶ VFS ── /dev/fuse ──▶ filter ──▶ operations ──▶ fs.Tree ──▶ RAM
                             │                     │             │
                      page cache, names,     reads, answers;     turns requests into calls,
                      attributes: endless    or else pyfuse3     OSError into an errno

The door makes no decisions: `fs` knows the answers of tmpfs. This chapter handles only the peculiarities
of FUSE:

* The daemon alone changes the tree, and every change comes through the kernel, so the kernel's caches stay
  valid: attributes, names and absent names are cached without end, pages over open and close.
* The writeback cache is on. Dirty pages live in the kernel until it sends them; it owns size and
  mtime of open files. RELEASE is sent only after all writes of that handle, so when the tree counts
  no writers, all data have arrived. `preserve` relies on this.
* A handle is an inode number with a few bits for how the file was opened (fs/rules.py): there is no table to
  lose when a daemon is replaced.
* Every exception of a handler becomes an errno. Any other exception would end pyfuse3's loop, and with it the mount.
* The filter reads and answers requests in front of pyfuse3. pyfuse3 still owns the session, and its path uses
  the same handlers.
* As root the daemon opens /dev/fuse and calls mount(2) itself, so that another process could hold the
  descriptor instead; a user's mount goes through fusermount3.

In reading order: translate (attributes), doors (orders that FUSE has no request for), net (turns exceptions into
errnos), memory (refuses requests without memory), operations (one method for each request), wire, replies and requests
(the same in the kernel's bytes), counters (requests by kind), filter (read, answer), turns (which task is next), flags
(which accesses are noted), handshake (INIT), session (mount, serve, detach).

Kernel: fs/fuse/, include/uapi/linux/fuse.h
"""
