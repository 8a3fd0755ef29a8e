# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl export and import: files that appear whole or not at all, pipes, a mount of what was imported."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pkramfs.archive.claiming import claimed
from pkramfs.fs.tree import Tree
from pkramfs.machine.directory import Machine
from tests.support.preserved import Trees, write
from tests.support.trees import snapshot

SOCK = 0o140600


@pytest.fixture
def trees(machine: Machine) -> Trees:
    return Trees(machine)


def small(tree: Tree) -> None:
    write(tree, b"a/f", b"content")


def test_a_file_appears_whole(trees, ctl, tmp_path):
    trees.plant("x", small)
    status, out, err = ctl("export", "x", str(tmp_path / "out.tar"))
    assert (status, out, err) == (0, f"{tmp_path}/out.tar: 3 names, 7 B\n", "")
    assert (tmp_path / "out.tar").stat().st_mode & 0o777 == 0o644
    with tarfile.open(tmp_path / "out.tar") as archive:
        assert archive.getnames() == [".", "./a", "./a/f"]
    assert json.loads(ctl("--json", "import", "y", str(tmp_path / "out.tar"))[1]) == {
        "names": 3,
        "bytes": 7,
        "left_out": [],
    }
    assert trees.run("ctl", "cat", "y", "a/f").stdout == "content"
    assert "imported node shmem-y, 3 names" in trees.dmesg()


def test_through_pipes(trees, ctl):
    trees.plant("x", small)
    words = [sys.executable, "-m", "pkramfs", "ctl"]
    archive = subprocess.run([*words, "export", "x", "-"], capture_output=True, check=True, env=trees.environment)
    done = subprocess.run([*words, "import", "y", "-"], input=archive.stdout, check=True, capture_output=True)
    assert (archive.stderr, done.stdout, done.stderr) == (b"", b"y: 3 names, 7 B\n", b"")


def test_a_disk_that_is_full_leaves_nothing(trees, ctl, host):
    trees.plant("x", lambda tree: write(tree, b"f", bytes(4 << 20)))
    host.fill(1 << 20)
    status, out, err = ctl("export", "x", f"{host.directory}/out.tar")
    assert (status, out, err) == (1, "", f"pkramctl: {host.directory}/out.tar: No space left on device\n")
    assert os.listdir(host.directory) == ["filling"]
    assert ctl("export", "x", "/dev/full")[::2] == (1, "pkramctl: /dev/full: No space left on device\n")


def test_what_is_left_out_is_listed_and_is_a_status(trees, ctl, tmp_path):
    trees.plant("x", lambda tree: tree.mknod(1, b"s\x1b", SOCK))
    status, out, err = ctl("--json", "export", "x", str(tmp_path / "out.tar"))
    reason = "a socket, which no archive can hold"
    assert (status, err) == (1, f"pkramctl: warning: left out: /s\\x1b: {reason}\n")
    assert json.loads(out)["left_out"] == [{"path": "s\x1b", "reason": reason}]


ERRORS = [
    (["export", "y", "/tmp/x.tar"], 9, "no node shmem-y is preserved"),
    (["export", "x", "/nosuch/x.tar"], 1, "/nosuch/x.tar: No such file or directory"),
    (["import", "x", "/dev/null"], 9, "node shmem-x exists already: free it, or take another name"),
    (["import", "y" * 128, "/dev/null"], 2, "NAME is 128 bytes long: a name has 1 to 127 bytes"),
    (["import", "", "/dev/null"], 2, "NAME is 0 bytes long: a name has 1 to 127 bytes"),
    (["export", "x", ""], 2, "invalid FILE '': give its name, or - for standard output"),
    (["diff", "x", "/dev/null"], 2, "/dev/null is not a directory"),
    (["import", "y", "/nosuch"], 1, "/nosuch: No such file or directory"),
    (["import", "y", sys.executable], 1, f"{sys.executable}: not a tar archive"),
]


def test_one_clear_line(trees, ctl):
    trees.plant("x", small)
    for words, status, said in ERRORS:
        assert ctl(*words) == (status, "", f"pkramctl: {said}\n")


def test_a_full_machine_imports_nothing(trees, ctl, tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for number in range(3):
            info = tarfile.TarInfo(f"f{number}")
            info.size = 100 << 20
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    status, out, err = ctl("import", "y", str(tmp_path / "in.tar"))
    assert (status, out, err.count("\n")) == (4, "", 1) and "RAM is full" in err
    memory = json.loads(ctl("--json", "status")[1])["memory"]
    assert memory["tree"] == 0


def test_others_go_on_meanwhile(trees, ctl):
    with claimed(trees.up(), b"shmem-y", "import"):
        status, out, _ = ctl("status")
        assert status == 0 and "import" not in out and "problem" not in out


@pytest.mark.mount
def test_what_was_imported_can_be_mounted_and_is_what_was_exported(trees, ctl, place, tmp_path):
    first, second = Path(place()), Path(place())
    trees.ok("mount", "none", first, "-o", "pkram=x")
    (first / "a").mkdir()
    (first / "a" / "data").write_bytes(os.urandom(1_000_001))
    os.link(first / "a" / "data", first / "again")
    os.symlink("a", first / "way")
    with open(first / "sparse", "wb") as file:
        os.pwrite(file.fileno(), b"x", 1 << 40)
    os.utime(first / "again", ns=(1_617_139_699_000_000_001, 1_617_139_699_123_456_789))
    os.setxattr(first / "a", "user.a", b"b")
    trees.ok("mount", "none", first, "-o", "remount,preserve,ro")
    trees.ok("ctl", "export", "x", tmp_path / "out.tar")
    trees.ok("ctl", "import", "y", tmp_path / "out.tar")
    trees.ok("mount", "none", second, "-o", "pkram=y")
    before, after = snapshot(first), snapshot(second)
    assert before.keys() == after.keys()
    for path, one in before.items():
        same = one._replace(ino=after[path].ino)
        assert same == after[path], path


@pytest.mark.usefixtures("damaged")
def test_best_effort(trees, ctl, tmp_path):
    trees.plant("x", lambda tree: [write(tree, b"%d\x1b" % n, bytes(3 << 20)) for n in range(2)], strict=True)
    kernel, out = trees.up(), str(tmp_path / "out.tar")
    with kernel.store.prepare_load(b"shmem-x") as load:
        head = list(load)[1].record.pages_head
    kernel.ram.bytes[(head << 12) + 100] ^= 1
    status, _, err = ctl("export", "x", out)
    assert (status, err.count("\n")) == (3, 1) and not os.path.exists(out)
    status, said, err = ctl("export", "x", out, "--best-effort")
    assert (status, said) == (1, f"{out}: 2 names, 3.0 MiB\n")
    assert f"warning: Link at pfn {head:x}: checksum is" in err
    assert "warning: left out: /0\\x1b: 504 pages of it cannot be found\n" in err
    with tarfile.open(out) as archive:
        assert archive.getnames() == [".", "./1\x1b"]
    kernel.ram.bytes[(head << 12) + 100] ^= 1
    assert ctl("export", "x", out, "--best-effort")[0] == 0
    (node,) = kernel.store.nodes()
    kernel.ram.bytes[node.table_pfn << 12] ^= 1  # all files come out, and something is wrong all the same
    status, said, err = ctl("export", "x", out, "--best-effort")
    assert (status, said, err.count("\n")) == (1, f"{out}: 3 names, 6.0 MiB\n", 1)
