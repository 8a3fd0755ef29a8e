# SPDX-License-Identifier: GPL-2.0-or-later
"""io and meta: against a kernel tmpfs and the floor of FUSE on the same machine, turn by turn.

The floor (floor.py) is a file system of pyfuse3 that only keeps names and bytes, served as ours is: what it
does not reach, nothing behind this door does. The bytes themselves have a floor, too: one plain copy.
"""

import contextlib
import functools
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.mounts import Lab, lab
from benchmarks.table import FLOOR, Table, seconds

MIB = 1 << 20
_CHUNK = os.urandom(MIB)

Work = Callable[[Path], float]


class Bench:
    """A section's three directories, and its rows."""

    def __init__(self, table: Table, section: str, place: Lab) -> None:
        self.table, self.section = table, section
        self.directories = place.mount(section), place.reference(), place.floor()

    def compare(
        self, name: str, unit: str, work: Work, target: str = "", prepare: Callable[[Path], None] | None = None
    ) -> None:
        """`work(directory)` gives a rate, higher is better; `prepare` goes before it, outside of the clock."""
        values: tuple[list[float], ...] = ([], [], [])
        for _ in range(self.table.runs):
            for directory, rates in zip(self.directories, values, strict=True):
                if prepare is not None:
                    prepare(directory)
                rates.append(work(directory))
        ours, theirs, floor = values
        words = {"reference": theirs, "reference_name": "tmpfs", "floor": floor}
        self.table.add(self.section, name, ours, unit, target=target, **words)  # type: ignore[arg-type]

    def beside_tmpfs(self, name: str, size: int, work: Work, target: str) -> None:
        """A rate of MiB/s, without the floor, which has no request for it."""
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(self.table.runs):
            for directory, rates in zip(self.directories, (ours, theirs), strict=False):
                rates.append(work(directory))
        name = f"{name} of {size // MIB} MiB"
        self.table.add(self.section, name, ours, "MiB/s", target=target, reference=theirs, reference_name="tmpfs")


