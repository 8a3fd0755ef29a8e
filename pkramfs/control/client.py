# SPDX-License-Identifier: GPL-2.0-or-later
"""Exchange one request and one answer with a mount daemon.

    call(path, verb, **args)                     → the answer, a JSON object
    call_long(path, verb, **args)                the same, for a verb that may take long
    held = Held(path, verb, undo="")             → held.answer; in force until held.release(), or this process ends

This module knows no verbs: commands.py has them, with typed replies. DaemonError means that there was no answer: no
daemon listens, it died, or it took too long. A refusal is protocol.RefusedError, with the daemon's words. Standard
library only.

A daemon that works on a verb still answers `status`. So `call_long` asks for it now and then, and gives up if there is
no answer.

Where nobody listens although the mount's lock is held, its daemon has died and another is about to take over: that one
is waited for. What a daemon was asked when it died is another matter: GoneError.

Kernel: net/unix/af_unix.c
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from pkramfs.control import protocol
from pkramfs.errors import DaemonError, PkramfsError, explain
from pkramfs.machine import locks
from pkramfs.mounting import patience

TIMEOUT = 120.0
LONG_SECONDS, ASK_SECONDS = 3600.0, 30.0
"""How long the longest work may take, and how long a daemon at work may leave `status` unanswered."""
COMING_SECONDS = 10.0
"""How long a daemon may take until it listens."""
_POLL = 0.02


class GoneError(DaemonError):
    """The daemon died, or ended, before it answered."""


def call(path: str, verb: str, /, *, timeout: float = TIMEOUT, **args: Any) -> dict[str, Any]:
    """Send one verb to the daemon that listens at `path`, and return its answer."""
    with contextlib.closing(_Connection(path, verb, timeout)) as peer:
        return peer.ask(args)


def call_long(path: str, verb: str, /, **args: Any) -> dict[str, Any]:
    """Send a verb that may take long, and return its answer, while the daemon answers `status` meanwhile."""
    with contextlib.closing(_Connection(path, verb, LONG_SECONDS)) as peer:
        return peer.ask(args, meanwhile=lambda: call(path, "status", timeout=ASK_SECONDS))


class Held:
    """A verb that is in force as long as its connection; `answer` is the daemon's answer.

    `undo` is the verb that takes it back from a daemon of an older version, which does not answer `held`; empty: none.
    """

    def __init__(self, path: str, verb: str, /, *, undo: str, timeout: float = TIMEOUT, **args: Any) -> None:
        self._path, self._undo = path, undo
        self._peer = _Connection(path, verb, timeout)
        try:
            self.answer = self._peer.ask(args)
        except BaseException:
            self._peer.close()
            raise

    def close(self) -> None:
        """End it without waiting, for a daemon that is gone."""
        self._peer.close()

    def release(self, timeout: float = TIMEOUT) -> None:
        """End it, and wait until the daemon has taken it back; raise DaemonError if it does not confirm in time."""
        if self.answer.get("held"):
            self._peer.finish(timeout)
        else:
            self._peer.close()
            if self._undo:
                call(self._path, self._undo, timeout=timeout)


class _Connection:
    """One exchange with a daemon; every failure is a DaemonError that names the verb."""

    def __init__(self, path: str, verb: str, timeout: float) -> None:
        self._verb, self._timeout, self._deadline = verb, timeout, time.monotonic() + timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with self._trouble():
                self._connect(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def ask(self, args: dict[str, Any], meanwhile: Callable[[], object] | None = None) -> dict[str, Any]:
        """Send the request and return the answer; call `meanwhile`, which may raise, now and then while waiting."""
        with self._trouble():
            self._socket.settimeout(self._left())
            self._socket.sendall(protocol.encode({"verb": self._verb, "args": args}))
            line = self._line(meanwhile)
        try:
            answer = protocol.decode(line)
        except ValueError:
            raise GoneError(f"the daemon ended before it answered {self._verb}") from None
        return protocol.result(answer)

    def finish(self, timeout: float) -> None:
        """Close our end and wait until the daemon has closed its own."""
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        with contextlib.closing(self._socket), self._trouble():
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(self._left())
            self._socket.recv(1)

    def _connect(self, path: str) -> None:
        """Connect; a daemon with which too many others wait to speak is asked again, as is one that is coming."""
        coming = time.monotonic() + min(COMING_SECONDS, self._left())
        with protocol.short_path(path) as short:
            while True:
                self._socket.settimeout(self._left())
                try:
                    self._socket.connect(short)
                except BlockingIOError:  # its queue is full; with a timeout, connect does not wait
                    if self._left() <= _POLL:
                        raise TimeoutError from None
                except (ConnectionRefusedError, FileNotFoundError):
                    if time.monotonic() > coming or not locks.is_held(os.path.splitext(path)[0] + ".lock"):
                        raise
                else:
                    return
                time.sleep(_POLL)

    def _line(self, meanwhile: Callable[[], object] | None) -> bytes:
        parts, size, asking = [b""], 0, time.monotonic() + ASK_SECONDS
        while not parts[-1].endswith(b"\n") and size <= protocol.LINE_MAX:
            left = self._left() if meanwhile is None else min(self._left(), asking - time.monotonic())
            self._socket.settimeout(max(min(left, patience.TICK_SECONDS) if patience.tick() else left, 0.001))
            try:
                part = self._socket.recv(1 << 16)
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    raise
                if meanwhile is not None and time.monotonic() >= asking:
                    meanwhile()
                    asking = time.monotonic() + ASK_SECONDS
                continue
            if not part:
                break
            parts.append(part)
            size += len(part)
        if size > protocol.LINE_MAX:
            raise DaemonError(f"the answer to {self._verb} is longer than {protocol.LINE_MAX:,} bytes")
        return b"".join(parts)

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except PkramfsError:
            raise
        except TimeoutError:
            raise DaemonError(f"no answer to {self._verb} within {self._timeout:g} s") from None
        except (ConnectionResetError, BrokenPipeError):
            raise GoneError(f"the daemon ended before it answered {self._verb}") from None
        except OSError as error:
            raise DaemonError(f"cannot send {self._verb} to the daemon: {explain(error)}") from None
