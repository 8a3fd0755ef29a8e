"""mount(2), umount2(2), and what is mounted: the system calls that Python's library lacks.

Standard library only: the mount helper uses this without importing the daemon's chapters.

What is mounted is read from /proc/self/mountinfo, never by stat of the mount point: that would be
a request to a daemon that may be dead, or be ourselves.

Kernel: fs/namespace.c (path_mount, path_umount), fs/proc_namespace.c (show_mountinfo)
"""

import ctypes
import errno
import os
import re
import subprocess
from typing import NamedTuple

from pkramfs.fuse import options as o

FSTYPE = "fuse.pkramfs"
MOUNTINFO = "/proc/self/mountinfo"
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_PR_SET_IO_FLUSHER = 57

_libc = ctypes.CDLL(None, use_errno=True)
_OCTAL = re.compile(rb"\\([0-7]{3})")
_NAMES = {
    "ro": o.MS_RDONLY,
    "nosuid": o.MS_NOSUID,
    "nodev": o.MS_NODEV,
    "noexec": o.MS_NOEXEC,
    "noatime": o.MS_NOATIME,
    "nodiratime": o.MS_NODIRATIME,
    "relatime": o.MS_RELATIME,
    "nosymfollow": o.MS_NOSYMFOLLOW,
    "sync": o.MS_SYNCHRONOUS,
    "dirsync": o.MS_DIRSYNC,
    "lazytime": o.MS_LAZYTIME,
}


class Mounted(NamedTuple):
    """A line of mountinfo. `flags` are the mount's and the file system's together, as MS_ bits."""

    dev: int
    mountpoint: str
    fstype: str
    flags: int


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2)."""
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(target), os.fsencode(fstype), ctypes.c_ulong(flags), os.fsencode(data)
        ),
        target,
    )


def serve_writers() -> bool:
    """Tell the kernel that dirty pages are written through this process, so that it never waits for such pages when it
    needs memory itself; whether that is allowed (CAP_SYS_RESOURCE) and known (Linux 5.6).

    Kernel: prctl(2), PR_SET_IO_FLUSHER
    """
    return int(_libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)) == 0


def umount(target: str, *, lazy: bool = False) -> None:
    """umount2(2): at once, or detached now and gone when the last user is."""
    _check(_libc.umount2(os.fsencode(target), (MNT_DETACH if lazy else 0) | UMOUNT_NOFOLLOW), target)


def _check(result: int, target: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def detach(target: str, *, lazy: bool = True) -> None:
    """Unmount as who we are: umount2(2) for root, fusermount3 for others."""
    if os.geteuid() == 0:
        umount(target, lazy=lazy)
        return
    words = ["fusermount3", "-u", *(["-z"] * lazy), "--", target]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="surrogateescape", check=False
    )
    if done.returncode:
        raise OSError(errno.EBUSY, done.stderr.strip() or "fusermount3 failed", target)


def mounts() -> list[Mounted]:
    """Everything that is mounted in this mount namespace, in order."""
    with open(MOUNTINFO, "rb") as file:
        return [_line(line) for line in file]


def places_of(dev: int) -> list[Mounted]:
    """The mounts of one file system, in order; only their lines are taken apart."""
    number = b" %d:%d " % (os.major(dev), os.minor(dev))
    with open(MOUNTINFO, "rb") as file:
        found = [_line(line) for line in file if number in line]
    return [mounted for mounted in found if mounted.dev == dev]


def _line(line: bytes) -> Mounted:
    left, _, right = line.partition(b" - ")
    words, tail = left.split(b" "), right.split()
    major, minor = words[2].split(b":")
    named = {*words[5].split(b","), *(tail[2].split(b",") if len(tail) > 2 else [])}
    flags = 0
    for name in named:
        flags |= _NAMES.get(name.decode(errors="replace"), 0)
    return Mounted(os.makedev(int(major), int(minor)), _path(words[4]), os.fsdecode(tail[0]), flags)


def _path(text: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text))


def mounted_at(directory: str) -> Mounted | None:
    """What is mounted on exactly this directory: the topmost, or None."""
    found = [mounted for mounted in mounts() if mounted.mountpoint == directory]
    return found[-1] if found else None


def places(dev: int | None) -> list[str]:
    """Where this file system lies on top: its mount, if nothing covers it, and its bind mounts."""
    top = {mounted.mountpoint: mounted.dev for mounted in mounts()}  # the last of a path hides the others
    return [path for path, found in top.items() if found == dev]


def detach_all(dev: int | None, *, lazy: bool = True) -> None:
    """Unmount a file system wherever it is on top. What somebody mounted over it is not ours to unmount."""
    while found := places(dev):
        for path in reversed(found):
            detach(path, lazy=lazy)


def is_dead(directory: str) -> bool:
    """Whether a mount of ours is there whose daemon is gone.

    Asked with statfs, which always is a request: stat may be answered from the kernel's endless cache.
    """
    mounted = mounted_at(directory)
    if mounted is None or mounted.fstype != FSTYPE:
        return False
    try:
        os.statvfs(directory)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def syncfs(directory: str) -> None:
    """Have the kernel send what is dirty in the file system of a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check(_libc.syncfs(fd), directory)
    finally:
        os.close(fd)
