# SPDX-License-Identifier: GPL-2.0-or-later
"""The entries of mount daemons, each named by its tree id.

    mounts/00c0ffee….lock    held while the daemon lives: that alone means "mounted"
    mounts/00c0ffee….json    name, mount point, pid, options
    mounts/00c0ffee….sock    its control socket
    mounts/00c0ffee….log     its stdout and stderr
    mounts/00c0ffee….spare   pages for the next entry, where the host has none any more

The lock is taken before the first page block is leased and removed only by its holder. Should somebody else remove
the file, those who hold the lock have it open nevertheless, and the entry names them. The entry of a
dead daemon reads as not alive; once its page blocks are swept, `clear_away` takes its lock, writes the
end of its log to the kernel log and removes its files.

Kernel: /proc/mounts, which does not tell whether a daemon lives
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
from pkramfs.machine.files import open_regular, read_json, replace_with_spare

_SUFFIXES = ("json", "spare", "sock", "lock")
_ANY_NAME = re.compile(r"([0-9a-f]{16})\.(?:json|spare|sock|lock|log)")
_LAST_LINES, _LAST_BYTES = 20, 1 << 14
"""Lines and bytes of a dead daemon's log that are kept: an interpreter that aborts prints a stack of calls."""
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
        "journal": schema.Maybe(schema.Whole(1)),
        "holder": schema.Maybe(schema.Whole(0, (1 << 31) - 1)),
    },
    others=schema.Anything(),
)
_KNOWN = {"name", "mountpoint", "pid", "options", "dev", "on_dev", "on_ino", "journal", "holder"}
"""Keys that are fields of MountEntry."""
_REMEDY = "umount and mount it again"
_LAST = 1 << 20
"""Bytes at the end of a log that `last_words` searches."""


@dataclass(frozen=True)
class MountEntry:
    """One mount daemon; `name` is None for a mount without pkram=."""

    tree_id: int
    name: str | None
    mountpoint: str
    pid: int
    options: dict[str, Any]
    dev: int | None
    alive: bool
    socket: str
    on: tuple[int, int] | None = None
    """Device and inode number of the directory under the mount."""
    extra: dict[str, Any] = field(default_factory=dict)
    damaged: str = ""
    """Why the entry could not be read; empty if it could."""
    holder: int = 0
    """The process that starts another daemon when this one dies; 0 without one."""
    journal: int | None = None
    """The live page of the tree's log (pkramfs.journal)."""

    @property
    def outlived(self) -> bool:
        """Return True if the daemon is dead and left the tree in RAM, for the next mount of the name to recover."""
        return not self.alive and self.journal is not None and self.name is not None


class MountLock:
    """The lock of a tree id, which its daemon keeps as long as it lives."""

    def __init__(self, directory: str, tree_id: int, fd: int) -> None:
        self.directory, self.tree_id, self._fd = directory, tree_id, fd

    def path(self, suffix: str) -> str:
        """Return the path of a file of this mount: `lock`, `json`, `sock`, `log`."""
        return stem(self.directory, self.tree_id) + "." + suffix

    def fileno(self) -> int:
        """Return the descriptor that holds the lock."""
        return self._fd

    def write_entry(self, data: dict[str, Any]) -> None:
        """Write the entry of this mount: keys as in MountEntry; others are kept in `extra`."""
        replace_with_spare(self.path("json"), json.dumps(data, indent=1) + "\n", self.path("spare"))

    def release(self) -> None:
        """Remove the entry and release the lock; the lock file goes last, still locked."""
        if self._fd < 0:
            return
        for suffix in _SUFFIXES:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(self.path(suffix))
        os.close(self._fd)
        self._fd = -1

    def abandon(self) -> None:
        """Release the lock and leave the entry, as a process that dies does: the tree can be recovered."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def stem(directory: str, tree_id: int) -> str:
    """Return the path of a mount's files without their suffix."""
    return os.path.join(directory, f"{tree_id:016x}")


def claim(directory: str, tree_id: int) -> MountLock:
    """Take the lock of a tree id; MachineError if a living daemon holds it."""
    fd = locks.lock_removable(stem(directory, tree_id) + ".lock")
    if fd is None or _is_open(tree_id, _read_data(stem(directory, tree_id) + ".json")[0] or {}):
        if fd is not None:
            os.close(fd)
        raise MachineError(f"tree {tree_id:x} is in use by another mount daemon")
    return MountLock(directory, tree_id, fd)


