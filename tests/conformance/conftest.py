# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel tmpfs and a pkramfs side by side: every case runs on both and must look the same.

    both(case)     runs `case(t)` with a fresh directory of each as working directory and compares the
                   lines that `t` has recorded (see record.py) and the tree that is left

One mount of each serves the whole session, so that at its end there is a large and strange tree, which
test_survival.py sends through cold caches and a kexec. As root the other side is a tmpfs of its own,
with the same options; for others it is /dev/shm.

What differs and must is a row in differences.py; a row that is no longer true fails.
"""

import contextlib
import gc
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.differences import judge
from tests.conformance.record import Record, picture

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[2]
OPTIONS = "size=2G,nr_inodes=1m,mode=777"
PATH = os.environ.get("PKRAM_TEST_FUSE", "filter")
"""Who answers requests: see mount.pkramfs(8), fuse="""
Case = Callable[[Record], object]

_numbers = itertools.count()
_ODD = re.compile(r"[^\w=+-]+", re.ASCII)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The survival of what the cases leave comes after them. pyfuse3 does not know what test_requests is about."""
    if PATH == "pyfuse3":
        items[:] = [item for item in items if item.path.name not in ("test_requests.py", "test_pyfuse3.py")]
    items.sort(key=lambda item: item.path == Path(__file__).with_name("test_survival.py"))


class Lab:
    """A machine of its own, with pairs of mounts that have the same options."""

    def __init__(self) -> None:
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="pkram-test-", dir=shm))
        self._places = Path(tempfile.mkdtemp(prefix="pkram-test-", dir=shm))
        self._mounted: list[Path] = []
        self.environment = {**os.environ, "PKRAM_ROOT": str(self.root), "PYTHONPATH": str(REPOSITORY)}

    def run(self, *words: str) -> str:
        """A pkramfs command that must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "pkramfs", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout

    def pair(self, name: str, options: str) -> tuple[Path, Path]:
        """(tmpfs, pkramfs)"""
        theirs, ours = self._places / f"{name}-theirs", self._places / f"{name}-ours"
        theirs.mkdir()
        ours.mkdir()
        if ROOT:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", theirs], check=True)
            self._mounted.append(theirs)
        self.run("mount", "none", str(ours), "-o", f"pkram={name},fuse={PATH},{options}")
        self._mounted.append(ours)
        return theirs, ours

    def close(self) -> None:
        for place in self._mounted:
            for words in (["umount"], ["umount", "-l"]) if ROOT else (["fusermount3", "-u"], ["fusermount3", "-uz"]):
                if subprocess.run([*words, str(place)], check=False, capture_output=True).returncode == 0:
                    break
        deadline = time.monotonic() + 20
        while any(self.root.glob("*/mounts/*.lock")) and time.monotonic() < deadline:
            time.sleep(0.01)
        shutil.rmtree(self._places, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture(scope="session")
def laboratory() -> Iterator[Lab]:
    lab = Lab()
    try:
        yield lab
        for log in lab.root.glob("*/mounts/*.log"):
            assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        lab.close()


@pytest.fixture(scope="session")
def pair(laboratory: Lab) -> tuple[Path, Path]:
    return laboratory.pair("conformance", OPTIONS)


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Work there, with the usual umask, and leave no descriptor open."""
    here, mask = os.open(".", os.O_RDONLY), os.umask(0o022)
    opened = _descriptors()
    os.chdir(directory)
    try:
        yield
    finally:
        os.fchdir(here)
        os.umask(mask)
        for fd in _descriptors() - opened:
            os.close(fd)
        os.close(here)


def _descriptors() -> set[int]:
    return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


def perform(directory: Path, case: Case) -> list[str]:
    """The lines of a case, and of the tree that it leaves."""
    with inside(directory):
        record = Record()
        case(record)
    with inside(directory):
        return [*record.lines, *picture(".")]


def compare(name: str, top: tuple[Path, Path], case: Case) -> None:
    """Run a case on both sides; what differs must be known."""
    lines, place = [], f"{next(_numbers):04}-{_ODD.sub('_', name)[:80]}"
    gc.disable()  # it closes what other tests left open, so that descriptors would have other numbers here and there
    try:
        for side in top:
            directory = side / place
            directory.mkdir(mode=0o777)
            directory.chmod(0o777)
            lines.append(perform(directory, case))
    finally:
        gc.enable()
    judge(name, *lines)


@pytest.fixture
def both(request: pytest.FixtureRequest, pair: tuple[Path, Path]) -> Callable[[Case], None]:
    """Run a case on both file systems and compare."""
    return lambda case: compare(request.node.name, pair, case)
