# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl upgrade: another daemon serves, and what was open stays open."""

import json
import os
from typing import Any

import pytest

pytestmark = pytest.mark.mount


def test_a_mount_in_use_gets_another_daemon(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    before = lab.entry(mnt)
    with open(mnt / "file") as held, open(mnt / "gone", "w+") as gone:
        gone.write("still")
        gone.flush()
        os.unlink(mnt / "gone")
        done = lab.run("ctl", "--json", "upgrade", "one")
        assert done.returncode == 0, done.stderr
        (one,) = json.loads(done.stdout)
        after = lab.entry(mnt)
        assert (one["before"], one["pid"]) == (before.pid, after.pid) and before.pid != after.pid
        assert (after.holder, after.tree_id) == (before.holder, before.tree_id)
        gone.seek(0)
        assert (held.read(), gone.read()) == ("x", "still")
    assert "survives" in lab.run("ctl", "status").stdout and "1 takeover" in lab.run("ctl", "status").stdout
    lab.remount(mnt, "preserve,ro")
    assert lab.run("ctl", "upgrade", "--all").returncode == 0
    assert (lab.status(mnt)["state"], lab.status(mnt)["frozen"]) == ("preserved", True)
    lab.remount(mnt, "rw")
    (mnt / "more").write_text("y")
    lab.umount(mnt)


def test_who_has_no_holder_is_refused(lab: Any) -> None:
    mnt = lab.mount("plain", "mode=755")
    done = lab.run("ctl", "upgrade", str(mnt))
    assert done.returncode != 0 and "has no holder" in done.stderr and done.stderr.count("\n") == 1
    assert lab.run("ctl", "upgrade", "nothing").returncode == 8
    assert lab.run("ctl", "upgrade").returncode == 2
