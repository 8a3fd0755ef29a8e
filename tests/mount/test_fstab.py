# SPDX-License-Identifier: GPL-2.0-or-later
"""/etc/fstab: mount -a, mount DIR, remount and umount with the options of a line, by root and by a user.

Everything happens in a mount namespace of its own, over whose /etc/fstab ours is bound, so that the
system's is left alone and nothing can stay behind.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

HELPER = "/sbin/mount.fuse.pkramfs"
A_USER = "setpriv --reuid 1000 --regid 1000 --clear-groups"
pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists(HELPER), reason="the links in /sbin are not made"),
]


def shell(lab: Any, lines: list[str], script: str, user: str = "") -> list[str]:
    """What a script prints, with these lines as fstab; `user` is a command that runs it as somebody else."""
    fstab = lab.root / "fstab"
    fstab.write_text("".join(f"{line} 0 0\n" for line in lines))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'mount --bind "$0" /etc/fstab && exec {user} sh -c "$1"', fstab, script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=lab.root,
    )
    assert "Traceback" not in done.stderr
    return [line.strip() for line in (done.stdout + done.stderr).splitlines()]


def test_lines_of_fstab(lab: Any) -> None:
    one, two, missing = lab.dir("one"), lab.dir("two"), lab.root / "missing"
    said = shell(
        lab,
        [
            f"none {one} pkramfs pkram=one,size=64m,mode=750,noexec",
            f"none {two} pkramfs noauto,pkram=two",
            f"none {missing} pkramfs nofail,pkram=missing",
        ],
        f"""
        mount -a; echo $?
        df --output=size {one} | tail -n 1; stat -c %a {one}
        mountpoint -q {two} || echo noauto
        mount {two} && mountpoint {two}
        touch {one}/file {two}/file
        mount -o remount,exec {one}; grep -c "{one} .*noexec" /proc/mounts
        mount -o remount {one}; grep -c "{one} .*noexec" /proc/mounts
        mount -o remount,size=1m,preserve,ro {one}; echo $?
        umount {one} {two}; echo $?
        mount {one}; mount {two}; ls {one} {two}
        umount {one}; umount {two}; echo $?
        """,
    )
    assert said == [
        "64",  # mount(8): some succeeded; that one is missing is said below
        *("65536", "750", "noauto", f"{two} is a mountpoint"),
        *("0", "1", "0", "0"),
        *(f"{one}:", "file", "", f"{two}:", "0"),
        f"mount.pkramfs: mount point {missing} does not exist",
    ]
    assert "one is no longer preserved" not in lab.dmesg()


def _a_user_can_mount() -> bool:
    """Return True if somebody else reaches our command, which is not in root's home, and the device, as udev has it."""
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        return False
    words = [*A_USER.split(), "sh", "-c", f"{HELPER} --version"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_user_mounts_a_line_that_says_user(lab: Any, pkram_root: Path) -> None:
    if not _a_user_can_mount():
        pytest.skip("this Python, or /dev/fuse, is not for other users")
    lab.admit_others()
    one, other = lab.dir("one"), lab.dir("other")
    os.chown(one, 1000, 1000)
    os.chown(pkram_root, 1000, 1000)
    said = shell(
        lab,
        [f"none {one} pkramfs user,noauto,pkram=one,size=64m", f"none {other} pkramfs noauto,pkram=other"],
        f"""
        mount {one}; echo $?
        grep -c "{one} fuse.pkramfs .*nosuid,nodev,noexec.*user_id=1000" /proc/mounts
        touch {one}/file
        mount -o remount,preserve,ro {one}; echo $?
        umount {one}; echo $?
        mount {one} && ls {one} && umount {one}
        mount {other} 2>/dev/null || echo refused
        """,
        user=A_USER,
    )
    assert said == ["0", "1", "0", "0", "file", "refused"]
