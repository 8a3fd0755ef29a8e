# SPDX-License-Identifier: GPL-2.0-or-later
"""Who loses set-id bits and capabilities by which change: as on tmpfs, before and after the caches are dropped."""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.mounting import syscalls

ROOT = os.geteuid() == 0
pytestmark = [pytest.mark.mount, pytest.mark.skipif(not ROOT, reason="needs root")]

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # effective cap_net_bind_service
OWNER, STRANGER = 1000, 1001
USERS = {
    "root": (0, []),
    "stranger": (STRANGER, []),
    "member": (STRANGER, [OWNER]),
}
MODES = (0o6777, 0o4777, 0o2777, 0o2767, 0o6766, 0o4766)


def _with(flags: int, work: Callable[[int], object]) -> Callable[[str], None]:
    def change(path: str) -> None:
        fd = os.open(path, flags)
        try:
            work(fd)
        finally:
            os.close(fd)

    return change


def _map(fd: int) -> None:
    with mmap.mmap(fd, 4096) as view:
        view[0:1] = b"z"


def _direct(fd: int) -> None:
    with mmap.mmap(-1, 4096) as page:
        os.writev(fd, [page])


CHANGES: dict[str, Callable[[str], None]] = {
    "append": _with(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"q")),
    "write nothing": _with(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "write directly": _with(os.O_RDWR | os.O_DIRECT, _direct),
    "write to a mapping": _with(os.O_RDWR, _map),
    "open with O_TRUNC": _with(os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    "truncate": lambda path: os.truncate(path, 1),
    "truncate to the same size": lambda path: os.truncate(path, 8192),
    "ftruncate": _with(os.O_RDWR, lambda fd: os.ftruncate(fd, 1)),
    "read": _with(os.O_RDONLY, lambda fd: os.read(fd, 1)),
}
BY_ROOT: dict[str, Callable[[str], None]] = {
    "chown": lambda path: os.chown(path, 1002, -1),
    "chgrp": lambda path: os.chown(path, -1, 1002),
}


@contextlib.contextmanager
def _as(user: str) -> Iterator[None]:
    number, groups = USERS[user]
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def _look(path: Path) -> tuple[str, bool]:
    return oct(path.stat().st_mode), "security.capability" in os.listxattr(path)


def _changed(path: Path, user: str, mode: int, change: Callable[[str], None]) -> Path:
    path.write_bytes(bytes(8192))
    os.chown(path, OWNER, OWNER)
    os.chmod(path, mode)
    os.setxattr(path, "security.capability", CAPABILITY)
    os.stat(path)
    with _as(user):
        change(str(path))
    return path


@pytest.fixture
def pair(lab: Any, tmpfs: Path) -> tuple[Path, Path]:
    """Ours, and a tmpfs beside it; everybody may come to both."""
    lab.admit_others()
    return lab.mount("one"), tmpfs


@pytest.mark.parametrize("user", USERS)
def test_as_on_tmpfs(pair: tuple[Path, Path], user: str) -> None:
    ours, theirs = pair
    expected, warm = {}, {}
    for mode in MODES:
        for name, change in (CHANGES | (BY_ROOT if user == "root" else {})).items():
            case = f"{mode:o} {name}"
            expected[case] = _look(_changed(theirs / case, user, mode, change))
            warm[case] = _look(_changed(ours / case, user, mode, change))
    assert warm == expected
    syscalls.syncfs(str(ours))
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert {case: _look(ours / case) for case in expected} == expected
