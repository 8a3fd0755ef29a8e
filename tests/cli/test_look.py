# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl ls, tree, stat and cat: forms that people know, names that reach no terminal raw, errors of one line."""

import json
import os
import stat

import pytest

from pkramfs.cli.look import ENTRY
from pkramfs.fs import acl
from pkramfs.fs.tree import Tree
from pkramfs.machine.directory import Machine
from tests.support.preserved import Trees, write

ACL = acl.pack([(1, 6, 0xFFFFFFFF), (2, 6, 7), (4, 4, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)])
WHEN = 1_600_000_000_123_456_789


def fill(tree: Tree) -> None:
    write(tree, b"dir/file", b"hello\n")
    inode = write(tree, b"e\x1b[31m\xff\nvil", b"\x1b]0;")
    inode.mode |= 0o4111
    tree.setxattr(inode.ino, b"user.n\x07", b"v")
    tree.symlink(1, b"way", b"dir/\x1b")
    tree.symlink(1, b"good", b"dir")
    tree.mknod(1, b"null", stat.S_IFCHR | 0o666, 0x0103)
    for child in (*tree.inodes.values(),):
        child.mtime = child.ctime = child.atime = WHEN
        child.btime = 0
    tree.setxattr(tree.lookup(1, b"dir").ino, acl.DEFAULT, ACL)


@pytest.fixture
def trees(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Trees:
    monkeypatch.setenv("TZ", "UTC")
    made = Trees(machine)
    made.plant("x", fill)
    return made


def test_ls(trees, ctl):
    status, out, err = ctl("ls", "x", "-n")
    lines = out.splitlines()
    assert (status, err, lines[0]) == (0, "", "total 4")
    assert lines[1].startswith("drwxr-xr-x+ 2 0 0   60 Sep 13  2020 dir")
    assert lines[2] == "-rwsr-xr-x  1 0 0    4 Sep 13  2020 e\\x1b[31m\\xff\\nvil"
    assert lines[3] == "lrwxrwxrwx  1 0 0    3 Sep 13  2020 good -> dir"
    assert lines[4] == "crw-r--r--  1 0 0 1, 3 Sep 13  2020 null"
    assert lines[5] == "lrwxrwxrwx  1 0 0    5 Sep 13  2020 way -> dir/\\x1b"
    assert ctl("ls", "shmem-x", "good")[1].endswith(" file\n")
    assert ctl("ls", "x", "dir/file")[1].endswith(" dir/file\n")


def test_tree(trees, ctl):
    status, out, _ = ctl("tree", "x")
    assert status == 0
    assert out.splitlines()[:5] == [".", "├── dir", "│   └── file", "├── e\\x1b[31m\\xff\\nvil", "├── good -> dir"]
    assert out.endswith("\n1 directory, 5 files\n")


def test_stat(trees, ctl):
    status, out, _ = ctl("stat", "x", "dir/../null")
    assert status == 0 and "Device type: 1,3" in out and "Access: (0644/crw-r--r--)" in out
    assert "Modify: 2020-09-13 12:26:40.123456789 +0000\n" in out and out.endswith(" Birth: -\n")
    assert "good -> dir" in ctl("stat", "x", "good")[1]
    assert " Xattr: user.n\\a (1 byte)" in ctl("stat", "x", os.fsdecode(b"e\x1b[31m\xff\nvil"))[1]


def test_cat(trees, ctl):
    assert trees.run("ctl", "cat", "x", "good/file", "dir/file").stdout == "hello\nhello\n"
    status, out, err = ctl("cat", "x", "dir/file", "good")
    assert (status, out, err) == (1, "", "pkramctl: good: Is a directory\n")


def test_json_is_exact_and_has_its_shape(trees, ctl):
    found = json.loads(ctl("--json", "ls", "x")[1])
    assert all(tuple(one) == ENTRY for one in found)
    names = [os.fsencode(one["path"]) for one in found]
    assert names == [b"dir", b"e\x1b[31m\xff\nvil", b"good", b"null", b"way"]
    assert [one["path"] for one in json.loads(ctl("--json", "tree", "x", "dir")[1])] == ["", "file"]
    one = json.loads(ctl("--json", "stat", "x", "dir/file")[1])
    assert tuple(one) == (*ENTRY, "xattrs", "extents") and one["extents"] == [{"offset": 0, "bytes": 6}]


ERRORS = [
    (["ls", "y"], 9, "no node shmem-y is preserved"),
    (["ls", "x", "no\x1b"], 1, "no\\x1b: No such file or directory"),
    (["stat", "x", "way/"], 1, "way/: No such file or directory"),
    (["cat", "x", "null"], 1, "null: it is not a regular file"),
    (["cat", "x"], 2, "the following arguments are required: PATH; see pkramctl cat --help"),
]


def test_one_clear_line(trees, ctl):
    for words, status, said in ERRORS:
        assert ctl(*words)[::2] == (status, f"pkramctl{' cat' if status == 2 else ''}: {said}\n")


@pytest.mark.usefixtures("damaged")
def test_a_damaged_tree_says_so(trees, ctl):
    kernel = trees.up()
    (node,) = kernel.store.nodes()
    kernel.ram.bytes[(node.object_pfn << 12) + 70] ^= 1
    status, out, err = ctl("ls", "x")
    assert (status, out, err.count("\n")) == (3, "", 1)
    assert "Object at pfn" in err and err.endswith("`pkramctl verify x` shows all that is wrong\n")


@pytest.mark.mount
def test_a_tree_in_use(machine, ctl, place, trees):
    """Live it is refused, preserved it is shown while the mount serves it, also after it was mounted again."""
    mnt = place()
    trees.ok("mount", "none", mnt, "-o", "pkram=y")
    with open(f"{mnt}/f", "w") as file:
        file.write("content")
    status, _, err = ctl("ls", "y")
    assert status == 9 and err.startswith(f"pkramctl: y is mounted on {mnt} and not preserved")
    trees.ok("mount", "none", mnt, "-o", "remount,preserve,ro")
    assert ctl("ls", "y")[1].endswith(" f\n") and trees.ok("ctl", "cat", "y", "f") == "content"
