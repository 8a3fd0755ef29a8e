# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is mounted: one entry for each mount daemon, named by its tree id.

    mounts/00c0ffee….lock    held while the daemon lives; "mounted" means nothing else
    mounts/00c0ffee….json    name, mount point, pid, options
    mounts/00c0ffee….sock    where it listens
    mounts/00c0ffee….log     what it printed

The lock is taken before the first page block is leased and removed only by its holder. What a dead
daemon left is read as not alive; once its page blocks were swept, `clear_away` takes its lock and
removes its files, and its last words go to the kernel log.

Kernel: /proc/mounts, which cannot say whose daemon lives
"""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from pkramfs import schema
from pkramfs.errors import MachineError, explain
from pkramfs.machine import locks
from pkramfs.machine.files import open_regular, read_json, replace_file

_SUFFIXES = ("json", "sock", "lock")
_ANY_NAME = re.compile(r"([0-9a-f]{16})\.(?:json|sock|lock|log)")
_LAST_LINES, _LAST_BYTES = 20, 1 << 14
"""How much of a dead daemon's log is worth keeping: an interpreter's last words are a stack of calls."""
_NAME = re.compile(r"[0-9a-f]{16}\.(json|lock)")
_FATAL = re.compile(rb"^Fatal Python error: (.*)$", re.MULTILINE)
_ENTRY = schema.Object(
    {},
    optional={
        "name": schema.Maybe(schema.Text()),
        "mountpoint": schema.Maybe(schema.Text()),
        "pid": schema.Maybe(schema.Whole(0, (1 << 31) - 1)),
        "options": schema.Maybe(schema.MapOf(schema.OneOf((schema.Text(), schema.Flag())))),
        "dev": schema.Maybe(schema.Whole(0, (1 << 64) - 1)),
        "on_dev": schema.Maybe(schema.Whole(0, (1 << 64) - 1)),
        "on_ino": schema.Maybe(schema.Whole(0, (1 << 64) - 1)),
        "log_at": schema.Maybe(schema.Whole()),
    },
    others=schema.Anything(),
)
_KNOWN = {"name", "mountpoint", "pid", "options", "dev", "on_dev", "on_ino"}
"""Keys that are fields of MountEntry."""
_REMEDY = "umount and mount it again"
_LAST = 1 << 20
"""Bytes at the end of a log in which its last words are looked for."""


@dataclass(frozen=True)
class MountEntry:
    """What is known of one mount daemon. `name` is None for a mount without pkram=."""

    tree_id: int
    name: str | None
    mountpoint: str
    pid: int
    options: dict[str, Any]
    dev: int | None
    alive: bool
    socket: str
    on: tuple[int, int] | None = None
    """Device and inode number of the directory that it was mounted on."""
    extra: dict[str, Any] = field(default_factory=dict)
    damaged: str = ""
    """Why the entry could not be read, or nothing."""


class MountLock:
    """A daemon's hold on its tree id. Keep it for the life of the daemon."""

    def __init__(self, directory: str, tree_id: int, fd: int) -> None:
        self.directory, self.tree_id, self._fd = directory, tree_id, fd

    def path(self, suffix: str) -> str:
        """A file of this mount: `lock`, `json`, `sock`, `log`."""
        return stem(self.directory, self.tree_id) + "." + suffix

    def write_entry(self, data: dict[str, Any]) -> None:
        """Say what is mounted; keys as MountEntry, more are kept in `extra`."""
        replace_file(self.path("json"), json.dumps(data, indent=1) + "\n")

    def release(self) -> None:
        """Let go and remove the entry; the lock file goes last, still held."""
        if self._fd < 0:
            return
        for suffix in _SUFFIXES:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(self.path(suffix))
        os.close(self._fd)
        self._fd = -1


def stem(directory: str, tree_id: int) -> str:
    """Path of a mount's files without their suffix."""
    return os.path.join(directory, f"{tree_id:016x}")


def claim(directory: str, tree_id: int) -> MountLock:
    """Take the lock of a tree id; MachineError if a living daemon holds it."""
    fd = locks.lock_removable(stem(directory, tree_id) + ".lock")
    if fd is None:
        raise MachineError(f"tree {tree_id:x} is in use by another mount daemon")
    return MountLock(directory, tree_id, fd)


