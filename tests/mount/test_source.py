# SPDX-License-Identifier: GPL-2.0-or-later
"""SOURCE, by which a mount is found in the mount table; and mounts of machines other than the default."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pkramfs.fuse import session

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
SOURCES = ["cache1", "tank/my data, #1\\", "tab\tline\nfeed", "\udcff\udc80ä"]


def shown(mnt: Path) -> list[bytes]:
    """The source of each mount there, as the kernel shows it, and its flags: nothing else is mistaken."""
    rows = [line.split(b" ") for line in Path("/proc/self/mounts").read_bytes().splitlines()]
    found = [row for row in rows if row[1] == os.fsencode(mnt)]
    assert all(len(row) == 6 and row[2] == b"fuse.pkramfs" for row in found)
    return [row[0] for row in found]


def escaped(source: str) -> bytes:
    """As the kernel writes it."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in os.fsencode(source))


@pytest.mark.few(2)
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_shown_and_stays(lab: Any, source: str) -> None:
    mnt = lab.dir("one")
    done = lab.run("mount", source, str(mnt), "-o", "pkram=one,size=1m")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert shown(mnt) == [escaped(source)]
    lab.remount(mnt, "size=2m")
    lab.remount(mnt, "preserve,ro")
    assert shown(mnt) == [escaped(source)]
    pfn = Path(lab.machine.path("pkram")).read_text().strip()
    assert lab.run("kexec", "-s", "-l", "builtin", f"--append=pkram={pfn}").returncode == 0
    done = lab.run("kexec", "-e")
    assert done.returncode == 0, done
    assert shown(mnt) == [escaped(source)]


@pytest.mark.parametrize(("source", "options", "expected"), [("none", "", b"none"), ("", "", b"none"),
                                                            ("dev", "fsname=said", b"said")])  # fmt: skip
def test_sources_that_are_none(lab: Any, source: str, options: str, expected: bytes) -> None:
    mnt = lab.dir("one")
    assert lab.run("mount", source, str(mnt), *(["-o", options] if options else [])).returncode == 0
    assert shown(mnt) == [expected]


@pytest.mark.parametrize("source", ["cache1", "a,b", "back\\slash", "with blank"])
def test_fusermount_shows_the_same(tmp_path: Path, source: str) -> None:
    """How others than root mount, asked without a daemon."""
    device = session._mount_as_user(str(tmp_path), 0, False, source)
    try:
        assert shown(tmp_path) == [escaped(source)]
    finally:
        os.close(device)
        subprocess.run(["fusermount3", "-u", "-z", str(tmp_path)], check=True)


@pytest.mark.skipif(not os.path.exists("/sbin/mount.pkramfs") or not ROOT, reason="mount(8) does not know us")
def test_programs_find_a_mount_by_its_source(lab: Any, pkram_root: Path) -> None:
    mnt, source = lab.dir("one"), f"cache-{os.getpid()}"
    subprocess.run(["mount", "-t", "pkramfs", "-o", "pkram=one", source, str(mnt)], check=True)
    found = subprocess.run(["findmnt", "-n", "-o", "TARGET", "-S", source], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(mnt)
    entry = lab.entry(mnt)
    subprocess.run(["umount", source], check=True)
    lab.gone(entry)
    assert not os.path.ismount(mnt)


def test_a_remount_finds_the_machine(lab: Any) -> None:
    """By the device of what is mounted there, among all machines of PKRAM_ROOT."""
    one = lab.mount("one")
    assert lab.run("ctl", "machine", "create", "--ram", "64M", "--machine", "other").returncode == 0
    two = lab.dir("two")
    assert lab.run("mount", "none", str(two), "-o", "pkram=one,machine=other").returncode == 0
    (two / "file").write_bytes(b"x")
    lab.remount(two, "size=25%")
    assert 3000 < os.statvfs(two).f_blocks <= 4096, "a share of that machine's RAM"
    lab.remount(two, "preserve,ro")
    assert lab.status(one)["state"] == "live"
    assert "preserved" in lab.run("ctl", "status", "--machine", "other").stdout
    done = lab.run("mount", "none", str(two), "-o", "remount,rw,machine=default")
    assert done.returncode == 32 and "belongs to no mount daemon of the machine" in done.stderr
    assert "leave machine= out" in done.stderr
    lab.remount(two, "rw")
    (two / "file").write_bytes(b"y")
    subprocess.run(["umount", str(two)] if ROOT else ["fusermount3", "-u", str(two)], check=True)
