"""Corners of real mounts in which something once was lost or ignored."""

import os
import signal
from typing import Any

import pytest

pytestmark = pytest.mark.mount


def test_a_dead_mount_is_recognized_although_the_kernel_knows_its_attributes(lab: Any) -> None:
    """stat of a dead mount may still be answered from the cache; the next mount must not believe it."""
    mnt = lab.mount("one")
    os.stat(mnt)
    entry = lab.entry(mnt)
    os.kill(entry.pid, signal.SIGKILL)
    lab.gone(entry)
    os.stat(mnt)  # answered by nobody
    lab.mount("one")
    lab.umount(mnt)
    assert not os.path.ismount(mnt)


def test_strict_said_at_the_remount(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "directory").mkdir()
    done = lab.helper(mnt, "remount,preserve,ro,pkram_strict")
    assert done.returncode == 32
    assert "/directory is no regular file" in done.stderr
    assert lab.nodes() == []
    (mnt / "directory").rmdir()
    lab.remount(mnt, "preserve,ro,pkram_strict")
    assert lab.nodes() == ["shmem-one"]
