# SPDX-License-Identifier: GPL-2.0-or-later
"""A node copied, and a node renamed.

    copy      streams as they are, pages copied into frames of a new tree id: the two share nothing
    rename    one store (pkram/renaming); refused while a mount uses the tree

Any node can be copied, those that programs have saved as well, for an object is a stream of bytes and a stream of
pages whatever it means. The original may be mounted; see standing for what happens if it is changed meanwhile.
"""

import errno
from collections.abc import Generator

import numpy as np

from pkramfs.archive.claiming import claimed, named, settle
from pkramfs.archive.standing import Standing
from pkramfs.errors import MachineError, PkramError
from pkramfs.fs.nodes import objects
from pkramfs.fs.picture import Progress
from pkramfs.kernel.running import Running
from pkramfs.machine.frames import Frames, Run
from pkramfs.machine.ram import Ram
from pkramfs.pkram.node import Node, shown
from pkramfs.pkram.streams.runs import Runs
from pkramfs.pkram.streams.writer import ObjectWriter
from pkramfs.units import PAGE_SHIFT

_SLICE = 1 << 14
"""Runs that are copied before their copies are named."""
_PIECE = 2048
"""Pages that are copied at once: 8 MiB."""


def copy(kernel: Running, source: bytes, target: bytes) -> Generator[Progress, None, Node]:
    """Copy a node under another name and publish the copy by one store."""
    with kernel.store.prepare_load(source) as load:
        node, found = load.node, objects(kernel.store, load)
    standing, ram = Standing(kernel.ram, node), kernel.ram
    total, done = sum(int(runs[2].sum()) for _, runs in found) << PAGE_SHIFT, 0
    with (
        claimed(kernel, target, "cp") as frames,
        kernel.store.prepare_save(
            target, tree_id=frames.tree_id, frames=frames, banned=kernel.banned(), strict=node.strict
        ) as saving,
    ):
        for stream, runs in found:
            with saving.object() as writer:
                writer.write(stream)
                for pages in _copied(ram, frames, runs, writer):
                    standing.expect()
                    done += pages << PAGE_SHIFT
                    yield Progress("copy", done, total)
        standing.expect()
        return saving.finish()


def _copied(ram: Ram, frames: Frames, runs: Runs, writer: ObjectWriter) -> Generator[int, None, None]:
    """Copy the frames of runs and name the copies; yield how many pages were copied, now and then."""
    for low in range(0, len(runs[0]), _SLICE):
        part = np.stack([column[low : low + _SLICE] for column in runs], axis=1).tolist()
        named = list[tuple[int, int, int]]()
        supply = frames.allocate(sum(count for _, _, count in part))[::-1]
        for index, pfn, count in part:
            while count:
                start, room = supply.pop()
                size = min(count, room, _PIECE)
                if size < room:
                    supply.append((start + size, room - size))
                _copy(ram, (pfn, size), start)
                named.append((index, start, size))
                index, pfn, count = index + size, pfn + size, count - size
                yield size
        writer.save_runs(*np.array(named, dtype=np.uint64).reshape(-1, 3).T)


def _copy(ram: Ram, run: Run, target: int) -> None:
    """Copy those pages of a run for which the host has memory; the others are zeros, as fresh frames are."""
    pfn, count = run
    for start, end in ram.data_spans(pfn, pfn + count):
        ram.copy(start, target + start - pfn, end - start)


def rename(kernel: Running, name: bytes, new: bytes) -> Node:
    """Give a node another name; PkramError (EBUSY) if a mount uses it."""
    with named(kernel, new):
        node = kernel.store.find(name)
        if node is None:
            raise PkramError(f"no node {shown(name)} is preserved", errno.ENOENT)
        if node.tree_id in kernel.machine.outlived_ids():
            raise PkramError(f"the daemon of {shown(name)} has died: mount and unmount it first", errno.EBUSY)
        try:
            lock = kernel.machine.claim(node.tree_id)
        except MachineError:
            raise PkramError(f"{shown(name)} is in use by a mount: umount it first", errno.EBUSY) from None
        try:
            frames = Frames(kernel.ram, kernel.leases, node.tree_id)
            frames.adopt(kernel.store.pages_of_tree(node.tree_id))
            try:
                return kernel.store.rename(name, new, frames, kernel.banned())
            finally:
                settle(kernel, frames)
        finally:
            lock.release()
