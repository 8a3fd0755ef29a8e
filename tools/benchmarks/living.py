# SPDX-License-Identifier: GPL-2.0-or-later
"""live: what it costs that a tree outlives its daemon, and how long programs wait when one dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.mounts import BIN, Lab, command, lab
from benchmarks.table import Table, milliseconds
from pkramfs.daemon.standby import NAME
from pkramfs.fs.inode import ROOT
from pkramfs.fs.limits import Limits
from pkramfs.fs.picture import complete
from pkramfs.fs.recover import begin, rebuild
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.sealing import preserve
from pkramfs.fs.tree import Tree
from pkramfs.kernel.running import Running, attach
from pkramfs.machine import process
from pkramfs.machine.directory import Machine
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.machine.mounts import MountEntry

_BATCH = 100
_IMPORTS = "import pkramfs.cli.remount, pkramfs.control.commands, pkramfs.machine.directory"


def live(table: Table) -> None:
    """The log's share of each operation, replay, preserving, takeovers, upgrade, and the holder's memory."""
    with lab() as place:
        _operations(table, place)
        _preserves(table, place)
    for files in (200,) if table.quick else (1_000, 100_000):
        with lab() as place:
            _deaths(table, place, files)
    with lab() as place:
        _standby(table, place, 2_000 if table.quick else 1_000_000)
    files, requests = (2_000, 640) if table.quick else (1_000_000, 64_000)
    for spread in (False, True):
        with lab() as place:
            _recovery(table, place, files, requests, spread=spread)
    with lab() as place:
        _commands(table, place)
    with lab() as place:
        _kept(table, place)
    _many(table)


def _operations(table: Table, place: Lab) -> None:
    """The processor time of a tree's operations with a log and without: the least of many short batches, in turn."""
    kernel = attach(Machine(str(place.machine)))
    count = 500 if table.quick else 5_000
    rounds = [[_least(kernel, count, with_log=with_log) for with_log in (False, True)] for _ in range(table.runs)]
    plain, logged = (_best([found for found, _ in column]) for column in zip(*rounds, strict=True))
    for name, micros in logged.items():
        added = [micros - plain[name]]
        table.add(
            "live", f"added to {name}", added, "us", target="<3 us", note=f"on {plain[name]:.1f} us without a log"
        )
    records, requests, spent = min((replayed for _, (_, replayed) in rounds), key=lambda one: one[2])
    note = f"{requests / spent:,.0f} requests/s, each told by a record or more"
    table.add("live", "replay", [records / spent], "records/s", target=">300000 records/s", note=note)


def _best(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(found[name] for found in rounds) for name in rounds[0]}


def _least(kernel: Running, count: int, *, with_log: bool) -> tuple[dict[str, float], tuple[int, int, float]]:
    """Return the microseconds of each operation, and records, requests and seconds of a replay."""
    frames = Frames(kernel.ram, kernel.leases, new_tree_id())
    tree = Tree(kernel.ram, frames, Limits())
    if with_log:
        begin(tree, b"bench", kernel.generation)
    found: dict[str, float] = {}
    for name, work, items in _workload(tree, count):
        found[name] = _timed(tree, work, items)
    replayed = (0, 0, 1.0)
    if tree.journal is not None:
        began = time.thread_time()
        done = complete(rebuild(kernel.store, tree.journal.log.live, kernel.ram, frames, Limits()))
        replayed = done.replay.records, done.replay.requests, time.thread_time() - began
    frames.release_all()
    return found, replayed


def _workload(tree: Tree, count: int) -> Iterator[tuple[str, Callable[[Any], Any], list[Any]]]:
    names, data, handles = [b"file%08d" % number for number in range(count)], memoryview(bytes(4096)), list[int]()

    def create(name: bytes) -> None:
        inode = tree.create(1, name, 0o644)
        tree.remember(inode)
        handles.append(tree.open_inode(inode, os.O_RDWR, ROOT))

    yield "create and open", create, names
    yield "a write of a new page", lambda handle: tree.write(handle, 0, data, stamp=False), handles
    yield "an overwrite of a page", lambda handle: tree.write(handle, 0, data, stamp=False), handles
    yield "a read of a page", lambda handle: tree.read(handle, 0, 4096), handles
    yield "open to read and release", lambda handle: tree.release(tree.open(handle)), handles
    yield "times", lambda handle: tree.set_times(handle, None, handle, handle), handles
    yield "release", tree.release, handles
    yield "rename", lambda name: tree.rename(1, name, 1, b"x" + name), names
    yield "unlink", lambda name: tree.unlink(1, b"x" + name), names


def _timed(tree: Tree, work: Callable[[Any], Any], items: list[Any]) -> float:
    best = float("inf")
    for low in range(0, len(items), _BATCH):
        some = items[low : low + _BATCH]
        began = time.thread_time_ns()
        for item in some:
            work(item)
            tree.commit(1)
        best = min(best, (time.thread_time_ns() - began) / len(some) / 1000)
    return best


