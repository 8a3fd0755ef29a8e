# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input: one clear line, mount(8)'s exit status, nothing lost."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pkramfs.machine.directory import Machine

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0


def _refused(done: Any, status: int, *parts: str) -> None:
    assert done.returncode == status, done
    assert done.stdout == ""
    assert done.stderr.startswith("mount.pkramfs: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("pkram=x,frobnicate", "unknown mount option 'frobnicate'"),
        ("frobnicate=3", "unknown mount option 'frobnicate=3'"),
        ("pkram=", "pkram needs a value"),
        (f"pkram={'n' * 128}", "128 bytes"),
        ("pkram=x,size=much", "size=much"),
        ("size=x%", "percent"),
        ("mode=999", "octal"),
        ("uid=nobody-here", "uid="),
        ("huge=sometimes", "huge="),
        ("mpol=fast", "mpol="),
        ("nr_inodes=-1", "nr_inodes="),
        ("ro=1", "takes no value"),
        ("pkram=x,preserve", "mount first"),
        ("pkram=x,preserve,ro", "mount first"),
        ("nopreserve", "mount first"),
        ("machine=a/b", "machine name"),
    ],
)
def test_options(lab: Any, options: str, part: str) -> None:
    mnt = lab.dir("one")
    _refused(lab.helper(mnt, options), 1, part)
    assert not os.path.ismount(mnt)
    assert not lab.machine.exists()  # not even that was made


def test_longest_name(lab: Any) -> None:
    mnt = lab.mount("one", f"pkram={'n' * 127}")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    assert lab.nodes() == [f"shmem-{'n' * 127}"]


def test_mount_point(lab: Any) -> None:
    (lab.root / "file").write_text("")
    _refused(lab.helper(lab.root / "missing", "pkram=x"), 32, "does not exist")
    _refused(lab.helper(lab.root / "file", "pkram=x"), 32, "not a directory")


def test_words_on_the_command_line(lab: Any) -> None:
    assert lab.run("mount", "none").returncode == 1
    assert lab.run("mount", "none", "/tmp", "--frob").returncode == 1
    _refused(lab.run("mount", "none", "/tmp", "-t", "ext4"), 1, "ext4")
    assert lab.run("mount", "--help").returncode == 0
    assert lab.run("mount", "--version").stdout.startswith("mount.pkramfs (pkramfs)")


def test_without_a_name(lab: Any) -> None:
    mnt = lab.mount("plain", "size=16M")
    (mnt / "file").write_text("x")
    _refused(lab.helper(mnt, "remount,preserve,ro"), 32, "without pkram=NAME")
    assert not os.statvfs(mnt).f_flag & os.ST_RDONLY  # rw again
    (mnt / "file").write_text("y")
    assert "was not preserved" in lab.dmesg()


def test_preserve_needs_read_only(lab: Any) -> None:
    mnt = lab.mount("one")
    _refused(lab.helper(mnt, "remount,preserve"), 1, "read-only")
    _refused(lab.helper(mnt, "remount,preserve,rw"), 1, "read-only")
    assert lab.status(mnt)["state"] == "live"


def test_a_name_is_mounted_once(lab: Any) -> None:
    mnt = lab.mount("one")
    again = lab.helper(mnt, "pkram=one")
    assert (again.returncode, again.stdout) == (0, f"one is already mounted on {mnt}\n")
    _refused(lab.helper(lab.dir("two"), "pkram=one"), 32, str(mnt))
    assert len(lab.machine.live_ids()) == 1


def test_a_name_cannot_be_changed(lab: Any) -> None:
    mnt = lab.mount("one")
    _refused(lab.helper(mnt, "remount,pkram=two,ro"), 1, "cannot be changed")
    lab.remount(mnt, "pkram=one,preserve,ro")


def test_remount_of_something_else(lab: Any) -> None:
    _refused(lab.helper(lab.dir("plain"), "remount,preserve,ro"), 32, "not a pkramfs mount")
    _refused(lab.helper("/proc", "remount,ro"), 32, "not a pkramfs mount")


def test_remount_of_a_dead_mount(lab: Any) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    lab.kill(entry)
    _refused(lab.helper(mnt, "remount,preserve,ro"), 32, "has died")


@pytest.mark.usefixtures("damaged")
def test_ram_cut_short(lab: Any) -> None:
    lab.umount(lab.mount("one"))
    os.truncate(lab.machine.path("ram"), 4096)
    _refused(lab.helper(lab.dir("one"), "pkram=one"), 32, "machine.json")


@pytest.mark.usefixtures("damaged")
def test_ram_overwritten_with_noise(lab: Any) -> None:
    """Whatever RAM says, the answer is a refusal, never a crash or a wrong tree."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    node = lab.run("ctl", "--json", "nodes").stdout
    assert "shmem-one" in node
    with Machine.locate().ram()._mapping as memory:  # every page in use
        ram = Machine.locate().ram()
        for start, end in ram.data_spans():
            memory[start << 12 : end << 12] = os.urandom((end - start) << 12)
    done = lab.helper(mnt, "pkram=one")
    _refused(done, 32)
    assert not os.path.ismount(mnt)


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_a_remount_that_bypassed_the_helper_is_not_preserved(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    subprocess.run(["mount", "-i", "-o", "remount,ro", str(mnt)], check=True)
    assert lab.status(mnt)["state"] == "live"
    lab.remount(mnt, "preserve,ro")  # preserve on what is read-only already
    assert lab.status(mnt)["state"] == "preserved"


def test_the_helper_imports_little() -> None:
    code = (
        "import sys; import pkramfs.cli.mount as m; m.parser(); "
        "print([n for n in ('numpy','trio','pyfuse3','rich') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "[]\n"
