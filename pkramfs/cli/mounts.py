# SPDX-License-Identifier: GPL-2.0-or-later
"""All mounts of a machine at once: ask them, freeze them, take that back, stop them.

    look()      what each mount is and would lose; changes nothing              --dry-run, status
    freeze()    flush the kernel's dirty pages, then no change until thaw()     -e, first step
    thaw()      take back exactly what freeze() did                             -e, refused
    stop()      every daemon detaches and ends; returns when all locks are free -e

A mount is what its daemon says, never what /proc/mounts says: a lazily detached mount, or one in
another mount namespace, is a mount as long as its daemon's lock is held. Only where it is, the mount
table knows (again.py): it may have been moved. A daemon that does not
answer stops everything, with its pid and the remedy, unless forced: then it is killed, because a
process of the old kernel that still maps RAM must not live to see the new one.

What is frozen is frozen as long as we hold a connection to its daemon, so nothing stays frozen when we are killed.

Kernel: kernel/reboot.c (kernel_restart_prepare), fs/sync.c (SYSCALL_DEFINE1(syncfs)),
        include/linux/freezer.h
"""

import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from pkramfs.errors import DaemonError, PkramfsError
from pkramfs.mounting.names import node_name
from pkramfs.units import plural

if TYPE_CHECKING:
    from pkramfs.control.client import Held
    from pkramfs.kernel.kexec import MountReport
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

ANSWER_SECONDS = 5.0
"""How long a daemon may take to say how it is; it answers between two steps of its longest work."""
FREEZE_SECONDS = 120.0
"""How long flushing and freezing may take: dirty pages of a slow host must reach the daemon."""
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02

Warn = Callable[[str], None]


class Seen(NamedTuple):
    """One mount: its entry and what its daemon said, or why it said nothing."""

    entry: "MountEntry"
    status: dict[str, Any] | None
    silence: str
    places: tuple[str, ...] = ()
    """Where it is seen in our mount namespace: its mount and its bind mounts."""

    @property
    def report(self) -> "MountReport":
        """What the planner of a kexec needs to know."""
        from pkramfs.kernel.kexec import MountReport

        status = self.status or {}
        preserved = status.get("state") == "preserved"
        return MountReport(
            mountpoint=self.entry.mountpoint,
            name=self.entry.name,
            preserved=preserved,
            files=int(status.get("files", 0)),
            reason="" if preserved else self.silence or _why_not(self),
            tree_id=self.entry.tree_id,
            lost=lost(status),
        )


def lost(status: dict[str, Any]) -> str:
    """What a daemon says of data that were written and are lost, in words; nothing if there are none."""
    count, named = int(status.get("lost_count", 0)), [str(path) for path in status.get("lost", [])[:5]]
    if not count:
        return ""
    more = f" and {count - len(named)} more" if count > len(named) else ""
    return f"data written to {', '.join(named)}{more} are lost: write them again, or truncate or delete the files"


def _why_not(seen: Seen) -> str:
    """Why a mount that answered is not preserved, in words."""
    if not seen.entry.name:
        return "mounted without pkram=NAME, so it cannot be preserved"
    return f"not preserved: mount -o remount,preserve,ro {seen.entry.mountpoint}"


def alive(machine: "Machine") -> list["MountEntry"]:
    """The mounts whose daemons live, by mount point: where they are by now."""
    living = located(e for e in machine.mounts() if e.alive)
    found = sorted(living, key=lambda e: (e.mountpoint, e.tree_id))
    unknown = machine.live_ids() - {e.tree_id for e in found}
    if unknown:
        raise DaemonError(
            f"{plural(len(unknown), 'process', 'processes')} hold a tree but say nothing of themselves: "
            f"see who has {machine.path('mounts', f'{min(unknown):016x}.lock')} open (fuser), and end it"
        )
    return found


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


def look(machine: "Machine") -> list[Seen]:
    """Ask every daemon how it is. Changes nothing, raises nothing for a silent daemon."""
    from pkramfs.mounting import syscalls

    entries, table = alive(machine), syscalls.mounts()
    found = [_ask(entry) for entry in entries]
    return [
        one._replace(places=tuple(m.mountpoint for m in table if m.dev == one.entry.dev is not None)) for one in found
    ]


