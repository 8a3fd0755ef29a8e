# SPDX-License-Identifier: GPL-2.0-or-later
"""A laboratory for real mounts: its own machine, its own mount points, everything taken down again.

Mount points are not below the machine's directory, so that a dead one hides nothing of it.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.control.client import call
from pkramfs.machine.directory import Machine
from pkramfs.machine.mounts import MountEntry
from pkramfs.mounting import syscalls

ROOT = os.geteuid() == 0


class Lab:
    """Commands on one temporary machine. Each returns what the process did."""

    def __init__(self, root: Path) -> None:
        self.root, self.machine = root, Machine.locate()
        self._made: set[Path] = set()

    def run(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pkramfs", *words],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(env or {})},
        )

    def helper(self, directory: Path | str, options: str = "", *more: str) -> subprocess.CompletedProcess[str]:
        """mount.pkramfs none DIR -o OPTIONS."""
        return self.run("mount", "none", str(directory), *(["-o", options] if options else []), *more)

    def start(self, directory: Path, options: str) -> subprocess.Popen[bytes]:
        """mount.pkramfs in the background."""
        words = [sys.executable, "-m", "pkramfs", "mount", "none", str(directory), "-o", options]
        return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})

    def mount(self, name: str, options: str | None = None) -> Path:
        """Mount on a directory called `name`, as pkram=name unless options are given; it must succeed."""
        directory = self.dir(name)
        path = os.environ.get("PKRAM_TEST_FUSE")
        words = [f"pkram={name}" if options is None else options, *([f"fuse={path}"] if path else [])]
        done = self.helper(directory, ",".join(word for word in words if word))
        assert (done.returncode, done.stderr) == (0, ""), done
        return directory

    def dir(self, name: str) -> Path:
        directory = self.root / name
        if directory not in self._made:  # asking the directory may be asking a dead daemon
            directory.mkdir()
            self._made.add(directory)
        return directory

    def admit_others(self) -> None:
        """Let other users come to the mount points: pytest's directories are its user's alone."""
        for above in (self.root, *self.root.parents):
            found = above.stat()
            if found.st_uid == os.geteuid() and found.st_mode & 0o055 != 0o055:
                above.chmod(0o755)

    def clean(self) -> None:
        """Take down what is mounted, dead or alive."""
        mounted = {mounted.mountpoint for mounted in syscalls.mounts()}
        for directory in sorted(self._made, reverse=True):
            while str(directory) in mounted:
                syscalls.detach(str(directory))
                mounted = {mounted.mountpoint for mounted in syscalls.mounts()}

    def remount(self, directory: Path, options: str) -> None:
        """A remount that must succeed."""
        done = self.helper(directory, f"remount,{options}")
        assert (done.returncode, done.stderr) == (0, ""), done

    def umount(self, directory: Path) -> None:
        """Unmount and wait for the daemon."""
        entry = self.entry(directory)
        subprocess.run(["umount", str(directory)] if ROOT else ["fusermount3", "-u", str(directory)], check=True)
        self.gone(entry)

    def gone(self, entry: MountEntry) -> None:
        """Wait, with a deadline, until a daemon has let go of its tree."""
        deadline = time.monotonic() + 20
        while entry.tree_id in self.machine.live_ids():
            assert time.monotonic() < deadline, f"the daemon of {entry.mountpoint} stays"
            time.sleep(0.005)

    def entry(self, directory: Path) -> MountEntry:
        return next(e for e in self.machine.mounts() if e.mountpoint == str(directory) and e.alive)

    def call(self, directory: Path, verb: str, **args: Any) -> dict[str, Any]:
        return call(self.entry(directory).socket, verb, **args)

    def status(self, directory: Path) -> dict[str, Any]:
        return self.call(directory, "status")

    def dmesg(self) -> str:
        return self.machine.dmesg()

    def nodes(self) -> list[str]:
        """Names of the preserved nodes."""
        found = json.loads(self.run("ctl", "--json", "nodes").stdout or "[]")
        return [node["name"] for node in (found["nodes"] if isinstance(found, dict) else found)]

    def leased(self) -> int:
        """Bytes of RAM that trees hold."""
        found = json.loads(self.run("ctl", "--json", "status").stdout)
        return int(found["memory"]["tree"])


@pytest.fixture
def lab(pkram_root: Path, tmp_path: Path) -> Iterator[Lab]:
    laboratory = Lab(tmp_path)
    try:
        yield laboratory
    finally:
        laboratory.clean()
    for log in pkram_root.glob("*/mounts/*.log"):
        with contextlib.suppress(OSError):
            assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture
def tmpfs(lab: Lab) -> Iterator[Path]:
    """A kernel tmpfs, to compare with."""
    if not ROOT:
        pytest.skip("needs root to mount a tmpfs")
    directory = lab.dir("tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
