"""Client and server on a real socket; the tree is not needed."""

import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from pkramfs.control import protocol
from pkramfs.control.client import Held, call
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


HELD: list[str] = []


async def _hold(name: str = "") -> dict[str, Any]:
    HELD.append(name)
    return {"name": name}


async def _let_go(answer: dict[str, Any]) -> None:
    HELD.remove(answer["name"])


async def _held() -> dict[str, Any]:
    return {"now": list(HELD)}


async def _echo_much() -> dict[str, Any]:
    return {"text": "x" * 30_000}


async def _say_much() -> dict[str, Any]:
    raise UsageError("x" * 30_000)


VERBS = {
    "echo_much": _echo_much,
    "say_much": _say_much,
    "hold": _hold,
    "held": _held,
    "echo": _echo,
    "busy": _busy,
    "usage": _usage,
    "bug": _bug,
    "silent": _silent,
}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A server in a thread, at a path longer than the kernel takes."""
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    made: list[Any] = []
    up = threading.Event()

    async def run() -> None:
        server = Server(str(directory / "sock"), VERBS, {"hold": _let_go})
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


def test_an_answer_has_its_limits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINE_MAX", 1 << 14)
    with pytest.raises(protocol.RefusedError, match=r"a message of 30,\d* bytes is too long: 16,384 is the most"):
        call(path, "echo_much")
    with pytest.raises(protocol.RefusedError) as caught:
        monkeypatch.setattr(protocol, "MESSAGE_MAX", 100)
        call(path, "say_much")
    assert str(caught.value) == "x" * 100 + "…"
    with pytest.raises(DaemonError, match="too long"):
        call(path, "echo", text="x" * 20_000)


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


def until_nothing_is_held(path: str) -> None:
    deadline = time.monotonic() + 10
    while call(path, "held")["now"]:
        assert time.monotonic() < deadline, "it is held for ever"


def test_a_verb_that_holds_is_in_force_until_it_is_released(path: str) -> None:
    held = Held(path, "hold", undo="", name="a")
    assert held.answer == {"name": "a", "held": True}
    assert call(path, "held")["now"] == ["a"]
    held.release()
    assert call(path, "held")["now"] == [], "it was taken back before release returned"


@pytest.mark.parametrize("answered", [True, False])
def test_a_verb_that_holds_ends_with_who_asked_for_it(path: str, answered: bool) -> None:
    """A commander that is killed: the kernel closes its end, whether it has read the answer or not."""
    child = os.fork()
    if child == 0:
        try:
            with socket.socket(socket.AF_UNIX) as peer, protocol.short_path(path) as short:
                peer.connect(short)
                peer.sendall(protocol.encode({"verb": "hold", "args": {"name": "b"}}))
                if answered:
                    peer.recv(4096)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    until_nothing_is_held(path)


def test_what_an_older_daemon_does_not_hold_is_taken_back_by_its_own_verb(path: str) -> None:
    """It answers without `held` and forgets who asked."""
    with pytest.raises(protocol.RefusedError, match="open for writing"):
        Held(path, "echo", undo="busy").release()
    Held(path, "echo", undo="").release()
