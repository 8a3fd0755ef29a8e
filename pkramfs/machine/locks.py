# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks between processes: flock on files of the machine's directory.

A lock ends with the process that took it, so no lock is ever stale. Descriptors are close-on-exec
and never inherited. A file that its holder may remove (a mount's lock) is locked first and then
compared with what its path names now, so that two processes never hold "the same" lock on two
different files.

Kernel: flock(2)
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pkramfs.errors import MachineError, explain

HELD_SECONDS = 60.0
"""Seconds to wait for a lock that others hold only for moments."""
_POLL = 0.01
_FIRST_POLL = 0.0005
_PROBE_GRACE = 0.2
"""Seconds for which a lock may seem taken while another process probes it (`is_held`)."""


def open_lock(path: str) -> int:
    """Open the lock file at `path`, making it if it is missing; return its descriptor."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise MachineError(f"cannot lock {explain(error)}") from None


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock if it is free; return True if it was."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def held(path: str, *, shared: bool = False, timeout: float = HELD_SECONDS, what: str = "") -> Iterator[None]:
    """Hold the lock at `path`; MachineError if it is not free within `timeout` seconds."""
    fd = open_lock(path)
    try:
        _wait(fd, shared, timeout, what or path)
        yield
    finally:
        os.close(fd)


def _wait(fd: int, shared: bool, timeout: float, what: str) -> None:
    deadline, pause = time.monotonic() + timeout, _FIRST_POLL
    while not try_lock(fd, shared=shared):
        if time.monotonic() >= deadline:
            raise MachineError(
                f"{what} is busy: another boot, kexec or mount has held it for {timeout:.0f} s{_holders(fd)}"
            )
        time.sleep(pause)
        pause = min(2 * pause, _POLL)


def _holders(fd: int) -> str:
    """Return the pids of a lock's holders, in words, as far as the kernel tells them."""
    lock = os.fstat(fd)
    place = b"%02x:%02x:%d" % (os.major(lock.st_dev), os.minor(lock.st_dev), lock.st_ino)
    try:
        with open("/proc/locks", "rb") as file:
            lines = [line.split() for line in file]
    except OSError:
        return ""  # no /proc
    pids = sorted({int(words[4]) for words in lines if words[1] == b"FLOCK" and words[5] == place} - {0})
    return f" (pid {', '.join(map(str, pids))})" if pids else ""


def lock_removable(path: str, *, shared: bool = False) -> int | None:
    """Lock a file that its last holder removes; return its descriptor, or None if another process holds it."""
    deadline = time.monotonic() + _PROBE_GRACE
    while True:
        fd = open_lock(path)
        locked = try_lock(fd, shared=shared)
        if locked and still_named(fd, path):
            return fd
        os.close(fd)
        if not locked:
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL)


def remove_free(path: str) -> bool:
    """Remove a file unless its lock is held, never through a link; return True if it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    try:
        if not try_lock(fd) or not still_named(fd, path):
            return False
        os.unlink(path)
        return True
    finally:
        os.close(fd)


def is_held(path: str) -> bool:
    """Return True if any process holds the lock at `path`, which is never created."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise MachineError(f"cannot look at the lock {explain(error)}") from None
    try:
        return not try_lock(fd, shared=True)
    finally:
        os.close(fd)


def still_named(fd: int, path: str) -> bool:
    """Return True if a path still names the file that is open."""
    try:
        named = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    mine = os.fstat(fd)
    return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)
