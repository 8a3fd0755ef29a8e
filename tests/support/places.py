# SPDX-License-Identifier: GPL-2.0-or-later
"""What is mounted below a directory, whose processes serve it, and how both are taken down.

Only what the caller names is touched: other mounts on this machine are no business of a test's.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from pkramfs.mounting import syscalls

ROOT = os.geteuid() == 0


def memory_directory(prefix: str = "pkram-test-") -> Path:
    """Make a directory in memory, where holes of files cost nothing."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base))


def mounted() -> list[str]:
    """Return the mount points of every pkramfs mount."""
    return [one.mountpoint for one in syscalls.mounts() if one.fstype == syscalls.FSTYPE]


def mounts_below(root: Path) -> list[str]:
    return [point for point in mounted() if point.startswith(f"{root}/")]


def unmounting(place: object, *, lazy: bool = False) -> list[str]:
    """Return the command with which this user unmounts."""
    if ROOT:
        return ["umount", *(["-l"] if lazy else []), str(place)]
    return ["fusermount3", "-uz" if lazy else "-u", str(place)]


def wait_gone(pid: int, seconds: float) -> bool:
    """Wait, with a deadline, until a process has ended."""
    deadline = time.monotonic() + seconds
    while _is_ours(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_ours(pid: int) -> bool:
    try:
        return pid > 0 and b"pkramfs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def take_down(root: Path) -> None:
    """Unmount, end the daemons by pid, remove the files; lazily and forcibly only where needed."""
    for entry in sorted(root.glob("*/mounts/*.json")):
        with contextlib.suppress(OSError, ValueError):
            _take_down_mount(json.loads(entry.read_text()))
    for mountpoint in mounts_below(root):
        subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)
    shutil.rmtree(root, ignore_errors=True)


def _take_down_mount(entry: dict[str, object]) -> None:
    mountpoint, pid = str(entry.get("mountpoint", "")), int(str(entry.get("pid", 0)))
    for command in (["umount", mountpoint], ["fusermount3", "-u", mountpoint], ["umount", "-l", mountpoint]):
        if mountpoint not in mounted():
            break
        subprocess.run(command, check=False, capture_output=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if wait_gone(pid, 5.0):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
