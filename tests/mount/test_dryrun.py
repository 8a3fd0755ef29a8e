# SPDX-License-Identifier: GPL-2.0-or-later
"""remount,preserve,dryrun tells what a preserve would do, does nothing, and is right."""

import shutil
import subprocess

import pytest

from tests.support.lab import Mounts
from tests.support.places import ROOT

pytestmark = pytest.mark.mount


def rehearsed(lab: Mounts, mnt) -> tuple[int, list[str]]:
    done = lab.helper(mnt, "remount,preserve,dryrun")
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_a_dry_run_is_right_and_changes_nothing(lab: Mounts) -> None:
    mnt = lab.mount("x")
    (mnt / "a").write_bytes(b"x" * 10_000)
    before = lab.status(mnt)
    (mnt / "gone").touch()
    with open(mnt / "open\x1b", "w") as file, open(mnt / "gone"):
        (mnt / "gone").unlink()
        status, lines = rehearsed(lab, mnt)
        assert status == 32
        assert lines[0].startswith(f"x on {mnt}: 2 files, 12.0 KiB; about ")
        assert lines[1:] == ["refused   /open\\x1b: open for writing", "lost      /gone (deleted)"]
        assert lab.helper(mnt, "remount,preserve,ro").returncode == 32
        file.write("still writable")
    assert rehearsed(lab, mnt)[0] == 0
    after = lab.status(mnt)
    assert (after["state"], after["frozen"], lab.nodes()) == (before["state"], False, [])
    lab.remount(mnt, "preserve,ro")
    assert rehearsed(lab, mnt)[0] == 0 and lab.nodes() == ["shmem-x"]


def test_refusals(lab: Mounts) -> None:
    mnt = lab.mount("plain", "size=1M")
    assert "without pkram=NAME" in lab.helper(mnt, "remount,preserve,dryrun").stderr
    assert "dryrun goes with preserve" in lab.helper(mnt, "remount,dryrun,ro").stderr
    assert "dryrun goes with preserve" in lab.helper(lab.dir("other"), "pkram=y,dryrun").stderr


@pytest.mark.skipif(not ROOT or shutil.which("mount.pkramfs", path="/sbin") is None, reason="needs mount(8)'s helper")
def test_through_mount_8(lab: Mounts) -> None:
    mnt = lab.mount("x")
    done = subprocess.run(["mount", "-o", "remount,preserve,dryrun", mnt], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"x on {mnt}: 0 files")
    (mnt / "f").touch()
