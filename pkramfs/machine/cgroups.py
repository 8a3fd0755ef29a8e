# SPDX-License-Identifier: GPL-2.0-or-later
"""What the memory cgroups allow that this process is in: theirs is the memory that it touches first.

    /proc/self/cgroup     which group                     ┐
    /proc/self/mountinfo  where its directory is          ├ that group and all above it: the least room counts
    memory.max …          limit, use, what can be freed   ┘

A group that is full is worse than a file system that is: a daemon in it that needs one more page, for whatever
it does, waits for dirty pages to be written that wait for the daemon, or somebody is killed. So room is what is
below the limit, less a reserve: larger than what the mount may have dirty (see `dirty`), so that writers in the
group always leave something that can be freed. The clean page cache counts as free, for the kernel takes it back
when it is needed.

Looking costs some 0.1 ms, so it is done a few times a second, more often where room is scarce; what this process
takes meanwhile is subtracted.

Kernel: mm/memcontrol.c (try_charge), Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst
"""

import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

from pkramfs.units import MIB

_RESERVE_SHARE, _RESERVE_LEAST, _RESERVE_MOST, _RESERVE_MOST_SHARE = 0.05, 64 * MIB, 256 * MIB, 0.25
_DIRTY_PART = 4
_TIGHT, _TIGHT_SECONDS, _EASY_SECONDS = 4, 0.01, 0.1
"""How long a look is good for, where less than so many reserves are free, and where there is more."""
_NONE = 1 << 60
"""Limits from here on are none: version 1 says LONG_MAX, rounded down."""


class _Names(NamedTuple):
    """What a version calls its files, and the lines of memory.stat."""

    limits: tuple[str, ...]
    used: str
    cache: tuple[str, ...]
    dirty: tuple[str, ...]


_VERSION_1 = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    ("total_dirty", "total_writeback"),
)
_VERSION_2 = _Names(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file"),
    ("file_dirty", "file_writeback"),
)


class _Level(NamedTuple):
    """A group with a limit: bytes below it that are free or can be freed, and how many of them are left alone."""

    limit: int
    free: int
    reserve: int


class MemoryGroups:
    """The memory cgroups of this process. `proc` is where its files of /proc are."""

    def __init__(self, proc: str = "/proc/self") -> None:
        self._proc = proc
        self._member: str | None = None
        self._groups: list[tuple[str, _Names]] = []
        self._levels: list[_Level] = []
        self._again = 0.0
        self._taken = 0

    def room(self, floor: float = 1.0) -> int | None:
        """Bytes that may still be touched, None where nothing limits them; `floor` as in `Ram.room`."""
        if time.monotonic() >= self._again:
            self.look()
        if not self._levels:
            return None
        return min(level.free - int(floor * level.reserve) for level in self._levels) - self._taken

    def dirty(self) -> int | None:
        """Bytes that writers should have unwritten at most, None where nothing limits them: part of the reserve."""
        self.look()
        return min((level.reserve // _DIRTY_PART for level in self._levels), default=None)

    def limit(self) -> int | None:
        """Bytes that the groups allow in all, None where nothing limits them."""
        self.look()
        return min((level.limit for level in self._levels), default=None)

    def take(self, size: int) -> None:
        """So many bytes are about to be touched, which the next look will see."""
        self._taken += size

    def look(self) -> None:
        """See how things are now."""
        member = _read(os.path.join(self._proc, "cgroup"))
        if member != self._member:
            self._member, self._groups = member, list(_groups(member, _read(os.path.join(self._proc, "mountinfo"))))
        self._levels = [level for group in self._groups if (level := _level(*group)) is not None]
        tight = any(level.free < _TIGHT * level.reserve for level in self._levels)
        self._again = time.monotonic() + (_TIGHT_SECONDS if tight else _EASY_SECONDS)
        self._taken = 0


def _groups(member: str, mountinfo: str) -> Iterator[tuple[str, _Names]]:
    """Directories of the groups that hold this process, innermost first, of whichever versions are in use."""
    paths = {}
    for line in member.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, *_, options) = left.split(), right.split()
        if kind in paths and (kind == "cgroup2" or "memory" in options.split(",")):
            names = _VERSION_2 if kind == "cgroup2" else _VERSION_1
            yield from ((place, names) for place in _upwards(_plain(fields[4]), _plain(fields[3]), paths.pop(kind)))


def _upwards(mountpoint: str, root: str, path: str) -> Iterator[str]:
    """The directory of a group and those above it. A container may see its own part of the hierarchy only, `root`."""
    inside = os.path.relpath(path, root)
    parts = [] if inside.startswith("..") or inside == "." else inside.split("/")
    for depth in range(len(parts), -1, -1):
        yield os.path.join(mountpoint, *parts[:depth])


def _level(directory: str, names: _Names) -> _Level | None:
    """How a group is, None if it has no limit (or is not there: the root has no files)."""
    limits = [int(text) for name in names.limits if (text := _read(os.path.join(directory, name)).strip()).isdecimal()]
    limit = min(limits, default=_NONE)
    used = _read(os.path.join(directory, names.used)).strip()
    if limit >= _NONE or not used.isdecimal():
        return None
    stat = dict(line.split() for line in _read(os.path.join(directory, "memory.stat")).splitlines())
    cache, dirty = (sum(int(stat.get(name, 0)) for name in part) for part in (names.cache, names.dirty))
    reserve = int(min(max(limit * _RESERVE_SHARE, _RESERVE_LEAST), _RESERVE_MOST, limit * _RESERVE_MOST_SHARE))
    return _Level(limit, limit - int(used) + max(cache - dirty, 0), reserve)


def _read(path: str) -> str:
    """A file's text, nothing where there is none: a group may go, and not every group has every file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _plain(path: str) -> str:
    """A path of mountinfo, whose odd characters are octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
