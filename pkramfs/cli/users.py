# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that use a mount and will get ENOTCONN when it goes, as far as /proc shows them.

Kernel: fs/proc/fd.c; fuser(1) of psmisc does the same
"""

import os
from typing import NamedTuple

from pkramfs.mounting.syscalls import inside


class User(NamedTuple):
    """A program that has files open in a mount, or stands in it."""

    pid: int
    name: str
    places: int


def processes() -> dict[int, list[str]]:
    """Return the open files of all programs that /proc shows, read once for any number of mounts."""
    return {int(pid): _links(pid) for pid in os.listdir("/proc") if pid.isdecimal() and int(pid) != os.getpid()}


def users(mountpoint: str, programs: dict[int, list[str]]) -> list[User]:
    """Return the programs that will get ENOTCONN. Never touches the mount itself."""
    found = []
    for pid, links in programs.items():
        if places := sum(inside(link, mountpoint) for link in links):
            found.append(User(pid, _name(str(pid)), places))
    return sorted(found)


def _links(pid: str) -> list[str]:
    """Return where a process's descriptors, working directory and root point."""
    links = []
    try:
        names = [f"fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        names = []  # not ours to look at, or gone
    for name in ["cwd", "root", *names]:
        try:
            links.append(os.readlink(f"/proc/{pid}/{name}"))
        except OSError:
            continue  # closed meanwhile
    return links


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="surrogateescape") as comm:
            return comm.read().strip()
    except OSError:
        return "?"
