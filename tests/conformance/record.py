# SPDX-License-Identifier: GPL-2.0-or-later
"""What a case does in one directory and what came back, as lines that can be compared.

    t(os.mkdir, "a", 0o700)          mkdir('a', 448) = None
    t(os.rmdir, "b")                 rmdir('b') = ENOENT
    t.touched(os.chmod, "a", 0)      chmod('a', 0) = None  ·  a: ctime

Paths are relative, for a case runs with its directory as working directory. Inode numbers become the
order of their first appearance, times what has changed, and long contents a digest.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

TICK = 0.009
"""Longer than two ticks of the kernel's coarse clock."""
OLD = 1_500_000_000 * 10**9
"""Times before this were given by somebody, later ones are the clock's."""
SAMPLE = 1 << 20

Times = tuple[int, int, int]


class Record:
    """The lines of one case on one file system."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._inodes: dict[int, int] = {}

    def __call__(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call, note, and return the result, or None if there was an error."""
        words = [self._argument(arg) for arg in args] + [f"{name}={value!r}" for name, value in named.items()]
        call = f"{function.__name__}({', '.join(words)})"
        try:
            result = function(*args, **named)
        except OSError as error:
            self.lines.append(f"{call} = {errno.errorcode.get(error.errno or 0, error.errno)}")
            return None
        except (TypeError, ValueError, OverflowError) as error:
            self.lines.append(f"{call} = {type(error).__name__}")
            return None
        self.lines.append(f"{call} = {'fd' if function in (os.open, os.dup) else self.show(result)}")
        return result

    def note(self, *words: object) -> None:
        self.lines.append(" ".join(map(str, words)))

    def _argument(self, value: object) -> str:
        return "…" if callable(value) else self.show(value)

    def show(self, value: object) -> str:
        """A value for the eye, short, without what differs from mount to mount."""
        if isinstance(value, os.stat_result):
            return self.stat(value)
        if isinstance(value, bytes | bytearray | memoryview) and len(value) > 60:
            return f"<{len(value)} bytes {hashlib.sha1(value).hexdigest()[:10]}>"
        if isinstance(value, str) and len(value) > 120:
            return f"<{len(value)} characters {hashlib.sha1(os.fsencode(value)).hexdigest()[:10]}>"
        if isinstance(value, list) and len(value) > 50:
            return f"<{len(value)} entries {hashlib.sha1(repr(value).encode()).hexdigest()[:10]}>"
        return re.sub(r" object at 0x[0-9a-f]+", "", repr(value))

    def stat(self, info: os.stat_result) -> str:
        rdev = f" rdev={os.major(info.st_rdev)}:{os.minor(info.st_rdev)}" if info.st_rdev else ""
        return (
            f"{stat.filemode(info.st_mode)} {info.st_uid}:{info.st_gid} nlink={info.st_nlink} size={info.st_size}"
            f"{rdev} ino#{self._inodes.setdefault(info.st_ino, len(self._inodes))}"
        )

    # -- times ----------------------------------------------------------------------------------

    def touched(self, function: Callable[..., Any], *args: Any, watch: tuple[str, ...] = (), **named: Any) -> Any:
        """Call, and note which times it changes: of `watch`, of what the arguments name, and of the directory."""
        names = dict.fromkeys([".", *(arg for arg in args if isinstance(arg, str) and len(arg) < 20), *watch])
        time.sleep(TICK)
        before = {name: _times(name) for name in names}
        result = self(function, *args, **named)
        time.sleep(TICK)
        changes = {name: _changed(before[name], _times(name)) for name in names}
        said = "; ".join(f"{name}: {change}" for name, change in changes.items() if change)
        self.lines[-1] += f"  ·  {said or 'no time changes'}"
        return result

    # -- others ---------------------------------------------------------------------------------

    def other(
        self, case: Callable[["Record"], object], uid: int = 1000, gid: int = 1000, groups: tuple[int, ...] = ()
    ) -> None:
        """Run a part of a case in a process of another user (as who we are, without root)."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(case, writer, uid, gid, groups)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            text = pipe.read().decode(errors="backslashreplace")
        os.waitpid(pid, 0)
        self.lines += [f"{uid}:{gid} {line}" for line in text.split("\n")]


def _child(case: Callable[[Record], object], writer: int, uid: int, gid: int, groups: tuple[int, ...]) -> None:
    record = Record()
    try:
        if os.geteuid() == 0:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        case(record)
    except BaseException as error:
        record.note("raised", repr(error))
    with os.fdopen(writer, "wb") as pipe:
        pipe.write("\n".join(record.lines).encode(errors="surrogateescape"))
    os._exit(0)


def _times(name: str) -> Times | None:
    try:
        info = os.lstat(name)
    except OSError:
        return None
    return info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns


def _changed(before: Times | None, after: Times | None) -> str:
    if before is None or after is None:
        return "" if before is after else "gone" if after is None else "new"
    rows = list(zip(("atime", "mtime", "ctime"), before, after, strict=True))
    words = [name for name, a, b in rows if a != b] + [f"({name} goes back)" for name, a, b in rows if b < a]
    if {"mtime", "ctime"} <= set(words) and after[1] != after[2]:
        words.append("mtime≠ctime")
    return " ".join(words)


# -- the tree -----------------------------------------------------------------------------------


def picture(top: str, *, exact: bool = False) -> list[str]:
    """Everything below a directory, a line each. `exact`: with times to the nanosecond and inode numbers."""
    record = Record()
    rows = []
    for path in _walk(os.fsencode(top)):
        try:
            info = os.lstat(path)
        except PermissionError:
            rows.append(f"{path!r} EACCES")
            continue
        words = [os.path.relpath(path, os.fsencode(top)).decode(errors="backslashreplace"), record.stat(info)]
        if stat.S_ISREG(info.st_mode):
            words += [f"blocks={info.st_blocks}", _content(path, info.st_size)]
        if stat.S_ISLNK(info.st_mode):
            words.append(record.show(os.readlink(path)))
        words += [f"{name}={record.show(value)}" for name, value in _xattrs(path)]
        if exact:
            words += [f"ino={info.st_ino}", f"mtime={info.st_mtime_ns}", f"ctime={info.st_ctime_ns}"]
        elif info.st_mtime_ns < OLD:
            words.append(f"mtime={info.st_mtime_ns}")
        rows.append(" ".join(words))
    return rows


def _walk(top: bytes) -> Iterator[bytes]:
    """Every path that is not longer than the kernel takes, parents first."""
    stack = [top]
    while stack:
        path = stack.pop()
        yield path
        with contextlib.suppress(PermissionError):  # the line of the directory says its mode
            if stat.S_ISDIR(os.lstat(path).st_mode) and len(path) < 3800:
                stack += [os.path.join(path, name) for name in sorted(os.listdir(path), reverse=True)]


def _content(path: bytes, size: int) -> str:
    """A digest of the beginning and the end."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha1(file.read(SAMPLE))
            if size > SAMPLE:
                file.seek(max(size - SAMPLE, SAMPLE))
                digest.update(file.read(SAMPLE))
            return digest.hexdigest()[:10]
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _xattrs(path: bytes) -> Iterator[tuple[str, bytes]]:
    with contextlib.suppress(OSError):
        for name in os.listxattr(path, follow_symlinks=False):
            yield name, os.getxattr(path, name, follow_symlinks=False)
