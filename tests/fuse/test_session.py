# SPDX-License-Identifier: GPL-2.0-or-later
"""Serving goes on when a request has vanished before it was read."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

pyfuse3 = pytest.importorskip("pyfuse3")

from pkramfs.errors import MachineError  # noqa: E402
from pkramfs.fuse import session as module  # noqa: E402
from pkramfs.fuse.session import Session  # noqa: E402


class Ops:
    ready: Any = None


def _main(calls: list[int], *errors: BaseException | None) -> Any:
    async def main(*_: int) -> None:
        error = errors[len(calls)]
        calls.append(1)
        if error is not None:
            raise BaseExceptionGroup("of a nursery", [error])

    return main


def test_a_vanished_request_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    gone = BlockingIOError(errno.EAGAIN, "fuse_session_receive_buf failed")
    monkeypatch.setattr(pyfuse3, "main", _main(calls, gone, gone, None))
    trio.run(Session(Ops(), "/nowhere").serve)  # type: ignore[arg-type]
    assert len(calls) == 3


def test_other_errors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(pyfuse3, "main", _main(calls, OSError(errno.EIO, "oh")))
    with pytest.raises(BaseExceptionGroup):
        trio.run(Session(Ops(), "/nowhere").serve)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_users_without_fusermount3_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="install the package fuse3"):
        module._mount_as_user(str(tmp_path), 0, False, "none")


@pytest.mark.parametrize(("script", "part"), [("echo no way >&2; exit 1", "no way"), ("exit 0", "sent no descriptor")])
def test_what_fusermount3_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, part: str
) -> None:
    (tmp_path / "fusermount3").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "fusermount3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(MachineError, match=part):
        module._mount_as_user(str(tmp_path), 0, False, "none")


@pytest.mark.parametrize(
    ("found", "left"),
    [
        ({"read_ahead_kb": "128\n", "max_bytes": "41943040\n"}, {"read_ahead_kb": "1020", "max_bytes": "268435456"}),
        ({"read_ahead_kb": "8192\n", "max_bytes": "999999999999\n"}, None),  # somebody wants more
        ({"read_ahead_kb": "128\n"}, {"read_ahead_kb": "1020"}),  # an old kernel
        ({}, {}),
    ],
)
def test_root_raises_the_kernels_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: dict[str, str], left: dict[str, str] | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert _tuned(monkeypatch, tmp_path, found) == (found if left is None else left)


def test_users_leave_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = {"read_ahead_kb": "128\n", "max_bytes": "41943040\n"}
    assert _tuned(monkeypatch, tmp_path, found) == found


def _tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: dict[str, str]) -> dict[str, str]:
    """What is in a directory like those of /sys/class/bdi after it was tuned."""
    monkeypatch.setattr(module, "_TUNING", f"{tmp_path}/{{}}:{{}}")
    (tmp_path / "0:77").mkdir()
    for name, text in found.items():
        (tmp_path / "0:77" / name).write_text(text)
    module._tune(os.makedev(0, 77))
    return {path.name: path.read_text() for path in (tmp_path / "0:77").iterdir()}
