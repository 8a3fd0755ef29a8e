# SPDX-License-Identifier: GPL-2.0-or-later
"""Which accesses are noted, by the flags of a mount and of an open file."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.mounting.options import (
    MS_NOATIME,
    MS_NODIRATIME,
    MS_NOSUID,
    MS_RDONLY,
    MS_RELATIME,
    MS_REMOUNT,
    MS_STRICTATIME,
)
from tests.conformance import system

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="mount flags are root's"),
]
MS_BIND = 4096
FLAGS = {
    "relatime": MS_RELATIME,
    "noatime": MS_NOATIME,
    "strictatime": MS_STRICTATIME,
    "nodiratime": MS_NODIRATIME | MS_RELATIME,
    "strict-nodiratime": MS_NODIRATIME | MS_STRICTATIME,
    "ro": MS_RDONLY | MS_RELATIME,
    "ro-strict": MS_RDONLY | MS_STRICTATIME,
    "nosuid": MS_NOSUID | MS_RELATIME,
}


@pytest.fixture(scope="module")
def flagged(laboratory: Any) -> Iterator[tuple[Path, Path]]:
    """A pair of mounts whose flags the tests change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PKRAM_ROOT", str(laboratory.root))
        yield laboratory.pair("access", "size=16M")


def look(pair: tuple[Path, Path], change: Callable[[Path], object]) -> list[list[str]]:
    """What is noted on each side after a change of its flags: files that nobody has cached, links and directories,
    whose access times are old or newer than all else."""
    found = []
    for side in pair:
        system.mount("none", str(side), "none", "", MS_REMOUNT | MS_RELATIME)
        place = side / f"{time.monotonic_ns()}"
        for age in ("old", "new"):
            (place / age / "d").mkdir(parents=True)
            (place / age / "d" / "x").write_bytes(b"")
            os.symlink("f", place / age / "l")
            for name in ("f", "quiet"):
                _write_cold(place / age / name)
            at = time.time_ns() + (60 * 10**9 if age == "new" else -(10**10))
            for name in ("f", "quiet", "l", "d"):
                os.utime(place / age / name, ns=(at, time.time_ns()), follow_symlinks=False)
        change(side)
        found.append([f"{age} {word}" for age in ("old", "new") for word in _noted(place / age)])
    return found


def _write_cold(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"content")
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _noted(place: Path) -> list[str]:
    before = {name: os.lstat(place / name).st_atime_ns for name in ("f", "quiet", "l", "d")}
    (place / "f").read_bytes()
    quiet = os.open(place / "quiet", os.O_RDONLY | os.O_NOATIME)
    os.read(quiet, 100)
    os.close(quiet)
    os.readlink(place / "l")
    os.listdir(place / "d")
    return [name for name, at in before.items() if os.lstat(place / name).st_atime_ns != at]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("how", ["all", "this"])
def test_flags_that_any_program_sets(flagged: tuple[Path, Path], how: str, flags: str) -> None:
    """By mount(2), of which no helper hears: of the file system, or of this mount of it."""
    call = MS_REMOUNT | FLAGS[flags] | (MS_BIND if how == "this" else 0)
    theirs, ours = look(flagged, lambda side: system.mount("none", str(side), "none", "", call))
    assert ours == theirs
    expected = {"relatime": ["old f", "old l", "old d"], "noatime": [], "nodiratime": ["old f", "old l"], "ro": []}
    assert theirs == expected.get(flags, theirs)


WORDS = ["noatime", "strictatime", "nodiratime", "ro", "noatime,nodiratime", "nodiratime,strictatime", "lazytime"]


@pytest.mark.skipif(not os.path.exists("/sbin/mount.fuse.pkramfs"), reason="the links in /sbin are not made")
@pytest.mark.parametrize("words", WORDS)
def test_flags_that_mount_8_sets(flagged: tuple[Path, Path], words: str) -> None:
    theirs, ours = look(flagged, lambda side: subprocess.run(["mount", "-o", f"remount,{words}", side], check=True))
    assert ours == theirs


@pytest.mark.parametrize("words", ["noatime", "strictatime", "relatime", "nodiratime", "relatime,ro"])
def test_flags_of_the_first_mount(laboratory: Any, words: str) -> None:
    """The root of a mount, which is there from the first moment, as a directory."""
    found = []
    for side in laboratory.pair(f"first-{words.replace(',', '-')}", f"size=1M,{words}"):
        before = os.stat(side).st_atime_ns
        os.listdir(side)
        found.append(os.stat(side).st_atime_ns != before)
    assert found[0] == found[1]
    assert found[0] == (words in ("strictatime", "relatime"))


@pytest.mark.parametrize("words", ["relatime", "strictatime"])
def test_another_place_of_the_tree_has_flags_of_its_own(flagged: tuple[Path, Path], tmp_path: Path, words: str) -> None:
    (tmp_path / "private").mkdir()
    subprocess.run(["mount", "--bind", tmp_path / "private", tmp_path / "private"], check=True)
    try:
        subprocess.run(["mount", "--make-private", tmp_path / "private"], check=True)
        found = []
        for number, side in enumerate(flagged):
            other = tmp_path / "private" / f"bind{number}"
            other.mkdir()
            subprocess.run(["mount", "--bind", side, other], check=True)
            subprocess.run(["mount", "-o", f"remount,bind,{words}", other], check=True)
            found.append(look((side, side), lambda _: None)[0])
            subprocess.run(["umount", other], check=True)
        assert found[0] == found[1] == ["old f", "old l", "old d"]
    finally:
        subprocess.run(["umount", "-R", tmp_path / "private"], check=True)
