# SPDX-License-Identifier: GPL-2.0-or-later
"""Data for which there was no room when the kernel wrote back: who is told, and that no zeros are preserved."""

import contextlib
import errno
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
MIB = 1 << 20
OPTIONS = "pkram=one,size=4M"
UNASKED = f"{OPTIONS},fuse=pyfuse3"
"""Nobody is asked whether there is room for a write."""


def store(path: Path, size: int = 8 * MIB) -> None:
    """Store through a mapping of a file that is closed, which is told to nobody."""
    with open(path, "w+b") as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    memory[:] = b"data" * (size // 4)
    memory.close()


def careless_write(path: Path, size: int = 8 * MIB) -> None:
    """Write, and do not look at what close says."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    assert os.write(fd, b"data" * (size // 4)) == size
    with contextlib.suppress(OSError):
        os.close(fd)


def settled(lab: Any, directory: Path) -> dict[str, Any]:
    """What the daemon says once nobody writes any more: munmap and close return before the last of it arrives."""
    deadline = time.monotonic() + 60
    while True:
        status: dict[str, Any] = lab.status(directory)
        if not status["writers"]:
            return status
        assert time.monotonic() < deadline


@pytest.mark.parametrize(("lose", "options"), [(store, OPTIONS), (careless_write, UNASKED)])
def test_what_is_lost_is_named_everywhere_and_not_preserved(
    lab: Any, lose: Callable[[Path], None], options: str
) -> None:
    mnt = lab.mount("one", options)
    lose(mnt / "file")
    status = settled(lab, mnt)
    assert (status["lost"], status["lost_count"]) == (["/file"], 1)
    assert f"problem   {mnt}: data written to /file are lost" in lab.run("ctl", "status").stdout
    deadline = time.monotonic() + 60
    while (line := f"{mnt}: data written to /file are lost: {os.strerror(errno.ENOSPC)}") not in lab.dmesg():
        assert time.monotonic() < deadline, line
    done = lab.helper(mnt, "remount,preserve,ro")
    assert done.returncode == 32 and "data written to /file" in done.stderr and "lossy" in done.stderr
    assert lab.nodes() == []
    (mnt / "file").unlink()  # writable again
    lab.remount(mnt, "preserve,ro")
    assert lab.nodes() == ["shmem-one"]


@pytest.mark.parametrize(("lose", "options"), [(store, OPTIONS), (careless_write, UNASKED)])
def test_the_next_who_asks_is_told(lab: Any, lose: Callable[[Path], None], options: str) -> None:
    """errseq: each descriptor that did not see the error before has it once, at fsync; those opened later have not."""
    mnt = lab.mount("one", options)
    with open(mnt / "file", "w+b") as early:
        lose(mnt / "file")
        if lose is store:  # close has told nobody yet
            late = os.open(mnt / "file", os.O_RDONLY)
            with pytest.raises(OSError) as told:
                os.fsync(late)
            assert told.value.errno == errno.ENOSPC
            os.fsync(late)
            os.close(late)
        with pytest.raises(OSError) as told:
            os.fsync(early.fileno())
        assert told.value.errno == errno.ENOSPC
        os.fsync(early.fileno())
        latest = os.open(mnt / "file", os.O_RDONLY)
        os.fsync(latest)
        os.close(latest)


def _rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())  # the error that is to be mended
        file.write(b"data" * (path.stat().st_size // 4))
        file.flush()
        os.fsync(file.fileno())


MENDS: dict[str, Callable[[Path], object]] = {
    "rewrite": _rewrite,
    "truncate": lambda path: os.truncate(path, 0),
    "new": lambda path: path.write_bytes(b"new"),
    "unlink": Path.unlink,
    "replace": lambda path: ((path.parent / "new").touch(), (path.parent / "new").replace(path)),
}


@pytest.mark.parametrize("mend", MENDS)
def test_a_loss_ends_when_it_is_made_good(lab: Any, mend: str) -> None:
    mnt = lab.mount("one", OPTIONS)
    store(mnt / "file")
    assert settled(lab, mnt)["lost_count"] == 1
    if mend == "rewrite":
        lab.remount(mnt, "size=16M")
    MENDS[mend](mnt / "file")
    assert settled(lab, mnt)["lost_count"] == 0
    content = (mnt / "file").read_bytes() if (mnt / "file").exists() else None
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    lab.mount("one", "pkram=one")
    assert ((mnt / "file").read_bytes() if (mnt / "file").exists() else None) == content


def test_lossy_goes_on_and_names_what_is_missing(lab: Any) -> None:
    mnt = lab.mount("one", OPTIONS)
    store(mnt / "file")
    settled(lab, mnt)
    lab.remount(mnt, "preserve,ro,lossy")
    assert lab.nodes() == ["shmem-one"]
    assert "one is preserved without data written to /file" in lab.dmesg()
    assert lab.status(mnt)["lost_count"] == 0
    lab.umount(mnt)
    assert lab.helper(mnt, "pkram=one,lossy").returncode == 1, "it goes with preserve"
    lab.mount("one", "pkram=one")
    assert b"data" in (mnt / "file").read_bytes()
    assert "lossy" not in lab.status(mnt)["options"]


def test_who_writes_directly_is_told_and_nothing_is_lost(lab: Any) -> None:
    mnt = lab.mount("one", OPTIONS)
    fd = os.open(mnt / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, 8 * MIB) as content, pytest.raises(OSError) as told:
        while os.write(fd, content):
            pass
    assert told.value.errno == errno.ENOSPC
    os.close(fd)
    assert settled(lab, mnt)["lost_count"] == 0
    lab.remount(mnt, "preserve,ro")


@pytest.mark.skipif(not ROOT, reason="dropping caches needs root")
def test_a_loss_outlives_the_cache(lab: Any) -> None:
    """The kernel forgets the error with the inode; the tree does not."""
    mnt = lab.mount("one", OPTIONS)
    store(mnt / "file")
    settled(lab, mnt)
    with open(mnt / "file", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    Path("/proc/sys/vm/drop_caches").write_text("2", encoding="ascii")
    assert bytes(4096) in (mnt / "file").read_bytes()
    assert settled(lab, mnt)["lost"] == ["/file"]
    assert lab.helper(mnt, "remount,preserve,ro").returncode == 32
