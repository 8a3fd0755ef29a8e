# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks between processes; a forked child stands for the other process."""

import inspect
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkramfs.errors import MachineError
from pkramfs.machine import locks


@contextmanager
def another(path: Path, take: Callable[[str], object]) -> Iterator[int]:
    """A process that has taken the lock, killed at the end; its pid."""
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        kept = take(str(path))
        os.write(said, b"x")
        signal.pause()
        os._exit(kept is None)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(said)


def exclusively(path: str) -> int:
    fd = locks.open_lock(path)
    assert locks.try_lock(fd)
    return fd


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        another(path, exclusively),
        pytest.raises(MachineError, match="the machine is busy: another boot, kexec or mount has held it for 0 s"),
        locks.held(str(path), timeout=0, what="the machine"),
    ):
        pass
    with locks.held(str(path), timeout=0):  # who dies lets go
        assert locks.is_held(str(path))
    assert not locks.is_held(str(path))


def test_who_holds_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with another(path, exclusively) as pid:
        if f" {pid} " not in Path("/proc/locks").read_text():
            pytest.skip("/proc/locks names no process of ours here")
        with (
            pytest.raises(MachineError, match=rf"{path} is busy: .* for 0 s \(pid {pid}\)"),
            locks.held(str(path), timeout=0),
        ):
            pass


def test_no_lock_is_waited_for_without_end() -> None:
    assert 0 < inspect.signature(locks.held).parameters["timeout"].default < 3600


def test_sharing(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with locks.held(path, shared=True), locks.held(path, shared=True, timeout=0):
        with pytest.raises(MachineError), locks.held(path, timeout=0):
            pass
        assert locks.is_held(path) is False  # a shared holder is nobody's mount


def test_looking_makes_nothing(tmp_path: Path) -> None:
    assert not locks.is_held(str(tmp_path / "lock"))
    assert os.listdir(tmp_path) == []


def test_a_lock_is_not_inherited(tmp_path: Path) -> None:
    fd = locks.open_lock(str(tmp_path / "lock"))
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match=r"cannot lock .*lock: Too many levels"):
        locks.open_lock(str(tmp_path / "lock"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_removable_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with another(path, locks.lock_removable):
        assert locks.lock_removable(str(path)) is None
    fd = locks.lock_removable(str(path))
    assert fd is not None
    os.close(fd)


def test_a_file_removed_while_another_waits_is_not_what_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We open the file; its holder removes it and ends; somebody else makes it anew and locks that."""
    path = tmp_path / "lock"
    first = exclusively(str(path))
    made: list[int] = []

    def meanwhile(fd: int, *, shared: bool = False) -> bool:
        if not made:
            path.unlink()
            os.close(first)
            made.append(exclusively_for_real(str(path)))
        return real(fd, shared=shared)

    real = locks.try_lock

    def exclusively_for_real(where: str) -> int:
        fd = os.open(where, os.O_RDWR | os.O_CREAT)
        assert real(fd)
        return fd

    monkeypatch.setattr(locks, "try_lock", meanwhile)
    assert locks.lock_removable(str(path)) is None  # not the removed one, which would have been free
    os.close(made[0])
    fd = locks.lock_removable(str(path))
    assert fd is not None
    assert os.fstat(fd).st_ino == path.stat().st_ino


def test_a_look_does_not_take_the_lock_from_somebody(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def probing(where: str) -> None:
        for _ in range(200):
            locks.is_held(where)

    path.touch()
    for _ in range(20):
        with another(path, probing):
            fd = locks.lock_removable(str(path))
            assert fd is not None
            os.close(fd)
