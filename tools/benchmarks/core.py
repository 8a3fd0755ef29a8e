# SPDX-License-Identifier: GPL-2.0-or-later
"""rfc and scale: saving and loading huge trees, on sparse RAM, below FUSE.

Frames are allocated and recorded, their contents never touched, so that 100 GiB fit a small machine.
The reference for metadata is the best way known to bring as many bytes into a hole of the RAM file:
pwrite, from a buffer that is warm. Where a target is beyond what the machine does, the floor is the least that any
save or load has to do, each part of it done by itself in the best way known:

    save    read its columns once, mark every frame that it names, checksum its pages, write them into a hole
    load    have the kernel map its pages, read and checksum them, mark every frame that they name
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from typing import TypeVar

import numpy as np
import xxhash

from benchmarks.table import FLOOR, Table, milliseconds
from pkramfs.fs.limits import Limits
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save as save_tree
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.machine.ram import Ram
from pkramfs.pkram import parallel, superblock
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, GIB, PAGE_SIZE, format_size

T = TypeVar("T")
TREE, SUPER_PFN, NAME = 0xBE4C4, 1, b"shmem-bench"
BEST_WRITE, MARKED, READ = 8 << 20, 1 << 15, 1 << 17


class Unchecked(Ram):
    """RAM larger than the host: frames are recorded here, not touched."""

    def check_room(self, size: int, *, floor: float = 1.0) -> None:
        pass


class Core:
    """A machine without a kernel: RAM, leases, one owner, a store."""

    def __init__(self, directory: str, size: int) -> None:
        self.ram = Unchecked(os.path.join(directory, "ram"), size, create=True)
        blocks = size // PAGE_SIZE // BLOCK_PAGES
        self.leases = Leases(self.ram, 2, blocks, contextlib.nullcontext)
        table = -(-(blocks * 8) // PAGE_SIZE) + 2
        self.leases.ids[: -(-table // BLOCK_PAGES)] = KERNEL
        superblock.create(self.ram, SUPER_PFN, generation=1)
        self.store = Store(self.ram, SUPER_PFN, contextlib.nullcontext)
        self.frames = Frames(self.ram, self.leases, TREE)

    def withdraw(self) -> int:
        """Take the node out and free its metadata; how many pages those were."""
        metadata = self.store.metadata_pages(NAME)
        self.store.withdraw(NAME)
        self.frames.free(metadata.starts, metadata.counts)
        return metadata.total

    def first_touch(self, pages: int) -> float:
        """Milliseconds to write as many bytes into a hole of the RAM file, in the best way known."""
        (start, count) = self.frames.allocate(pages)[0]
        buffer = memoryview(bytes(BEST_WRITE))
        end = (start + min(count, pages)) * PAGE_SIZE

        def write() -> None:
            at = start * PAGE_SIZE
            while at < end:
                at += os.pwrite(self.ram.fd, buffer[: end - at], at)

        spent = milliseconds(write)
        self.frames.free([start], [count])
        return spent

    def read_again(self, pages: int) -> float:
        """Milliseconds to have as many pages mapped, read and checksummed, one after the other."""
        (start, count) = self.frames.allocate(pages)[0]
        self.ram.write(start, memoryview(bytes(count * PAGE_SIZE)))
        again = Ram(self.ram.path, self.ram.size)
        digest = xxhash.xxh3_64_intdigest

        def read() -> None:
            memory, begin = again.bytes, start * PAGE_SIZE
            for at in range(begin, begin + count * PAGE_SIZE, PAGE_SIZE):
                digest(memory[at : at + PAGE_SIZE], at)

        spent = milliseconds(read)
        again.close()
        self.frames.free([start], [count])
        return spent


def checksummed(pages: int) -> float:
    """Milliseconds to checksum as many pages that are in the cache, one by one."""
    page, digest = memoryview(bytes(PAGE_SIZE)), xxhash.xxh3_64_intdigest

    def sums() -> None:
        for number in range(pages):
            digest(page, number)

    return milliseconds(sums)


def looked_at(runs: "Runs") -> float:
    """Milliseconds to read the columns that marking does not read, index and count, once on all CPUs."""

    def look(number: int) -> None:
        for column in (runs[0], runs[2]):
            np.bitwise_or.reduce(column[number * READ : (number + 1) * READ])

    return milliseconds(lambda: parallel.each(look, -(-len(runs[0]) // READ)))


def marked(machine: Core, runs: "Runs") -> float:
    """Milliseconds to set a byte for every frame of single pages, on all CPUs; 0 where runs are longer."""
    if len(runs[0]) != int(runs[2].sum()):
        return 0.0
    where, bits = runs[1].view(np.int64), np.zeros(machine.ram.pages, dtype=bool)

    def mark(number: int) -> None:
        bits[where[number * MARKED : (number + 1) * MARKED]] = True

    return milliseconds(lambda: parallel.each(mark, -(-len(where) // MARKED)))


@contextlib.contextmanager
def core(size: int) -> Iterator[Core]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        made = Core(directory, size)
        try:
            yield made
        finally:
            made.ram.close()


Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


def contiguous(machine: Core, size: int) -> Runs:
    runs = np.array(machine.frames.allocate(size // PAGE_SIZE, order=9), dtype=np.uint64)
    return np.cumsum(runs[:, 1]) - runs[:, 1], runs[:, 0], runs[:, 1]


def _rows(*columns: np.ndarray) -> Iterator[tuple[int, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)


def scattered(machine: Core, size: int) -> Runs:
    """Every page somewhere else: no two neighbours of the file are neighbours in memory."""
    _, pfn, count = contiguous(machine, size)
    pages = np.concatenate([np.arange(p, p + n, dtype=np.uint64) for p, n in _rows(pfn, count)])
    np.random.default_rng(0).shuffle(pages)
    return np.arange(len(pages), dtype=np.uint64), pages, np.ones_like(pages)


def huge(machine: Core, size: int) -> Runs:
    """One entry for each 2 MiB: what huge=always has."""
    _, pfn, count = contiguous(machine, size)
    starts = np.concatenate([np.arange(p, p + n, BLOCK_PAGES, dtype=np.uint64) for p, n in _rows(pfn, count)])
    return np.arange(len(starts), dtype=np.uint64) * np.uint64(BLOCK_PAGES), starts, np.full_like(starts, BLOCK_PAGES)


def save(machine: Core, runs: Runs, *, strict: bool = False, blocks: bool = False) -> None:
    with machine.store.prepare_save(NAME, tree_id=TREE, frames=machine.frames, strict=strict) as saving:
        with saving.object() as writer:
            if blocks:
                writer.save_pages(runs[0], runs[1], np.full(len(runs[0]), 9, dtype=np.uint8))
            else:
                writer.save_runs(*runs)
        saving.finish()


def load(machine: Core) -> None:
    with machine.store.prepare_load(NAME) as loading:
        for reader in loading:
            reader.load_runs()


ANNOUNCED = {
    "huge=never, runs": "announced 232/516 ms on 16 CPUs, 2265/8833 plain",
    "huge=never, an entry per page": "announced 232/516 ms on 16 CPUs, 2265/8833 plain",
    "huge=always": "announced 22/105 ms on 16 CPUs, 58/752 plain",
    "every page somewhere else": "",
}


class Times:
    """Milliseconds of saves and loads of one case, and of what they are compared with, run after run."""

    def __init__(self) -> None:
        self.saves: list[float] = []
        self.loads: list[float] = []
        self.touches: list[float] = []
        self.least_saves: list[float] = []
        self.least_loads: list[float] = []

    def run(self, machine: Core, runs: Runs, **words: bool) -> None:
        """One save and load, and their references."""
        self.saves.append(milliseconds(lambda: save(machine, runs, **words)))
        self.loads.append(milliseconds(lambda: load(machine)))
        pages, marks = machine.withdraw(), marked(machine, runs)
        self.touches.append(machine.first_touch(pages))
        self.least_saves.append(looked_at(runs) + marks + checksummed(pages) + self.touches[-1])
        self.least_loads.append(machine.read_again(pages) + marks)


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """All threads of this process on one CPU, so that there is one worker."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def rfc(table: Table) -> None:
    """The announcement's table: one file of 100 GiB, on all CPUs and on one.

    One round goes before those that count: the host may have to find memory for what is touched first, at several
    times the price, and only the save would pay it, for its references come after it and use the same memory again.
    """
    size = (4 if table.quick else 100) * GIB
    cases = (
        ("huge=never, runs", contiguous, {}, "<5 ms", "<5 ms"),
        ("huge=always", huge, {"blocks": True}, "<3 ms", "<3 ms"),
        ("huge=never, an entry per page", contiguous, {"strict": True}, "<1.3x", f"<40 ms or {FLOOR}"),
        ("every page somewhere else", scattered, {}, f"<1.5x or {FLOOR}", f"<300 ms or {FLOOR}"),
    )
    for name, make, words, save_target, load_target in cases:
        times, alone = Times(), Times()
        with core(size + 16 * GIB) as machine:
            runs = make(machine, size)
            Times().run(machine, runs, **words)
            for _ in range(table.runs):
                times.run(machine, runs, **words)
            with one_cpu():
                for _ in range(table.runs):
                    alone.run(machine, runs, **words)
        _add_case(table, f"{format_size(size)} {name}", times, save_target, load_target, ANNOUNCED[name])
        _add_case(table, f"{format_size(size)} {name}, one CPU", alone, "", "", "")