def _ask(entry: "MountEntry", verb: str = "status", seconds: float | None = None) -> Seen:
    from pkramfs.control.client import call

    try:
        return Seen(entry, call(entry.socket, verb, timeout=seconds or ANSWER_SECONDS), "")
    except DaemonError as error:
        return Seen(entry, None, _silent(entry, error))


def _silent(entry: "MountEntry", error: Exception) -> str:
    """A daemon that does not answer, in words: who it is and what to do."""
    return (
        f"the daemon of {entry.mountpoint} (pid {entry.pid}) does not answer ({error}): "
        f"look at it, or kill {entry.pid} and umount {entry.mountpoint}, or use --force and lose its tree"
    )


class Mounts:
    """The mounts of one machine on the way through a kexec."""

    def __init__(self, machine: "Machine", *, force: bool = False, warn: Warn = lambda _: None) -> None:
        self.machine, self.force, self.warn = machine, force, warn
        self._frozen: list[tuple[MountEntry, Held]] = []
        self._silent: set[int] = set()
        self.stopped = False
        """Whether daemons were told to end, so that a thaw is not enough to go back."""

    def freeze(self) -> list[Seen]:
        """Flush and freeze every mount; if one fails, thaw all and raise (or go on, when forced)."""
        try:
            return [self._freeze(entry) for entry in alive(self.machine)]
        except BaseException:
            self.thaw()
            raise

    def _freeze(self, entry: "MountEntry") -> Seen:
        seen = _ask(entry)
        if seen.status is not None:
            failed = self._flush(entry)
            seen = self._frozen_now(entry, before=bool(seen.status.get("frozen")))
            if failed and not (seen.status or {}).get("refused"):  # else the daemon knows which data are lost
                self._refuse(f"{entry.mountpoint}: data that were written may be lost: {failed}")
        if seen.status is None:
            if not self.force:
                raise DaemonError(seen.silence)
            self.warn(seen.silence)
            self._silent.add(entry.tree_id)
        return seen

    def _frozen_now(self, entry: "MountEntry", *, before: bool) -> Seen:
        """Freeze one mount and see how it is; a refusal (files open for writing) is final unless forced.

        `before` says that it is frozen already, for daemons of older versions, which do not remember who froze them.
        """
        from pkramfs.control.client import Held

        try:
            held = Held(entry.socket, "freeze", undo="" if before else "thaw", timeout=FREEZE_SECONDS)
            self._frozen.append((entry, held))
        except DaemonError as error:
            return Seen(entry, None, _silent(entry, error))
        except PkramfsError as refusal:
            if not self.force:
                raise
            self.warn(f"{refusal}; what was not written yet is lost")
        return _ask(entry)

    def _flush(self, entry: "MountEntry") -> str:
        """Let the kernel send its dirty pages, so that the daemon knows all that was written; return what went wrong.

        The kernel tells an error once, and may tell an old one that was mended since.
        """
        from pkramfs.mounting.patience import StuckError, within

        try:
            within(lambda: _sync(entry), FREEZE_SECONDS, "the kernel's writing back")
        except StuckError:
            message = f"flushing {entry.mountpoint} took more than {FREEZE_SECONDS:.0f} s"
            self._refuse(message, f"; its daemon is pid {entry.pid}")
        except OSError as error:
            return f"the kernel could not write back: {os.strerror(error.errno or 0)}"
        return ""

    def _refuse(self, message: str, remedy: str = "") -> None:
        """Raise DaemonError; warn, when forced."""
        if not self.force:
            raise DaemonError(message + remedy)
        self.warn(message)

    def thaw(self) -> None:
        """Take back the freezing of every mount that `freeze` froze; one that fails is a warning."""
        while self._frozen:
            entry, held = self._frozen.pop()
            if entry.tree_id not in self.machine.live_ids():
                held.close()  # it was stopped
                continue
            try:
                held.release(ANSWER_SECONDS)
            except DaemonError as error:
                self.warn(f"{entry.mountpoint} may stay frozen: {_silent(entry, error)}")
            except PkramfsError as error:
                self.warn(f"{entry.mountpoint} stays frozen: {error}")

    def stop(self) -> None:
        """End every daemon and wait until their locks are free."""
        stopping = alive(self.machine)
        self.stopped = True
        for entry in stopping:
            if entry.tree_id in self._silent:
                self._kill_silent(entry)
            elif (answer := _ask(entry, "stop")).status is None:
                self._stop_silent(entry, answer)
        self._await_gone(stopping)
        while self._frozen:
            self._frozen.pop()[1].close()

    def kill(self) -> None:
        """End every daemon as a crash does."""
        dying = alive(self.machine)
        for entry in dying:
            kill(entry)
        self._await_gone(dying)

    def _stop_silent(self, entry: "MountEntry", answer: Seen) -> None:
        """A daemon that did not answer: gone already, or killed if forced, or an error."""
        if entry.tree_id not in self.machine.live_ids():
            return
        if not self.force:
            raise DaemonError(answer.silence)
        self._kill_silent(entry)

    def _kill_silent(self, entry: "MountEntry") -> None:
        self.warn(f"killing the daemon of {entry.mountpoint} (pid {entry.pid})")
        kill(entry)

    def _await_gone(self, entries: list["MountEntry"]) -> None:
        deadline, killed = time.monotonic() + STOP_SECONDS, False
        while left := self._living(entries):
            if time.monotonic() > deadline:
                if killed or not self.force:
                    first = left[0]
                    raise DaemonError(f"the daemon of {first.mountpoint} (pid {first.pid}) does not end: kill it")
                for entry in left:
                    kill(entry)
                deadline, killed = time.monotonic() + STOP_SECONDS, True
            time.sleep(_POLL_SECONDS)

    def _living(self, entries: list["MountEntry"]) -> list["MountEntry"]:
        """Return those whose daemons live; all locks are looked at once, not once for each entry."""
        living = self.machine.live_ids()
        return [entry for entry in entries if entry.tree_id in living]


