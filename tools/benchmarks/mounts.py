# SPDX-License-Identifier: GPL-2.0-or-later
"""Real mounts for the benchmark: ours, a kernel tmpfs and the floor beside it, a machine of their own."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pkramfs.machine.directory import Machine

BIN = Path(sys.executable).parent
_SECONDS = 20.0
"""How long a program may take to mount, or to end."""


def command(*words: object) -> str:
    """Run a command that must succeed; its output."""
    program = BIN / str(words[0])
    line = [str(program) if program.exists() else str(words[0]), *map(str, words[1:])]
    result = subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise SystemExit(f"tools/bench: {' '.join(line)}: {result.stderr.strip()}")
    return result.stdout


def unmount(path: Path) -> None:
    words = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    if subprocess.run([*words, str(path)], capture_output=True, check=False).returncode:
        subprocess.run([*words, "-l" if os.geteuid() == 0 else "-z", str(path)], capture_output=True, check=False)


class Lab:
    """A scratch directory, a machine in it, mounts on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.machine = directory / "machines" / "default"
        self.mounted: list[Path] = []
        self.daemon: subprocess.Popen[str] | None = None

    def mount(self, name: str, options: str = "") -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        command("mount.pkramfs", "none", path, "-o", f"pkram={name}{options}")
        if path not in self.mounted:
            self.mounted.append(path)
        return path

    def reference(self) -> Path:
        """A directory on a kernel tmpfs: one of its own for root, /dev/shm otherwise."""
        path = self.directory / "tmpfs"
        path.mkdir(exist_ok=True)
        if os.geteuid() == 0 and path not in self.mounted:
            command("mount", "-t", "tmpfs", "none", path)
            self.mounted.append(path)
        return path

    def floor(self) -> Path:
        """A mount of a file system that does nothing: see floor.py."""
        path = self.directory / "floor"
        path.mkdir()
        words = [sys.executable, "-m", "benchmarks.floor", str(path), str(self.directory / "floor.ram")]
        self.daemon = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        assert self.daemon.stdout is not None
        if self.daemon.stdout.readline() != "serving\n":
            raise SystemExit(f"tools/bench: the floor was not mounted on {path}")
        self.mounted.append(path)
        return path

    def create(self, ram: int) -> None:
        """A machine with so many bytes of RAM."""
        command("pkramctl", "machine", "create", "--ram", str(ram))

    def preserve(self, path: Path) -> None:
        command("mount.pkramfs", "none", path, "-o", "remount,preserve,ro")

    def load(self) -> None:
        pfn = (self.machine / "pkram").read_text().strip()
        command("pkram-kexec", "-s", "-l", "builtin", f"--append=ro pkram={pfn}")


def _wait_for_daemons(machine: Machine) -> None:
    """umount returns before a daemon has gone, and it still writes a line into the machine's log."""
    deadline = time.monotonic() + 30
    while machine.exists() and machine.live_ids():
        if time.monotonic() > deadline:
            raise SystemExit(f"tools/bench: a daemon of {machine.path()} does not end")
        time.sleep(0.01)


@contextlib.contextmanager
def _large_tmpfs(directory: str, size: int) -> Iterator[None]:
    """A tmpfs there that says it is that large, whatever the host has: for memory that is not touched."""
    command("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", directory)
    try:
        yield
    finally:
        unmount(Path(directory))


@contextlib.contextmanager
def lab(size: int = 0) -> Iterator[Lab]:
    """A lab, on a tmpfs of its own of `size` bytes if that is given (root only)."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkram-bench-"))
        if size:
            stack.enter_context(_large_tmpfs(directory, size))
        made = Lab(Path(directory))
        before = os.environ.get("PKRAM_ROOT")
        os.environ["PKRAM_ROOT"] = str(made.machine.parent)
        try:
            yield made
        finally:
            for path in reversed(made.mounted):
                unmount(path)
            _wait_for_daemons(Machine(str(made.machine)))
            if made.daemon is not None:
                made.daemon.communicate(timeout=30)
            os.environ.pop("PKRAM_ROOT")
            if before is not None:
                os.environ["PKRAM_ROOT"] = before


@contextlib.contextmanager
def served(words: list[str], path: Path, output: IO[bytes] | None = None) -> Iterator[None]:
    """A program that mounts on a directory, until it is unmounted."""
    daemon = subprocess.Popen([*words, str(path)], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _SECONDS
        while not os.path.ismount(path):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"tools/bench: {words[0]} does not mount on {path}")
            time.sleep(0.01)
        yield
    finally:
        daemon.terminate()
        daemon.wait(timeout=_SECONDS)
