# SPDX-License-Identifier: GPL-2.0-or-later
"""mount(2), umount2(2), and the mount table: the system calls that Python's library lacks.

What is mounted is read from /proc/self/mountinfo, never by stat of the mount point: that would be
a request to a daemon that may be dead, or be ourselves.

A path that was read earlier may lead elsewhere by now, if another user may change a directory on the way. So the
directory is held first, by a descriptor, with no symbolic link on the way; its identity is compared with the one
that was noted; and the system call is given the descriptor.

Kernel: fs/namespace.c (path_mount, path_umount), fs/proc_namespace.c (show_mountinfo), fs/namei.c
"""

import ctypes
import errno
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

from pkramfs.mounting import options as o
from pkramfs.mounting import patience

FSTYPE = "fuse.pkramfs"
MOUNTINFO = "/proc/self/mountinfo"
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_PR_SET_IO_FLUSHER = 57
ANOTHER = "it is another directory than the one that was mounted on: look at it, and mount by hand"
"""The reason not to mount on a directory whose identity has changed."""
_LINK = "is a symbolic link by now"

_DETACH_SECONDS = 600.0
"""How long fusermount3 may take, which has the kernel write back what is dirty."""
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
    """A line of mountinfo. `flags` are the mount's and the file system's together, as MS_ bits; `own` the mount's."""

    dev: int
    mountpoint: str
    fstype: str
    flags: int
    own: int = 0
    id: int = 0
    parent: int = 0
    root: str = "/"
    """What of the file system is seen there: all, or the directory or file that is mounted by a bind mount."""
    groups: frozenset[bytes] = frozenset()
    """The peer groups that it belongs to or follows."""


def mount(source: str, target: str, fstype: str, flags: int, data: str, *, held: int | None = None) -> None:
    """Call mount(2) on the directory that `held` is a descriptor of; `target` names it in errors, or is the place."""
    place = target if held is None else held_path(held)
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(place), os.fsencode(fstype), ctypes.c_ulong(flags), os.fsencode(data)
        ),
        target,
    )


def serve_writers() -> bool:
    """Tell the kernel that dirty pages are written through this process, so that it never waits for such pages when it
    needs memory itself. Return False if that is not allowed (CAP_SYS_RESOURCE) or not known (before Linux 5.6).

    Kernel: prctl(2), PR_SET_IO_FLUSHER
    """
    return int(_libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)) == 0


def umount(target: str, *, lazy: bool = False) -> None:
    """Call umount2(2): at once, or detached now and gone with the last user.

    The directory above is held, not the mount itself: that would be a user of it. No one can rename a mount point.
    """
    above, name = os.path.split(target)
    with holding(above) as held:
        place = f"{held_path(held)}/{name}" if name else target
        _check(_libc.umount2(os.fsencode(place), (MNT_DETACH if lazy else 0) | UMOUNT_NOFOLLOW), target)


def _check(result: int, target: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def hold(path: str, start: int | None = None, *, directory: bool = True) -> int:
    """Return a descriptor (O_PATH) of the file at an absolute path from `start`, or from the root.

    ELOOP where a component is a symbolic link. A path that was read from the mount table, or resolved, has none:
    so it was changed since. With `directory`, ENOTDIR for any other file.
    """
    held = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if start is None else os.dup(start)
    names = [name for name in path.split("/") if name]
    for number, name in enumerate(names, 1):
        above = held
        try:
            held = _step(above, name, directory=directory or number < len(names))
        except OSError as error:
            raise OSError(error.errno, error.strerror, "/" + "/".join(names[:number])) from None
        finally:
            os.close(above)
    return held


def _step(above: int, name: str, *, directory: bool) -> int:
    """Open one component."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | (os.O_DIRECTORY if directory else 0), dir_fd=above)
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, _LINK, name) from None
        raise
    if not directory and stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, _LINK, name)
    return fd


@contextmanager
def holding(path: str, start: int | None = None, *, directory: bool = True) -> Iterator[int]:
    """Hold the file at a path for a while; see `hold`."""
    held = hold(path, start, directory=directory)
    try:
        yield held
    finally:
        os.close(held)


def identity(held: int) -> tuple[int, int]:
    """Return device and inode number of a held file."""
    found = os.fstat(held)
    return found.st_dev, found.st_ino


def same(found: tuple[int, int], expected: tuple[int, int | None]) -> bool:
    """Return True if an identity is the one that is expected; without an inode number only the device counts."""
    return found[0] == expected[0] and expected[1] in (None, found[1])


def held_path(held: int) -> str:
    """Return the path by which the kernel finds the file of a descriptor, whatever its name is by now."""
    return f"/proc/self/fd/{held}"


def mount_id(held: int) -> int:
    """Return the id of the mount in which something held lies. Sends no request."""
    with open(f"/proc/self/fdinfo/{held}", "rb") as lines:
        return next(int(line[len(b"mnt_id:") :]) for line in lines if line.startswith(b"mnt_id:"))


def detach(target: str, *, lazy: bool = True) -> None:
    """Unmount by umount2(2) as root, by fusermount3 as another user."""
    if os.geteuid() == 0:
        umount(target, lazy=lazy)
        return
    words = ["fusermount3", "-u", *(["-z"] * lazy), "--", target]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=_DETACH_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"fusermount3 did not end within {_DETACH_SECONDS:g} s", target) from None
    if done.returncode:
        raise OSError(errno.EBUSY, done.stderr.strip() or "fusermount3 failed", target)


def mounts(pid: int | None = None) -> list[Mounted]:
    """Return everything that is mounted in this mount namespace, or in a process's, in order."""
    with open(MOUNTINFO if pid is None else f"/proc/{pid}/mountinfo", "rb") as file:
        return [_line(line) for line in file]


def places_of(dev: int) -> list[Mounted]:
    """Return the mounts of one file system, in order; only their lines are taken apart."""
    number = b" %d:%d " % (os.major(dev), os.minor(dev))
    with open(MOUNTINFO, "rb") as file:
        found = [_line(line) for line in file if number in line]
    return [mounted for mounted in found if mounted.dev == dev]


@lru_cache(maxsize=4096)
def _line(line: bytes) -> Mounted:
    left, _, right = line.partition(b" - ")
    words, tail = left.split(b" "), right.rstrip(b"\n").split(b" ")  # a source may be empty
    major, minor = words[2].split(b":")
    own, its = _flags(words[5]), _flags(tail[2]) if len(tail) > 2 else 0
    groups = (word.partition(b":") for word in words[6:])
    return Mounted(
        dev=os.makedev(int(major), int(minor)),
        mountpoint=_path(words[4]),
        fstype=os.fsdecode(tail[0]),
        flags=own | its,
        own=own,
        id=int(words[0]),
        parent=int(words[1]),
        root=_path(words[3]),
        groups=frozenset(number for kind, _, number in groups if kind in (b"shared", b"master")),
    )


def _flags(words: bytes) -> int:
    flags = 0
    for name in words.split(b","):
        flags |= _NAMES.get(name.decode(errors="replace"), 0)
    return flags


def _path(text: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text))


