"""Ask a mount daemon, and wait for its answer.

    call(entry.socket, "status")                 → dict
    call(entry.socket, "preserve", strict=True)

DaemonError means that there was no answer: nobody listens, the daemon died, or it took too long. A
refusal is protocol.RefusedError, with the daemon's words. Standard library only.

Kernel: net/unix/af_unix.c
"""

import socket
import time
from typing import Any

from pkramfs.control import protocol
from pkramfs.errors import DaemonError, explain

TIMEOUT = 120.0


def call(path: str, verb: str, /, *, timeout: float = TIMEOUT, **args: Any) -> dict[str, Any]:
    """The answer to one verb of the daemon that listens at `path`."""
    try:
        line = _exchange(path, protocol.encode({"verb": verb, "args": args}), timeout)
    except TimeoutError:
        raise DaemonError(f"no answer to {verb} within {timeout:g} s") from None
    except OSError as error:
        raise DaemonError(f"cannot ask it to {verb}: {explain(error)}") from None
    try:
        answer = protocol.decode(line)
    except ValueError:
        raise DaemonError(f"it ended while it was asked to {verb}") from None
    return protocol.result(answer)


def _exchange(path: str, request: bytes, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as peer:
        peer.settimeout(timeout)
        with protocol.short_path(path) as short:
            peer.connect(short)
        peer.sendall(request)
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            peer.settimeout(max(deadline - time.monotonic(), 0.001))
            part = peer.recv(1 << 16)
            if not part:
                break
            parts.append(part)
    return b"".join(parts)
