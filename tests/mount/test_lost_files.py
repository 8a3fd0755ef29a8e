# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of a machine that are lost while trees are preserved in its RAM."""

import os
from pathlib import Path
from typing import Any

import pytest

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
