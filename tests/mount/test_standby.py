# SPDX-License-Identifier: GPL-2.0-or-later
"""-o standby: a daemon that has the tree already takes over, whatever was changed until the other one died."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pkramfs.daemon.standby import NAME
from pkramfs.machine import process
from tests.support.mortal import Held
from tests.support.waiting import until

pytestmark = pytest.mark.mount


def second(entry: Any) -> int:
    """The standby of a mount, 0 if none is ready."""
    pids = [pid for pid in process.children(entry.holder) if pid != entry.pid]
    return next((pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == f"{NAME}\n"), 0)


def taken(lab: Any, at: Path) -> bool:
    """Kill the daemon, and wait for the next; return whether that is the one that stood by."""
    entry = lab.entry(at)
    until(lambda: second(entry))
    standby = second(entry)
    os.kill(entry.pid, signal.SIGKILL)
    os.statvfs(at)
    until(lambda: lab.entry(at).pid != entry.pid)
    until(lambda: f"by daemon {lab.entry(at).pid}" in lab.dmesg())
    stood_by = f"by daemon {standby}, which stood by" in lab.dmesg()
    assert stood_by == (lab.entry(at).pid == standby)
    return bool(stood_by)


def test_a_standby_takes_over(lab: Any) -> None:
    """With what was changed since it stood by, and what is open; also after a checkpoint, from which another begins."""
    mount = Held(lab, lab.dir("one"), extra="journal.REQUESTS = 150", options="pkram=one,standby")
    at, expected = mount.directory, {}
    try:
        with open(at / "gone", "wb+", buffering=0) as gone:
            gone.write(b"gone")
            (at / "gone").unlink()
            stood_by = number = 0
            while stood_by < 3:
                number += 1
                assert number < 12
                for each in range(20):
                    expected[f"{number} {each}"] = b"%d" % each * 3000
                    (at / f"{number} {each}").write_bytes(expected[f"{number} {each}"])
                if number > 1:
                    os.rename(at / f"{number - 1} 3", at / "renamed")
                    expected["renamed"] = expected.pop(f"{number - 1} 3")
                stood_by += taken(lab, at)
                assert {name: (at / name).read_bytes() for name in os.listdir(at)} == expected
                assert os.pread(gone.fileno(), 9, 0) == b"gone"
        assert lab.run("ctl", "verify").returncode == 0
        lab.remount(at, "preserve,ro")
        entry = lab.entry(at)
        until(lambda: second(entry))
        standby = second(entry)
        assert mount.end() == 0
        assert not Path(f"/proc/{standby}").exists()
    finally:
        mount.process.kill()
        mount.process.wait()
    again = lab.mount("one", "pkram=one")
    assert {name: (again / name).read_bytes() for name in os.listdir(again)} == expected


def test_no_standby_lives_where_a_kernel_ends(lab: Any) -> None:
    """Neither while the mount stands still, nor in the new kernel, until that has one of its own."""
    at = lab.mount("one", "pkram=one,standby")
    (at / "file").write_bytes(b"x")
    entry = lab.entry(at)
    until(lambda: second(entry))
    standby = second(entry)
    pfn = Path(lab.machine.path("pkram")).read_text().strip()
    assert lab.run("kexec", "-l", "builtin", f"--append=ro pkram={pfn}").returncode == 0
    done = lab.run("kexec", "-e", "--keep-mounts")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert not Path(f"/proc/{standby}").exists()
    until(lambda: second(lab.entry(at)))
    assert (at / "file").read_bytes() == b"x"
    before = lab.entry(at).holder
    os.kill(before, signal.SIGKILL)
    until(lambda: lab.entry(at).holder != before and second(lab.entry(at)))
    assert (at / "file").read_bytes() == b"x"
