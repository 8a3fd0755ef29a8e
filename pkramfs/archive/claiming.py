# SPDX-License-Identifier: GPL-2.0-or-later
"""A node that is being made without a mount: its name and its tree id are claimed as a mount claims them.

    lock.names ─▶ the NAME is free ─▶ new tree id, its lock, its entry ─▶ frames … a save publishes
                                                                        └─▶ or all of it is given back

The entry in mounts/ keeps a mount from taking the NAME meanwhile, and names the work, so that it does not count as a
mount. A command that dies leaves the same as a dead daemon: page blocks without a lock holder, which the next sweep
frees.

Kernel: fs/super.c (sget_fc)
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pkramfs.errors import PkramError
from pkramfs.kernel.running import Running
from pkramfs.machine import locks
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.mounting.names import mount_name
from pkramfs.pkram.format import NAME_MAX
from pkramfs.pkram.node import shown
from pkramfs.units import BLOCK_PAGES


@contextmanager
def named(kernel: Running, name: bytes) -> Iterator[None]:
    """Reserve a node's name for a moment; raise PkramError (EEXIST, EBUSY) if it is taken."""
    if len(name) > NAME_MAX:
        raise PkramError(f"node name of {len(name)} bytes is too long: at most {NAME_MAX}", errno.ENAMETOOLONG)
    machine = kernel.machine
    with locks.held(machine.path("lock.names"), what=f"taking a name on the machine {machine.path()}"):
        if kernel.store.find(name) is not None:
            raise PkramError(f"node {shown(name)} exists already: free it, or take another name", errno.EEXIST)
        wanted = mount_name(name)
        entries = [entry for entry in machine.mounts() if wanted is not None and entry.name == wanted]
        if any(entry.outlived and kernel.leases.blocks_of(entry.tree_id) for entry in entries):
            raise PkramError(
                f"the daemon of {wanted} has died and left its tree: mount {wanted}, free it, or take another name",
                errno.EBUSY,
            )
        if holder := next((entry for entry in entries if entry.alive), None):
            raise PkramError(
                f"{wanted} is in use by {holder.mountpoint} (pid {holder.pid}): umount it, or take another name",
                errno.EBUSY,
            )
        yield


@contextmanager
def claimed(kernel: Running, name: bytes, work: str) -> Iterator[Frames]:
    """Yield the frames of a new tree; they are freed unless a node of this name was published in the block."""
    with named(kernel, name):
        lock = kernel.machine.claim(new_tree_id())
        lock.write_entry({"name": mount_name(name), "mountpoint": f"pkramctl {work}", "pid": os.getpid(), "work": work})
    frames = Frames(kernel.ram, kernel.leases, lock.tree_id)
    try:
        kernel.sweep()
        yield frames
    finally:
        try:
            settle(kernel, frames)
        finally:
            lock.release()


def settle(kernel: Running, frames: Frames) -> None:
    """Give those page blocks back in which no node of the tree has a page."""
    pages = kernel.store.pages_of_tree(frames.tree_id)
    unused = kernel.leases.blocks_of(frames.tree_id) - pages.outward(BLOCK_PAGES)
    if unused:
        kernel.leases.release(frames.tree_id, unused)
