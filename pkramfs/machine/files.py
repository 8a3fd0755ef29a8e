"""Small files that others read at any moment: replaced at once, or not at all.

    path.PID.tmp ──write──▶ path.PID.tmp ──rename──▶ path

A reader sees the old text or the new, never a part; whoever dies in between leaves the old one. A
file system that is full is an error in words, with nothing left behind.

What a JSON file says may authorise to punch memory, so it can be sealed: one word more, which is a
checksum of all others.

Kernel: rename(2)
"""

import hashlib
import json
import os
from typing import Any

from pkramfs.errors import MachineError, explain

CHECKSUM = "checksum"


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """The words of a JSON object, and their checksum."""
    plain = {name: value for name, value in data.items() if name != CHECKSUM}
    return plain | {CHECKSUM: _checksum(plain)}


def is_sealed(data: dict[str, Any]) -> bool:
    """Whether an object that was read has a checksum that fits."""
    return CHECKSUM in data and sealed(data)[CHECKSUM] == data[CHECKSUM]


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()


def replace_file(path: str, text: str) -> None:
    """Write a file beside `path` and rename it over."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", opener=private) as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise MachineError(f"cannot write {path}: {explain(error)}") from None


def append_line(path: str, line: str) -> None:
    """Add a line to a file in one write, so that lines of several processes do not mix."""
    try:
        fd = private(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(fd, line.encode(errors="surrogateescape") + b"\n")
        finally:
            os.close(fd)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {explain(error)}") from None


def private(path: str, flags: int) -> int:
    """Open a file for its owner alone; never through a link that somebody planted."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
