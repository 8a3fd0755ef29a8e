# SPDX-License-Identifier: GPL-2.0-or-later
"""Make a tree from a node of preserved memory: all of it, or nothing and a reason.

    load ──▶ verify ──▶ within limits? ──▶ build the root ──▶ adopt the frames
    store    every       size=, nr_inodes=   all else sleeps     the first moment at which
             rule        with the figures                        anything is changed

A node has the tree in two objects (unpack), or names a log that holds it (sealing): then the checkpoint that the log
begins with is unpacked, and brought up to date as after the death of a daemon (recover). The log continues under this
kernel; files that the dead daemon had open are closed, and inodes without a name are freed.

Nothing has changed before the last step: any failure leaves the node as it was, published, to be tried again with
other options. After it the node stays too: the tree is *preserved* until its first change (see preservation). Inode
numbers, hard links, holes, times and places in listings are those of the tree that was saved.

Long work: a generator that yields Progress and returns the tree.

Kernel: mm/shmem_pkram.c (shmem_load_pkram), patches 23-24 and 36-41
"""

from __future__ import annotations

import os
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

from pkramfs.fs.picture import Progress
from pkramfs.fs.recover import close_all, go_on, rebuild_sealed
from pkramfs.fs.tree import Tree
from pkramfs.fs.unpack import unpack
from pkramfs.journal.log import Log
from pkramfs.mounting.names import mount_name
from pkramfs.units import BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.fs.limits import Limits
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.store import Load, Store


def restore(
    store: Store, node_name: bytes, ram: Ram, frames: Frames, limits: Limits
) -> Generator[Progress, None, Tree]:
    """Restore the tree that node `node_name` holds; `frames` must have the node's tree id."""
    yield Progress("load", 0, 1)
    with store.prepare_load(node_name) as load:
        if load.node.log_pfn:
            return (yield from _from_log(store, load, ram, frames, limits))
        yield Progress("verify", 0, 1)
        tree = Tree(ram, frames, limits)
        found = unpack(load, tree, frames.leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES))
    yield Progress("adopt", 0, 1)
    frames.adopt(found.data | found.metadata)
    tree.preservation.restore(partial(store.withdraw, node_name), found.metadata)
    return tree


def _from_log(store: Store, load: Load, ram: Ram, frames: Frames, limits: Limits) -> Generator[Progress, None, Tree]:
    """Restore the tree of a log that was sealed, and go on with both."""
    node, own = load.node, load.own_pages()
    allowed = load.frames & frames.leases.blocks_of(frames.tree_id).scale(BLOCK_PAGES)
    rebuilt = yield from rebuild_sealed(store, node, Tree(ram, frames, limits), allowed)
    name = os.fsencode(mount_name(node.name) or "")
    reopened = partial(Log.reopen, ram, frames, name, store.generation(), rebuilt.log)
    tree = yield from go_on(rebuilt, reopened, own)
    # Before `preserve`: the users of open files are gone, and so are the losses that the preserve has accepted.
    tree.losses.forget()
    close_all(tree)
    tree.preservation.restore(partial(store.withdraw, node.name), own)
    return tree
