"""memory: what a mount, an empty file and a GiB of data cost the daemon."""

import json
import os
from pathlib import Path

from benchmarks.mounts import Lab, lab
from benchmarks.table import Table


def memory(table: Table) -> None:
    """Resident memory of the daemon beside its shared RAM."""
    files = 5000 if table.quick else 100_000
    with lab() as place:
        path = place.mount("memory")
        fresh = _private(place)
        table.add("memory", "a mount, empty", [fresh / 1024], "MiB")
        for number in range(files):
            if number % 1000 == 0:
                directory = path / f"d{number}"
                directory.mkdir()
            os.close(os.open(directory / f"file{number}", os.O_CREAT | os.O_WRONLY))
        filled = _private(place)
        table.add("memory", "an empty file", [(filled - fresh) * 1024 / files], "bytes", target="<1024 bytes")
        _fragment(path / "fragmented", 2000 if table.quick else 20_000)
        runs = 1000 if table.quick else 10_000
        table.add("memory", "a run of pages", [(_private(place) - filled) * 1024 / runs], "bytes", note="64 wanted")


def _fragment(path: Path, pages: int) -> None:
    """Every other page of a file: each a run of its own."""
    with open(path, "wb") as file:
        for page in range(0, pages, 2):
            os.pwrite(file.fileno(), b"x", page * 4096)


def _private(place: Lab) -> int:
    """KiB that the daemon has for itself: not the mapped RAM, not shared libraries."""
    (entry,) = (place.machine / "mounts").glob("*.json")
    pid = json.loads(entry.read_text())["pid"]
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon in /proc/PID/status")
