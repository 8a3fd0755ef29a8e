# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of a machine that are lost while trees are preserved in its RAM."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pkramfs.machine import locks
from tests.support.waiting import until

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("how", ["mount", "ctl", "ctl without a copy"])
def test_a_lost_description_loses_no_tree(lab: Any, how: str) -> None:
    assert lab.run("ctl", "machine", "create", "--ram", "256M").returncode == 0
    mnt = lab.mount("one")
    (mnt / "file").write_text("kept")
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    path = Path(lab.machine.path("machine.json"))
    path.unlink()
    for words in (("ctl", "status"), ("ctl", "nodes"), ("ctl", "verify")):
        done = lab.run(*words)
        assert done.returncode == 8 and "machine.json is missing, but its RAM is there" in done.stderr, done
    if how == "ctl":
        assert lab.run("ctl", "machine", "create").returncode == 0
    elif how == "ctl without a copy":
        os.unlink(lab.machine.path("machine.json.copy"))
        done = lab.run("ctl", "machine", "create")
        assert done.returncode == 8 and "`pkramctl machine create --ram 268435456`" in done.stderr, done
        assert lab.run("ctl", "machine", "create", "--ram", "268435456").returncode == 0
    mnt = lab.mount("one")
    assert (mnt / "file").read_text() == "kept"
    lab.remount(mnt, "preserve,ro")
    assert lab.run("kexec", "-l", "builtin", "--reuse-cmdline", "-e").returncode == 0
    assert (mnt / "file").read_text() == "kept"


def test_who_takes_over_makes_no_machine_in_the_place_of_one_that_was_moved_away(lab: Any) -> None:
    """Put back, and mounted again, it has the tree."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("kept")
    os.sync()
    entry, away = lab.entry(mnt), lab.files.with_name("away")
    lab.files.rename(away)
    os.kill(entry.pid, signal.SIGKILL)
    until(lambda: not locks.is_held(f"{away}/mounts/{Path(entry.socket).stem}.lock"), "somebody has the tree")
    assert not lab.files.exists()
    away.rename(lab.files)
    mnt = lab.mount("one")
    assert (mnt / "file").read_text() == "kept"


@pytest.mark.parametrize("options", ["", ",format=1"])
def test_what_nobody_would_find_is_not_preserved(lab: Any, options: str) -> None:
    """The file behind RAM is another, or none: the mount goes on, and says so."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("kept")
    ram, away = lab.files / "ram", lab.files / "away"
    ram.rename(away)
    for replaced in (False, True):
        if replaced:
            with open(ram, "wb") as file:
                file.truncate(away.stat().st_size)
        done = lab.helper(mnt, f"remount,preserve,ro{options}")
        assert done.returncode == 32 and f"{ram} is no longer the memory of this mount" in done.stderr, done
        assert "was not preserved" in lab.dmesg().splitlines()[-1]
        (mnt / "file").write_text("goes on")
    away.rename(ram)
    (mnt / "file").write_text("kept")
    lab.remount(mnt, f"preserve,ro{options}")
    lab.umount(mnt)
    assert (lab.mount("one") / "file").read_text() == "kept"


def test_an_entry_that_cannot_be_read_frees_no_tree(lab: Any) -> None:
    """It may name a log. Status says so; put back, it leads to the tree."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("kept")
    os.sync()
    entry = lab.entry(mnt)
    lab.kill(entry)
    path = Path(entry.socket).with_suffix(".json")
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    lab.umount(lab.mount("two"))
    assert f"{path}, which tells where its tree is, cannot be read" in lab.run("ctl", "status").stdout
    path.write_bytes(good)
    assert (lab.mount("one") / "file").read_text() == "kept"


def test_a_mount_whose_lock_was_removed_keeps_its_tree_and_its_name(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("kept")
    os.sync()
    entry = lab.entry(mnt)
    Path(entry.socket).with_suffix(".lock").unlink()
    done = lab.helper(lab.dir("elsewhere"), "pkram=one")
    assert done.returncode == 32 and f"one is mounted on {mnt} already" in done.stderr, done
    lab.umount(lab.mount("two"))
    os.kill(entry.pid, signal.SIGKILL)
    assert os.statvfs(mnt).f_files and lab.run("ctl", "verify").returncode == 0
    assert (mnt / "file").read_text() == "kept"
    lab.umount(mnt)
    assert lab.leased() == 0
