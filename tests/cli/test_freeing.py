# SPDX-License-Identifier: GPL-2.0-or-later
"""A dry run of pkramctl free tells every path that would be lost, and changes nothing."""

import json

import pytest

from pkramfs.machine.directory import Machine
from tests.support.preserved import Trees, outlived, write


@pytest.fixture
def trees(machine: Machine) -> Trees:
    made = Trees(machine)
    made.plant("x", lambda tree: (write(tree, b"a/f", b"x" * 5000), write(tree, b"e\x1b")))
    made.preserve("guest", 10)
    return made


def test_what_would_go(trees, ctl):
    before = trees.up().leases.counts(), trees.dmesg()
    status, out, err = ctl("free", "--dry-run", "x")
    assert (status, err) == (0, "")
    first, *files = out.splitlines()
    assert first.startswith("shmem-x: ") and first.endswith(" would be given back")
    assert files == ["  lost   /a/f, 4.9 KiB", "  lost   /e\\x1b, 0 B"]
    found = json.loads(ctl("--json", "free", "-n", "--all")[1])
    assert [one["name"] for one in found["freed"]] == ["guest", "shmem-x"] and found["refused"] == []
    assert found["freed"][1]["lost"][1] == {"path": "/e\x1b", "size": 0}
    assert (trees.up().leases.counts(), trees.dmesg()) == before
    assert [node.name for node in trees.up().store.nodes()] == [b"guest", b"shmem-x"]


def test_what_would_be_refused_has_the_status_and_the_words_of_the_real_run(trees, ctl):
    lock = trees.machine.claim(trees.up().store.find(b"shmem-x").tree_id)
    for words in (["x"], ["--all"], ["nobody"]):
        status, out, _ = ctl("free", "-n", *words)
        assert status == 9 and out.splitlines()[-1].startswith("refused: ")
        if words != ["--all"]:
            assert ctl("free", *words)[2] == out.splitlines()[-1].replace("refused", "pkramctl") + "\n"
    lock.release()
    assert ctl("free", "-n")[0] == 2


def test_a_tree_that_has_outlived_its_daemon(trees, ctl):
    with outlived(trees, "z"):
        found = json.loads(ctl("--json", "free", "-n", "--all")[1])["freed"]
        assert [one["name"] for one in found] == ["guest", "shmem-x", "z"]
        assert ctl("free", "-n", "z")[1].endswith(
            "  its files are not known: its daemon has died: mount it to see them\n"
        )
        assert ctl("ls", "z")[2] == "pkramctl: the daemon of z has died, and its tree is in RAM: mount z to see it\n"


@pytest.mark.usefixtures("damaged")
def test_damage(trees, ctl):
    assert ctl("free", "-n", "--damaged")[1] == "every node can be read\n"
    kernel = trees.up()
    kernel.ram.bytes[(kernel.store.find(b"shmem-x").pfn << 12) + 60] ^= 1
    planned = ctl("free", "-n", "--damaged")[1]
    assert planned.startswith("would be given up: Node at pfn") and "would be given back" in planned
    status, out, _ = ctl("free", "--damaged")
    assert status == 0 and planned.replace("would be ", "") == out
