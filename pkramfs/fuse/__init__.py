# SPDX-License-Identifier: GPL-2.0-or-later
"""The door: how the kernel's FUSE and the tree in RAM meet.

    program ── write(2) ──▶ VFS ── /dev/fuse ──▶ filter ──▶ operations ──▶ fs.Tree ──▶ RAM
                             │                     │             │
                      page cache, names,     reads, answers;     turns requests into calls,
                      attributes: endless    or else pyfuse3     OSError into an errno

The door decides nothing. What tmpfs would answer is known in `fs`; here is only what FUSE makes
special:

* We alone change the tree and every change comes through the kernel, so what the kernel knows stays
  true: attributes, names and absent names are cached without end, pages over open and close.
* The writeback cache is on. Dirty pages live in the kernel until it sends them; it owns size and
  mtime of open files. RELEASE is sent only after all writes of that handle, so when the tree counts
  no writers, everything has arrived. `preserve` stands on this.
* A handle is an inode number (with a bit for writing): no table, nothing to lose when a daemon is
  replaced.
* Whatever a handler raises must end as an errno: any other exception ends pyfuse3's loop and with
  it the mount. Requests are read and answered in front of pyfuse3, whose session it stays: the handlers are the same.
* As root the daemon opens /dev/fuse and calls mount(2) itself, so that somebody else could hold
  the descriptor; a user's mount goes through fusermount3.

In reading order: translate (attributes), doors (orders that FUSE has no request for), net (below every handler),
operations (one method a request), wire, replies and requests (the same in the kernel's bytes), filter (read, answer),
turns (who is next), session (mount, serve, detach).

Kernel: fs/fuse/, include/uapi/linux/fuse.h
"""
