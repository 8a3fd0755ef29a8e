# SPDX-License-Identifier: GPL-2.0-or-later
"""Client and server on a real socket; the tree is not needed."""

import errno
import fcntl
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from pkramfs.control import client, commands, protocol
from pkramfs.control.client import Held, call, call_long
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


ASKED: list[int] = []


async def _work() -> dict[str, Any]:
    """Work that is over when `status` was asked three times."""
    ASKED.clear()
    while len(ASKED) < 3:
        await trio.sleep(0.001)
    return {"asked": len(ASKED)}


async def _status() -> dict[str, Any]:
    ASKED.append(1)
    return {}


VERBS = {
    "work": _work,
    "status": _status,
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
    up.wait(60)
    yield str(directory / "sock")
    scope, token = made
    trio.from_thread.run_sync(scope.cancel, trio_token=token)
    thread.join(60)


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


def test_a_daemon_that_is_about_to_take_over_is_waited_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder has the lock meanwhile. Without that nobody would come."""
    later = path + ".later"
    os.rename(path, later)
    with open(path + ".lock", "w") as lock:
        with pytest.raises(DaemonError, match="No such file"):
            call(path, "echo")
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(client, "COMING_SECONDS", 0.0)
        with pytest.raises(DaemonError, match="No such file"):
            call(path, "echo")
        monkeypatch.undo()
        monkeypatch.setattr(client.time, "sleep", lambda _: os.path.exists(path) or os.rename(later, path))
        assert call(path, "echo", a=1) == {"a": 1}


def test_a_question_that_a_daemon_took_along_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a daemon that answers; an order is not given again."""
    monkeypatch.setattr(commands, "read", lambda _, found: found)
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor() as pool:
        listening.bind(str(tmp_path / "sock"))
        listening.listen()

        def serve() -> None:
            for answer in (b"", b"", b'{"ok": {"files": 1}}\n', b""):
                with listening.accept()[0] as peer:
                    peer.recv(100)
                    peer.send(answer)

        served = pool.submit(serve)
        told = commands.Commands(str(tmp_path / "sock"))
        assert told.status() == {"files": 1}
        with pytest.raises(client.GoneError, match="ended before it answered unpreserve"):
            told.unpreserve()
        served.result(60)


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
    deadline = time.monotonic() + 60
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


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[tuple[str, socket.socket, int]]:
    """A socket whose queue is full, and how many wait in it: nobody takes what comes."""
    count = 0
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listening, ExitStack() as waiting:
        listening.bind(path)
        listening.listen(0)
        listening.settimeout(5)
        while True:
            peer = waiting.enter_context(socket.socket(socket.AF_UNIX))
            peer.setblocking(False)
            try:
                peer.connect(path)
            except BlockingIOError:
                break
            count += 1
        yield path, listening, count


def test_a_queue_that_stays_full_is_an_error_in_time(crowded: tuple[str, socket.socket, int]) -> None:
    with pytest.raises(DaemonError, match=r"no answer to status within 0\.1 s"):
        call(crowded[0], "status", timeout=0.1)


def test_a_queue_that_is_full_is_waited_for(
    crowded: tuple[str, socket.socket, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes what comes, but only after the client has found the queue full."""
    path, listening, before = crowded
    full = threading.Event()
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: full.set()))

    def serve() -> None:
        if not full.wait(5):
            return  # it never found the queue full, or gave up
        with ExitStack() as taken:
            for _ in range(before):
                taken.enter_context(listening.accept()[0])
            peer = taken.enter_context(listening.accept()[0])
            peer.settimeout(5)
            assert b"status" in peer.recv(4096)
            peer.sendall(b'{"ok": {"at": "last"}}\n')

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        assert call(path, "status", timeout=10) == {"at": "last"}
        served.result()


def test_more_commands_at_once_than_ever_wait(path: str) -> None:
    """The server takes none before all have come."""
    answers: list[int] = []

    def ask(number: int) -> None:
        answers.append(call(path, "echo", number=number)["number"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == list(range(100))


def test_long_work_is_waited_for_as_long_as_the_daemon_answers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ASK_SECONDS", 0.05)
    assert call_long(path, "work") == {"asked": 3}
    monkeypatch.setattr(client, "LONG_SECONDS", 0.2)
    with pytest.raises(DaemonError, match="no answer to silent within"):
        call_long(path, "silent")


def test_a_daemon_that_answers_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ASK_SECONDS", 0.05)
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(path)
        stopped.listen()
        with pytest.raises(DaemonError, match=r"no answer to status within 0\.05 s"):
            call_long(path, "preserve")
