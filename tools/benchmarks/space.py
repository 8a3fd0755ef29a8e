# SPDX-License-Identifier: GPL-2.0-or-later
"""memory: what a mount, an empty file and a GiB of data cost the daemon; what RAM itself costs a boot."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.mounts import Lab, lab
from benchmarks.table import Table, milliseconds
from pkramfs.kernel import succession
from pkramfs.machine.directory import Machine
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.units import GIB, MIB, PAGE_SIZE, format_size

KIB = 1024


def memory(table: Table) -> None:
    """The daemon's own memory beside the shared RAM, and the kernel's tables by size of RAM."""
    _mounts(table)
    _files(table)
    _data(table)
    for size in (1, 16) if table.quick else (1, 16, 256, 4096):
        _boot(table, size * GIB)


def _mounts(table: Table) -> None:
    private, proportional = [], []
    for _ in range(table.runs):
        with lab() as place:
            place.mount("memory")
            private.append(_status(place, "RssAnon") / MIB)
            proportional.append(_proportional(place) / MIB)
    table.add("memory", "a mount, empty: its own", private, "MiB")
    table.add("memory", "a mount, empty: with its share of libraries", proportional, "MiB")


def _files(table: Table) -> None:
    """Empty files with their names, a thousand to a directory."""
    files, costs = 5000 if table.quick else 100_000, []
    for _ in range(_few(table)):
        with lab() as place:
            path = place.mount("memory")
            fresh = _status(place, "RssAnon")
            for number in range(files):
                if number % 1000 == 0:
                    directory = path / f"d{number}"
                    directory.mkdir()
                os.close(os.open(directory / f"file{number}", os.O_CREAT | os.O_WRONLY))
            costs.append((_status(place, "RssAnon") - fresh) / files)
    table.add("memory", "an empty file", costs, "bytes", target="<1024 bytes")


def _data(table: Table) -> None:
    """A file in one run, written and then read; and one in which every other page is a hole: the worst there is."""
    size, pages = (64 * MIB, 20_000) if table.quick else (GIB, 100_000)
    whole, tables, runs = [], [], []
    for _ in range(_few(table)):
        with lab() as place:
            path = place.mount("memory") / "whole"
            before = _status(place, "RssAnon"), _status(place, "VmPTE")
            _write(path, range(0, size, MIB), bytes(MIB))
            _read_cold(path, size)
            whole.append((_status(place, "RssAnon") - before[0]) / KIB)
            tables.append((_status(place, "VmPTE") - before[1]) / KIB)
        with lab() as place:
            path = place.mount("memory") / "fragmented"
            before = _status(place, "RssAnon"), 0
            _write(path, range(0, pages * 2 * PAGE_SIZE, 2 * PAGE_SIZE), b"x")
            runs.append((_status(place, "RssAnon") - before[0]) / pages)
    table.add("memory", f"{format_size(size)} of data in one run", whole, "KiB", note="buffers of requests")
    table.add("memory", f"{format_size(size)} of data, page tables once read", tables, "KiB")
    table.add("memory", f"a run of pages, of {pages:,}", runs, "bytes", target="<64 bytes")
    scattered = [cost * GIB / PAGE_SIZE / MIB for cost in runs]
    table.add("memory", "a GiB of data, each page a run of its own", scattered, "MiB", note="from the figure above")


def _read_cold(path: Path, size: int) -> None:
    """Read what the kernel has let go of before, so that the daemon is asked."""
    buffer = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(size // MIB):
            file.readinto(buffer)


def _few(table: Table) -> int:
    """These take a while and hardly differ."""
    return min(table.runs, 3)


def _write(path: Path, offsets: Sequence[int], data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        for offset in offsets:
            os.pwrite(file.fileno(), data, offset)


def _boot(table: Table, size: int) -> None:
    """A cold boot of a machine with so much RAM, less the start of its process; what it reserves and touches."""
    times, processes, reserved, touched = [], [], [], []
    for _ in range(table.runs):
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkram-bench-") as directory:
            machine = Machine(os.path.join(directory, "machine"))
            machine.create(FirmwareMap.default(size, seed=1))
            with machine.lifecycle(shared=False):
                processes.append(milliseconds(lambda: succession.power_cycle(machine)))  # noqa: B023
            report = json.loads(Path(machine.path("kernel.json")).read_text())["report"]
            times.append(sum(report["phases"].values()) * 1000)
            reserved.append(sum(report["reserved_bytes"].values()) / MIB)
            touched.append(machine.ram().backed / KIB)
    name = f"boot with {format_size(size)} of RAM"
    table.add("memory", name, times, "ms", reference=processes, reference_name="with its process")
    table.add("memory", f"{name}: reserved", reserved, "MiB")
    table.add("memory", f"{name}: touched", touched, "KiB")


def _pid(place: Lab) -> int:
    (entry,) = (place.machine / "mounts").glob("*.json")
    return int(json.loads(entry.read_text())["pid"])


def _status(place: Lab, key: str) -> int:
    """A figure of /proc/PID/status in bytes. RssAnon: not the mapped RAM, not libraries."""
    for line in Path(f"/proc/{_pid(place)}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * KIB
    raise AssertionError(f"no {key} in /proc/PID/status")


def _proportional(place: Lab) -> int:
    """Bytes that would be free without this daemon: Pss without that of the shared RAM."""
    for line in Path(f"/proc/{_pid(place)}/smaps_rollup").read_text().splitlines():
        words = line.split()
        if words[0] == "Pss_Anon:":
            anonymous = int(words[1])
        elif words[0] == "Pss_File:":
            return (anonymous + int(words[1])) * KIB
    raise AssertionError("no Pss_File in /proc/PID/smaps_rollup")
