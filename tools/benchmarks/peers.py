# SPDX-License-Identifier: GPL-2.0-or-later
"""peers: what somebody would pick instead, libfuse's own examples in C and C++, on the same machine, turn by turn.

    passthrough_ll  over a kernel tmpfs, cache=always,writeback
    memfs_ll        a file system in memory; from libfuse 3.17 on

Each twice: as it is, when nobody checks who may do what, and `checked` (default_permissions), as our mounts are. That
is not the same work. After each change of a directory the kernel forgets its attributes, and where it checks it asks
for them before the next one; where it keeps written data (writeback) it sends the times after each rename and unlink.
The rows `requests for …` count what the kernel asks of each and waits for (requests.py).

They are built from the examples of the package libfuse3-dev, or from the directory that LIBFUSE_EXAMPLES names, the
`example` of libfuse's unpacked source. What cannot be built here is left out, and it is said why.

Metadata twice: on one processor (nobody is woken across processors: cost, with little spread), and free (latency).
Of the former also the processor time of each daemon, for all rows together.
"""

import contextlib
import ctypes
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.files import _create, _each, _fsync, _read_cold, _write_again, _write_new
from benchmarks.mounts import Lab, lab, served
from benchmarks.requests import requests_for_each
from benchmarks.table import Table, seconds

_EXAMPLES = Path(os.environ.get("LIBFUSE_EXAMPLES", "/usr/share/doc/libfuse3-dev/examples"))
_SOURCES = {"passthrough_ll": "passthrough_ll.c", "memfs_ll": "memfs_ll.cc"}
_CHECKED = " checked"
MIB = 1 << 20
_FORCE_SYNC, _BASIC = 0x2000, 0x7FF  # AT_STATX_SYNC_TYPE, STATX_BASIC_STATS
_libc = ctypes.CDLL(None, use_errno=True)
_answer = ctypes.create_string_buffer(256)

Work = Callable[[Path], float]


def peers(table: Table) -> None:
    """Metadata and streams beside libfuse's examples."""
    count, size = (300, 32 * MIB) if table.quick else (3000, 512 * MIB)
    with lab() as place, contextlib.ExitStack() as stack:
        others = dict(_mounted(place, stack))
        processors = os.sched_getaffinity(0)
        for label, some in (("one processor", {min(processors)}), ("free", processors)):
            os.sched_setaffinity(0, some)
            _pin(place, some)
            times = Times(place.directory / "peers", others)
            for name, work in _metadata(count, place.directory).items():
                _compare(table, place, others, f"{name}, {label}", "/s", times.around(work))
            if len(some) == 1:
                times.add(table)
        requests_for_each(table, place, {name: _words(place, name) for name in others})
        unchecked = {name: path for name, path in others.items() if not name.endswith(_CHECKED)}
        for name, work in _streams(size).items():
            _compare(table, place, unchecked, name, "MiB/s", work)


class Times:
    """The processor time that the daemons of some mounts have taken for what was done there."""

    def __init__(self, ours: Path, others: dict[str, Path]) -> None:
        self._ours, self._others = ours, others
        self._pids = {path: list(_daemons(path)) for path in (ours, *others.values())}
        self._spent: dict[Path, float] = dict.fromkeys(self._pids, 0.0)

    def around(self, work: Work) -> Work:
        """The same work, with its time noted."""

        def timed(directory: Path) -> float:
            before = self._now(directory)
            rate = work(directory)
            self._spent[directory] += self._now(directory) - before
            return rate

        return timed

    def _now(self, directory: Path) -> float:
        """Seconds so far: /proc has nanoseconds for each thread."""
        tasks = [task for pid in self._pids[directory] for task in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def add(self, table: Table) -> None:
        """A row for each peer."""
        for peer, directory in self._others.items():
            ours, theirs = [self._spent[self._ours]], [self._spent[directory]]
            name = "processor time of the daemon for all of these"
            table.add("peers", name, ours, "s", reference=theirs, reference_name=peer)


def _metadata(count: int, scratch: Path) -> dict[str, Work]:
    return {
        "create+close": lambda d: _each(_fresh(d), count, _create),
        "rename": lambda d: _each(
            _full(d, count), count, lambda path: os.rename(path, path.replace("/meta/", "/other/"))
        ),
        "unlink": lambda d: _each(_full(d, count), count, os.unlink),
        "mkdir": lambda d: _each(_fresh(d), count, os.mkdir),
        "write a file of 4 KiB": lambda d: _each(_fresh(d), count, _small),
        "4 KiB write and fsync": lambda d: _fsync(d, count),
        "stat, uncached": lambda d: _each(_full(d, count), count, _stat),
        "untar files of 3 KB": lambda d: _untar(_fresh(d), _archive(scratch, count), count),
    }


def _streams(size: int) -> dict[str, Work]:
    return {
        "sequential write, new": lambda d: _write_new(d, size),
        "sequential write, again": lambda d: _write_again(d, size),
        "sequential read, cold": lambda d: _read_cold(d, size),
    }


def _fresh(directory: Path) -> Path:
    """An empty directory there, and another one beside it."""
    for name in ("other", "meta"):
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / name).mkdir()
    return directory / "meta"


