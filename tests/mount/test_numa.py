# SPDX-License-Identifier: GPL-2.0-or-later
"""mpol= of a real mount: its pages lie on the node that was asked for, and stay there over a kexec."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.mount


def trees(lab: Any) -> list[int]:
    found = json.loads(lab.run("ctl", "--json", "status").stdout)["numa"]
    return [found[node]["tree"] for node in sorted(found)]


def test_pages_lie_on_their_node_and_stay_there(lab: Any) -> None:
    assert lab.run("ctl", "machine", "create", "--ram", "256M", "--nodes", "2").returncode == 0
    mnt = lab.mount("one", "pkram=one,mpol=bind:1")
    (mnt / "file").write_bytes(b"x" * (5 << 20))
    assert trees(lab)[0] == 0
    assert trees(lab)[1] >= 5 << 20
    lab.remount(mnt, "preserve,ro")
    done = lab.run("kexec", "-le", "builtin:4M", "--reuse-cmdline")
    assert done.returncode == 0, done.stderr
    assert (mnt / "file").read_bytes() == b"x" * (5 << 20)
    assert trees(lab)[0] == 0
    shown = lab.run("ctl", "status").stdout
    assert "node 0" in shown
    assert "node 1" in shown
    lab.umount(mnt)


def test_a_node_that_is_not_there(lab: Any) -> None:
    done = lab.helper(lab.dir("one"), "pkram=one,mpol=bind:5")
    assert done.returncode == 1
    assert "mpol=bind:5: there is no node 5; the machine has 0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_remount_moves_what_comes_later(lab: Any) -> None:
    assert lab.run("ctl", "machine", "create", "--ram", "256M", "--nodes", "2").returncode == 0
    mnt = lab.mount("one", "pkram=one,mpol=bind:1")
    (mnt / "old").write_bytes(b"x" * (5 << 20))
    old = trees(lab)
    lab.remount(mnt, "mpol=bind:0")
    assert trees(lab) == old  # pages that are there stay
    (mnt / "new").write_bytes(b"y" * (20 << 20))
    assert trees(lab)[0] >= 10 << 20
    assert trees(lab)[1] >= 5 << 20
    done = lab.helper(mnt, "remount,mpol=bind:7,size=1G")
    assert (done.returncode, done.stderr.count("\n")) == (32, 1)
    assert "there is no node 7; the machine has 0, 1" in done.stderr
    assert lab.status(mnt)["options"] == "mpol=bind:0"
    lab.remount(mnt, "preserve,ro")
    assert lab.run("kexec", "-le", "builtin:4M", "--reuse-cmdline").returncode == 0
    assert lab.status(mnt)["options"] == "mpol=bind:0"  # what the remount said is the mount's
    assert "mpol=bind:0" in lab.run("ctl", "status").stdout
