# SPDX-License-Identifier: GPL-2.0-or-later
"""tools/examples: databases, caches and a guest on a mount, warm after a kexec. Each judges itself."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.lab import BIN
from tests.support.places import mounted

EXAMPLES = Path(__file__).parents[2] / "tools" / "examples"
CANNOT = 77
SMALL = {
    "redis": ["--keys", "5000"],
    "memcached": ["--items", "5000"],
    "postgresql": ["--scale", "1", "--commits", "50"],
    "qemu-guest": ["--data", "2"],
}
OUTLIVING = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9)
KILLS = ["--kill-daemons"] * OUTLIVING
LARGE = {
    "cache": [],
    "redis": KILLS,
    "memcached": KILLS,
    "postgresql": ["--scale", "3", "--commits", "300", *KILLS],
    "mariadb": ["--rows", "10000", "--commits", "300", *KILLS],
    "qemu-guest": ["--fetch", *KILLS],
}
CASES = [pytest.param(name, words, id=name) for name, words in SMALL.items()]
CASES += [pytest.param(name, words, id=f"{name}-large", marks=pytest.mark.slow) for name, words in LARGE.items()]


def start(name: str, *words: str, path: str = f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [EXAMPLES / name, *words],
        env={"PATH": path, "HOME": str(Path.home()), "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(example: "subprocess.Popen[str]") -> tuple[int, str]:
    """Return an example's status and what it said; nothing of it may be left."""
    said, _ = example.communicate(timeout=1000)
    if example.returncode == CANNOT:
        pytest.skip(said.strip().splitlines()[-1])
    if found := re.match("DIR=([^;]+);", said):
        assert not Path(found[1]).exists()
        assert not [point for point in mounted() if point.startswith(f"{found[1]}/")]
    return example.returncode, said


@pytest.mark.mount
@pytest.mark.parametrize(("name", "words"), CASES)
def test_programs_are_warm_after_a_kexec(name: str, words: list[str]) -> None:
    status, said = ended(start(name, *words))
    assert (status, said.splitlines()[-1]) == (0, "OK"), said[-5000:]
    assert {"warm", "cold", "pause"} == {*re.findall(r"^  (\w+) +\d+\.\d\d s  \w", said, re.MULTILINE)}


@pytest.mark.mount
def test_an_example_that_is_interrupted_leaves_nothing() -> None:
    example = start("memcached", "--items", "5000")
    assert example.stdout is not None
    for line in example.stdout:
        if line.startswith("DIR="):
            directory = line[4:].partition(";")[0]
        if line.startswith("  ok: "):  # it is mounted, and filled
            break
    example.send_signal(signal.SIGTERM)
    status, said = ended(example)
    assert (status, said.splitlines()[-1]) == (1, "FAIL: ended by SIGTERM")
    assert not Path(directory).exists()
    assert not [point for point in mounted() if point.startswith(f"{directory}/")]


@pytest.mark.parametrize("name", ["redis", "memcached", "qemu-guest"])
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "env").symlink_to("/usr/bin/env")
    (tmp_path / "python3").symlink_to(sys.executable)
    example = start(name, path=str(tmp_path))
    said, _ = example.communicate(timeout=100)
    assert example.returncode == CANNOT
    assert re.fullmatch(rf"{name}: cannot run here: missing: apt-get install [\w -]+\n", said)
