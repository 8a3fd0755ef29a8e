# SPDX-License-Identifier: GPL-2.0-or-later
"""Room in the memory cgroups of this process, which are charged for every page that it touches first.

    /proc/self/cgroup     name of the group                   ┐
    /proc/self/mountinfo  its directory                       ├ that group and all above it: the least room counts
    memory.max …          limit, use, and what can be freed   ┘

A full group is worse than a full file system. A daemon that needs one more page waits until dirty pages of the group
are written, and those may wait for the daemon; or the kernel kills a process. So room is the rest below the limit, less
a reserve. The reserve is larger than the dirty data of the mount (see `dirty`): writers in the group always leave pages
that can be freed. The clean page cache counts as free, because the kernel takes it back when it needs memory.

A look costs about 0.1 ms, so `room` looks a few times a second, more often where room is scarce, and subtracts what
this process has taken since.

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
"""Seconds for which a look is good: fewer while less than _TIGHT reserves are free."""
_NONE = 1 << 60
"""A limit this large means that there is none: version 1 says LONG_MAX, rounded down."""


class _Names(NamedTuple):
    """Names that one version of cgroups has for its files and for lines of memory.stat."""

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
    """A group with a limit: bytes below the limit that are free or can be freed, and how many of them stay reserved."""

    limit: int
    free: int
    reserve: int


class MemoryGroups:
    """The memory cgroups of this process; `proc` is the directory of its files in /proc."""

    def __init__(self, proc: str = "/proc/self") -> None:
        self._proc = proc
        self._member: str | None = None
        self._groups: list[tuple[str, _Names]] = []
        self._levels: list[_Level] = []
        self._again = 0.0
        self._taken = 0

    def room(self, floor: float = 1.0) -> int | None:
        """Return the bytes that may still be touched, None without a limit; `floor` as in `Ram.room`."""
        if time.monotonic() >= self._again:
            self.look()
        if not self._levels:
            return None
        return min(level.free - int(floor * level.reserve) for level in self._levels) - self._taken

    def dirty(self) -> int | None:
        """Return the most bytes that writers should leave dirty, a part of the reserve; None without a limit."""
        self.look()
        return min((level.reserve // _DIRTY_PART for level in self._levels), default=None)

    def limit(self) -> int | None:
        """Return the bytes that the groups allow in all, None without a limit."""
        self.look()
        return min((level.limit for level in self._levels), default=None)

    def take(self, size: int) -> None:
        """Subtract bytes that are about to be touched, until the next look sees them."""
        self._taken += size

    def look(self) -> None:
        """Read limits and use of all groups anew."""
        member = _read(os.path.join(self._proc, "cgroup"))
        if member != self._member:
            self._member, self._groups = member, list(_groups(member, _read(os.path.join(self._proc, "mountinfo"))))
        self._levels = [level for group in self._groups if (level := _level(*group)) is not None]
        tight = any(level.free < _TIGHT * level.reserve for level in self._levels)
        self._again = time.monotonic() + (_TIGHT_SECONDS if tight else _EASY_SECONDS)
        self._taken = 0


def _groups(member: str, mountinfo: str) -> Iterator[tuple[str, _Names]]:
    """Yield the directories of the groups that hold this process, innermost first, for each version in use."""
    paths = {}
    for line in member.split("\n"):  # names may contain what str.splitlines treats as line ends
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in mountinfo.split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        fields, (kind, *_, options) = left.split(" "), right.split(" ")
        if kind in paths and (kind == "cgroup2" or "memory" in options.split(",")):
            names = _VERSION_2 if kind == "cgroup2" else _VERSION_1
            yield from ((place, names) for place in _upwards(_plain(fields[4]), _plain(fields[3]), paths.pop(kind)))


def _upwards(mountpoint: str, root: str, path: str) -> Iterator[str]:
    """Yield the directory of a group and those above it. A container may see only a part of the hierarchy: `root`."""
    inside = os.path.relpath(path, root)
    parts = [] if inside.startswith("..") or inside == "." else inside.split("/")
    for depth in range(len(parts), -1, -1):
        yield os.path.join(mountpoint, *parts[:depth])


def _level(directory: str, names: _Names) -> _Level | None:
    """Return limit, free bytes and reserve of a group; None if it has no limit (the root group has no files)."""
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
    """Return a file's text, or nothing if it is missing: a group may go, and not every group has every file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return file.read()
    except OSError:
        return ""


def _plain(path: str) -> str:
    """Decode a path of mountinfo, which has odd characters in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
