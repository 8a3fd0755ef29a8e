# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that is stopped keeps nobody waiting without end, and loses nothing by it."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.cli import mount as helper
from pkramfs.control.client import call
from pkramfs.machine.mounts import MountEntry
from pkramfs.mounting import patience, syscalls

pytestmark = pytest.mark.mount


@pytest.fixture
def stopped(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, MountEntry]]:
    """A mount whose daemon is stopped; at the end it goes on and is what it was."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    entry = lab.entry(mnt)
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.2)
    os.kill(entry.pid, signal.SIGSTOP)
    try:
        yield mnt, entry
    finally:
        os.kill(entry.pid, signal.SIGCONT)
    assert call(entry.socket, "status")["state"] == "live"
    (mnt / "file").write_text("still writable")


@pytest.mark.parametrize("options", ["pkram=one", "pkram=two", "size=1M"])
def test_mounting_there_says_what_it_waited_for(
    stopped: tuple[Path, MountEntry], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mnt, _ = stopped
    assert helper.main(["none", str(mnt), "-o", options]) == 32
    said = capsys.readouterr().err
    assert f"waited 0.2 s for the daemon of what is mounted on {mnt}" in said and said.count("\n") == 1


@pytest.mark.parametrize("options", ["preserve,ro", "ro", "rw", "size=1M"])
def test_a_remount_names_the_daemon(
    stopped: tuple[Path, MountEntry], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mnt, entry = stopped
    before = syscalls.mounted_at(str(mnt))
    assert helper.main(["none", str(mnt), "-o", f"remount,{options}"]) == 32
    said = capsys.readouterr().err
    assert f"the daemon of {mnt} (pid {entry.pid}) does not answer (no answer to status within 0.2 s)" in said
    assert syscalls.mounted_at(str(mnt)) == before


def test_a_hundred_commands_wait_their_turn(stopped: tuple[Path, MountEntry]) -> None:
    _, entry = stopped
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(call(entry.socket, "status")["state"])) for _ in range(100)
    ]
    for thread in threads:
        thread.start()
    os.kill(entry.pid, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert answers == ["live"] * 100
