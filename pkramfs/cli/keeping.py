# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec -e --keep-mounts: lead mounts through a kexec with all that is open on them.

    freeze()      flush dirty data; note mounts that cannot be kept, and freeze them as without --keep-mounts
    cross()       no daemon reads requests any more, each tree is preserved          programs wait from here …
    stop()        the daemons end; their holders start others, which wait for the machine's lock
    ═══ the kernel ends, the next one boots, the machine's lock is released ═══
    arrive()      each daemon has taken its mount over                               … to here
                  and the kernel of the host has dropped its caches

From `cross` on nothing may be looked up on the mounts: it would wait for us. So we leave such a directory, and refuse
to go if our output or our own code lies there.

If the kexec fails the daemons that have ended are replaced all the same, under the old kernel.

Kernel: kernel/kexec_core.c (kernel_kexec), with CONFIG_KEXEC_JUMP
"""

import contextlib
import os
import select
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.cli import daemons
from pkramfs.cli.daemons import Seen
from pkramfs.cli.freezer import FREEZE_SECONDS, STOP_SECONDS, Freezer
from pkramfs.errors import DaemonError, NotPreservedError, PkramfsError, explain
from pkramfs.mounting import syscalls
from pkramfs.mounting.options import MS_RDONLY, MS_REMOUNT

if TYPE_CHECKING:
    from pkramfs.cli.again import Warn
    from pkramfs.control.commands import Commands
    from pkramfs.kernel.transition import MountReport
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

SECONDS = 600.0
"""How long a daemon may take until it serves again; it restores its tree."""
_POLL_SECONDS = 0.005


class _Crossed(NamedTuple):
    """A mount on its way: its entry, and a pidfd of its daemon."""

    entry: "MountEntry"
    pidfd: int


class Keeping(Freezer):
    """The mounts of one machine on the way through a kexec that keeps them."""

    def __init__(self, machine: "Machine", *, force: bool = False, warn: "Warn" = lambda _: None) -> None:
        super().__init__(machine, force=force, warn=warn)
        self._crossed: list[_Crossed] = []
        self._left: list[_Crossed] = []
        os.chdir("/")

    def _freeze(self, entry: "MountEntry") -> Seen:
        seen = daemons.ask(entry)
        if seen.status is None or reason_against(seen):
            return super()._freeze(entry)
        failed = self._flush(entry)
        seen = daemons.ask(entry)
        self._refuse_loss(seen, failed)
        return seen

    def leaving(self, seen: list[Seen]) -> list[Seen]:
        """Return those that do not stay."""
        return [one for one in seen if not is_kept(one)]

    def cross(self, seen: list[Seen]) -> list[Seen]:
        """Have those that stay stand still; return how all are then. If one refuses, all go on."""
        from pkramfs.control.commands import Commands

        try:
            for one in seen:
                if is_kept(one):
                    self._crossed.append(_Crossed(one.entry, _pidfd(one.entry)))
                    self._frozen.append((one.entry, Commands(one.entry.socket).cross(timeout=FREEZE_SECONDS)))
            return [daemons.ask(one.entry) if is_kept(one) else one for one in seen]
        except BaseException:
            self.thaw()
            raise

    def reports(self, seen: list[Seen]) -> "list[MountReport]":
        """Return the reports for the planner."""
        return reports(seen)

    def stop(self) -> None:
        """Have the daemons end; those of mounts that stay are replaced."""
        from pkramfs.control.commands import Commands

        self.stopped = True
        for one in self._crossed:
            Commands(one.entry.socket).depart(timeout=daemons.ANSWER_SECONDS)
            self._left.append(one)
            self.departed.add(one.entry.tree_id)
        for one in self._left:
            if not select.select([one.pidfd], [], [], STOP_SECONDS)[0]:
                raise DaemonError(
                    f"the daemon of {one.entry.mountpoint} (pid {one.entry.pid}) does not end: kill -9 it"
                )
        super().stop()

    def arrive(self) -> tuple[list[str], int]:
        """Wait until all that have left have come back; return where, and how many have not."""
        back, failed = [], 0
        for entry, pidfd in self._left:
            try:
                _arrive(self.machine, entry, time.monotonic() + SECONDS)
                back.append(entry.mountpoint)
            except PkramfsError as error:
                self.warn(str(error))
                failed += 1
            finally:
                os.close(pidfd)
        self._left = []
        return back, failed


def reason_against(seen: Seen) -> str:
    """Return why a mount whose daemon answers cannot be kept, or nothing."""
    status, entry = seen.status, seen.entry
    if status is None:
        return seen.silence
    if not entry.name:
        return "it is mounted without pkram=NAME"
    if "log_bytes" not in status:
        return "PKRAM is off"
    if entry.options.get("fuse") == "pyfuse3":
        return "fuse=pyfuse3 has no holder, which would keep it"
    if "holder" not in status:
        return "its holder has died, and there is no other yet; or the kernel is older than 6.9"
    if (place := _ours(entry)) is not None:
        return f"{place} lies on it, and nobody can use it meanwhile"
    return ""


def is_kept(seen: Seen) -> bool:
    """Return True if a mount can be kept."""
    return not reason_against(seen)


def reports(seen: list[Seen]) -> "list[MountReport]":
    """Return the reports of mounts of which all are to be kept."""
    return [replace(one.report, kept=is_kept(one)) for one in seen]


def refusals(seen: list[Seen]) -> list[PkramfsError]:
    """Return an error for each mount that cannot be kept."""
    return [
        NotPreservedError(f"{one.entry.mountpoint} cannot be kept: {why}; without --keep-mounts it is mounted again")
        for one in seen
        if (why := reason_against(one))
    ]


def _ours(entry: "MountEntry") -> str | None:
    """Return the part of this process that lies on a mount, or None."""
    for place, of in (("our output", 1), ("our output", 2), (sys.prefix, sys.prefix), (__file__, __file__)):
        with contextlib.suppress(OSError):
            if os.stat(of).st_dev == entry.dev:
                return place
    return None


def _pidfd(entry: "MountEntry") -> int:
    try:
        return os.pidfd_open(entry.pid)
    except OSError as error:
        raise DaemonError(f"the daemon of {entry.mountpoint} (pid {entry.pid}) has died: {explain(error)}") from None


def _arrive(machine: "Machine", before: "MountEntry", deadline: float) -> None:
    """Wait until another daemon serves a mount and the kernel has dropped its caches; raise DaemonError if not."""
    while (serving := _serving(machine, before)) is None:
        if time.monotonic() > deadline:
            raise DaemonError(f"no daemon serves {before.mountpoint}: its holder may be stopped")
        time.sleep(_POLL_SECONDS)
    try:
        serving.arrived(timeout=max(deadline - time.monotonic(), 1.0))
    except DaemonError:  # it was killed, perhaps: then another comes
        _arrive(machine, before, deadline)
    else:
        _make_writable(before)


def _serving(machine: "Machine", before: "MountEntry") -> "Commands | None":
    """Return the daemon that has taken a mount over, if it answers already; DaemonError if none will."""
    from pkramfs.control.commands import Commands

    now = next((e for e in machine.mounts() if e.tree_id == before.tree_id), None)
    if now is None or not now.alive:
        raise DaemonError(
            f"{before.mountpoint} was not kept: pkramctl dmesg says why; its tree stays preserved: "
            f"mount {before.name} again"
        )
    if now.pid == before.pid or daemons.ask(now).status is None:
        return None
    return Commands(now.socket)


def _make_writable(entry: "MountEntry") -> None:
    """Take back the ro that preserving has brought, as mounting again does."""
    mounted = next((one for one in syscalls.mounts() if one.dev == entry.dev), None)
    if mounted is None or not mounted.flags & MS_RDONLY or entry.options.get("ro") or os.geteuid() != 0:
        return
    with contextlib.suppress(OSError), syscalls.holding(mounted.mountpoint) as held:
        if os.fstat(held).st_dev == entry.dev:
            flags = mounted.flags & ~MS_RDONLY | MS_REMOUNT
            syscalls.mount("none", mounted.mountpoint, syscalls.FSTYPE, flags, "", held=held)
