# SPDX-License-Identifier: GPL-2.0-or-later
"""Small files that others may read at any moment: replaced by rename, and read with suspicion.

    path.PID.tmp ──write──▶ path.PID.tmp ──rename──▶ path

A reader sees the old text or the new, never a part, and a writer that dies leaves the old text. On a
full file system the writer gets an error and leaves nothing behind. A writer holds the lock of its
temporary file; a temporary file whose lock is free was left by a dead process, and `clear_temporary`
removes it. A file that has to be replaced on a full file system, too, has a *spare*: pages that are there already.

    path.spare ──write over──▶ path.spare ──rename──▶ path         and another spare, of the pages that path had

A reader trusts nothing: a path may name a FIFO, a device, a link, a directory, or a file larger than
memory. `read_file` opens without waiting and accepts only regular files of bounded size; `read_json`
checks their contents against the schema of their owner. Some JSON authorises to punch memory, so an
object can be sealed: one more field holds a checksum of all others.

Kernel: rename(2); fs/kernel_read_file.c, which reads only regular files within a limit
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import stat
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

from pkramfs import schema
from pkramfs.errors import DamagedError, MachineError, explain
from pkramfs.machine import locks
from pkramfs.units import PAGE_SIZE, round_up

LIMIT = 32 << 20
"""Most bytes of a file that this program wrote: a kernel.json of half a million ranges has fewer."""
_SMALL = 64 << 10
"""Most bytes of JSON that are remembered."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_CHUNK = 1 << 20


def open_regular(path: str, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open a regular file without waiting for anybody; return its descriptor.

    Raise OSError for anything else, and name what it is (`path: Is a directory`, `path: a FIFO, not a regular file`).
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW), 0o600)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP, errno.EISDIR):
            _refuse_kind(path, os.lstat(path).st_mode, error)
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        _refuse_kind(path, mode)
    return fd


def _refuse_kind(path: str, mode: int, error: OSError | None = None) -> NoReturn:
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is None:
        raise error or OSError(errno.EINVAL, "not a regular file", path)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, f"{kind}, not a regular file", path)


def read_file(path: str, limit: int = LIMIT, *, follow: bool = False) -> bytes | None:
    """Return the bytes of a regular file, None if it is missing; OSError if it is not regular, or beyond `limit`."""
    try:
        fd = open_regular(path, follow=follow)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(fd).st_size
        parts: list[bytes] = []
        got = 0
        while size <= limit and got <= limit and (part := os.read(fd, _CHUNK)):
            parts.append(part)
            got += len(part)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)
    if max(size, got) > limit:
        raise OSError(errno.EFBIG, f"{max(size, got):,} bytes, expected at most {limit:,}", path)
    return b"".join(parts)


def read_json(path: str, kind: schema.Kind, remedy: str) -> Any:
    """Read a JSON file as `kind` declares it; return None if it is missing, raise DamagedError for anything else."""
    try:
        data = read_file(path)
    except PermissionError as error:
        raise MachineError(f"cannot read {explain(error)}") from None
    except OSError as error:
        what = error.strerror or str(error)
        raise DamagedError(path, what, remedy, found=what, expected="a regular file") from None
    if data is None:
        return None
    try:
        return pickle.loads(_parsed(kind, data)) if len(data) <= _SMALL else kind.read(schema.parse(data))
    except schema.Invalid as error:
        where = {"field": error.field, "found": error.found, "expected": error.expected}
        raise DamagedError(path, str(error), remedy, **where) from None


@lru_cache(maxsize=128)
def _parsed(kind: schema.Kind, data: bytes) -> bytes:
    """Read an object as `kind` declares it, and pickle it.

    The same small files are read again and again: machine.json for each question, every mount's entry by every mount.
    To unpickle an entry takes 2 us, to parse and to check it 50.
    """
    return pickle.dumps(kind.read(schema.parse(data)))


CHECKSUM = "checksum"
_TEMPORARY = re.compile(r".+\.[0-9]+\.tmp")


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a checksum of its fields."""
    plain = {name: value for name, value in data.items() if name != CHECKSUM}
    return plain | {CHECKSUM: _checksum(plain)}


class Sealed(schema.Kind):
    """An object that was sealed when it was written; `required` returns True for objects that must have a seal."""

    def __init__(self, kind: schema.Kind, required: Callable[[dict[str, Any]], bool] = lambda _: False) -> None:
        self._kind, self._required = kind, required
        self.expected = kind.expected

    def read(self, value: Any, at: str = "") -> Any:
        """Return the object without its seal; raise Invalid if a field is wrong or the seal does not match.

        Fields come first: an error that names one says more than a checksum does.
        """
        if not isinstance(value, dict):
            return self._kind.read(value, at)
        plain = {name: field for name, field in value.items() if name != CHECKSUM}
        data = self._kind.read(plain, at)
        if (CHECKSUM in value or self._required(value)) and value.get(CHECKSUM) != _checksum(plain):
            raise schema.Invalid("", "its checksum does not fit", "the checksum of all other fields")
        return data


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()


def replace_file(path: str, text: str) -> None:
    """Write a file beside `path` and rename it over."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(locked(temporary), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise MachineError(f"cannot write {path}: {explain(error)}") from None


def replace_with_spare(path: str, text: str, spare: str) -> None:
    """Replace a file, on a full file system by its spare; see to it that there is a spare for the next time.

    For the one process that may write the file: nobody else uses its spare.
    """
    data = text.encode("utf-8", "surrogateescape")
    try:
        replace_file(path, text)
    except MachineError:
        if not _use_spare(path, data, spare):
            raise
    with contextlib.suppress(OSError):  # without one the next replacement needs room
        _make_spare(spare, len(data))


def _use_spare(path: str, data: bytes, spare: str) -> bool:
    """Make the spare the file, if it has room enough; return True if it is that now."""
    try:
        fd = open_regular(spare, os.O_WRONLY)
        try:
            if os.pwrite(fd, data, 0) < len(data):
                return False
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)
        os.replace(spare, path)
    except OSError:
        return False
    return True


def _make_spare(spare: str, size: int) -> None:
    """Make a spare for a file that may grow by half a page, unless there is one."""
    wanted = round_up(size + PAGE_SIZE // 2, PAGE_SIZE)
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(spare).st_size >= wanted:
            return
    fd = open_regular(spare, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(fd, bytes(wanted), 0)
    finally:
        os.close(fd)


def locked(path: str) -> int:
    """Open an empty file to be written, and take its lock; return its descriptor."""
    while True:
        fd = open_regular(path, os.O_WRONLY | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)  # another thread of ours may be writing the same
        if locks.still_named(fd, path):
            os.ftruncate(fd, 0)
            return fd
        os.close(fd)


def clear_temporary(directory: str) -> None:
    """Remove the temporary files of dead writers."""
    for name in os.listdir(directory):
        if _TEMPORARY.fullmatch(name):
            locks.remove_free(os.path.join(directory, name))


def append_line(path: str, line: str) -> None:
    """Append a line to a file in one write, so that lines of several processes do not mix."""
    try:
        fd = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(fd, _encoded(line) + b"\n")
        finally:
            os.close(fd)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from None


def _encoded(line: str) -> bytes:
    """Encode a line: paths byte by byte as they were, and what cannot be part of a path escaped."""
    try:
        return line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return line.encode("utf-8", "backslashreplace")


def private(path: str, flags: int) -> int:
    """Open a file that only its owner may use, and never through a symbolic link."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
