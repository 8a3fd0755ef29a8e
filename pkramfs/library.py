# SPDX-License-Identifier: GPL-2.0-or-later
"""Preserve arrays and bytes of a program under a name, without a mount; map them after a kexec where they lie.

    with open_machine() as machine:              boots it if need be; no kexec in here
        found = machine.load("primes")           None: nothing of that name crossed
        if found is None:
            machine.save("primes", {"table": table}, state=b"…")
        table = found["table"]                   a read-only array over RAM, without a copy

An array's pages are frames of RAM. They stay where they are over every kexec as long as the node is preserved, so an
array that was loaded stays valid after the block, too. Below this are the parts from which mounts are made, and which
a program with memory of its own can use itself: pkramfs-library(3).

    byte stream   a line of JSON {"arrays": [{"name", "dtype", "shape", "pages"}, …]}, then the program's own bytes
    page stream   the arrays, each from a page on

Counterparts: numpy.memmap and the .npy format; a memfd in a KHO/LUO session, which keeps bytes alone
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from pkramfs import schema
from pkramfs.archive.claiming import claimed
from pkramfs.archive.view import SavedTree, open_tree
from pkramfs.errors import PkramError
from pkramfs.kernel import running
from pkramfs.kernel.running import Running
from pkramfs.machine.directory import Machine
from pkramfs.machine.frames import Frames, Run
from pkramfs.machine.ram import Ram
from pkramfs.mounting.names import mount_name, node_name
from pkramfs.pkram.node import shown
from pkramfs.units import PAGE_SHIFT, pages

Arrays = npt.NDArray[Any]
_ENTRY = schema.Object(
    {"name": schema.Text(), "dtype": schema.Anything(), "shape": schema.ListOf(schema.Whole()), "pages": schema.Whole()}
)
_HEADER = schema.Object({"arrays": schema.ListOf(_ENTRY)}, others=schema.Anything())


@contextmanager
def open_machine(name: str | None = None) -> Iterator[OpenMachine]:
    """Give a machine (default: `default`), made and booted if need be; no kexec happens while the block lasts."""
    with running.shared(Machine.locate(name)) as kernel:
        yield OpenMachine(kernel)


class Saved(Mapping[str, Arrays]):
    """Saved data: arrays by name, and `state`, the program's own bytes."""

    def __init__(self, ram: Ram, state: bytes, entries: list[dict[str, Any]], runs: list[Run]) -> None:
        self.state = state
        self._ram, self._entries, self._runs = ram, {entry["name"]: entry for entry in entries}, runs
        ends = np.cumsum([entry["pages"] for entry in entries], dtype=np.int64).tolist()
        self._first = {entry["name"]: end - entry["pages"] for entry, end in zip(entries, ends, strict=True)}
        if ends and ends[-1] > sum(count for _, count in runs):
            raise PkramError("the node has fewer pages than its arrays", errno.EINVAL)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Arrays:
        """Return an array: over RAM where its pages are neighbours, else a copy. It cannot be written to."""
        entry = self._entries[name]
        dtype, shape = _read(entry["dtype"]), tuple(entry["shape"])
        size = math.prod(shape) * dtype.itemsize
        if size > entry["pages"] << PAGE_SHIFT:
            raise PkramError(f"array {name} has fewer pages than it needs", errno.EINVAL)
        parts = self.parts(name)
        whole = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        return np.frombuffer(whole[:size], dtype=dtype).reshape(shape)

    def parts(self, name: str) -> list[memoryview]:
        """Return an array's pages as they lie in RAM, read-only: one part, unless other nodes are in between."""
        first, left = self._first[name], int(self._entries[name]["pages"])
        found: list[Run] = []
        for start, count in self._runs:
            begin = min(first, count)
            taken = min(count - begin, left)
            first, left = first - begin, left - taken
            if taken and found and sum(found[-1]) == start + begin:
                found[-1] = (found[-1][0], found[-1][1] + taken)
            elif taken:
                found.append((start + begin, taken))
        return [self._ram.page(*run).toreadonly() for run in found] or [memoryview(b"")]


