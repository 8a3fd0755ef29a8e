# SPDX-License-Identifier: GPL-2.0-or-later
"""How a mount ends when it is not alone: under another mount, with bind mounts, in another namespace."""

import json
import os
import signal
import subprocess
from pathlib import Path
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


def oops(lab: Any, directory: Path, number: int) -> None:
    """Have a daemon die of a signal, and nobody take over."""
    entry = lab.entry(directory)
    os.kill(entry.pid, signal.SIGSTOP)  # or it would start another holder
    os.kill(entry.holder, signal.SIGKILL)
    os.kill(entry.pid, number)
    os.kill(entry.pid, signal.SIGCONT)
    lab.gone(entry)


def with_crash_kernel(lab: Any, cmdline: str) -> None:
    assert lab.run("ctl", "machine", "create", "--ram", "256M").returncode == 0
    done = lab.run("kexec", "-le", "builtin:4M", "--append", f"ro crashkernel=32M {cmdline}")
    assert done.returncode == 0, done.stderr
    assert lab.run("kexec", "-p", "builtin:8M").returncode == 0


def kind(lab: Any) -> str:
    return str(json.loads(lab.run("ctl", "--json", "status").stdout)["kernel"]["kind"])


def test_an_aborted_daemon_is_a_panic_if_the_command_line_says_so(lab: Any) -> None:
    with_crash_kernel(lab, "panic_on_oops")
    one, other = lab.mount("one"), lab.mount("other")
    survivor = lab.entry(other)
    oops(lab, one, signal.SIGABRT)
    done = lab.run("kexec", "-l", "builtin:4M")
    assert done.returncode == 8
    assert "panic_on_oops: a mount daemon had aborted" in done.stderr
    assert kind(lab) == "crash"
    lab.gone(survivor)
    (dead,) = (line for line in report(lab)["dead"]["dmesg"] if "Kernel panic" in line)
    assert f"Fatal exception: Aborted in the daemon of {one}" in dead
    assert lab.run("kexec", "--cold").returncode == 0
    assert kind(lab) == "cold"


def report(lab: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lab.run("ctl", "--json", "report").stdout)
    return found


@pytest.mark.parametrize(
    ("cmdline", "number"),
    [("panic_on_oops", signal.SIGKILL), ("panic_on_oops=0", signal.SIGABRT), ("", signal.SIGABRT)],
)
def test_other_deaths_are_none(lab: Any, cmdline: str, number: int) -> None:
    with_crash_kernel(lab, cmdline)
    oops(lab, lab.mount("one"), number)
    lab.umount(lab.mount("two"))
    assert kind(lab) == "kexec"


def test_without_a_crash_kernel_the_log_says_so(lab: Any) -> None:
    with_crash_kernel(lab, "panic_on_oops=1")
    assert lab.run("kexec", "-p", "-u").returncode == 0
    oops(lab, lab.mount("one"), signal.SIGSEGV)
    lab.umount(lab.mount("two"))
    assert kind(lab) == "kexec"
    assert "Segmentation fault in the daemon of" in lab.dmesg()
    assert "no crash kernel is loaded: going on" in lab.dmesg()


def test_nothing_is_left_of_daemons_that_were_killed(lab: Any) -> None:
    """The next mount clears away the files of the dead, and the temporary ones of who died while writing."""
    one, two = lab.mount("one", "mode=755"), lab.mount("two")
    (two / "file").write_bytes(b"2")
    lab.remount(two, "preserve,ro")
    for mnt in (one, two):
        entry = lab.entry(mnt)
        lab.kill(entry)
    mounts = Path(lab.machine.path("mounts"))
    left = [mounts / "0123456789abcdef.json.1.tmp", Path(lab.machine.path("nvram.json.1.tmp"))]
    for path in left:
        path.touch()
    assert len(os.listdir(mounts)) > 5
    three = lab.mount("three")
    assert {name[:16] for name in os.listdir(mounts)} == {f"{lab.entry(three).tree_id:016x}"}
    assert not any(path.exists() for path in left)
    lab.umount(three)
    lab.clean()
    assert os.listdir(mounts) == []
    assert lab.nodes() == ["shmem-two"]
    two = lab.mount("two")
    assert (two / "file").read_bytes() == b"2"
    lab.umount(two)
    assert os.listdir(mounts) == []