def inside(path: str, directory: str) -> bool:
    """Return True if an absolute path is that of a directory or of something in it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def mounted_at(directory: str) -> Mounted | None:
    """Return the topmost mount on exactly this directory, or None."""
    found = [mounted for mounted in mounts() if mounted.mountpoint == directory]
    return found[-1] if found else None


def mounted_since(before: Iterable[Mounted], directory: str) -> Mounted | None:
    """Return the pkramfs mount that was made on a directory since `before`.

    The kernel gives the id and the device of a mount that has ended to the next one, which may so look as one of
    `before`. The path may differ from `directory`, if that was moved.
    """
    found, known = [one for one in mounts() if one.fstype == FSTYPE], set(before)
    here = [one for one in found if one.mountpoint == directory]
    fresh = [one for one in found if one not in known]
    chosen = [one for one in fresh if one.mountpoint == directory] or here or fresh
    return chosen[-1] if chosen else None


class Table:
    """The mount table of a namespace: which mount lies on which, and which a path can reach."""

    def __init__(self, found: Iterable[Mounted]) -> None:
        self.mounts = list(found)
        self.by_id = {one.id: one for one in self.mounts}
        self._children: dict[int, dict[str, Mounted]] = {}
        for one in self.mounts:
            self._children.setdefault(one.parent, {})[one.mountpoint] = one

    def of(self, dev: int | None) -> list[Mounted]:
        """Return every place of a file system, in order."""
        return [one for one in self.mounts if one.dev == dev]

    def above(self, one: Mounted) -> Iterator[Mounted]:
        """Yield the mounts below which one lies, the nearest first."""
        seen = {one.id}
        while (upper := self.by_id.get(one.parent)) is not None and upper.id not in seen:
            seen.add(upper.id)
            yield upper
            one = upper

    def cover(self, one: Mounted) -> Mounted | None:
        """Return the mount over exactly the root of a mount."""
        return self._children.get(one.id, {}).get(one.mountpoint)

    def hidden(self, one: Mounted) -> Mounted | None:
        """Return the mount over a directory on the way to a mount, so that its path leads elsewhere."""
        for lower in (one, *self.above(one)):
            path, beside = lower.mountpoint, self._children.get(lower.parent, {})
            while path != "/":
                path = os.path.dirname(path)
                found = beside.get(path)
                if found is not None and found.id not in (lower.id, lower.parent):
                    return found
        return None


def is_read_only(dev: int | None) -> bool:
    """Return True if the kernel refuses changes of a mount by itself."""
    return any(one.flags & o.MS_RDONLY for one in mounts() if one.dev == dev)


def places(dev: int | None) -> list[str]:
    """Return the places of a file system that nothing covers or hides."""
    table = Table(mounts())
    return [one.mountpoint for one in table.of(dev) if table.cover(one) is None and table.hidden(one) is None]


def detach_all(dev: int | None, *, lazy: bool = True) -> None:
    """Unmount a file system wherever it is on top; mounts of others over it stay."""
    while found := places(dev):
        for path in reversed(found):
            detach(path, lazy=lazy)


def is_dead(directory: str) -> bool:
    """Return True if a mount of ours is there whose daemon is gone; raise StuckError if the daemon does not answer.

    Asked with statfs, which always is a request: stat may be answered from the kernel's endless cache.
    """
    mounted = mounted_at(directory)
    if mounted is None or mounted.fstype != FSTYPE:
        return False
    where = f"{os.major(mounted.dev)}:{os.minor(mounted.dev)}"
    try:
        patience.within(
            lambda: os.statvfs(directory).f_bsize,
            patience.ANSWER_SECONDS,
            f"the daemon of what is mounted on {directory} ({where}) to answer",
        )
    except patience.StuckError:
        raise
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2); raise OSError with its errno."""
    _check(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)), "fallocate")


def syncfs(directory: str, dev: int | None = None) -> None:
    """Make the kernel write back dirty data of the file system of a directory; with `dev`, only if it is that one."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if dev in (None, os.fstat(fd).st_dev):
            sync_held(fd, directory)
    finally:
        os.close(fd)


def sync_held(fd: int, directory: str) -> None:
    """Make the kernel write back dirty data, by a descriptor; raise OSError, once, if some could not be written."""
    _check(_libc.syncfs(fd), directory)
