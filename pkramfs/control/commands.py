# SPDX-License-Identifier: GPL-2.0-or-later
"""Command a mount daemon: one method for each verb, with its typed reply.

    commands = Commands(entry.socket)
    commands.status(timeout=5)["frozen"]
    commands.preserve(strict=True)               waits as long as the daemon answers `status` meanwhile
    held = commands.freeze()                     in force until held.release(), or until this process dies

Each raises DaemonError if there is no answer, or an unexpected one, and RefusedError with the daemon's own words if
it refuses. Standard library only.
"""

import time

from pkramfs.control.client import TIMEOUT, GoneError, Held, call, call_long
from pkramfs.control.replies import Done, Foreseen, Frozen, Status, read

_PAUSE = 0.02
"""Seconds before a question is asked again."""


class Commands:
    """The verbs of the daemon that listens at `socket`."""

    def __init__(self, socket: str) -> None:
        self.socket = socket

    def status(self, *, timeout: float = TIMEOUT) -> Status:
        """Ask for the state of the tree and its figures; if the daemon dies meanwhile, ask the next one."""
        deadline, left = time.monotonic() + timeout, timeout
        while True:
            try:
                return read(Status, call(self.socket, "status", timeout=left))
            except GoneError:
                left = round(deadline - time.monotonic(), 1)
                if left <= 0:
                    raise
                time.sleep(_PAUSE)

    def preserve(self, *, strict: bool = False, lossy: bool = False, verify: bool = False) -> Status:
        """Freeze the tree and publish its node; with `lossy` also without data that a refused write-back lost, with
        `verify` once all data have checksums."""
        asked = {"lossy": lossy, "verify": verify}
        more = {name: True for name, wanted in asked.items() if wanted}  # which an older daemon does not know
        return read(Status, call_long(self.socket, "preserve", strict=strict, **more))

    def foresee(self, *, strict: bool = False, lossy: bool = False) -> Foreseen:
        """Return the foresight of `preserve` without changing anything."""
        return read(Foreseen, call(self.socket, "foresee", strict=strict, lossy=lossy))

    def compare(self) -> None:
        """Compare all data with their checksums in the background; `status` has the pieces left, and the damage."""
        read(Done, call(self.socket, "compare"))

    def unpreserve(self, *, patient: bool = False) -> Status:
        """Withdraw the node and thaw the tree; if `patient`, wait for a save that is under way."""
        return read(Status, (call_long if patient else call)(self.socket, "unpreserve"))

    def upgrade(self) -> None:
        """Make a daemon that runs the code on disk take over; the answer comes once this is certain, before it."""
        read(Done, call_long(self.socket, "upgrade"))

    def freeze(self, *, undo: bool = True, timeout: float = TIMEOUT) -> Held:
        """Freeze the tree while the connection lasts.

        `undo` says that a daemon of an older version, which does not remember who froze it, is to be thawed at the end.
        """
        held = Held(self.socket, "freeze", undo="thaw" if undo else "", timeout=timeout)
        try:
            read(Frozen, held.answer)
        except BaseException:
            held.close()
            raise
        return held

    def cross(self, *, timeout: float = TIMEOUT) -> Held:
        """Make the daemon stop reading requests, with its tree preserved, while the connection lasts."""
        held = Held(self.socket, "cross", undo="", timeout=timeout)
        try:
            read(Frozen, held.answer)
        except BaseException:
            held.close()
            raise
        return held

    def depart(self, *, timeout: float = TIMEOUT) -> None:
        """End the daemon; its holder starts another, which takes over after the kexec."""
        read(Done, call(self.socket, "depart", timeout=timeout))

    def arrived(self, *, timeout: float = TIMEOUT) -> None:
        """Wait until the kernel of the host has dropped all that it cached before the kexec."""
        read(Done, call(self.socket, "arrived", timeout=timeout))

    def reconfigure(self, words: dict[str, str | bool], pages: int | None = None, inodes: int | None = None) -> None:
        """Pass on the options of a remount; `pages` and `inodes` are its size= and nr_inodes= as numbers."""
        limits = {"pages": pages, "inodes": inodes}
        read(
            Done,
            call(
                self.socket,
                "reconfigure",
                words=words,
                **{key: value for key, value in limits.items() if value is not None},
            ),
        )

    def stop(self, *, timeout: float = TIMEOUT) -> None:
        """End the daemon."""
        read(Done, call(self.socket, "stop", timeout=timeout))
