"""pause and start: what a user waits for, whole commands on real mounts."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.mounts import BIN, Lab, command, lab
from benchmarks.table import Table, milliseconds
from pkramfs.units import GIB


def pause(table: Table) -> None:
    """remount,preserve and pkram-kexec -e until the mount serves again."""
    with lab() as place:
        empty = place.mount("empty")
        _walk(table, place, empty, "an empty tree", "", "")
    size = min(2 * GIB, _room() // 4) if not table.quick else 64 << 20
    with lab() as place:
        path = place.mount("data")
        _write(path / "file", size)
        _walk(table, place, path, f"{size >> 20} MiB in one file", "<250 ms", "<700 ms")
    files = 2000 if table.quick else 100_000
    with lab() as place:
        path = place.mount("files")
        _many(path, files)
        _walk(table, place, path, f"{files:,} files", "", "")


def _walk(table: Table, place: Lab, path: Path, what: str, preserve: str, boot: str) -> None:
    saves, boots, bare = [], [], []
    for _ in range(table.runs):
        command("mount.pkramfs", "none", path, "-o", "remount,rw")
        saves.append(milliseconds(lambda: place.preserve(path)))
        place.load()
        boots.append(milliseconds(lambda: command("pkram-kexec", "-e")))
        bare.append(milliseconds(lambda: command("python", "-c", "import numpy, trio, pyfuse3")))
    words = {"reference": bare, "reference_name": "python with imports"}
    table.add("pause", f"remount,preserve of {what}", saves, "ms", target=preserve, **words)  # type: ignore[arg-type]
    table.add("pause", f"pkram-kexec -e with {what}", boots, "ms", target=boot, **words)  # type: ignore[arg-type]


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
