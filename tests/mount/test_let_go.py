# SPDX-License-Identifier: GPL-2.0-or-later
"""Nobody holds a mount once a command has answered: it can be unmounted at that very moment."""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="asking with umount2(2) is root's"),
]
MNT_EXPIRE = 4
_libc = ctypes.CDLL(None, use_errno=True)


def busy(place: Path) -> bool:
    """Whether umount would say EBUSY. The first MNT_EXPIRE since the last access unmounts nothing."""
    os.stat(place)
    assert _libc.umount2(os.fsencode(place), MNT_EXPIRE) == -1
    code = ctypes.get_errno()
    assert code in (errno.EAGAIN, errno.EBUSY), os.strerror(code)
    return code == errno.EBUSY


def test_the_question_itself(lab: Any) -> None:
    mnt = lab.mount("one")
    assert not busy(mnt)
    fd = os.open(mnt, os.O_RDONLY)
    assert busy(mnt)
    os.close(fd)
    assert not busy(mnt)


def change(mnt: Path) -> None:
    """Data that are dirty when their writer lets go of them, by write(2) and by a map."""
    with open(mnt / "file", "w+b") as file:
        file.write(bytes(1 << 20))
        file.flush()
        with mmap.mmap(file.fileno(), 1 << 20) as view:
            view[4096:8192] = b"x" * 4096
    os.listdir(mnt)


def test_after_every_command(lab: Any) -> None:
    mnt = lab.mount("one")
    change(mnt)
    pfn = Path(lab.machine.path("pkram")).read_text().strip()
    held = []
    for words in (
        ("ctl", "status"),
        ("ctl", "punch", str(mnt / "file"), "0:4096"),
        ("ctl", "sparsify", str(mnt / "file")),
        ("mount", "none", str(mnt), "-o", "remount,size=64m"),
        ("mount", "none", str(mnt), "-o", "remount,ro"),
        ("mount", "none", str(mnt), "-o", "remount,rw"),
        ("kexec", "-s", "-l", "builtin", f"--append=pkram={pfn}"),
        ("kexec", "-e"),  # is refused, after it has flushed the mount
        ("mount", "none", str(mnt), "-o", "remount,preserve,ro"),
        ("kexec", "-e", "--dry-run"),
        ("ctl", "verify"),
        ("kexec", "-e"),
        ("ctl", "nodes"),
    ):
        lab.run(*words)
        if busy(mnt):
            held.append(words)
    assert held == []


def test_after_the_verb_itself(lab: Any) -> None:
    """Asked of the daemon without a process in between, which would give it time."""
    mnt = lab.mount("one")
    found = []
    for _ in range(50):
        change(mnt)
        lab.call(mnt, "preserve")
        found.append(busy(mnt))
        lab.call(mnt, "unpreserve")
        found.append(busy(mnt))
    assert not any(found)