def _preserves(table: Table, place: Lab) -> None:
    """How long a daemon takes to preserve trees of all shapes by their logs."""
    kernel, few, many = attach(Machine(str(place.machine))), 1_000, 10_000 if table.quick else 100_000
    shapes: list[tuple[str, int, int]] = [
        ("an empty tree", 0, 1),
        (f"{few:,} files", few, 1),
        (f"{many:,} files", many, 1),
        (f"{many:,} files, every other deleted", many, 2),
    ]
    for shape, files, step in shapes:
        frames = Frames(kernel.ram, kernel.leases, new_tree_id())
        tree = Tree(kernel.ram, frames, Limits())
        begin(tree, b"bench", kernel.generation)
        _fill(tree, files, step)
        runs = table.repeat("preserve", partial(_preserved, tree, kernel))
        table.add("live", f"preserve, daemon side: {shape}", runs, "ms", target="<10 ms")
        frames.release_all()


def _fill(tree: Tree, files: int, step: int) -> None:
    """Make files of one page, and delete all but each `step`-th."""
    data = memoryview(bytes(4096))
    for number in range(files):
        tree.write(tree.create(1, b"%d" % number, 0o644).ino, 0, data, stamp=False)
        tree.commit(1)
    for number in range(files):
        if number % step:
            tree.unlink(1, b"%d" % number)
            tree.commit(1)


def _preserved(tree: Tree, kernel: Running) -> float:
    """Preserve a tree and take it back; return the milliseconds of the first."""
    tree.freeze()
    took = milliseconds(lambda: complete(preserve(tree, kernel.store, b"shmem-bench")))
    tree.preservation.withdraw()
    tree.thaw()
    return took


def _entry(place: Lab) -> MountEntry:
    return next(entry for entry in Machine(str(place.machine)).mounts() if entry.alive)


def _deaths(table: Table, place: Lab, files: int) -> None:
    """How long a request waits whose daemon has just been killed."""
    path = place.mount("files")
    for number in range(files):
        os.close(os.open(path / f"{number}", os.O_CREAT | os.O_WRONLY))
    runs = iter(range(1_000_000))

    def once() -> float:
        before = _entry(place)
        os.kill(before.pid, signal.SIGKILL)
        waited = milliseconds(lambda: (path / f"new{next(runs)}").touch())
        with _settled(place, before):
            return waited

    target = {1_000: "<300 ms", 100_000: "<1000 ms"}.get(files, "")
    table.add("live", f"pause after SIGKILL, {files:,} files", table.repeat("kill", once), "ms", target=target)


def _standby(table: Table, place: Lab, files: int) -> None:
    """The same with a standby, whose tree is far too large to be recovered in that time."""
    _save_files(attach(Machine(str(place.machine))), files)
    path = place.mount("files", ",standby")
    runs = iter(range(1_000_000))

    def once() -> float:
        before = _entry(place)
        _wait(lambda: _stands_by(before))
        (path / f"before{next(runs)}").touch()
        os.kill(before.pid, signal.SIGKILL)
        waited = milliseconds(lambda: (path / f"new{next(runs)}").touch())
        with _settled(place, before):
            return waited

    paused = table.repeat("kill, with a standby", once)
    table.add("live", f"pause after SIGKILL, {files:,} files, standby", paused, "ms", target="<500 ms")


def _save_files(kernel: Running, files: int) -> None:
    """Preserve a tree of empty files, a thousand in each directory."""
    tree = Tree(kernel.ram, Frames(kernel.ram, kernel.leases, new_tree_id()), Limits())
    for number in range(files):
        if number % 1000 == 0:
            folder = tree.mkdir(1, b"d%d" % number, 0o755).ino
        tree.create(folder, b"%d" % number, 0o644)
    tree.freeze()
    complete(save(tree, kernel.store, b"shmem-files"))


def _recovery(table: Table, place: Lab, files: int, requests: int, *, spread: bool) -> None:
    """Add the processor time to restore a tree, and to recover it with files made since, `spread` over directories."""
    kernel = attach(Machine(str(place.machine)))
    _save_files(kernel, files)
    node = kernel.store.find(b"shmem-files")
    assert node is not None

    def restored() -> Tree:
        frames = Frames(kernel.ram, kernel.leases, node.tree_id)
        return complete(restore(kernel.store, b"shmem-files", kernel.ram, frames, Limits()))

    if not spread:
        table.add("live", f"restore of {files:,} files", _seconds(table, restored), "ms", target="<600 ms")
    tree = restored()
    begin(tree, b"files", kernel.generation, node.pfn)
    assert tree.journal is not None
    live = tree.journal.log.live
    folders = [inode.ino for _, inode, _ in tree.readdir(1, 2)] if spread else [tree.mkdir(1, b"new", 0o755).ino]
    for number in range(requests):
        tree.create(folders[number % len(folders)], b"n%d" % number, 0o644)
        tree.commit(1)

    def recovered() -> Any:
        frames = Frames(kernel.ram, kernel.leases, node.tree_id)
        return complete(rebuild(kernel.store, live, kernel.ram, frames, Limits()))

    where, target = ("all directories", "<1500 ms") if spread else ("one directory", "")
    name = f"recovery of {files:,} files behind {requests:,} requests in {where}"
    table.add("live", name, _seconds(table, recovered), "ms", target=target)


