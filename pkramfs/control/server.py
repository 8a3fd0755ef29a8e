# SPDX-License-Identifier: GPL-2.0-or-later
"""The server of a daemon: a unix socket, one verb a connection.

`Server` knows no verbs: it is given functions by name. An exception that they raise becomes an answer. An unforeseen
one is logged with its traceback as well: a command can never end the mount.

A verb may have a function that takes it back (`undo`). Then it holds as long as its connection. When the command
closes the connection, or dies, that function gets the answer, and then our end is closed.

Only root and the daemon's own user are heard (SO_PEERCRED). The machine's directory lets nobody else reach the
socket; this is the second check.

Kernel: net/unix/af_unix.c, include/linux/socket.h (struct ucred)
"""

import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import trio

from pkramfs.control import protocol
from pkramfs.errors import PkramfsError, UsageError, explain

log = logging.getLogger(__name__)

Verb = Callable[..., Awaitable[dict[str, Any]]]
Undo = Callable[[dict[str, Any]], Awaitable[None]]

_READ_SECONDS, _AGAIN_SECONDS = 5.0, 10.0
_REQUEST_MAX = 1 << 16
_BACKLOG = 1024
"""Commands that may wait while we are busy; the kernel takes no more than net.core.somaxconn."""
_UCRED = struct.Struct("3i")


class Server:
    """Listens at `path` from the moment it is made, if it can; answers while `serve` runs."""

    def __init__(
        self, path: str, verbs: Mapping[str, Verb], undo: Mapping[str, Undo] | None = None, *, patient: bool = False
    ) -> None:
        """Listen; where that cannot be, raise OSError, or try again later if `patient`."""
        self._path, self._verbs, self._undo = path, verbs, undo or {}
        self._listening = self._try_to_listen() if patient else _listen(path)
        self._active = 0
        self._idle = trio.Condition()

    async def serve(self) -> None:
        """Answer until cancelled."""
        while self._listening is None:
            await trio.sleep(_AGAIN_SECONDS)
            self._listening = self._try_to_listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listening))
        await trio.serve_listeners(self._answer, [listener])

    def _try_to_listen(self) -> socket.socket | None:
        try:
            return _listen(self._path)
        except OSError as error:
            log.warning("no command can reach this daemon yet: %s", explain(error))
            return None

    async def idle(self) -> None:
        """Wait until no verb is being worked on."""
        async with self._idle:
            while self._active:
                await self._idle.wait()

    async def _answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            undo: Callable[[], Awaitable[None]] | None = None
            self._active += 1
            try:
                answer, undo = await self._ask(stream)
                heard = await _send(stream, answer)
            finally:
                with trio.CancelScope(shield=True):
                    async with self._idle:
                        self._active -= 1
                        self._idle.notify_all()
            if undo is not None:
                await _hold(stream if heard else None, undo)

    async def _ask(self, stream: trio.SocketStream) -> tuple[dict[str, Any], Callable[[], Awaitable[None]] | None]:
        """Do one request; return the answer, and the function that takes it back if it holds with the connection."""
        try:
            _check_peer(stream)
            request = await _request(stream)
            done = await self._call(request)
        except Exception as error:
            if not isinstance(error, PkramfsError | OSError | trio.BrokenResourceError):
                log.exception("a verb failed")
            return protocol.failure(error), None
        undo = self._undo.get(str(request.get("verb")))
        if undo is None:
            return {"ok": done}, None
        return {"ok": done | {"held": True}}, partial(undo, done)

    async def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        verb = self._verbs.get(str(request.get("verb")))
        if verb is None:
            raise UsageError(f"unknown verb {request.get('verb')!r}")
        args = request.get("args") or {}
        try:
            return await verb(**args)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise UsageError(f"{request['verb']}: {error}") from None


async def _send(stream: trio.SocketStream, answer: dict[str, Any]) -> bool:
    """Send the answer; return False if the peer did not take it at once."""
    try:
        line = protocol.encode(answer)
    except PkramfsError as error:
        line = protocol.encode(protocol.failure(error))
    try:
        with trio.fail_after(_READ_SECONDS):
            await stream.send_all(line)
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
        log.info("a command went away: %s", error)
        return False
    return True


async def _hold(stream: trio.SocketStream | None, undo: Callable[[], Awaitable[None]]) -> None:
    """Wait until the peer closes its end (without a stream it has done so already), then take the verb back."""
    try:
        if stream is not None:
            await stream.receive_some(1)
    except trio.BrokenResourceError:
        pass  # it died, which ends its hold as well
    try:
        await undo()
    except (PkramfsError, OSError):
        log.exception("what a command held could not be taken back")


def _listen(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with protocol.short_path(path) as short:
            if os.path.lexists(short):
                os.unlink(short)  # of a daemon that died: we hold the lock
            listening.bind(short)
            os.chmod(short, 0o600)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
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
        raise UsageError("invalid request: expected one line of JSON") from None
