# SPDX-License-Identifier: GPL-2.0-or-later
"""remount,preserve,ro and back, on real mounts; the same name mounted again."""

import errno
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.trees import snapshot

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0


def _fill(root: Path) -> None:
    rng = random.Random(5)
    (root / "empty").write_bytes(b"")
    (root / "one").write_bytes(b"1")
    (root / "big").write_bytes(rng.randbytes(3 << 20))
    for number in range(5):
        directory = root / f"d{number}" / "deep"
        directory.mkdir(parents=True)
        for size in (10, 4096, 5000):
            (directory / f"f{size}").write_bytes(rng.randbytes(size))
    os.link(root / "big", root / "d1" / "again")
    os.symlink("d1/again", root / "link")
    os.mkfifo(root / "pipe")


def test_preserve_umount_mount_restores_everything(lab: Any) -> None:
    mnt = lab.mount("one")
    _fill(mnt)
    before = snapshot(mnt)
    lab.remount(mnt, "preserve,ro")
    assert lab.nodes() == ["shmem-one"]
    assert snapshot(mnt) == before  # readable while preserved
    lab.umount(mnt)
    mnt = lab.mount("one")
    assert snapshot(mnt) == before
    assert "restored 20 files" in lab.dmesg()


def test_that_deleted_files_have_names_is_said(lab: Any) -> None:
    """As a kexec leaves them that was to keep the mount, if the holder died meanwhile."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    (mnt / ".pkramfs-deleted").mkdir(mode=0o700)
    (mnt / "file").rename(mnt / ".pkramfs-deleted" / str(os.stat(mnt / "file").st_ino))
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    said = "one: /.pkramfs-deleted has the files that were deleted but open when its mount was lost: remove it\n"
    assert lab.helper(mnt, "pkram=one").stdout == said
    assert lab.nodes() == ["shmem-one"]


def test_preserved_is_read_only_for_everybody(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    for change in (
        lambda: (mnt / "new").write_text(""),
        lambda: (mnt / "file").write_text(""),
        lambda: os.unlink(mnt / "file"),
        lambda: os.chmod(mnt / "file", 0),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    status = lab.status(mnt)
    assert (status["state"], status["frozen"], status["files"]) == ("preserved", True, 1)


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_the_daemon_is_frozen_whatever_the_kernel_says(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    subprocess.run(["mount", "-i", "-o", "remount,rw", str(mnt)], check=True)
    with pytest.raises(OSError) as caught:
        (mnt / "file").write_text("y")
    assert caught.value.errno == errno.EROFS
    lab.remount(mnt, "rw")
    (mnt / "file").write_text("y")
    assert lab.nodes() == []


@pytest.mark.parametrize("back", ["rw", "nopreserve,rw"])
def test_back_to_writing(lab: Any, back: str) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    lab.remount(mnt, back)
    assert lab.nodes() == []
    (mnt / "file").write_text("y")
    lab.umount(mnt)
    assert os.listdir(lab.mount("one")) == []  # it was live: freed


def test_nopreserve_alone_stays_read_only(lab: Any) -> None:
    mnt = lab.mount("one")
    lab.remount(mnt, "preserve,ro")
    lab.remount(mnt, "nopreserve")
    assert lab.status(mnt)["state"] == "live"
    assert lab.nodes() == []


def test_preserve_twice_is_one(lab: Any) -> None:
    mnt = lab.mount("one")
    lab.remount(mnt, "preserve,ro")
    lab.remount(mnt, "preserve,ro")
    assert lab.dmesg().count("one preserved") == 1


def test_preserve_again_after_a_change(lab: Any) -> None:
    mnt = lab.mount("one")
    for content in ("a", "b", "c"):
        (mnt / "file").write_text(content)
        lab.remount(mnt, "preserve,ro")
        lab.remount(mnt, "rw")
    (mnt / "file").write_text("last")
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    assert (lab.mount("one") / "file").read_text() == "last"


def test_writers_are_named(lab: Any) -> None:
    mnt = lab.mount("one")
    with open(mnt / "open file", "wb", buffering=0) as file:
        file.write(b"x")
        done = lab.helper(mnt, "remount,preserve,ro")
        assert done.returncode == 32
        assert "open file" in done.stderr and "open for writing" in done.stderr
        assert done.stderr.count("\n") == 1
        file.write(b"y")  # nothing was changed
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    assert (lab.mount("one") / "open file").read_bytes() == b"xy"


def test_readers_do_not_matter(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    with open(mnt / "file") as file:
        lab.remount(mnt, "preserve,ro")
        assert file.read() == "x"


def test_a_restored_tree_stays_preserved_until_it_changes(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    for _ in range(2):  # looking costs nothing
        mnt = lab.mount("one")
        assert (mnt / "file").read_text() == "x"
        assert lab.status(mnt)["state"] == "preserved"
        lab.umount(mnt)
    mnt = lab.mount("one")
    (mnt / "file").write_text("changed")
    assert lab.status(mnt)["state"] == "live"
    assert lab.nodes() == []
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    assert (lab.mount("one") / "file").read_text() == "changed"


def test_restored_and_preserved_again_without_a_change_costs_no_save(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    mnt = lab.mount("one")
    lab.remount(mnt, "preserve,ro")
    assert lab.dmesg().count("one preserved") == 1
    assert lab.status(mnt)["frozen"]


def test_memory_comes_back(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "big").write_bytes(bytes(64 << 20))
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    held = lab.leased()
    assert held >= 64 << 20
    mnt = lab.mount("one")
    (mnt / "big").unlink()
    lab.umount(mnt)
    assert lab.leased() == 0
    assert lab.nodes() == []


def test_a_restore_that_does_not_fit_is_refused_and_loses_nothing(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "big").write_bytes(b"x" * (2 << 20))
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    done = lab.helper(mnt, "pkram=one,size=1M")
    assert done.returncode == 32
    assert "size=" in done.stderr and "nothing is lost" in done.stderr
    assert not lab.machine.live_ids()
    assert (lab.mount("one") / "big").read_bytes() == b"x" * (2 << 20)


def test_resize(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,size=8M")
    (mnt / "file").write_bytes(bytes(4 << 20))
    lab.remount(mnt, "size=16M")
    assert os.statvfs(mnt).f_blocks << 12 == 16 << 20
    done = lab.helper(mnt, "remount,size=1M")
    assert done.returncode == 32 and "too small" in done.stderr


def test_bind_mount_names_the_same_tree(lab: Any) -> None:
    if not ROOT:
        pytest.skip("needs root")
    mnt, bind = lab.mount("one"), lab.dir("bind")
    (mnt / "sub").mkdir()
    subprocess.run(["mount", "--bind", str(mnt), str(bind)], check=True)
    try:
        lab.remount(bind, "preserve,ro")
        assert lab.status(mnt)["state"] == "preserved"
    finally:
        subprocess.run(["umount", str(bind)], check=True)


def test_the_merged_words_of_mount_8(lab: Any) -> None:
    """What libmount passes to a helper when nothing is in fstab."""
    mnt = lab.mount("one")
    lab.remount(
        mnt, "ro,nosuid,nodev,relatime,user_id=0,group_id=0,default_permissions,allow_other,blksize=4096,preserve"
    )
    assert lab.status(mnt)["state"] == "preserved"


@pytest.mark.skipif(not ROOT, reason="mount(8) wants root, or a line in fstab")
@pytest.mark.skipif(not os.path.exists("/sbin/mount.fuse.pkramfs"), reason="the links in /sbin are not made")
def test_through_mount_8(lab: Any) -> None:
    mnt = lab.dir("one")
    subprocess.run(["mount", "-t", "pkramfs", "-o", "pkram=one", "none", str(mnt)], check=True)
    (mnt / "file").write_text("x")
    subprocess.run(["mount", "-o", "remount,preserve,ro", str(mnt)], check=True)
    assert lab.nodes() == ["shmem-one"]
    subprocess.run(["mount", "-o", "remount,rw", str(mnt)], check=True)
    assert lab.nodes() == []