def _add_case(table: Table, title: str, times: Times, save_target: str, load_target: str, note: str) -> None:
    table.add(
        "rfc",
        f"save {title}",
        times.saves,
        "ms",
        reference=times.touches,
        reference_name="first touch",
        target=save_target,
        note=note,
        floor=times.least_saves if FLOOR in save_target else None,
    )
    least = times.least_loads if FLOOR in load_target else None
    table.add("rfc", f"load {title}", times.loads, "ms", target=load_target, floor=least)


def grown_tree(machine: Core, files: int) -> Tree:
    """A tree of small files, a thousand to a directory."""
    tree = Tree(machine.ram, machine.frames, Limits(0, 0))
    directory = tree.root
    for number in range(files):
        if number % 1000 == 0:
            directory = tree.mkdir(tree.root.ino, b"d%d" % number, 0o755)
        inode = tree.create(directory.ino, b"file%d" % number, 0o644)
        tree.write(inode.ino, 0, b"x")
    return tree


def exhaust(steps: Generator[object, None, T]) -> T:
    """The result of long work."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def scale(table: Table) -> None:
    """Cost per GiB and per file must not rise."""
    sizes = (1, 16, 128) if table.quick else (1, 16, 128, 1024, 16384)
    for gib in sizes:
        with core((gib + 16) * GIB) as machine:
            runs = huge(machine, gib * GIB)
            saves, loads = [], []
            for _ in range(table.runs):
                saves.append(milliseconds(lambda: save(machine, runs, blocks=True)))  # noqa: B023
                loads.append(milliseconds(lambda: load(machine)))
                machine.withdraw()
        table.add("scale", f"save {format_size(gib * GIB)}, an entry per 2 MiB", saves, "ms")
        table.add("scale", f"load {format_size(gib * GIB)}, an entry per 2 MiB", loads, "ms")
    for files in (1000, 10_000) if table.quick else (1000, 10_000, 100_000, 1_000_000):
        _scale_files(table, files)
    _scale_pieces(table, (4 if table.quick else 100) * GIB)


FILE_TARGETS = {100_000: ("<150 ms", "<300 ms"), 1_000_000: ("<1500 ms", "<3000 ms")}


def _scale_files(table: Table, files: int) -> None:
    """Save and load, and then what was put off until somebody asks: to make the inodes."""
    with core(64 * GIB) as machine:
        tree = grown_tree(machine, files)
        runs = min(table.runs, 3) if files > 100_000 else table.runs
        saves, loads, wakes = zip(*(_generation(machine, tree) for _ in range(runs)), strict=True)
    targets = FILE_TARGETS.get(files, ("", ""))
    table.add("scale", f"save {files:,} files", saves, "ms", target=targets[0])
    table.add("scale", f"load {files:,} files", loads, "ms", target=targets[1])
    table.add("scale", f"make the inodes of {files:,} files", wakes, "ms", note="when they are first asked for")


def _scale_pieces(table: Table, size: int) -> None:
    """A tree of one file of which every page lies somewhere else: what the last rows of `rfc` are for a user."""
    with core(size + 16 * GIB) as machine:
        tree = Tree(machine.ram, machine.frames, Limits(0, 0))
        inode = tree.create(tree.root.ino, b"file", 0o644)
        runs = np.stack(scattered(machine, size), axis=1)
        inode.pages, inode.size = PageMap(runs.tobytes(), len(runs)), size
        del runs
        saves, loads, wakes = zip(*(_generation(machine, tree) for _ in range(table.runs)), strict=True)
    name = f"a tree of {format_size(size)}, every page somewhere else"
    table.add("scale", f"save {name}", saves, "ms")
    table.add("scale", f"load {name}", loads, "ms")
    table.add("scale", f"make the inodes of {name}", wakes, "ms", note="when they are first asked for")


def _generation(machine: Core, tree: Tree) -> tuple[float, float, float]:
    """Milliseconds to save a tree, to load it, and to make all its inodes."""
    tree.freeze()
    saved = milliseconds(lambda: exhaust(save_tree(tree, machine.store, NAME)))
    heir = Frames(machine.ram, machine.leases, TREE)
    began = time.perf_counter()
    copy = exhaust(restore(machine.store, NAME, machine.ram, heir, Limits(0, 0)))
    loaded = (time.perf_counter() - began) * 1000
    woken = milliseconds(copy.wake)
    machine.withdraw()
    tree.thaw()
    return saved, loaded, woken


__all__ = ["Core", "Spans", "core", "rfc", "scale"]
