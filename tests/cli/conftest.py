# SPDX-License-Identifier: GPL-2.0-or-later
"""A place for machines of this test's own."""

import os
import subprocess
import tempfile
from collections.abc import Callable

import pytest

from pkramfs.kernel import succession
from tests.support.here import boot_here, run_here
from tests.support.nursery import forking

Command = Callable[[list[str]], int]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def root(pkram_root):
    """PKRAM_ROOT in memory, where holes cost nothing; sound and gone afterwards."""
    return str(pkram_root)


def in_this_process(main: Command, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs a command here and tells (status, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        with forking():
            status = main(list(words))
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(autouse=True)
def boots_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Boot in this process, unless a test asks for `boots_apart`: what is tested is before and after a boot."""
    if "boots_apart" not in request.fixturenames:
        monkeypatch.setattr(succession, "start_boot", boot_here)


@pytest.fixture
def boots_apart() -> None:
    """For tests of what a command hears of a boot in its process."""


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run pkramctl in this process: (status, stdout, stderr)."""
    from pkramfs.cli.ctl import main

    return in_this_process(main, capsys)


@pytest.fixture
def kexec(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run pkram-kexec in this process: (status, stdout, stderr)."""
    from pkramfs.cli.kexec import main

    return in_this_process(main, capsys)


@pytest.fixture
def mount() -> Callable[[str, str], None]:
    """mount.pkramfs none DIR -o OPTIONS in this process, which must succeed."""

    def run(directory: str, options: str) -> None:
        done = run_here(["mount", "none", directory, "-o", options], {}, 60)
        assert (done.returncode, done.stderr) == (0, "")

    return run


@pytest.fixture
def place():
    """Makes directories to mount on; whatever is mounted there is taken away afterwards."""
    made = []

    def make() -> str:
        made.append(tempfile.mkdtemp(prefix="pkram-mnt-"))
        return made[-1]

    yield make
    for directory in made:
        while subprocess.run(["fusermount3", "-u", "-z", directory], capture_output=True, check=False).returncode == 0:
            pass
        os.rmdir(directory)


@pytest.fixture
def machine(root, ctl, place):
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import kill

    assert ctl("machine", "create", "--ram", "256M", "--seed", "5")[0] == 0
    made = Machine.locate()
    yield made
    for entry in made.mounts():
        if entry.alive:
            kill(entry)