def kill(entry: MountEntry) -> None:
    """Kill a mount daemon and its holder, each of which would replace the other; no other program with their pids."""
    _signal(entry.pid, signal.SIGSTOP)
    directory, name = os.path.split(entry.socket)
    now = _read_entry(directory, name.removesuffix(".sock") + ".json")  # it may have another holder by now
    _signal(entry.holder if now is None else now.holder, signal.SIGKILL)
    _signal(entry.pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    if pid <= 0:
        return  # the entry is damaged, and kill(0) would end this process
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as words:
            ours = b"pkramfs" in words.read()
        if ours:
            os.kill(pid, number)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended already


def last_words(directory: str, entry: MountEntry) -> tuple[str, float] | None:
    """Return the line of an abort or a fault from a dead daemon's log, and when it was written; None without one."""
    log = stem(directory, entry.tree_id) + ".log"
    try:
        with open(open_regular(log), "rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(entry.extra.get("log_at") or 0, status.st_size - _LAST))
            found, ended = _FATAL.findall(file.read(_LAST)), status.st_mtime
    except OSError:
        return None  # no log
    return (found[-1].decode("ascii", "replace"), ended) if found and not entry.alive else None


def clear_away(directory: str, keep: Container[int], say: Callable[[str], None]) -> None:
    """Remove the files of dead daemons, except those in `keep`; tell `say` the last lines of their logs."""
    names = (_ANY_NAME.fullmatch(name) for name in os.listdir(directory))
    living = live_ids(directory)
    for tree_id in sorted({int(name[1], 16) for name in names if name}):
        if tree_id in living or tree_id in keep:
            continue
        fd = locks.lock_removable(stem(directory, tree_id) + ".lock")
        if fd is None:
            continue  # another process is mounting it
        dead = MountLock(directory, tree_id, fd)
        if entry := _read_entry(directory, f"{tree_id:016x}.json"):
            say(f"pkramfs: daemon of tree {tree_id:016x} (pid {entry.pid}, {entry.mountpoint}) has died")
        for line in _last_lines(dead.path("log")):
            say(f"pkramfs: daemon of tree {tree_id:016x}: {line}")
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a directory is not ours
            os.unlink(dead.path("log"))
        dead.release()


def _last_lines(path: str) -> list[str]:
    try:
        with open(open_regular(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            lines = file.read(_LAST_BYTES).decode("utf-8", "backslashreplace").splitlines()
    except OSError:
        return []  # no log, or something else in its place
    return [line for line in lines if line.strip()][-_LAST_LINES:]


def read_entries(directory: str, *, beside: Container[int] = ()) -> list[MountEntry]:
    """Return all entries of mounts/, those of dead daemons and damaged ones too; but not of the trees in `beside`."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    entries = (_read_entry(directory, name) for name in names if _tree_id(name, ".json") not in beside)
    return [entry for entry in entries if entry is not None]


def held_ids(directory: str) -> set[int]:
    """Return the tree ids whose memory is not to be freed: those with a lock that is held or an entry that names a log.

    A tree that a dead daemon left may be mounted again between two looks, or be left again. So its entry counts whoever
    has the lock; and so does an entry that cannot be read, which might name a log.
    """
    logged = (entry for entry in read_entries(directory) if entry.journal is not None or entry.damaged)
    return {entry.tree_id for entry in logged} | live_ids(directory)


def outlived_ids(directory: str) -> set[int]:
    """Return the tree ids of dead daemons that left their trees in RAM."""
    return {entry.tree_id for entry in read_entries(directory) if entry.outlived}


def live_ids(directory: str) -> set[int]:
    """Return the tree ids whose lock is held, with an entry or without."""
    held = {tree_id for tree_id in tree_ids(directory) if locks.is_held(stem(directory, tree_id) + ".lock")}
    return held | {entry.tree_id for entry in read_entries(directory, beside=held) if entry.alive}


def tree_ids(directory: str) -> set[int]:
    """Return the tree ids that have a lock file, held or not."""
    try:
        names = os.listdir(directory)
    except OSError as error:  # an empty answer would free the memory of living mounts
        raise MachineError(f"cannot list the mounts: {explain(error)}") from None
    found = (_tree_id(name, ".lock") for name in names)
    return {tree_id for tree_id in found if tree_id is not None}


def _tree_id(name: str, suffix: str) -> int | None:
    """Return the tree id in a file's name, None for a file that is not ours."""
    return int(name[:16], 16) if _NAME.fullmatch(name) and name.endswith(suffix) else None


def _read_entry(directory: str, name: str) -> MountEntry | None:
    tree_id = _tree_id(name, ".json")
    if tree_id is None:
        return None
    data, damaged = _read_data(os.path.join(directory, name))
    if data is None:
        return None  # it was removed meanwhile
    return MountEntry(
        tree_id=tree_id,
        name=data.get("name"),
        mountpoint=data.get("mountpoint") or "?",
        pid=data.get("pid") or 0,
        options=data.get("options") or {},
        dev=data.get("dev"),
        alive=locks.is_held(stem(directory, tree_id) + ".lock") or _is_open(tree_id, data),
        socket=stem(directory, tree_id) + ".sock",
        on=None if data.get("on_dev") is None or data.get("on_ino") is None else (data["on_dev"], data["on_ino"]),
        extra={key: value for key, value in data.items() if key not in _KNOWN},
        damaged=damaged,
        journal=data.get("journal"),
        holder=data.get("holder") or 0,
    )


def _is_open(tree_id: int, data: dict[str, Any]) -> bool:
    """Return True if another process that an entry names has the lock of its tree open, though its file was removed."""
    return any(_has_open(pid, f"{tree_id:016x}.lock (deleted)") for pid in (data.get("pid"), data.get("holder")) if pid)


def _has_open(pid: int, name: str) -> bool:
    """Return True if another process, which may have ended, has a file of this name open."""
    if pid == os.getpid():
        return False
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for fd in os.listdir(directory):
            with contextlib.suppress(OSError):  # closed just now
                if os.path.basename(os.readlink(f"{directory}/{fd}")) == name:
                    return True
    return False


def _read_data(path: str) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_json(path, _ENTRY, _REMEDY), ""
    except MachineError as error:
        return {}, str(error)
