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
