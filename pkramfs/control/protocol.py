# SPDX-License-Identifier: GPL-2.0-or-later
"""One request, one answer, each a line of JSON.

    {"verb": "preserve", "args": {"strict": false}}
    {"ok": {"files": 3, …}}    or    {"error": "one line for people", "status": 1, "errno": 16}

`status` is the exit status of the error's class, `errno` the system's number where there is one. A verb whose answer
says `"held": true` is in force until the connection ends. A line has at most LINE_MAX bytes, so that no peer
can make the other collect without end; a message longer than MESSAGE_MAX is cut. replies.py declares the content of
`ok` for each verb.

A socket's path may be longer than the 108 bytes that the kernel takes, so both sides name it as
/proc/self/fd/N/NAME, N being its directory.

Kernel: net/unix/af_unix.c (UNIX_PATH_MAX)
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pkramfs import schema
from pkramfs.errors import DaemonError, PkramfsError, explain

LINE_MAX = 1 << 20
MESSAGE_MAX = 1 << 16
_REFUSAL = schema.Object(
    {"error": schema.Text()},
    optional={
        "status": schema.Maybe(schema.Whole(0, 255)),
        "errno": schema.Maybe(schema.Whole(0, 4095)),
    },
)


@contextmanager
def short_path(path: str) -> Iterator[str]:
    """Yield a short path of the same file, valid inside the block."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def encode(message: dict[str, Any]) -> bytes:
    """Encode a message as its line. Paths that are not UTF-8 travel as surrogates."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > LINE_MAX:
        raise DaemonError(f"a message of {len(line):,} bytes is too long: {LINE_MAX:,} is the most")
    return line


def decode(line: bytes) -> dict[str, Any]:
    """Decode the message of a line; raise ValueError if it is none."""
    message = schema.parse(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def failure(error: Exception) -> dict[str, Any]:
    """Return the answer for an error."""
    if isinstance(error, PkramfsError):
        return {"error": _cut(str(error)), "status": error.exit_status, "errno": getattr(error, "errno", None)}
    if isinstance(error, OSError):
        return {"error": _cut(explain(error)), "status": PkramfsError.exit_status, "errno": error.errno}
    message = f"internal error: {type(error).__name__}: {_cut(str(error))}; the daemon's log has more"
    return {"error": message, "status": 70, "errno": None}


def _cut(message: str) -> str:
    return message if len(message) <= MESSAGE_MAX else message[:MESSAGE_MAX] + "…"


class RefusedError(PkramfsError):
    """The daemon refused. Carries its words, exit status and errno."""

    def __init__(self, message: str, status: int, code: int | None) -> None:
        super().__init__(message)
        self.exit_status, self.errno = status, code


def result(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an answer; raise RefusedError if it is a refusal."""
    if "error" in answer:
        try:
            refused = _REFUSAL.read(answer)
        except schema.Invalid as error:
            raise DaemonError(f"unexpected reply from the daemon (version mismatch?): {error}") from None
        raise RefusedError(refused["error"], refused.get("status") or 1, refused.get("errno"))
    found = answer.get("ok")
    if not isinstance(found, dict):
        raise DaemonError("unexpected reply from the daemon (version mismatch?): neither ok nor error")
    return found
