# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is busy with which name: claims that end with whoever holds them.

    claims/save-<hash of the name>    exclusive: a node of this name is being saved
    claims/load-<hash of the name>    shared by all that read it

A claim is a lock on a file (or, within one process, an entry of a table), never a record in RAM: so
a save or a load that dies leaves nothing busy, and nothing crosses a kexec. Files are made when they
are needed and removed by the last who lets go; one that a dead process left is locked by nobody, and
`clear_away` removes it.

Kernel: mm/pkram.c (PKRAM_SAVE, PKRAM_LOAD in a node's flags), which die with the kernel only
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
    """A claim that is held. It ends with `release`, or when nobody refers to it any more."""

    def __init__(self, shared: bool, end: Callable[..., None] = lambda: None, *args: object) -> None:
        self.shared, self._end = shared, weakref.finalize(self, end, *args)

    @property
    def held(self) -> bool:
        """Whether it was not released."""
        return self._end.alive

    def release(self) -> None:
        """Let go; doing it again does nothing."""
        self._end()


class Claims(Protocol):
    """What both kinds of claims can do."""

    def take(self, work: str, name: bytes, *, shared: bool = False) -> Claim | None:
        """Claim `name` for `work`, alone or shared; None if others are in the way."""

    def held(self, work: str, name: bytes) -> bool:
        """Whether somebody has `name` for `work` alone."""


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
    """Claims of all processes that know the same directory, which is made when it is needed."""

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
        """A name may have 255 bytes, any but NUL; so its hash stands for it."""
        return os.path.join(self._directory, f"{work}-{hashlib.blake2b(name, digest_size=16).hexdigest()}")


def clear_away(directory: str) -> None:
    """Remove the claims of processes that died."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            locks.remove_free(os.path.join(directory, name))


def _release(fd: int, path: str) -> None:
    """Let go; the last one out removes the file, while it is locked."""
    if locks.try_lock(fd):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    os.close(fd)
