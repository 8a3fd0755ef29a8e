"""io and meta: against a kernel tmpfs on the same machine, turn by turn."""

import mmap
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.mounts import lab
from benchmarks.table import Table, seconds

MIB = 1 << 20
_CHUNK = os.urandom(MIB)

Work = Callable[[Path], float]


def _compare(
    table: Table, section: str, name: str, unit: str, work: Work, ours: Path, theirs: Path, target: str
) -> None:
    """`work(directory)` gives a rate; higher is better."""
    values, references = [], []
    for _ in range(table.runs):
        values.append(work(ours))
        references.append(work(theirs))
    table.add(section, name, values, unit, reference=references, reference_name="tmpfs", target=target)


def io(table: Table) -> None:
    """Sequential, random and mapped I/O."""
    size = (32 if table.quick else 512) * MIB
    with lab() as place:
        ours, theirs = place.mount("io"), place.reference()
        for name, work, target in (
            ("sequential write, first touch", lambda d: _write_new(d, size), ">0.5x"),
            ("sequential write, again", lambda d: _write_again(d, size), ">0.7x"),
            ("sequential read, first", lambda d: _read_cold(d, size), ">0.6x"),
            ("sequential read, again", lambda d: _read(d, size), ">0.95x"),
            ("mmap read, again", lambda d: _map(d, size), ""),
        ):
            _compare(table, "io", name, "MiB/s", work, ours, theirs, target)
        operations = 2000 if table.quick else 50_000
        for name, work, target in (
            ("4 KiB random writes, cached", lambda d: _random(d, size, operations, write=True), ">0.45x"),
            ("4 KiB random reads, cached", lambda d: _random(d, size, operations, write=False), ">0.9x"),
            ("4 KiB write and fsync", lambda d: _fsync(d, operations // 50), ""),
        ):
            _compare(table, "io", name, "/s", work, ours, theirs, target)
        for name, work in (("8 clients, sequential write", lambda d: _clients(d, size // 8)),):
            _compare(table, "io", name, "MiB/s", work, ours, theirs, "")


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
        ours, theirs = place.mount("meta"), place.reference()
        for name, work, target in (
            ("create+close", lambda d: _each(d, count, _create), ">15000 /s"),
            ("open+close", lambda d: _each(d, count, lambda p: os.close(os.open(p, os.O_RDONLY))), ""),
            ("stat, cached", lambda d: _each(d, count, os.stat), ">0.8x"),
            ("rename", lambda d: _rename(d, count), ""),
            ("unlink", lambda d: _each(d, count, os.unlink), ">25000 /s"),
            ("mkdir", lambda d: _each(d, count, lambda p: os.mkdir(p + ".d")), ""),
            ("rmdir", lambda d: _each(d, count, lambda p: os.rmdir(p + ".d")), ""),
        ):
            _meta(table, name, count, work, ours, theirs, target)
        entries = 2000 if table.quick else 100_000
        for directory in (ours, theirs):
            for number in range(entries):
                os.close(os.open(directory / f"entry{number}", os.O_CREAT | os.O_WRONLY))
        _compare(
            table,
            "meta",
            f"list {entries:,} entries",
            "/s",
            lambda d: entries / seconds(lambda: os.listdir(d)),
            ours,
            theirs,
            "",
        )


def _meta(table: Table, name: str, count: int, work: Work, ours: Path, theirs: Path, target: str) -> None:
    """Each run needs what the runs before left: files are made and removed outside of the clock."""
    values, references = [], []
    for _ in range(table.runs):
        for directory, rates in ((ours, values), (theirs, references)):
            _prepare(directory, name, count)
            rates.append(work(directory))
    table.add("meta", name, values, "/s", reference=references, reference_name="tmpfs", target=target)


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