def _seconds(table: Table, work: Callable[[], object]) -> list[float]:
    """Return the milliseconds of processor time of each run."""

    def once() -> float:
        began = time.thread_time()
        work()
        return 1000 * (time.thread_time() - began)

    return [once() for _ in range(table.runs)]


def _stands_by(entry: MountEntry) -> bool:
    return any(Path(f"/proc/{pid}/comm").read_text() == f"{NAME}\n" for pid in process.children(entry.holder))


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("tools/bench: what was waited for does not come")
        time.sleep(0.01)


@contextmanager
def _settled(place: Lab, before: MountEntry) -> Iterator[None]:
    """Wait until another daemon has written its entry."""
    yield
    deadline = time.monotonic() + 30
    while _entry(place).pid == before.pid:
        if time.monotonic() > deadline:
            raise SystemExit("tools/bench: no daemon takes over")
        time.sleep(0.01)


def _commands(table: Table, place: Lab) -> None:
    path = place.mount("one")
    (path / "file").write_bytes(bytes(1 << 20))
    upgrades, pauses = zip(*(_upgraded(path) for _ in range(table.runs)), strict=True)
    table.add("live", "pkramctl upgrade, until a request returns", list(pauses), "ms", target="<700 ms")
    table.add("live", "pkramctl upgrade, whole command", list(upgrades), "ms")

    def preserve() -> float:
        took = milliseconds(lambda: place.preserve(path))
        command("mount.pkramfs", "none", path, "-o", "remount,rw")
        (path / "file").write_bytes(bytes(1 << 20))
        return took

    python = table.repeat("python", lambda: milliseconds(lambda: command(sys.executable, "-c", _IMPORTS)))
    table.add(
        "live", "remount,preserve,ro, whole command", table.repeat("preserve", preserve), "ms", reference=python,
        reference_name="a Python start with our imports", target="<1.2x",
    )  # fmt: skip
    holder = _entry(place).holder
    text = Path(f"/proc/{holder}/smaps_rollup").read_text()
    private = sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))
    table.add("live", "private memory of a holder", [private / 1024], "MiB", target="<8 MiB")


def _upgraded(path: Path) -> tuple[float, float]:
    """Replace a daemon; return the milliseconds of the command, and the longest that a request took meanwhile."""
    began = before = time.monotonic()
    longest = 0.0
    with subprocess.Popen([str(BIN / "pkramctl"), "upgrade", str(path)], stdout=subprocess.DEVNULL) as upgrade:
        while upgrade.poll() is None:
            os.utime(path / "file")
            now = time.monotonic()
            longest, before = max(longest, now - before), now
    if upgrade.returncode:
        raise SystemExit("tools/bench: pkramctl upgrade failed")
    return 1000 * (before - began), 1000 * longest


def _kept(table: Table, place: Lab) -> None:
    """How long who reads an open file waits for a kexec that keeps the mount."""
    path = place.mount("one")
    (path / "file").write_bytes(bytes(1 << 20))
    file = os.open(path / "file", os.O_RDONLY)

    def once() -> float:
        place.load()
        words = [str(BIN / "pkram-kexec"), "-e", "--keep-mounts"]
        longest, before = 0.0, time.monotonic()
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as kexec:
            while kexec.poll() is None:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.pread(file, 4096, 0)
                now = time.monotonic()
                longest, before = max(longest, now - before), now
        if kexec.returncode:
            raise SystemExit("tools/bench: pkram-kexec -e --keep-mounts failed")
        return 1000 * longest

    figures = table.repeat("keep", once)
    os.close(file)
    table.add("live", "-e --keep-mounts, until the next read returns", figures, "ms", target="<700 ms")


def _many(table: Table) -> None:
    """How long a kexec takes until all of many mounts serve, beside that of one."""
    times = {}
    for number in (1, 3 if table.quick else 30):
        with lab() as place:
            paths = [place.mount(f"mount{each}") for each in range(number)]

            def once(place: Lab = place, paths: list[Path] = paths) -> float:
                for path in paths:
                    place.preserve(path)
                place.load()
                return milliseconds(lambda: command("pkram-kexec", "-e"))

            times[number] = table.repeat(f"kexec of {number}", once)
    one, many = times.values()
    name = f"-e of {max(times)} mounts, until all serve"
    table.add("live", name, many, "ms", reference=one, reference_name="one mount", target="<3x")
