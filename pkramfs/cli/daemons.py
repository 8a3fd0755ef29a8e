# SPDX-License-Identifier: GPL-2.0-or-later
"""The mount daemons of a machine: which are alive, where their mounts are, and their states.

    alive()      the entries of living daemons, each with the mount point of now
    owner()      the daemon of a file system that is mounted, and its machine
    look()       ask every daemon for its status; changes nothing

The daemon's lock says that a mount lives, never /proc/mounts: a lazily detached mount, or one in another mount
namespace, lives as long as that lock is held. The mount table says only where it is, because a mount may have been
moved. A daemon that does not answer is named, with its pid and the remedy.

Kernel: /proc/self/mountinfo, which cannot say whose daemon lives
"""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.cli import logs
from pkramfs.errors import DaemonError
from pkramfs.units import plural

if TYPE_CHECKING:
    from pkramfs.control.replies import Status
    from pkramfs.kernel.running import Running
    from pkramfs.kernel.transition import MountReport
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

ANSWER_SECONDS = 5.0
"""How long a daemon may take to answer `status`; it does so between two steps of its longest work."""
_ENTRY_SECONDS, _POLL = 1.0, 0.02
_NAMED = 5
"""How many files with lost data are named."""


class Seen(NamedTuple):
    """One mount: its entry and its daemon's status, or why there is none."""

    entry: "MountEntry"
    status: "Status | None"
    silence: str
    places: tuple[str, ...] = ()
    """Where it is seen in our mount namespace: its mount and its bind mounts."""

    @property
    def report(self) -> "MountReport":
        """Return the report of this mount for the planner of a kexec."""
        from pkramfs.kernel.transition import MountReport

        status = self.status
        preserved = status is not None and status["state"] == "preserved"
        return MountReport(
            mountpoint=self.entry.mountpoint,
            name=self.entry.name,
            preserved=preserved,
            files=status["files"] if status else 0,
            reason="" if preserved else self.silence or _why_not(self),
            tree_id=self.entry.tree_id,
            lost=lost(status) if status else "",
        )


def lost(status: "Status") -> str:
    """Return a sentence about data that were written and are lost, or nothing if there are none."""
    count, named = status["lost_count"], status["lost"][:_NAMED]
    if not count:
        return ""
    more = f" and {count - len(named)} more" if count > len(named) else ""
    return f"data written to {', '.join(named)}{more} are lost: write them again, or truncate or delete the files"


def damaged(status: "Status") -> str:
    """Return a sentence about data that do not match their checksums, or nothing if there are none."""
    count, named = status.get("damaged_count", 0), status.get("damaged", [])[:_NAMED]
    if not count:
        return ""
    more = f" and {count - len(named)} more" if count > len(named) else ""
    return f"{', '.join(named)}{more} are damaged: write them again, or delete the files"


def _why_not(seen: Seen) -> str:
    """Return why a mount whose daemon answered is not preserved."""
    if not seen.entry.name:
        return "mounted without pkram=NAME, so it cannot be preserved"
    return f"not preserved: mount -o remount,preserve,ro {seen.entry.mountpoint}"


def alive(machine: "Machine") -> list["MountEntry"]:
    """Return the entries of living daemons by mount point, with the mount points of now.

    DaemonError if somebody has a lock but no entry: for longer than a mount has none when it begins or ends.
    """
    unknown, deadline = machine.live_ids(), time.monotonic() + _ENTRY_SECONDS
    while True:
        entries = machine.mounts()
        unknown = (unknown & machine.live_ids()) - {e.tree_id for e in entries}
        if not unknown:
            break
        if time.monotonic() > deadline:
            raise DaemonError(
                f"{plural(len(unknown), 'process holds', 'processes hold')} a tree without an entry in mounts/: find "
                f"the process that has {machine.path('mounts', f'{min(unknown):016x}.lock')} open (fuser), and end it"
            )
        time.sleep(_POLL)
    mounted = located(e for e in entries if e.alive and "work" not in e.extra)  # else pkramctl makes a node
    return sorted(mounted, key=lambda e: (e.mountpoint, e.tree_id))


