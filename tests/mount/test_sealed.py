# SPDX-License-Identifier: GPL-2.0-or-later
"""A mount is preserved by its log, and soon afterwards written whole if that log is long."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pkramfs.fs.sealing import LONG
from pkramfs.kernel.running import look
from pkramfs.pkram.node import Node
from tests.support.trees import snapshot

pytestmark = pytest.mark.mount


def node(lab: Any, name: bytes = b"shmem-one") -> Node:
    found: Node | None = look(lab.machine).store.find(name)
    assert found is not None
    return found


def fill(at: Path, files: int) -> None:
    for number in range(files):
        (at / f"{number}").write_bytes(b"%d" % number)


def written_whole(lab: Any) -> Node:
    """The node, once it is whole."""
    deadline = time.monotonic() + 60
    while node(lab).log_pfn:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return node(lab)


@pytest.mark.parametrize("files", [0, 40])
def test_a_short_log_is_what_is_preserved(lab: Any, files: int) -> None:
    at = lab.mount("one")
    fill(at, files)
    os.mkfifo(at / "pipe")
    before = snapshot(at)
    lab.remount(at, "preserve,ro")
    assert node(lab).log_pfn and not node(lab).objects
    assert lab.call(at, "status")["files"] == files + 1
    assert "checked, nothing is wrong" in lab.ok("ctl", "verify")
    assert "pipe" in lab.ok("ctl", "ls", "one")
    lab.umount(at)
    again = lab.mount("one")
    assert snapshot(again) == before
    (again / "more").write_bytes(b"more")
    lab.remount(again, "preserve,ro")
    lab.umount(again)
    assert (lab.mount("one") / "more").read_bytes() == b"more"


def test_a_long_log_is_written_whole_afterwards(lab: Any) -> None:
    at = lab.mount("one")
    fill(at, LONG // 2)
    before = snapshot(at)
    lab.remount(at, "preserve,ro")
    found = written_whole(lab)
    assert found.objects == 2
    assert lab.status(at)["state"] == "preserved" and lab.status(at)["frozen"]
    assert lab.status(at)["log_requests"] == 0
    assert len(lab.nodes()) == 1
    lab.umount(at)
    again = lab.mount("one")
    assert snapshot(again) == before


def test_format_1_is_written_whole_at_once(lab: Any) -> None:
    at = lab.mount("one")
    fill(at, 3)
    lab.remount(at, "preserve,ro,format=1")
    assert node(lab).objects == 2 and not node(lab).log_pfn
    lab.remount(at, "rw,nopreserve,format=2")
    lab.remount(at, "preserve,ro")
    assert node(lab).log_pfn
