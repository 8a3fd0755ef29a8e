# SPDX-License-Identifier: GPL-2.0-or-later
"""A laboratory for real mounts: its own machine, its own mount points, everything taken down again.

Mount points are not below the machine's directory, so that a dead one hides nothing of it.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkramfs.machine.directory import Machine
from tests.support.lab import Mounts
from tests.support.places import ROOT


@pytest.fixture
def lab(pkram_root: Path, tmp_path: Path) -> Iterator[Mounts]:
    laboratory = Mounts(tmp_path, Machine.locate())
    try:
        yield laboratory
    finally:
        laboratory.clean()
    for log in pkram_root.glob("*/mounts/*.log"):
        with contextlib.suppress(OSError):
            assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture
def tmpfs(lab: Mounts) -> Iterator[Path]:
    """A kernel tmpfs, to compare with."""
    if not ROOT:
        pytest.skip("needs root to mount a tmpfs")
    directory = lab.dir("tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
