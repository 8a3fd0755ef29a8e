# SPDX-License-Identifier: GPL-2.0-or-later
"""Ctrl-C in a preserve takes it back, whenever it comes, and leaves the mount writable."""

import signal
from typing import Any

import pytest

from pkramfs.cli import remount, signals
from pkramfs.control.commands import Commands
from pkramfs.mounting.options import parse
from tests.support.lab import Mounts

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("when", ["before the daemon hears of it", "after the node is published"])
def test_a_preserve_is_taken_back(lab: Mounts, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    mnt = lab.mount("x")
    (mnt / "f").write_text("before")
    preserve = Commands.preserve

    def interrupted(self: Commands, **how: Any) -> Any:
        if when.startswith("after"):
            assert preserve(self, **how)["state"] == "preserved" and lab.nodes() == ["shmem-x"]
        raise signals.Ended(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Commands, "preserve", interrupted)
        with pytest.raises(signals.Ended):
            remount.remount(str(mnt), parse("remount,preserve,ro"))
    assert lab.nodes() == [] and lab.status(mnt)["state"] == "live" and not lab.status(mnt)["frozen"]
    (mnt / "f").write_text("writable")
    lab.remount(mnt, "preserve,ro")
    assert lab.nodes() == ["shmem-x"]
