# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl diff: one line for each difference, status 1 for any, names escaped, JSON exact."""

import json
import os
import stat

import pytest

from pkramfs.fs import acl
from pkramfs.fs.tree import Tree
from pkramfs.machine.directory import Machine
from tests.support.preserved import Trees, write

NOBODY = 0xFFFFFFFF


def everything(tree: Tree, number: int) -> None:
    """Files with attributes that have a number in them."""
    tree.mknod(1, b"d", stat.S_IFCHR | 0o600, os.makedev(1, number))
    inode = write(tree, b"f", b"x")
    tree.setxattr(inode.ino, b"user.x", b"%d" % number)
    entries = [(acl.USER_OBJ, 6, NOBODY), (acl.USER, 4, number), (acl.GROUP_OBJ, 4, NOBODY), (acl.OTHER, 4, NOBODY)]
    tree.setxattr(inode.ino, acl.ACCESS, acl.pack([*entries[:3], (acl.MASK, 2 + 2 * number & 6, NOBODY), entries[3]]))


@pytest.fixture
def trees(machine: Machine) -> Trees:
    made = Trees(machine)
    made.plant("x", lambda tree: (write(tree, b"a/f", b"one"), write(tree, b"e\x1b")))
    made.plant("y", lambda tree: (write(tree, b"a/f", b"ons!"), write(tree, b"new")))
    return made


def test_diff(trees, ctl, tmp_path, monkeypatch):
    status, out, err = ctl("diff", "--ignore-times", "x", "y")
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        "only in x: /e\\x1b",
        "only in y: /new",
        "/a/f: size 3 and 4",
        "/a/f: content differs at byte 2",
    ]
    trees.plant("p", lambda tree: everything(tree, 1))
    trees.plant("q", lambda tree: everything(tree, 2))
    assert [line for line in ctl("diff", "p", "q")[1].splitlines() if "mtime" not in line] == [
        "/d: device 1,1 and 1,2",
        "/f: mode 0644 and 0664",
        "/f: xattr system.posix_acl_access user::rw-,user:1:r--,group::r--,mask::r--,other::r--"
        " and user::rw-,user:2:r--,group::r--,mask::rw-,other::r--",
        "/f: xattr user.x '1' and '2'",
    ]
    trees.plant("r", lambda tree: tree.mkdir(1, b"f", 0o755))
    assert ctl("diff", "q", "r")[1].endswith("/f: type regular file and directory\n")
    assert "/: mtime 20" in ctl("diff", "q", "r")[1]
    found = json.loads(ctl("--json", "diff", "x", "y", "--ignore-times")[1])
    assert found[0] == {"path": "/e\x1b", "what": "only", "left": "e\x1b", "right": None}
    assert ctl("diff", "x", "shmem-x") == (0, "", "")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").touch()
    assert f"only in {tmp_path}/: /b\n" in ctl("diff", "x", f"{tmp_path}/")[1]
    monkeypatch.chdir(tmp_path)
    status, _, err = ctl("diff", "x", "a")
    assert status == 9 and err.startswith("pkramctl: warning: a is taken for a NAME; the directory is ./a\n")
    assert ctl("diff", "x", "./nosuch")[::2] == (1, "pkramctl: ./nosuch: No such file or directory\n")
