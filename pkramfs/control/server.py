"""The daemon's ear: a unix socket, one verb a connection.

`Server` knows no verbs: it is given functions by name. Whatever they raise becomes an answer, and what
nobody foresaw is logged with its traceback: a command can never end the mount.

Only root and the daemon's own user are heard (SO_PEERCRED); the machine's directory lets nobody
else reach the socket, this is the second door.

Kernel: net/unix/af_unix.c, include/linux/socket.h (struct ucred)
"""

import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from pkramfs.control import protocol
from pkramfs.errors import PkramfsError, UsageError

log = logging.getLogger(__name__)

Verb = Callable[..., Awaitable[dict[str, Any]]]

_READ_SECONDS = 5.0
_REQUEST_MAX = 1 << 16
_UCRED = struct.Struct("3i")


class Server:
    """Listens at `path` from the moment it is made; answers while `serve` runs."""

    def __init__(self, path: str, verbs: Mapping[str, Verb]) -> None:
        self._verbs = verbs
        self._listening = _listen(path)
        self._active = 0
        self._idle = trio.Condition()

    async def serve(self) -> None:
        """Answer until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listening))
        await trio.serve_listeners(self._answer, [listener])

    async def idle(self) -> None:
        """Wait until no verb is being worked on."""
        async with self._idle:
            while self._active:
                await self._idle.wait()

    async def _answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            self._active += 1
            try:
                await self._exchange(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
                log.info("a command went away: %s", error)
            finally:
                with trio.CancelScope(shield=True):
                    async with self._idle:
                        self._active -= 1
                        self._idle.notify_all()

    async def _exchange(self, stream: trio.SocketStream) -> None:
        try:
            _check_peer(stream)
            answer = {"ok": await self._call(await _request(stream))}
        except Exception as error:
            if not isinstance(error, PkramfsError | OSError):
                log.exception("a verb failed")
            answer = protocol.failure(error)
        with trio.move_on_after(_READ_SECONDS):
            await stream.send_all(protocol.encode(answer))

    async def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        verb = self._verbs.get(str(request.get("verb")))
        if verb is None:
            raise UsageError(f"the daemon knows no verb {request.get('verb')!r}")
        args = request.get("args") or {}
        try:
            return await verb(**args)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise UsageError(f"{request['verb']}: {error}") from None


def _listen(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with protocol.short_path(path) as short:
        if os.path.lexists(short):
            os.unlink(short)  # of a daemon that died: we hold the lock
        listening.bind(short)
        os.chmod(short, 0o600)
    listening.listen(16)
    return listening


def _check_peer(stream: trio.SocketStream) -> None:
    packed = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(packed)
    if uid not in (0, os.geteuid()):
        raise PermissionError(1, f"user {uid} may not command this daemon")


async def _request(stream: trio.SocketStream) -> dict[str, Any]:
    line = b""
    with trio.move_on_after(_READ_SECONDS):
        while not line.endswith(b"\n") and len(line) < _REQUEST_MAX:
            part = await stream.receive_some(1 << 16)
            if not part:
                break
            line += part
    try:
        return protocol.decode(line)
    except ValueError:
        raise UsageError("not a request: one line of JSON is expected") from None
