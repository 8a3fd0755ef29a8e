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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.differences import judge
from tests.conformance.record import Record, picture
from tests.support.lab import FUSE_PATH, Pairs

ROOT = os.geteuid() == 0
OPTIONS = "size=2G,nr_inodes=1m,mode=777"
Case = Callable[[Record], object]

_numbers = itertools.count()
_ODD = re.compile(r"[^\w=+-]+", re.ASCII)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The survival of what the cases leave comes after them. pyfuse3 does not know what test_requests is about."""
    if FUSE_PATH == "pyfuse3":
        items[:] = [item for item in items if item.path.name not in ("test_requests.py", "test_pyfuse3.py")]
    items.sort(key=lambda item: item.path == Path(__file__).with_name("test_survival.py"))


@pytest.fixture(scope="session")
def laboratory() -> Iterator[Pairs]:
    lab = Pairs()
    try:
        yield lab
        for log in lab.root.glob("*/mounts/*.log"):
            assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        lab.close()


@pytest.fixture(scope="session")
def pair(laboratory: Pairs) -> tuple[Path, Path]:
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
