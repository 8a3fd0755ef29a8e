# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs by which a command keeps a mount over a kexec.

    cross     no request is read any more; the tree is preserved as it is, open files too; holds as long as its
              connection, then all goes on
    depart    the daemon ends for good; its holder has another one take over under the next kernel
    arrived   the kernel of the host has let go of what it had cached under the old one

Programs with files open for writing may still write into the host's cache. These data are not part of the preserved
tree: they reach the next daemon, as they would have reached this one.

Kernel: kernel/power/process.c (freeze_processes)
"""

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from pkramfs.control.keeper import BusyError, Keeper
from pkramfs.control.replies import Done, Frozen
from pkramfs.errors import ErrnoError
from pkramfs.fs import handles
from pkramfs.text import exact

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree


class Door(NamedTuple):
    """The actions of the daemon in a crossing."""

    shut: Callable[[], Awaitable[bool]]
    """Reads no more requests; False if one that was read is not answered before long."""
    open: Callable[[], None]
    sheltering: Callable[[], None]
    """Told before deleted files get names: whoever takes over now has to take these back."""


class Crossing:
    """The verbs of one tree."""

    def __init__(self, keeper: Keeper, door: Door) -> None:
        self._keeper, self._door = keeper, door
        self.departing, self.has_arrived = trio.Event(), trio.Event()

    def verbs(self) -> dict[str, Any]:
        """Return the verbs by name."""
        return {"cross": self.cross, "depart": self.depart, "arrived": self.arrived}

    def undo(self) -> dict[str, Any]:
        """Return the functions that take a verb back when its connection ends."""
        return {"cross": self.release}

    async def cross(self) -> Frozen:
        """Stand still, preserved."""
        keeper, tree = self._keeper, self._keeper.tree
        if "holder" not in keeper.outlives():
            raise BusyError(f"{keeper.mountpoint} has no holder, or Linux is older than 6.9: leave --keep-mounts out")
        if not await self._door.shut():
            raise BusyError(f"requests to {keeper.mountpoint} wait for room: delete files, or try again")
        try:
            await self._shelter(tree)
            await keeper.freeze_in_use()
        except BaseException:
            await self._go_on()
            raise
        return {"preserved": True}

    async def _shelter(self, tree: "Tree") -> None:
        """Give deleted files names, so that they are preserved, too."""
        if not tree.orphans:
            return
        if tree.lookup(tree.root.ino, handles.SHELTER) is not None:
            raise ErrnoError(f"{self._keeper.mountpoint} has a {exact(handles.SHELTER)}: rename it", errno.EEXIST)
        self._door.sheltering()
        frozen = tree.frozen
        if frozen:
            tree.thaw()
        try:
            handles.shelter(tree)
        except OSError as error:
            where = self._keeper.mountpoint
            raise ErrnoError(
                f"deleted files that are open on {where} cannot be kept ({error.strerror}): close them",
                error.errno or errno.EIO,
            ) from None
        finally:
            if frozen:
                tree.freeze()

    async def release(self, answer: Frozen) -> None:
        """Go on after the connection of `cross` has ended, unless the daemon is about to end."""
        if not self.departing.is_set():
            await self._keeper.release(answer)
            await self._go_on()

    async def _go_on(self) -> None:
        """Take deleted files' names back, and read requests again."""
        tree = self._keeper.tree
        frozen = tree.frozen
        if frozen:
            tree.thaw()
        handles.unshelter(tree)
        if frozen:
            tree.freeze()
        self._door.open()

    async def depart(self) -> Done:
        """End once this is answered."""
        self.departing.set()
        return {}

    async def arrived(self) -> Done:
        """Return when the host's caches contain nothing from before this daemon."""
        await self.has_arrived.wait()
        return {}
