# SPDX-License-Identifier: GPL-2.0-or-later
"""sums: what checksums of data cost (verify=data): to make and compare them, and those who are served meanwhile."""

import mmap
import os
import random
import time
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.core import NAME, core, exhaust
from benchmarks.living import _timed, _workload
from benchmarks.mounts import Lab, lab
from benchmarks.table import Table, milliseconds
from pkramfs.fs.limits import Limits
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.recover import begin as begin_log
from pkramfs.fs.save import save
from pkramfs.fs.summing import Summing, begin
from pkramfs.fs.sums import Sums
from pkramfs.fs.sumtable import SOUND, Rows
from pkramfs.fs.tree import Tree
from pkramfs.kernel.running import attach
from pkramfs.machine.directory import Machine
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.units import GIB, MIB


def sums(table: Table) -> None:
    """Making and comparing beside reading and XXH3 alone, the share of an operation and of a save, and serving."""
    with lab() as place:
        _speed(table, place)
        _operations(table, place)
    _saving(table)
    with lab() as place:
        _serving(table, place)


def _tree(place: Lab) -> Tree:
    kernel = attach(Machine(str(place.machine)))
    tree = Tree(kernel.ram, Frames(kernel.ram, kernel.leases, new_tree_id()), Limits())
    begin_log(tree, b"bench", kernel.generation)
    return tree


def _summing(tree: Tree) -> Summing:
    tree.sums = tree.sums or Sums(tree)
    begin(tree, tree.sums)
    return Summing(tree, tree.sums)


def _rest(work: Summing) -> None:
    work.sums.table.turn()
    while work.step():
        pass


def _speed(table: Table, place: Lab) -> None:
    """One thread over one large file, and over many small ones."""
    size, files = (32, 500) if table.quick else (512, 10_000)
    tree = _tree(place)
    ino, block = tree.create(1, b"large", 0o644).ino, memoryview(random.Random(1).randbytes(MIB))
    for at in range(size):
        tree.write(ino, at << 20, block)
    tree.commit()
    (_, pfn, _), *_ = tree.inode(ino).pages or ()
    room = memoryview(bytearray(MIB))

    def alone() -> float:
        began = time.perf_counter()
        for at in range(size):
            tree.ram.read(pfn + at * 256, room)
            xxhash.xxh3_64_intdigest(room)
        return size / (time.perf_counter() - began)

    def made() -> float:
        tree.forget_sums()
        work, began = _summing(tree), time.perf_counter()
        _rest(work)
        return size / (time.perf_counter() - began)

    def compared() -> float:
        work = _summing(tree)
        work.sums.table.doubt()
        began = time.perf_counter()
        _rest(work)
        return size / (time.perf_counter() - began)

    floor = table.repeat("sums", alone)
    for name, once in (("make", made), ("compare", compared)):
        values = table.repeat("sums", once)
        told = {"reference": floor, "reference_name": "reading and XXH3 alone", "target": ">0.8x"}
        table.add("sums", f"{name} the sums of {size} MiB, one thread", values, "MiB/s", **told)  # type: ignore[arg-type]
    tree.unlink(1, b"large")
    tree.forget(ino)
    for number in range(files):
        tree.write(tree.create(1, b"%d" % number, 0o644).ino, 0, block[:4096])
        tree.commit()
    work, began = _summing(tree), time.perf_counter()
    _rest(work)
    table.add("sums", f"make the sums of {files:,} files of 4 KiB", [files / (time.perf_counter() - began)], "files/s")
    tree.frames.release_all()


def _operations(table: Table, place: Lab) -> None:
    """What is added to the processor time of an operation: the least of many short batches."""
    count, plain = 500 if table.quick else 5_000, dict[str, float]()
    for summed in (False, True):
        tree = _tree(place)
        if summed:
            _summing(tree)
        for name, work, items in _workload(tree, count):
            micros = _timed(tree, work, items)
            if not summed:
                plain[name] = micros
            elif "write" in name or name == "unlink":
                note = f"on {plain[name]:.1f} us without sums"
                table.add("sums", f"added to {name}", [micros - plain[name]], "us", target="<5 us", note=note)
        tree.frames.release_all()


def _saving(table: Table) -> None:
    """A save of one file with a sum for each MiB."""
    size = (4 if table.quick else 100) * GIB
    with core(size + 16 * GIB) as machine:
        tree = Tree(machine.ram, machine.frames, Limits(0, 0))
        inode = tree.create(tree.root.ino, b"file", 0o644)
        runs = [(start, count) for start, count in machine.frames.allocate(size >> 12)]
        counts = np.array([count for _, count in runs])
        columns = np.stack((np.cumsum(counts) - counts, [start for start, _ in runs], counts), axis=1).astype(np.int64)
        inode.pages, inode.size = PageMap(columns.tobytes(), size >> 12), size

        def once() -> float:
            tree.freeze()
            took = milliseconds(lambda: exhaust(save(tree, machine.store, NAME)))
            tree.thaw()
            tree.preservation.withdraw()
            return took

        without = table.repeat("sums", once)
        pieces = np.arange(size // MIB, dtype=np.uint64)
        tree.sums = Sums(tree)
        rows = Rows(np.full(len(pieces), inode.ino, dtype=np.uint64), pieces, pieces)
        tree.sums.table.load(rows, np.full(len(pieces), SOUND, dtype=np.uint8))
        told = {"reference": without, "reference_name": "without sums"}
        table.add("sums", f"save {size // GIB} GiB in one file", table.repeat("sums", once), "ms", **told)  # type: ignore[arg-type]


def _serving(table: Table, place: Lab) -> None:
    """Programs on two mounts, one of which makes sums of what was just written."""
    size = 16 if table.quick else 256
    paths = {name: place.mount(name, options) for name, options in (("plain", ""), ("summed", ",verify=data"))}
    block = random.Random(1).randbytes(MIB)

    def written(path: Path) -> float:
        began = time.perf_counter()
        with open(path / "file", "wb", buffering=0) as file:
            file.writelines(block for _ in range(size))
            os.fsync(file.fileno())
        return size / (time.perf_counter() - began)

    def read(path: Path) -> float:
        """Scattered reads past the page cache, while what was written is summed."""
        chance, room, count = random.Random(1), mmap.mmap(-1, 4096), 500 if table.quick else 20_000
        file = os.open(path / "file", os.O_RDONLY | os.O_DIRECT)
        began = time.perf_counter()
        for _ in range(count):
            os.preadv(file, [room], chance.randrange(size * 256) << 12)
        took = time.perf_counter() - began
        os.close(file)
        return count / took

    for name, once, unit in (("write", written, "MiB/s"), ("read 4 KiB, O_DIRECT,", read, "/s")):
        found: dict[str, list[float]] = {"plain": [], "summed": []}
        for number in range(table.runs):
            for kind in sorted(paths, reverse=bool(number % 2)):
                found[kind].append(once(paths[kind]))
        table.add(
            "sums", f"{name} with verify=data", found["summed"], unit,
            reference=found["plain"], reference_name="without", target=">0.85x",
        )  # fmt: skip
