# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree on a real mount: one that is hard to preserve, and all that must survive of one."""

import os
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

WHOLE = 1 << 26
"""Files up to this size are read whole, larger ones where they have data."""


class Seen(NamedTuple):
    """What the system calls tell of one file."""

    mode: int
    uid: int
    gid: int
    nlink: int
    ino: int
    rdev: int
    size: int
    blocks: int
    times: tuple[int, ...]
    xattrs: dict[str, bytes]
    content: Any
    """Pieces of a file as (offset, bytes), where a link points to, or the names of a directory in their order."""


def snapshot(top: Path | str, *, atime: bool = False) -> dict[bytes, Seen]:
    """Return all that must survive of a pkramfs tree, by path below its top.

    Attributes come first: reading changes access times, which count only if they are asked for.
    """
    root = os.fsencode(top)
    stats, left = dict[bytes, os.stat_result](), [root]
    while left:
        path = left.pop()
        stats[path] = found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode):
            left += [os.path.join(path, name) for name in os.listdir(path)]
    return {os.path.relpath(path, root): _seen(path, found, atime) for path, found in stats.items()}


def _seen(path: bytes, s: os.stat_result, atime: bool) -> Seen:
    times = (s.st_mtime_ns, s.st_ctime_ns, *([s.st_atime_ns] if atime else []))
    names = os.listxattr(path, follow_symlinks=False)
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    numbers = (s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_ino, s.st_rdev, s.st_size, s.st_blocks)
    return Seen(*numbers, times, xattrs, _content(path, s))


def _content(path: bytes, s: os.stat_result) -> Any:
    if stat.S_ISLNK(s.st_mode):
        return os.readlink(path)
    if stat.S_ISDIR(s.st_mode):
        return os.listdir(path)
    if not stat.S_ISREG(s.st_mode):
        return None
    with open(path, "rb") as file:
        pieces = [(0, s.st_size)]
        if s.st_size > WHOLE:
            os.fsync(file.fileno())  # the daemon knows no extent of what only the kernel's cache has
            extents = os.getxattr(path, "user.pkramfs.extents").splitlines()
            pieces = [(int(start), int(length)) for start, length in (line.split(b":") for line in extents)]
        return [(start, os.pread(file.fileno(), length, start)) for start, length in pieces]


def fill(top: Path) -> None:
    """Make the awkward files: empty, one byte, sparse of 1 TiB with two pages, deep, linked, and a copy of /etc."""
    (top / "empty").touch()
    (top / "one").write_bytes(b"x")
    with open(top / "sparse", "wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"begin", 4096 * 3)
        os.pwrite(file.fileno(), b"end", (1 << 39) + 5)
    deep = top / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "data").write_bytes(os.urandom(3_000_001))
    os.link(deep / "data", top / "second name")
    os.symlink("a/b", top / "way")
    os.mkfifo(top / "pipe")
    os.chmod(top / "one", 0o640)
    os.utime(top / "one", ns=(1_617_139_699_000_000_001, 1_617_139_699_123_456_789))
    shutil.copytree("/etc", top / "etc", symlinks=True, ignore=_left_out)


def _left_out(directory: str, names: list[str]) -> list[str]:
    """Return what a copy of /etc lacks: certificates, for their number, and what this user may not read."""
    if "ssl" in directory:
        return names
    places = {name: os.path.join(directory, name) for name in names}
    return [name for name, place in places.items() if not os.path.islink(place) and not os.access(place, os.R_OK)]
