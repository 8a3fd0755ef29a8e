# SPDX-License-Identifier: GPL-2.0-or-later
"""Freeze all mounts of a machine for a kexec, take that back, or end their daemons.

    freeze()    flush the kernel's dirty pages, then no change until thaw()     -e, first step
    thaw()      undo freeze() exactly                                           -e, refused
    stop()      every daemon detaches and ends; returns when all locks are free -e
    kill()      every daemon ends at once                                       --panic

A daemon that does not answer stops everything, with its pid and the remedy, unless forced: then it is killed,
because a process of the old kernel that still maps RAM must not live to see the new one.

A mount is frozen as long as this process holds a connection to its daemon, so none stays frozen if it is killed.

Kernel: kernel/reboot.c (kernel_restart_prepare), fs/sync.c (SYSCALL_DEFINE1(syncfs)),
        include/linux/freezer.h
"""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pkramfs.cli import daemons
from pkramfs.cli.daemons import Seen, alive
from pkramfs.errors import DaemonError, PkramfsError

if TYPE_CHECKING:
    from pkramfs.control.client import Held
    from pkramfs.kernel.transition import MountReport
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

FREEZE_SECONDS = 120.0
"""How long flushing and freezing may take: dirty pages of a slow host must reach the daemon."""
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02

Warn = Callable[[str], None]


class Freezer:
    """The mounts of one machine on the way through a kexec."""

    def __init__(self, machine: "Machine", *, force: bool = False, warn: Warn = lambda _: None) -> None:
        self.machine, self.force, self.warn = machine, force, warn
        self._frozen: list[tuple[MountEntry, Held]] = []
        self._silent: set[int] = set()
        self.departed: set[int] = set()
        """Trees whose daemons have ended and are replaced by others."""
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
        seen = daemons.ask(entry)
        if seen.status is not None:
            failed = self._flush(entry)
            seen = self._frozen_now(entry, before=seen.status["frozen"])
            self._refuse_loss(seen, failed)
        if seen.status is None:
            if not self.force:
                raise DaemonError(seen.silence)
            self.warn(seen.silence)
            self._silent.add(entry.tree_id)
        return seen

    def _refuse_loss(self, seen: Seen, failed: str) -> None:
        """Refuse to go on if flushing has failed, unless the daemon knows which data are lost: then it names them."""
        if failed and not (seen.status and seen.status["refused"]):
            self._refuse(f"{seen.entry.mountpoint}: data that were written may be lost: {failed}")

    def leaving(self, seen: list[Seen]) -> list[Seen]:
        """Return the mounts that will be mounted again: all."""
        return seen

    def cross(self, seen: list[Seen]) -> list[Seen]:
        """Have mounts stand still that stay: none. See keeping.py."""
        return seen

    def reports(self, seen: list[Seen]) -> "list[MountReport]":
        """Return the reports for the planner."""
        return [one.report for one in seen]

    def arrive(self) -> tuple[list[str], int]:
        """Wait for the mounts that stay; return where they are, and how many have failed."""
        return [], 0

    def _frozen_now(self, entry: "MountEntry", *, before: bool) -> Seen:
        """Freeze one mount and see how it is; a refusal (files open for writing) is final unless forced.

        `before`: it is frozen already, for daemons of older versions, which do not record who froze them.
        """
        from pkramfs.control.commands import Commands

        try:
            held = Commands(entry.socket).freeze(undo=not before, timeout=FREEZE_SECONDS)
            self._frozen.append((entry, held))
        except DaemonError as error:
            return Seen(entry, None, daemons.silent(entry, error))
        except PkramfsError as refusal:
            if not self.force:
                raise
            self.warn(f"{refusal}; what was not written yet is lost")
        return daemons.ask(entry)

    def _flush(self, entry: "MountEntry") -> str:
        """Make the kernel send its dirty pages, so that the daemon has all written data; return the error, if any.

        The kernel tells an error once, and may tell an old one that was mended since.
        """
        from pkramfs.mounting.patience import StuckError, within
        from pkramfs.mounting.syscalls import sync_held

        try:
            within(lambda: _sync(entry, sync_held), FREEZE_SECONDS, "the kernel's writing back")
        except StuckError:
            message = f"flushing {entry.mountpoint} took more than {FREEZE_SECONDS:.0f} s"
            self._refuse(message, f"; its daemon is pid {entry.pid}")
        except OSError as error:
            return f"the kernel could not write back: {error.strerror or error}"
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
            if entry.tree_id in self.departed or entry.tree_id not in self.machine.live_ids():
                held.close()  # it was stopped
                continue
            try:
                held.release(daemons.ANSWER_SECONDS)
            except DaemonError as error:
                self.warn(f"{entry.mountpoint} may stay frozen: {daemons.silent(entry, error)}")
            except PkramfsError as error:
                self.warn(f"{entry.mountpoint} stays frozen: {error}")

    def stop(self) -> None:
        """End every daemon and wait until their locks are free."""
        stopping = [entry for entry in alive(self.machine) if entry.tree_id not in self.departed]
        self.stopped = True
        for entry in stopping:
            if entry.tree_id in self._silent:
                self._kill_silent(entry)
            else:
                self._stop(entry)
        self._await_gone(stopping)
        while self._frozen:
            self._frozen.pop()[1].close()

    def kill(self) -> None:
        """End every daemon as a crash does."""
        dying = alive(self.machine)
        for entry in dying:
            daemons.kill(entry)
        self._await_gone(dying)

    def _stop(self, entry: "MountEntry") -> None:
        """Tell a daemon to end. One that does not answer is gone already, or killed if forced, or an error."""
        from pkramfs.control.commands import Commands

        try:
            Commands(entry.socket).stop(timeout=daemons.ANSWER_SECONDS)
        except DaemonError as error:
            if entry.tree_id not in self.machine.live_ids():
                return
            if not self.force:
                raise DaemonError(daemons.silent(entry, error)) from None
            self._kill_silent(entry)

    def _kill_silent(self, entry: "MountEntry") -> None:
        self.warn(f"killing the daemon of {entry.mountpoint} (pid {entry.pid})")
        daemons.kill(entry)

    def _await_gone(self, entries: list["MountEntry"]) -> None:
        deadline, killed = time.monotonic() + STOP_SECONDS, False
        while left := self._living(entries):
            if time.monotonic() > deadline:
                if killed or not self.force:
                    first = left[0]
                    raise DaemonError(f"the daemon of {first.mountpoint} (pid {first.pid}) does not end: kill -9 it")
                for entry in left:
                    daemons.kill(entry)
                deadline, killed = time.monotonic() + STOP_SECONDS, True
            time.sleep(_POLL_SECONDS)

    def _living(self, entries: list["MountEntry"]) -> list["MountEntry"]:
        """Return those whose daemons live; all locks are looked at once, not once for each entry."""
        living = self.machine.live_ids()
        return [entry for entry in entries if entry.tree_id in living]


def _sync(entry: "MountEntry", sync: "Callable[[int, str], None]") -> None:
    """Call syncfs(2) on a mount, if it is mounted where its entry says; OSError if data did not arrive.

    It imports nothing: the process that is forked for it must not read code that may just be replaced.
    """
    try:
        directory = os.open(entry.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # detached, or in another namespace: only its daemon knows which data have arrived
    try:
        if entry.dev is None or os.fstat(directory).st_dev == entry.dev:
            sync(directory, entry.mountpoint)
    finally:
        os.close(directory)
