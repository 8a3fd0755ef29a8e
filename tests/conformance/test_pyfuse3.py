# SPDX-License-Identifier: GPL-2.0-or-later
"""The same with fuse=pyfuse3: it stays a complete path, for what it knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOME = {
    "conformance": ("test_rename.py", "test_xattrs.py", "test_data.py", "test_listing.py"),
    "mount": ("test_holes.py", "test_life.py", "test_preserve.py"),
}
"""One of each is run always; --long runs all of both directories."""


def _run(*names: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            *(str(HERE.parent / name) for name in names),
        ],
        env={**os.environ, "PKRAM_TEST_FUSE": "pyfuse3"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.mount
@pytest.mark.few(1, each="chapter")
@pytest.mark.parametrize(("chapter", "name"), [(chapter, name) for chapter in SOME for name in SOME[chapter]])
def test_pyfuse3_alone(chapter: str, name: str) -> None:
    _run(f"{chapter}/{name}")


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_pyfuse3_alone_with_everything(name: str) -> None:
    _run(name)