def kill(entry: MountEntry) -> None:
    """Kill a mount daemon, if its pid still is one (a pid may have been given to somebody else)."""
    if entry.pid <= 0:
        return  # a damaged entry; kill(0) would be ourselves
    try:
        with open(f"/proc/{entry.pid}/cmdline", "rb") as words:
            ours = b"pkramfs" in words.read()
        if ours:
            os.kill(entry.pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it is gone, which is what we want


def last_words(directory: str, entry: MountEntry) -> tuple[str, float] | None:
    """How a dead daemon ended, if it was an abort or a fault, and when: its interpreter's own line in its log."""
    log = stem(directory, entry.tree_id) + ".log"
    try:
        with open(open_regular(log), "rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(entry.extra.get("log_at") or 0, status.st_size - _LAST))
            found, ended = _FATAL.findall(file.read(_LAST)), status.st_mtime
    except OSError:
        return None  # no log, no fault
    return (found[-1].decode("ascii", "replace"), ended) if found and not entry.alive else None


def clear_away(directory: str, keep: Container[int], say: Callable[[str], None]) -> None:
    """Remove the files of daemons that have ended, but those of `keep`; `say` is told what their logs end with."""
    names = (_ANY_NAME.fullmatch(name) for name in os.listdir(directory))
    living = live_ids(directory)
    for tree_id in sorted({int(name[1], 16) for name in names if name}):
        if tree_id in living or tree_id in keep:
            continue
        fd = locks.lock_removable(stem(directory, tree_id) + ".lock")
        if fd is None:
            continue  # somebody mounts it just now
        dead = MountLock(directory, tree_id, fd)
        for line in _last_lines(dead.path("log")):
            say(f"pkramfs: daemon of tree {tree_id:016x}: {line}")
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # which is not ours to remove
            os.unlink(dead.path("log"))
        dead.release()


def _last_lines(path: str) -> list[str]:
    try:
        with open(open_regular(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            lines = file.read(_LAST_BYTES).decode("utf-8", "backslashreplace").splitlines()
    except OSError:
        return []  # no log, or something else in its place: no last words
    return [line for line in lines if line.strip()][-_LAST_LINES:]


def read_entries(directory: str) -> list[MountEntry]:
    """All entries of mounts/, the dead and the damaged too."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    entries = (_read_entry(directory, name) for name in names)
    return [entry for entry in entries if entry is not None]


def live_ids(directory: str) -> set[int]:
    """Tree ids whose lock is held, whether they have an entry or not."""
    return {tree_id for tree_id in tree_ids(directory) if locks.is_held(stem(directory, tree_id) + ".lock")}


def tree_ids(directory: str) -> set[int]:
    """Tree ids that have a lock file, held or not."""
    try:
        names = os.listdir(directory)
    except OSError as error:  # nobody lives? who would believe that frees the memory of those who do
        raise MachineError(f"cannot tell who is mounted: {explain(error)}") from None
    found = (_tree_id(name, ".lock") for name in names)
    return {tree_id for tree_id in found if tree_id is not None}


def _tree_id(name: str, suffix: str) -> int | None:
    """The tree id that a file is named by; None for a file that is not ours."""
    return int(name[:16], 16) if _NAME.fullmatch(name) and name.endswith(suffix) else None


def _read_entry(directory: str, name: str) -> MountEntry | None:
    tree_id = _tree_id(name, ".json")
    if tree_id is None:
        return None
    data, damaged = _read_data(os.path.join(directory, name))
    if data is None:
        return None  # it went while we were looking
    return MountEntry(
        tree_id=tree_id,
        name=data.get("name"),
        mountpoint=data.get("mountpoint") or "?",
        pid=data.get("pid") or 0,
        options=data.get("options") or {},
        dev=data.get("dev"),
        alive=locks.is_held(stem(directory, tree_id) + ".lock"),
        socket=stem(directory, tree_id) + ".sock",
        on=None if data.get("on_dev") is None or data.get("on_ino") is None else (data["on_dev"], data["on_ino"]),
        extra={key: value for key, value in data.items() if key not in _KNOWN},
        damaged=damaged,
    )


def _read_data(path: str) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_json(path, _ENTRY, _REMEDY), ""
    except MachineError as error:
        return {}, str(error)
