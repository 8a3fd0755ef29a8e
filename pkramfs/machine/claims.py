# SPDX-License-Identifier: GPL-2.0-or-later
"""Claims on node names by saves and loads in progress; a claim ends with its holder.

    claims/save-<hash of the name>    exclusive: a node of this name is being saved
    claims/load-<hash of the name>    shared by all that read it

A claim is a lock on a file (or, within one process, an entry of a table), never a record in RAM. So
a save or a load that dies leaves nothing busy, and nothing crosses a kexec. A file is made when it is
needed, and its last holder removes it; nobody locks a file that a dead process left, and `clear_away`
removes it.

Kernel: mm/pkram.c (PKRAM_SAVE, PKRAM_LOAD in a node's flags), which end only with the kernel
"""

import contextlib
import hashlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from pkramfs.errors import MachineError, explain
from pkramfs.machine import locks


class Claim:
    """A claim that is held, until `release` or until nothing refers to it any more."""

    def __init__(self, shared: bool, end: Callable[..., None] = lambda: None, *args: object) -> None:
        self.shared, self._end = shared, weakref.finalize(self, end, *args)

    @property
    def held(self) -> bool:
        """Return True until the claim is released."""
        return self._end.alive

    def release(self) -> None:
        """End the claim; doing it again does nothing."""
        self._end()


class Claims(Protocol):
    """The interface of both kinds of claims."""

    def take(self, work: str, name: bytes, *, shared: bool = False) -> Claim | None:
        """Claim `name` for `work`, alone or shared; return None if another claim is in the way."""

    def held(self, work: str, name: bytes) -> bool:
        """Return True if `name` is claimed for `work`, and not shared."""


class LocalClaims:
    """Claims of the threads of one process."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._claims: dict[tuple[str, bytes], weakref.WeakSet[Claim]] = {}

    def take(self, work: str, name: bytes, *, shared: bool = False) -> Claim | None:
        with self._mutex:
            others = self._others(work, name)
            if others and not (shared and all(other.shared for other in others)):
                return None
            claim = Claim(shared)
            self._claims[work, name] = weakref.WeakSet([*others, claim])
        return claim

    def held(self, work: str, name: bytes) -> bool:
        with self._mutex:
            return any(not other.shared for other in self._others(work, name))

    def _others(self, work: str, name: bytes) -> list[Claim]:
        others = [claim for claim in self._claims.get((work, name), ()) if claim.held]
        if not others:
            self._claims.pop((work, name), None)
        return others


class FileClaims:
    """Claims of all processes that use the same directory, which is made when it is needed."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def take(self, work: str, name: bytes, *, shared: bool = False) -> Claim | None:
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
        except OSError as error:
            raise MachineError(f"cannot claim a name: {explain(error)}") from None
        path = self._path(work, name)
        fd = locks.lock_removable(path, shared=shared)
        return None if fd is None else Claim(shared, _release, fd, path)

    def held(self, work: str, name: bytes) -> bool:
        return locks.is_held(self._path(work, name))

    def _path(self, work: str, name: bytes) -> str:
        """Return the file of a claim. A name has up to 255 bytes, any but NUL, so a hash stands for it."""
        return os.path.join(self._directory, f"{work}-{hashlib.blake2b(name, digest_size=16).hexdigest()}")


def clear_away(directory: str) -> None:
    """Remove the claims of processes that died."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            locks.remove_free(os.path.join(directory, name))


def _release(fd: int, path: str) -> None:
    """Unlock a claim's file; its last holder removes it first, while it is locked."""
    if locks.try_lock(fd):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    os.close(fd)
