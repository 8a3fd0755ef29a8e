# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl upgrade: another daemon serves, and what was open stays open."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pkramfs.control.commands import Commands
from pkramfs.machine import process

pytestmark = pytest.mark.mount


def test_a_mount_in_use_gets_another_daemon(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    before = lab.entry(mnt)
    with open(mnt / "file") as held, open(mnt / "gone", "w+") as gone:
        gone.write("still")
        gone.flush()
        os.unlink(mnt / "gone")
        done = lab.run("ctl", "--json", "upgrade", "one")
        assert done.returncode == 0, done.stderr
        (one,) = json.loads(done.stdout)
        after = lab.entry(mnt)
        assert (one["before"], one["pid"]) == (before.pid, after.pid) and before.pid != after.pid
        assert (after.holder, after.tree_id) == (before.holder, before.tree_id)
        gone.seek(0)
        assert (held.read(), gone.read()) == ("x", "still")
    assert "survives" in lab.run("ctl", "status").stdout and "1 takeover" in lab.run("ctl", "status").stdout
    lab.remount(mnt, "preserve,ro")
    assert lab.run("ctl", "upgrade", "--all").returncode == 0
    assert (lab.status(mnt)["state"], lab.status(mnt)["frozen"]) == ("preserved", True)
    lab.remount(mnt, "rw")
    (mnt / "more").write_text("y")
    lab.umount(mnt)


def test_a_daemon_that_dies_while_its_holder_becomes_the_new_code(lab: Any) -> None:
    """The new code finds it dead, knows of what it died, and starts another; nothing was asked for twice."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    before = lab.entry(mnt)
    os.kill(before.holder, signal.SIGSTOP)
    Commands(before.socket).upgrade()
    Commands(before.socket).status()  # and so the holder was told
    os.kill(before.pid, signal.SIGKILL)
    os.kill(before.holder, signal.SIGCONT)
    (mnt / "new").touch()
    deadline = time.monotonic() + 60
    while (after := lab.entry(mnt)).pid == before.pid:
        assert time.monotonic() < deadline, "the next daemon does not write its entry"
        time.sleep(0.01)
    assert after.holder == before.holder and b"hold" in Path(f"/proc/{after.holder}/cmdline").read_bytes()
    assert "was killed by signal 9, another takes over" in lab.run("ctl", "dmesg").stdout
    assert lab.run("ctl", "upgrade", "one").returncode == 0
    (mnt / "more").write_text("y")
    assert process.children(after.holder) == [lab.entry(mnt).pid]
    lab.umount(mnt)


def test_who_has_no_holder_is_refused(lab: Any) -> None:
    mnt = lab.mount("plain", "mode=755")
    done = lab.run("ctl", "upgrade", str(mnt))
    assert done.returncode != 0 and "has no holder" in done.stderr and done.stderr.count("\n") == 1
    assert lab.run("ctl", "upgrade", "nothing").returncode == 8
    assert lab.run("ctl", "upgrade").returncode == 2
