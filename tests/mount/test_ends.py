"""How a mount ends when it is not alone: under another mount, with bind mounts, in another namespace."""

import os
import signal
import subprocess
from typing import Any

import pytest

from pkramfs.control.client import call
from pkramfs.machine.mounts import MountEntry

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0


@pytest.mark.skipif(not ROOT, reason="needs root")
@pytest.mark.parametrize("end", ["SIGTERM", "stop"])
def test_what_is_mounted_over_us_is_not_ours_to_unmount(lab: Any, end: str) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(mnt)], check=True)
    try:
        (mnt / "of somebody else").write_text("x")
        _end(lab, entry, end)
        assert os.listdir(mnt) == ["of somebody else"]
    finally:
        subprocess.run(["umount", str(mnt)], check=True)
    lab.mount("one")  # over what we left below


@pytest.mark.skipif(not ROOT, reason="needs root")
@pytest.mark.parametrize("end", ["SIGTERM", "stop"])
def test_the_end_takes_bind_mounts_along(lab: Any, end: str) -> None:
    mnt, bind = lab.mount("one"), lab.dir("bind")
    entry = lab.entry(mnt)
    subprocess.run(["mount", "--bind", str(mnt), str(bind)], check=True)
    _end(lab, entry, end)
    assert not os.path.ismount(mnt)
    assert not os.path.ismount(bind)


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_sigterm_ends_a_mount_that_another_namespace_has(lab: Any) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            _end(lab, entry, "SIGTERM")
        finally:
            other.kill()
    assert not os.path.ismount(mnt)


def _end(lab: Any, entry: MountEntry, how: str) -> None:
    if how == "stop":
        assert call(entry.socket, "stop") == {}
    else:
        os.kill(entry.pid, signal.SIGTERM)
    lab.gone(entry)
