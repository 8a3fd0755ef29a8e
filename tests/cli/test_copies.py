# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl cp and rename, between mounts."""

import json
from pathlib import Path

import pytest

from pkramfs.machine.directory import Machine
from tests.support.preserved import Trees, write


@pytest.fixture
def trees(machine: Machine) -> Trees:
    return Trees(machine)


def test_names_are_of_mounts_or_of_programs(trees, ctl):
    trees.plant("x", lambda tree: write(tree, b"f", b"x"))
    trees.preserve("guest", 10)
    assert ctl("cp", "x", "y")[:2] == (0, "shmem-x -> shmem-y: 11 pages (44.0 KiB)\n")
    assert json.loads(ctl("--json", "rename", "guest", "other")[1])["name"] == "other"
    assert ctl("rename", "y", "shmem-z")[0] == 0
    assert [node["name"] for node in json.loads(ctl("--json", "nodes")[1])] == ["shmem-z", "other", "shmem-x"]
    assert "copied node shmem-x to shmem-y" in trees.dmesg() and "renamed node guest to other" in trees.dmesg()
    for words, status, said in (
        (["cp", "x", "z"], 9, "node shmem-z exists already: free it, or take another name"),
        (["rename", "nobody", "y"], 9, "no node shmem-nobody is preserved"),
        (["rename", "x", ""], 2, "NEW is 0 bytes long: a name has 1 to 127 bytes"),
        (["cp", "x", "n" * 128], 2, "NEW is 128 bytes long: a name has 1 to 127 bytes"),
    ):
        assert ctl(*words) == (status, "", f"pkramctl: {said}\n")


@pytest.mark.mount
def test_a_mount_finds_them(trees, ctl, place):
    first, second = Path(place()), Path(place())
    trees.ok("mount", "none", first, "-o", "pkram=x")
    (first / "f").write_text("before")
    trees.ok("mount", "none", first, "-o", "remount,preserve,ro")
    assert ctl("cp", "x", "y")[0] == 0
    status, _, err = ctl("rename", "x", "z")
    assert (status, err) == (9, "pkramctl: shmem-x is in use by a mount: umount it first\n")
    status, _, err = ctl("cp", "y", "x")
    assert (status, err) == (9, "pkramctl: node shmem-x exists already: free it, or take another name\n")
    assert ctl("rename", "y", "z")[0] == 0
    trees.ok("mount", "none", second, "-o", "pkram=z")
    (second / "f").write_text("after")
    assert (first / "f").read_text() == "before"
    trees.ok("mount", "none", second, "-o", "remount,preserve,ro")
