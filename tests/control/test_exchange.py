"""Client and server on a real socket; the tree is not needed."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from pkramfs.control import protocol
from pkramfs.control.client import call
from pkramfs.control.server import Server, _check_peer
from pkramfs.errors import DaemonError, ErrnoError, UsageError


async def _echo(**args: Any) -> dict[str, Any]:
    return args


async def _busy() -> dict[str, Any]:
    raise ErrnoError("/a is open for writing", errno.EBUSY)


async def _usage() -> dict[str, Any]:
    raise UsageError("wrong word")


async def _bug() -> dict[str, Any]:
    raise ZeroDivisionError("oh")


async def _silent() -> dict[str, Any]:
    await trio.sleep_forever()
    return {}


VERBS = {"echo": _echo, "busy": _busy, "usage": _usage, "bug": _bug, "silent": _silent}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A server in a thread, at a path longer than the kernel takes."""
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    made: list[Any] = []
    up = threading.Event()

    async def run() -> None:
        server = Server(str(directory / "sock"), VERBS)
        with trio.CancelScope() as scope:
            made.extend([scope, trio.lowlevel.current_trio_token()])
            up.set()
            await server.serve()

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    up.wait(10)
    yield str(directory / "sock")
    scope, token = made
    trio.from_thread.run_sync(scope.cancel, trio_token=token)
    thread.join(10)


def test_an_answer(path: str) -> None:
    assert call(path, "echo", a=1, b=["x"], path="\udcff") == {"a": 1, "b": ["x"], "path": "\udcff"}


def test_a_long_answer(path: str) -> None:
    text = "x" * 60_000
    assert call(path, "echo", text=text)["text"] == text


@pytest.mark.parametrize(
    ("verb", "status", "code", "part"),
    [
        ("busy", 1, errno.EBUSY, "/a is open for writing"),
        ("usage", 2, None, "wrong word"),
        ("bug", 70, None, "ZeroDivisionError"),
        ("frob", 2, None, "frob"),
    ],
)
def test_refusals(path: str, verb: str, status: int, code: int | None, part: str) -> None:
    with pytest.raises(protocol.RefusedError) as caught:
        call(path, verb)
    assert (caught.value.exit_status, caught.value.errno) == (status, code)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_arguments(path: str) -> None:
    with pytest.raises(protocol.RefusedError) as caught:
        call(path, "busy", much=True)
    assert caught.value.exit_status == 2


def test_no_answer_in_time(path: str) -> None:
    with pytest.raises(DaemonError, match="within"):
        call(path, "silent", timeout=0.05)
    assert call(path, "echo") == {}  # it goes on for others


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DaemonError):
        call(str(tmp_path / "none"), "status")
    with pytest.raises(DaemonError):
        call(str(tmp_path / "no" / "directory"), "status")


@pytest.mark.parametrize(
    "noise", [b"", b"\n", b"[]\n", b"\xff\xfe\n", b'{"verb": 3}\n', b'{"verb":"echo","args":[1]}\n']
)
def test_noise_ends_nothing(path: str, noise: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as peer, protocol.short_path(path) as short:
        peer.connect(short)
        peer.sendall(noise)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(4096):
            pass
    assert call(path, "echo", still=True) == {"still": True}


def test_who_goes_before_the_answer(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as peer, protocol.short_path(path) as short:
        peer.connect(short)
        peer.sendall(protocol.encode({"verb": "silent"}))
    assert call(path, "echo") == {}


@pytest.mark.parametrize(("uid", "heard"), [(0, True), (os.geteuid(), True), (4711, False)])
def test_strangers_are_not_heard(uid: int, heard: bool) -> None:
    packed = struct.pack("3i", 1, uid, uid)
    stream: Any = SimpleNamespace(socket=SimpleNamespace(getsockopt=lambda *_: packed))
    with nullcontext() if heard else pytest.raises(PermissionError, match="4711"):
        _check_peer(stream)


def test_the_socket_is_private(path: str) -> None:
    assert os.stat(path).st_mode & 0o777 == 0o600
