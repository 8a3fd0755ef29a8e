# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount points whose names are not UTF-8 or are escaped in the mount table: ours, and others' beside them."""

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pkramfs.mounting import syscalls
from tests.support.places import mounted

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
NAMES = ["\udcff\udc80 ä", "back\\040slash\tc#", "line\nfeed"]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_mount_there_lives_like_any_other(lab: Any, name: str) -> None:
    mnt = lab.mount(name, "pkram=one")
    assert str(mnt) in mounted()
    assert syscalls.mounted_at(str(mnt)) is not None
    (mnt / "file").write_bytes(b"x")
    lab.remount(mnt, "preserve,ro")
    assert lab.run("ctl", "status").returncode == 0
    pfn = Path(lab.machine.path("pkram")).read_text().strip()
    assert lab.run("kexec", "-s", "-l", "builtin", f"--append=pkram={pfn}").returncode == 0
    done = lab.run("kexec", "-e")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    assert (mnt / "file").read_bytes() == b"x" and str(mnt) in mounted()
    lab.remount(mnt, "rw")
    lab.umount(mnt)
    assert str(mnt) not in mounted()


@pytest.mark.skipif(not ROOT, reason="mounts a tmpfs")
def test_what_others_mounted_is_in_nobodys_way(lab: Any) -> None:
    places = [lab.root / name for name in NAMES]
    with contextlib.ExitStack() as stack:
        for place in places:
            place.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", place.name, str(place)], check=True)
            stack.callback(subprocess.run, ["umount", str(place)], check=True)
        mnt = lab.mount("one")
        assert str(mnt) in mounted() and not {*map(str, places)} & {*mounted()}
        assert {*map(str, places)} < {one.mountpoint for one in syscalls.mounts()}
        lab.remount(mnt, "preserve,ro")
        lab.umount(mnt)


def test_a_user_of_a_mount_with_a_strange_name_is_no_error() -> None:
    """/proc/PID/comm is what a program calls itself."""
    from pkramfs.cli import users

    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    try:
        comm.write_bytes(b"\xff\x80")
        assert users._name(str(os.getpid())) == "\udcff\udc80"
    finally:
        comm.write_bytes(before.strip())
