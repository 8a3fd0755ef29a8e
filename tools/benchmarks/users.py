# SPDX-License-Identifier: GPL-2.0-or-later
"""pause and start: what a user waits for, whole commands on real mounts."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.mounts import BIN, Lab, command, lab
from benchmarks.table import Table, milliseconds
from pkramfs.units import GIB, format_size

PHASES = {
    "": "start, freeze, plan",
    "stop": "stop the mounts",
    "hand over": "hand over, verify, decide",
    "end": "end the kernel, boot",
    "take over": "take over, serve again",
}
"""What `pkram-kexec -e -v` says first of each phase; nothing before the first."""


def pause(table: Table) -> None:
    """remount,preserve and pkram-kexec -e until the mount serves again."""
    with lab() as place:
        _walk(table, place, place.mount("empty"), "an empty tree")
    with lab() as place:
        path, size = place.mount("data"), min(GIB, _room() // 4) if not table.quick else 64 << 20
        _write(path / "file", size)
        _walk(table, place, path, f"{format_size(size)} in one file", "<250 ms", "<700 ms")
    _pause_large(table)
    files = 2000 if table.quick else 100_000
    with lab() as place:
        path = place.mount("files")
        _many(path, files)
        _walk(table, place, path, f"{files:,} files")


def _pause_large(table: Table) -> None:
    """One file of 100 GiB, whose memory is allocated and recorded, not touched: RAM is sparse."""
    size = (4 if table.quick else 100) * GIB
    if os.geteuid():
        print(f"pause   {format_size(size)} in one file: left out, only root can mount a tmpfs that large")
        return
    for name, options in (("one file", ""), ("one file, huge=always", ",huge=always")):
        with lab(size * 3 // 2) as place:
            place.create(size * 5 // 4)
            path = place.mount("large", f"{options},size={size}")
            file = path / "file"
            file.touch()
            command("pkramctl", "allocate", file, 0, size)
            _walk(table, place, path, f"{format_size(size)} in {name}", "<250 ms", "<700 ms")
            found = file.stat()
            if (found.st_size, found.st_blocks * 512) != (size, size):
                raise SystemExit(f"tools/bench: {file} came back with {found.st_blocks * 512} bytes, not {size}")


def _walk(table: Table, place: Lab, path: Path, what: str, preserve: str = "", boot: str = "") -> None:
    saves, boots, bare = [], [], []
    phases: dict[str, list[float]] = {name: [] for name in PHASES.values()}
    for _ in range(table.runs):
        command("mount.pkramfs", "none", path, "-o", "remount,rw")
        _look(path)
        saves.append(milliseconds(lambda: place.preserve(path)))
        place.load()
        spent = _timed_kexec()
        boots.append(sum(spent.values()))
        for name, values in phases.items():
            values.append(spent[name])
        bare.append(milliseconds(lambda: command("python", "-c", "import numpy, trio, pyfuse3")))
    words = {"reference": bare, "reference_name": "python with imports"}
    table.add("pause", f"remount,preserve of {what}", saves, "ms", target=preserve, **words)  # type: ignore[arg-type]
    table.add("pause", f"pkram-kexec -e with {what}", boots, "ms", target=boot, **words)  # type: ignore[arg-type]
    for name, values in phases.items():
        table.add("pause", f"{what}: {name}", values, "ms")


def _timed_kexec() -> dict[str, float]:
    """Milliseconds that pkram-kexec -e spends in each of PHASES."""
    spent, phase, began = dict.fromkeys(PHASES.values(), 0.0), "", time.perf_counter()
    with subprocess.Popen(
        [str(BIN / "pkram-kexec"), "-e", "-v"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            now, following = time.perf_counter(), next((word for word in PHASES if word and line.startswith(word)), "")
            if following:
                spent[PHASES[phase]] += (now - began) * 1000
                phase, began = following, now
    spent[PHASES[phase]] += (time.perf_counter() - began) * 1000
    if process.returncode:
        raise SystemExit(f"tools/bench: pkram-kexec -e failed: {''.join(lines).strip()}")
    return spent


def _look(path: Path) -> None:
    """Ask for every file, as users do: what nobody looks at after a kexec is saved in less time than this shows."""
    for place, _, names in os.walk(path):
        for name in names:
            os.lstat(os.path.join(place, name))


def _room() -> int:
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(pages)


def _write(path: Path, size: int) -> None:
    chunk = os.urandom(1 << 20)
    with open(path, "wb") as file:
        file.writelines(chunk for _ in range(size >> 20))


def _many(path: Path, files: int) -> None:
    for number in range(files):
        if number % 1000 == 0:
            directory = path / f"d{number}"
            directory.mkdir()
        os.close(os.open(directory / f"file{number}", os.O_CREAT | os.O_WRONLY))


def start(table: Table) -> None:
    """How long the commands take to say --help, beside a Python that does nothing."""
    for name in ("pkram-kexec", "mount.pkramfs", "pkramctl"):
        values, bare = [], []
        for _ in range(table.runs * 3):
            values.append(milliseconds(lambda: command(name, "--help")))  # noqa: B023
            bare.append(milliseconds(lambda: subprocess.run([sys.executable, "-c", ""], check=True)))
        table.add(
            "start",
            f"{name} --help",
            values,
            "ms",
            reference=bare,
            reference_name="python -c ''",
            target="<40 ms" if name != "pkramctl" else "",
        )


__all__ = ["BIN", "pause", "start"]
