# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging and printing never decide: what was done is done, whether or not a line about it could be written."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mount


def directory(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def full(path: Path) -> None:
    path.symlink_to("/dev/full")


@pytest.mark.few(2)
@pytest.mark.parametrize("what", [directory, fifo, full])
def test_a_kernel_log_that_cannot_be_written_fails_nothing(lab: Any, what: Callable[[Path], None]) -> None:
    lab.run("ctl", "machine", "create", "--ram", "256M")
    dmesg = Path(lab.machine.path("dmesg"))
    what(dmesg)
    mnt = lab.mount("one")
    if not dmesg.is_dir():  # a boot begins its own
        dmesg.unlink()
        what(dmesg)
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    assert lab.nodes() == ["shmem-one"]
    done = lab.run("kexec", "-l", "builtin", "--reuse-cmdline", "-e")
    assert done.returncode == 0, done
    lab.remount(mnt, "rw")
    (mnt / "other").write_text("the first change")
    assert lab.nodes() == [] and (mnt / "file").read_text() == "x"
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    assert lab.nodes() == ["shmem-one"]
    done = lab.run("ctl", "free", "one")
    assert done.returncode == 0 and lab.nodes() == []


def test_a_mount_s_own_log_that_cannot_be_written_fails_nothing(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    log = Path(lab.entry(mnt).socket.replace(".sock", ".log"))
    lab.umount(mnt)
    log.unlink(missing_ok=True)
    log.mkdir()
    lab.mount("one")  # the tree keeps its id, and so the name of its log
    assert (mnt / "file").read_text() == "x"
    lab.umount(mnt)
    log.rmdir()


def test_damaged_files_refuse_a_mount_in_one_line(lab: Any) -> None:
    lab.umount(lab.mount("one"))
    for name in ("machine.json", "kernel.json", "nvram.json"):
        path = Path(lab.machine.path(name))
        kept = path.read_bytes()
        for damage in (lambda path: path.write_text("[" * 100_000), fifo, lambda path: path.symlink_to("/dev/zero")):
            path.unlink()
            damage(path)
            done = lab.helper(lab.dir("one"), "pkram=one")
            path.unlink()
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (32, "", 1), done
            assert f"{path} is damaged: " in done.stderr
            path.write_bytes(kept)
    lab.umount(lab.mount("one"))


@pytest.mark.few(2)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_standard_descriptors_that_are_closed_or_full_harm_nothing(lab: Any, closed: str) -> None:
    mnt = lab.dir("one")

    def run(*words: str) -> None:
        line = f"{shlex.join([sys.executable, '-m', 'pkramfs', *words])} {closed}"
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60, env=env)
        assert done.returncode == 0, (words, done)
        assert done.stderr.count("\n") <= (1 if "full" in closed else 0), (words, done)

    run("mount", "none", str(mnt), "-v", "-o", "pkram=one")
    assert os.path.ismount(mnt)
    opened = [os.readlink(f"/proc/{lab.entry(mnt).pid}/fd/{number}") for number in (0, 1, 2)]
    assert opened[0] == "/dev/null" and opened[1] == opened[2] == lab.entry(mnt).socket.replace(".sock", ".log")
    (mnt / "file").write_text("x" * 5000)
    run("mount", "none", str(mnt), "-v", "-o", "remount,preserve,ro")
    run("kexec", "-v", "-l", "builtin", "--reuse-cmdline", "-e")
    assert (mnt / "file").read_text() == "x" * 5000
    run("mount", "none", str(mnt), "-o", "remount,rw")
    lab.umount(mnt)