def _full(directory: Path, count: int) -> Path:
    """A directory with files to work on."""
    place = _fresh(directory)
    _each(place, count, _create)
    return place


def _small(path: str) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(fd, b"x" * 4096)
    os.close(fd)


def _stat(path: str) -> None:
    """statx(2) that asks the daemon, whatever the kernel has cached."""
    if _libc.statx(-100, os.fsencode(path), _FORCE_SYNC, _BASIC, _answer):
        raise OSError(ctypes.get_errno(), path)


def _archive(scratch: Path, count: int) -> Path:
    """A tar archive of so many small files, in directories of 60."""
    path = scratch / "archive.tar"
    if not path.exists():
        with tarfile.open(path, "w") as archive:
            for number in range(count):
                entry = tarfile.TarInfo(f"{number // 60}/{number}")
                entry.size = 3000
                archive.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    return path


def _untar(directory: Path, archive: Path, count: int) -> float:
    words = ["tar", "-xf", str(archive), "-C", str(directory)]
    return count / seconds(lambda: subprocess.run(words, check=True))


def _compare(table: Table, place: Lab, others: dict[str, Path], name: str, unit: str, work: Work) -> None:
    """A row for each peer."""
    ours, theirs = place.directory / "peers", {name: list[float]() for name in others}
    rates = []
    for _ in range(table.runs):
        rates.append(work(ours))
        for peer, directory in list(others.items()):
            try:
                theirs[peer].append(work(directory))
            except OSError as error:
                print(f"tools/bench: peers: without {peer} from here on: {error.strerror}", file=sys.stderr)
                del others[peer], theirs[peer]
    for peer, found in theirs.items():
        table.add("peers", name, rates, unit, reference=found, reference_name=peer)


def _pin(place: Lab, processors: set[int]) -> None:
    """Have every daemon below our lab use these processors only."""
    for pid in _daemons(place.directory):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(task.name), processors)


def _daemons(directory: Path) -> Iterator[int]:
    """The processes that were started with this directory, or one below it, in their arguments."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(directory).encode() in (entry / "cmdline").read_bytes():
                    yield int(entry.name)


def _mounted(place: Lab, stack: contextlib.ExitStack) -> Iterator[tuple[str, Path]]:
    """The peers that can be built, mounted beside ours, each unchecked and checked."""
    place.mount("peers")
    for name, file in _SOURCES.items():
        reason = _build(file, place.directory / name)
        if reason:
            print(f"tools/bench: peers: without {name}: {reason}", file=sys.stderr)
            continue
        for peer in (name, name + _CHECKED):
            path = place.directory / f"{peer}.mnt".replace(" ", "-")
            path.mkdir()
            stack.enter_context(served(_words(place, peer), path))
            place.mounted.append(path)
            yield peer, path


def _words(place: Lab, peer: str) -> list[str]:
    """The command that serves a peer, but for the directory."""
    name, options = peer.removesuffix(_CHECKED), []
    if name == "passthrough_ll":
        source = place.reference() / peer.replace(" ", "-")
        source.mkdir(exist_ok=True)
        options.append(f"source={source},cache=always,writeback")
    if peer.endswith(_CHECKED):
        options.append("default_permissions")
    return [str(place.directory / name), "-f", *(["-o", ",".join(options)] if options else [])]


def _build(file: str, program: Path) -> str:
    """Compile an example; the reason why that is not possible, or nothing."""
    compiler = shutil.which("g++" if file.endswith(".cc") else "gcc")
    if compiler is None or shutil.which("pkg-config") is None:
        return "no compiler, or no pkg-config"
    directory = program.parent / "examples"
    directory.mkdir(exist_ok=True)
    for found in (*_EXAMPLES.glob("passthrough_helpers.h*"), *_EXAMPLES.glob(f"{file}*")):
        text = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
        (directory / found.name.removesuffix(".gz")).write_bytes(text)
    if not (directory / file).exists():
        return f"{_EXAMPLES} has no {file}; LIBFUSE_EXAMPLES names another directory"
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=False)
    if flags.returncode:
        return "pkg-config does not know fuse3: install libfuse3-dev"
    words = [compiler, "-O2", "-D_GNU_SOURCE", "-include", "limits.h"]  # which some of them use and do not ask for
    words += ["-o", str(program), str(directory / file), *flags.stdout.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return errors[0] if done.returncode and errors else f"{compiler} fails" if done.returncode else ""