def io(table: Table) -> None:
    """Sequential, random and mapped I/O."""
    size = (32 if table.quick else 512) * MIB
    _copies(table, size)
    with lab() as place:
        bench = Bench(table, "io", place)
        bench.compare("sequential write, first touch", "MiB/s", lambda d: _write_new(d, size), f">0.5x or {FLOOR}")
        bench.compare("sequential write, again", "MiB/s", lambda d: _write_again(d, size), f">0.7x or {FLOOR}")
        bench.compare("sequential read, first", "MiB/s", lambda d: _read_cold(d, size), f">0.6x or {FLOOR}")
        bench.compare("sequential read, again", "MiB/s", lambda d: _read(d, size), f">0.95x or {FLOOR}")
        bench.compare("mmap read, again", "MiB/s", lambda d: _map(d, size))
        count = 2000 if table.quick else 50_000
        for verb, write, target in (("writes", True, ">0.45x"), ("reads", False, ">0.9x")):
            work = functools.partial(_random, size=size, operations=count, write=write)
            bench.compare(f"4 KiB random {verb}, cached", "/s", work, f"{target} or {FLOOR}")
        bench.compare("4 KiB write and fsync", "/s", lambda d: _fsync(d, count // 50))
        bench.compare("8 clients, sequential write", "MiB/s", lambda d: _clients(d, size // 8))
        bench.beside_tmpfs("fallocate", size, lambda d: _allocate(d, size), ">0.67x")
        bench.beside_tmpfs("copy_file_range", size, lambda d: _copy(d, size), ">0.83x")


def _copies(table: Table, size: int) -> None:
    """What a copy costs here without any file system: the floor of everything that moves bytes."""
    with mmap.mmap(-1, size) as memory, memoryview(memory) as view:
        touches, copies = [], []
        for _ in range(table.runs):
            memory.madvise(mmap.MADV_DONTNEED)
            touches.append(_rate(size, seconds(lambda: _fill(view))))
            copies.append(_rate(size, seconds(lambda: _fill(view))))
        table.add("io", "a bare memcpy, first touch", touches, "MiB/s")
        table.add("io", "a bare memcpy, again", copies, "MiB/s")


def _fill(view: memoryview) -> None:
    for at in range(0, len(view), MIB):
        view[at : at + MIB] = _CHUNK


def _rate(size: int, spent: float) -> float:
    return size / MIB / spent


def _stream(path: Path, size: int, flags: int) -> float:
    fd = os.open(path, flags, 0o644)

    def write() -> None:
        for _ in range(size // MIB):
            os.write(fd, _CHUNK)
        os.close(fd)

    return _rate(size, seconds(write))


def _write_new(directory: Path, size: int) -> float:
    (directory / "file").unlink(missing_ok=True)
    return _stream(directory / "file", size, os.O_CREAT | os.O_WRONLY)


def _write_again(directory: Path, size: int) -> float:
    return _stream(directory / "file", size, os.O_WRONLY)


def _read_cold(directory: Path, size: int) -> float:
    """Drop what the kernel has cached of this file first (tmpfs has nothing to drop)."""
    fd = os.open(directory / "file", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return _read(directory, size)


def _read(directory: Path, size: int) -> float:
    buffer = bytearray(MIB)
    with open(directory / "file", "rb", buffering=0) as file:
        return _rate(size, seconds(lambda: [file.readinto(buffer) for _ in range(size // MIB)]))


def _map(directory: Path, size: int) -> float:
    with open(directory / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        return _rate(size, seconds(lambda: [mapped[at] for at in range(0, size, 4096)]))


def _random(directory: Path, size: int, operations: int, *, write: bool) -> float:
    rng, page = random.Random(1), os.urandom(4096)
    places = [rng.randrange(size // 4096) * 4096 for _ in range(operations)]
    fd = os.open(directory / "file", os.O_RDWR)
    try:
        if write:
            return operations / seconds(lambda: [os.pwrite(fd, page, at) for at in places])
        return operations / seconds(lambda: [os.pread(fd, 4096, at) for at in places])
    finally:
        os.close(fd)


def _fsync(directory: Path, operations: int) -> float:
    fd, page = os.open(directory / "synced", os.O_CREAT | os.O_RDWR), os.urandom(4096)

    def work() -> None:
        for at in range(operations):
            os.pwrite(fd, page, at * 4096)
            os.fsync(fd)

    try:
        return operations / seconds(work)
    finally:
        os.close(fd)


def _allocate(directory: Path, size: int) -> float:
    fd = os.open(directory / "allocated", os.O_CREAT | os.O_RDWR)
    try:
        return _rate(size, seconds(lambda: os.posix_fallocate(fd, 0, size)))
    finally:
        os.close(fd)
        os.unlink(directory / "allocated")


def _copy(directory: Path, size: int) -> float:
    """Copy the file of the rows before by copy_file_range(2), until it is written."""
    source, target = os.open(directory / "file", os.O_RDONLY), os.open(directory / "copy", os.O_CREAT | os.O_RDWR)

    def work() -> None:
        done = 0
        while done < size:
            done += os.copy_file_range(source, target, size - done, done, done)
        os.fsync(target)

    try:
        return _rate(size, seconds(work))
    finally:
        os.close(source)
        os.close(target)
        os.unlink(directory / "copy")


def _clients(directory: Path, size: int) -> float:
    paths = [directory / f"client{number}" for number in range(8)]
    for path in paths:
        path.unlink(missing_ok=True)
    threads = [threading.Thread(target=_stream, args=(p, size, os.O_CREAT | os.O_WRONLY)) for p in paths]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _rate(8 * size, seconds(run))


def meta(table: Table) -> None:
    """Names: create, open, stat, rename, unlink, mkdir, list."""
    count = 1000 if table.quick else 10_000
    with lab() as place:
        bench = Bench(table, "meta", place)
        for name, work, target in (
            ("create+close", lambda d: _each(d, count, _create), f">15000 /s or {FLOOR}"),
            ("open+close", lambda d: _each(d, count, lambda p: os.close(os.open(p, os.O_RDONLY))), ""),
            ("stat, cached", lambda d: _each(d, count, os.stat), f">0.8x or {FLOOR}"),
            ("rename", lambda d: _rename(d, count), ""),
            ("unlink", lambda d: _each(d, count, os.unlink), f">25000 /s or {FLOOR}"),
            ("mkdir", lambda d: _each(d, count, lambda p: os.mkdir(p + ".d")), ""),
            ("rmdir", lambda d: _each(d, count, lambda p: os.rmdir(p + ".d")), ""),
        ):
            # each run needs what the runs before left: files are made and removed outside of the clock
            bench.compare(name, "/s", work, target, lambda d: _prepare(d, name, count))  # noqa: B023
        entries = 2000 if table.quick else 100_000
        for directory in bench.directories:
            for number in range(entries):
                os.close(os.open(directory / f"entry{number}", os.O_CREAT | os.O_WRONLY))
        bench.compare(f"list {entries:,} entries", "/s", lambda d: entries / seconds(lambda: os.listdir(d)))
        _list_long(bench, min(entries, 20_000))


def _list_long(bench: Bench, count: int) -> None:
    """`ls -l`, first of what the kernel has forgotten (root can have it forget), then again."""
    for directory in bench.directories:
        (directory / "long").mkdir()
        _each(directory / "long", count, _create)

    def work(directory: Path) -> float:
        words = ["ls", "-l", str(directory / "long")]
        return count / seconds(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL))

    if os.geteuid() == 0:
        bench.compare(f"ls -l of {count:,} files, first", "/s", work, ">33000 /s", _forget)
    bench.compare(f"ls -l of {count:,} files, again", "/s", work)


def _forget(_: Path) -> None:
    """Have the kernel drop every name and inode that nobody uses."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("2")


def _paths(directory: Path, count: int) -> list[str]:
    return [f"{directory}/file{number}" for number in range(count)]


def _prepare(directory: Path, name: str, count: int) -> None:
    for path in _paths(directory, count):
        exists, folder = os.path.exists(path), os.path.exists(path + ".d")
        if exists and name == "create+close":
            os.unlink(path)
        elif not exists and name != "create+close":
            _create(path)
        if name == "rmdir" and not folder:
            os.mkdir(path + ".d")
        elif name == "mkdir" and folder:
            os.rmdir(path + ".d")


def _create(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _each(directory: Path, count: int, work: Callable[[str], object]) -> float:
    paths = _paths(directory, count)
    return count / seconds(lambda: [work(path) for path in paths])


def _rename(directory: Path, count: int) -> float:
    paths = _paths(directory, count)
    rate = count / seconds(lambda: [os.rename(path, path + ".new") for path in paths])
    for path in paths:
        os.rename(path + ".new", path)
    return rate
