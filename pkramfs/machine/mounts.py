"""Who is mounted: one entry for each mount daemon, named by its tree id.

    mounts/00c0ffee….lock    held while the daemon lives; "mounted" means nothing else
    mounts/00c0ffee….json    name, mount point, pid, options
    mounts/00c0ffee….sock    where it listens

The lock is taken before the first page block is leased and removed only by its holder. What a dead
daemon left is read as not alive and swept by the next one.

Kernel: /proc/mounts, which cannot say whose daemon lives
"""

import json
import os
from dataclasses import dataclass, field
from typing import Any

from pkramfs.errors import MachineError, explain
from pkramfs.machine import locks

_SUFFIXES = ("json", "sock", "lock")


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
        temporary = self.path("json") + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        os.replace(temporary, self.path("json"))

    def release(self) -> None:
        """Let go and remove the entry; the lock file goes last, still held."""
        if self._fd < 0:
            return
        for suffix in _SUFFIXES:
            try:
                os.unlink(self.path(suffix))
            except FileNotFoundError:
                continue
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


def read_entries(directory: str) -> list[MountEntry]:
    """All entries of mounts/, the dead and the damaged too."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    entries = (_read_entry(directory, name) for name in names)
    return [entry for entry in entries if entry is not None]


def _read_entry(directory: str, name: str) -> MountEntry | None:
    try:
        tree_id = int(name.removesuffix(".json"), 16)
    except ValueError:
        return None
    data, damaged = _read_data(os.path.join(directory, name))
    if data is None:
        return None  # it went while we were looking
    known = {"name", "mountpoint", "pid", "options", "dev"}
    return MountEntry(
        tree_id=tree_id,
        name=data.get("name"),
        mountpoint=str(data.get("mountpoint", "?")),
        pid=int(data.get("pid", 0)),
        options=data.get("options") or {},
        dev=data.get("dev"),
        alive=locks.is_held(stem(directory, tree_id) + ".lock"),
        socket=stem(directory, tree_id) + ".sock",
        extra={key: value for key, value in data.items() if key not in known},
        damaged=damaged,
    )


def _read_data(path: str) -> tuple[dict[str, Any] | None, str]:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        if not isinstance(data, dict) or not isinstance(data.get("pid", 0), int):
            raise ValueError("not a mount entry")
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return {}, explain(error)
    except ValueError as error:
        return {}, f"{path} is damaged: {error}"
    return data, ""