def kill(entry: "MountEntry") -> None:
    """Kill a mount daemon, if its pid still is one."""
    from pkramfs.machine import mounts

    mounts.kill(entry)


def _sync(entry: "MountEntry") -> None:
    """syncfs(2) on a mount, if it is mounted where its entry says; OSError if data did not arrive."""
    from pkramfs.mounting.syscalls import sync_held

    try:
        directory = os.open(entry.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # detached, or in another namespace: only its daemon can say what has arrived
    try:
        if entry.dev is None or os.fstat(directory).st_dev == entry.dev:
            sync_held(directory, entry.mountpoint)
    finally:
        os.close(directory)


class User(NamedTuple):
    """A program that has files open in a mount, or stands in it."""

    pid: int
    name: str
    places: int


def users(mountpoint: str) -> list[User]:
    """Programs that will get ENOTCONN, as far as /proc shows them to us. Never touches the mount itself."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        places = sum(_inside(link, mountpoint) for link in _links(pid))
        if places and int(pid) != os.getpid():
            found.append(User(int(pid), _name(pid), places))
    return sorted(found)


def _links(pid: str) -> list[str]:
    """Where a process's descriptors, working directory and root point."""
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


def _inside(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="surrogateescape") as comm:
            return comm.read().strip()
    except OSError:
        return "?"


def still_there(machine: "Machine", mounts: Iterable[dict[str, Any]], warn: Warn) -> list[dict[str, Any]]:
    """Those of `mounts` whose tree crossed: an empty mount in the place of a lost tree would look like one."""
    wanted = list(mounts)
    if not wanted:
        return []
    from pkramfs.kernel.running import look

    kernel = look(machine)
    crossed = {node.name for node in kernel.store.nodes()} if kernel.info.pkram else set()
    crossed |= {node_name(entry.name) for entry in machine.mounts() if entry.alive and entry.name}
    for mount in wanted:
        if _node(mount) not in crossed:
            warn(f"{mount.get('name')} is not mounted again on {mount['mountpoint']}: its tree was lost")
    return [mount for mount in wanted if _node(mount) in crossed]


def _node(mount: dict[str, Any]) -> bytes:
    """Return the name of the node that an entry of nvram.json's list is preserved in."""
    return node_name(str(mount.get("name")))