def attached(machine: "Machine") -> "Running | None":
    """Return the running kernel, or None; never boot one."""
    from pkramfs.kernel import kernelrecord

    if kernelrecord.read(machine, any_layout=True) is None:
        return None
    from pkramfs.kernel.running import look

    return look(machine)


def outlived(machine: "Machine") -> list["MountEntry"]:
    """Return the entries of dead daemons whose trees are still in RAM, for the next mounts of their names."""
    entries = sorted((e for e in machine.mounts() if e.outlived), key=lambda e: (e.name or "", e.tree_id))
    running = attached(machine) if entries else None
    if running is None or not running.info.pkram:
        return []
    preserved = running.store.preserved_ids()  # a node has it, whatever became of the daemon
    return [e for e in entries if e.tree_id not in preserved and running.leases.blocks_of(e.tree_id)]


def left(machine: "Machine") -> list["MountReport"]:
    """Return the reports of trees that have outlived their daemons: a kexec would lose them."""
    from pkramfs.kernel.transition import MountReport

    return [
        MountReport(
            mountpoint=entry.mountpoint,
            name=entry.name,
            preserved=False,
            files=None,
            reason=f"its daemon has died: mount {entry.name} again and preserve it, or `pkramctl free {entry.name}`",
            tree_id=entry.tree_id,
        )
        for entry in outlived(machine)
    ]


def located(entries: Iterable["MountEntry"]) -> list["MountEntry"]:
    """Return entries with the mount points that the mount table has: a mount, or a directory above it, may be moved."""
    from dataclasses import replace

    from pkramfs.mounting import syscalls

    places: dict[int | None, list[str]] = {}
    for one in syscalls.mounts():
        if one.root == "/":
            places.setdefault(one.dev, []).append(one.mountpoint)
    return [
        entry
        if entry.dev is None or entry.mountpoint in places.get(entry.dev, [entry.mountpoint])
        else replace(entry, mountpoint=places[entry.dev][0])
        for entry in entries
    ]


def owner(dev: int, name: str | None) -> "tuple[Machine, MountEntry] | None":
    """Return the living daemon that serves a device, with its machine: the one that is named, or any."""
    from pkramfs.machine.directory import Machine

    for machine in [Machine.locate(name), *([] if name else Machine.all())]:
        for entry in machine.mounts():
            if entry.dev == dev and entry.alive:
                return machine, entry
    return None


def look(machine: "Machine") -> list[Seen]:
    """Ask every daemon for its status. Changes nothing, raises nothing for a silent daemon."""
    from pkramfs.mounting import syscalls

    entries, table = alive(machine), syscalls.mounts()
    found = [ask(entry) for entry in entries]
    return [
        one._replace(places=tuple(m.mountpoint for m in table if m.dev == one.entry.dev is not None)) for one in found
    ]


def ask(entry: "MountEntry") -> Seen:
    """Ask one daemon for its status."""
    from pkramfs.control.commands import Commands

    logs.info(f"asking the daemon of {entry.mountpoint} (pid {entry.pid})")
    try:
        return Seen(entry, Commands(entry.socket).status(timeout=ANSWER_SECONDS), "")
    except DaemonError as error:
        return Seen(entry, None, silent(entry, error))


def silent(entry: "MountEntry", error: Exception) -> str:
    """Return the message about a daemon that does not answer, with the remedy."""
    remedy = f"kill -9 {entry.pid}, and another daemon takes over"
    if not entry.holder:
        remedy = f"kill -9 {entry.pid} and umount {entry.mountpoint}, or use --force; either loses its tree"
    return f"the daemon of {entry.mountpoint} (pid {entry.pid}) does not answer ({error}): {remedy}"


def kill(entry: "MountEntry") -> None:
    """Kill a mount daemon, if its pid still is one."""
    from pkramfs.machine import mounts

    mounts.kill(entry)
