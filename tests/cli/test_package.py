# SPDX-License-Identifier: GPL-2.0-or-later
"""tools/package: what it builds is whole, holds nothing else, and has the same bytes each time."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

TOP = Path(__file__).parents[2]
SETUP = {"MANIFEST.in", "PKG-INFO", "setup.cfg"}
"""What setuptools adds to a source distribution, beside pkramfs.egg-info."""


class Built(NamedTuple):
    said: str
    source: set[str]
    wheel: set[str]


def package(*words: object) -> subprocess.CompletedProcess[str]:
    """The command behind tools/package, which sets up what is missing first."""
    return subprocess.run(
        [sys.executable, "-m", "releasing", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(TOP / "tools")},
        capture_output=True,
        text=True,
        check=False,
    )


def tracked() -> set[str]:
    done = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout:
        pytest.skip("not a git checkout")
    return {name for name in done.stdout.splitlines() if (TOP / name).exists()}


def build(out: Path) -> Built:
    done = package("--twice", "--out", out)
    assert done.returncode == 0, done.stderr
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(source) as archive:
        members = [member for member in archive if member.isfile()]
        assert {(member.uid, member.uname, member.mode & ~0o755) for member in members} == {(0, "", 0)}
        names = {member.name.partition("/")[2] for member in members}
    with zipfile.ZipFile(wheel) as packed:
        return Built(done.stderr, names, set(packed.namelist()))


def test_what_is_built(tmp_path: Path) -> None:
    """One test, for one build: the same bytes each time, all that is tracked, and nothing else."""
    known = tracked()
    pytest.importorskip("myst_parser", reason="the build requirements are not installed")
    built = build(tmp_path)
    assert built.said.count(" is the same, built twice") == 2
    hidden = {name for name in known if name.startswith(".")}
    made = {name for name in built.source if name in SETUP or name.startswith("pkramfs.egg-info/")}
    assert built.source - made == known - hidden
    inside = {name for name in built.wheel if name.startswith("pkramfs/")}
    assert inside == {name for name in known if name.startswith("pkramfs/")}
    pages = {name.rpartition("/")[2] for name in built.wheel if ".data/data/share/man/man" in name}
    assert pages == {path.stem for path in (TOP / "pkramfs" / "resources" / "man").glob("*.md")}
    others = {name for name in built.wheel - inside if ".dist-info/" not in name and "/share/man/" not in name}
    assert others == set()


def test_a_kind_that_nobody_knows(tmp_path: Path) -> None:
    done = package("rpm", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("unknown kind 'rpm': sdist, wheel, deb are known\n")