class OpenMachine:
    """A machine with a running kernel. Names of nodes are text; those of mounts begin with shmem-."""

    def __init__(self, kernel: Running) -> None:
        self.kernel = kernel

    def nodes(self) -> list[str]:
        """Return the names of all preserved nodes."""
        return [shown(node.name) for node in self.kernel.store.nodes()]

    def save(self, name: str, arrays: Mapping[str, Arrays], state: bytes = b"") -> None:
        """Copy arrays into RAM and preserve them with the program's own bytes; all of it, or PkramError and nothing.

        EEXIST if there is such a node, EINVAL for arrays of Python objects and for names of mounts, ENOMEM or
        ExhaustedError without room.
        """
        key = _key(name)
        if objects := [one for one, array in arrays.items() if array.dtype.hasobject]:
            raise PkramError(f"array {objects[0]} has Python objects, which mean nothing elsewhere", errno.EINVAL)
        with claimed(self.kernel, key, "save") as frames:
            placed = [_place(self.kernel.ram, frames, array) for array in arrays.values()]
            entries = [
                {"name": one, "dtype": _written(array.dtype), "shape": array.shape, "pages": pages(array.nbytes)}
                for one, array in arrays.items()
            ]
            runs = np.array([run for part in placed for run in part], dtype=np.uint64).reshape(-1, 2)
            banned = self.kernel.banned()
            with self.kernel.store.prepare_save(key, tree_id=frames.tree_id, frames=frames, banned=banned) as saving:
                with saving.object() as memory:
                    memory.write(json.dumps({"arrays": entries}).encode() + b"\n" + state)
                    memory.save_runs(np.cumsum(runs[:, 1]) - runs[:, 1], runs[:, 0], runs[:, 1])
                saving.finish()

    def load(self, name: str) -> Saved | None:
        """Return the saved data of a name, checked; None if there are none. The node stays preserved."""
        key = _key(name)
        if self.kernel.store.find(key) is None:
            return None
        with self.kernel.store.prepare_load(key) as loading:
            memory = next(iter(loading))
            head, _, state = bytes(memory.read()).partition(b"\n")
            index, start, count = memory.load_runs()
        try:
            entries = _HEADER.read(json.loads(head))["arrays"]
        except (ValueError, schema.Invalid):
            raise PkramError(f"node {name} was not saved by this module", errno.EINVAL) from None
        order = np.argsort(index)
        return Saved(
            self.kernel.ram, state, entries, list(zip(start[order].tolist(), count[order].tolist(), strict=True))
        )

    def drop(self, name: str) -> None:
        """Give the memory of a node back; ENOENT if there is none. Arrays that were loaded from it are void then."""
        self.kernel.store.withdraw(_key(name))
        self.kernel.sweep()

    def tree(self, name: str) -> SavedTree:
        """Return the preserved tree of a mount, to be read: `find`, `attributes`, `children`, `data`."""
        return open_tree(self.kernel.store, node_name(name))


def _key(name: str) -> bytes:
    """Return the name of a program's node; PkramError for none, and for those of mounts."""
    key = os.fsencode(name)
    if not key or mount_name(key) is not None:
        raise PkramError(f"invalid name {name!r}: 1 to 255 bytes, not beginning with shmem-", errno.EINVAL)
    return key


def _place(ram: Ram, frames: Frames, array: Arrays) -> list[Run]:
    """Copy an array into new frames, and return them."""
    data, done = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
    runs = frames.allocate(pages(array.nbytes))
    for start, count in runs:
        ram.back_run(start, count)
        part = data[done : done + (count << PAGE_SHIFT)]
        ram.page(start, count)[: len(part)] = part
        done += len(part)
    return runs


def _written(dtype: np.dtype[Any]) -> Any:
    """Return a dtype as JSON data."""
    return np.lib.format.dtype_to_descr(dtype)


def _read(written: Any) -> np.dtype[Any]:
    """Return the dtype that was written; fields became lists."""

    def fields(descr: Any) -> Any:
        if not isinstance(descr, list):
            return descr
        return [(one[0], fields(one[1]), *(tuple(shape) for shape in one[2:])) for one in descr]

    return np.lib.format.descr_to_dtype(fields(written))
