# SPDX-License-Identifier: GPL-2.0-or-later
"""Which NAME and which tree id a mount gets, and where its tree comes from.

    a node has the NAME              its tree id; the tree is restored (so, too, under a mount that stayed over a kexec)
    a dead daemon had the NAME       its tree id; the tree is recovered from its log
    neither                          a new tree id; the tree is empty

A name has one mount at a time: a daemon that claims a name holds a lock meanwhile, and waits for a daemon of the same
NAME that is about to end.

Kernel: fs/super.c (sget_fc), which finds a mounted super block
"""

import enum
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from pkramfs.errors import MachineError
from pkramfs.kernel.booting import BOOT_SECONDS
from pkramfs.kernel.running import Running, shared
from pkramfs.machine import locks
from pkramfs.machine.directory import Machine
from pkramfs.machine.leases import new_tree_id
from pkramfs.machine.mounts import MountEntry, MountLock
from pkramfs.mounting import syscalls
from pkramfs.mounting.names import node_name
from pkramfs.mounting.options import Options
from pkramfs.mounting.starting import Expected

GOING_SECONDS = 30.0
"""How long a mount waits for a daemon of the same NAME that is unmounted but has not ended."""
_POLL_SECONDS = 0.02


class AlreadyMounted(Exception):
    """The same NAME is mounted on the same directory already."""


class Origin(enum.Enum):
    """Where a tree comes from."""

    NOTHING = enum.auto()
    NODE = enum.auto()
    LOG = enum.auto()
    DAEMON = enum.auto()
    """From the log of a daemon that has just died and whose mount is still there."""
    KEXEC = enum.auto()
    """From the node that the last kernel has handed over; the mount is still there."""


class Claimed(NamedTuple):
    """A tree id that is claimed. `live` is the live page of the log, if the tree outlived its daemon."""

    lock: MountLock
    origin: Origin
    live: int | None
    log_at: int


class Claiming:
    """How one mount gets its tree id."""

    def __init__(self, machine: Machine, options: Options, mountpoint: str, expected: Expected) -> None:
        self.machine, self.options, self.mountpoint, self.expected = machine, options, mountpoint, expected

    def attach(self, starting: ExitStack) -> Running:
        """Attach to the running kernel until the mount serves; wait for a daemon of the same NAME that is ending."""
        deadline = time.monotonic() + GOING_SECONDS
        while True:
            kernel = starting.enter_context(shared(self.machine))
            holder = self._holder()
            if holder is None:
                return kernel
            self._refuse_mounted(holder)
            starting.close()  # it may be waiting for a kexec
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{holder.name} was mounted on {holder.mountpoint} and its daemon (pid {holder.pid}) has not ended "
                    "yet: end the programs that use it, or the daemon"
                )
            time.sleep(_POLL_SECONDS)

    def attach_again(self, starting: ExitStack) -> Running:
        """Attach to the kernel of a tree that is to be taken over; a kexec that is on its way is waited for.

        A machine is not made for that, as for a first mount: who moved its directory away may put it back.
        """
        if not os.path.isdir(self.machine.path()):
            raise MachineError(f"{self.machine.path()} is gone: put it back, and mount {self.options.name} again")
        return starting.enter_context(shared(self.machine, BOOT_SECONDS))

    def _holder(self) -> MountEntry | None:
        """Return the live mount of this NAME."""
        if self.options.name is None:
            return None
        return next((e for e in self.machine.mounts() if e.alive and e.name == self.options.name), None)

    def _refuse_mounted(self, holder: MountEntry) -> None:
        """Raise MachineError if the NAME is mounted elsewhere, AlreadyMounted if it is mounted here."""
        places, whose = _places(holder)
        if not places:
            return  # unmounted, or about to be mounted
        if not whose and self.mountpoint in places and self.expected.tree in (None, holder.tree_id):
            raise AlreadyMounted(f"{holder.name} is already mounted on {self.mountpoint}")
        raise MachineError(
            f"{holder.name} is mounted on {' and '.join(places)}{whose} already: a name has one mount at a time"
        )

    def claim(self, kernel: Running, entry: Callable[[Claimed], dict[str, Any]]) -> Claimed:
        """Claim the tree id of the NAME, or a new one, and write its entry, so that no other mount gets the NAME."""
        with locks.held(self.machine.path("lock.names"), what=f"taking a name on the machine {self.machine.path()}"):
            holder = self._holder()
            if holder is not None:
                raise MachineError(f"{holder.name} is just being mounted on {holder.mountpoint} (pid {holder.pid})")
            tree_id, origin, live = self._origin(kernel)
            lock = self.machine.claim(tree_id)
            claimed = Claimed(lock, origin, live, _size(lock.path("log")))
            lock.write_entry(entry(claimed))
        return claimed

    def inherit(
        self, kernel: Running, lock: int, *, tree_id: int, live: int, log_at: int, generation: int | None = None,
        **_: object,
    ) -> Claimed:  # fmt: skip
        """Take a tree over from a daemon that has ended, with its lock; raise MachineError if it did not cross a kexec.

        `generation` is the kernel under which that daemon had the tree; an older holder does not tell.
        """
        inherited = self.machine.inherit(tree_id, lock)
        if generation not in (None, kernel.generation):
            node = kernel.store.find(node_name(self.options.name or "")) if kernel.info.pkram else None
            if node is None or node.tree_id != tree_id:
                raise MachineError(f"{self.options.name} has not crossed the kexec to kernel {kernel.generation}")
            return Claimed(inherited, Origin.KEXEC, None, log_at)
        if not kernel.leases.blocks_of(tree_id):
            raise MachineError(f"{self.options.name} is no longer in RAM: another kernel runs")
        return Claimed(inherited, Origin.DAEMON, live, log_at)

    def _origin(self, kernel: Running) -> tuple[int, Origin, int | None]:
        """Return the tree id, where the tree comes from, and the live page of its log."""
        wanted = self.options.name and kernel.info.pkram  # otherwise a plain tmpfs, as in a crash kernel
        node = kernel.store.find(node_name(self.options.name or "")) if wanted else None
        dead = self._dead(kernel) if wanted and node is None else None
        if self.expected.tree is not None and (node is None or node.tree_id != self.expected.tree):
            raise MachineError(f"{self.options.name} is no longer preserved, or another tree has that name")
        if node is not None:
            return node.tree_id, Origin.NODE, None
        if dead is not None:
            return dead.tree_id, Origin.LOG, dead.journal
        return new_tree_id(), Origin.NOTHING, None

    def _dead(self, kernel: Running) -> MountEntry | None:
        """Return the dead mount of this NAME whose tree is still in RAM."""
        found = (e for e in self.machine.mounts() if e.outlived and e.name == self.options.name)
        return next((e for e in found if kernel.leases.blocks_of(e.tree_id)), None)


def _places(holder: MountEntry) -> tuple[list[str], str]:
    """Return where a live daemon's tree is mounted, and whose mount namespace it is in if not the same."""
    found = [one.mountpoint for one in syscalls.mounts() if one.dev == holder.dev]
    if found:
        return found, ""
    try:
        there = syscalls.mounts(holder.pid)
    except OSError:
        return [], ""  # the process has ended, or is not readable
    return [one.mountpoint for one in there if one.dev == holder.dev], f" in the mount namespace of pid {holder.pid}"


def _size(path: str) -> int:
    """Return the size of the mount's log file, which an earlier daemon of the tree id may have begun."""
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return 0  # there is none
