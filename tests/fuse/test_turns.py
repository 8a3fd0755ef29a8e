# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests follow each other without the scheduler, and nobody else starves."""

import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from pkramfs.fuse import turns as module
from pkramfs.fuse.turns import SHORT, TURN, WINDOW, Device, Lock, Turns, Window


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


class Clock:
    """Stands in for time.monotonic in the module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_what_is_there_is_read_without_the_scheduler_until_the_turn_ends(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    clock = Clock(monkeypatch)
    ours, theirs = pair

    async def main() -> None:
        device = Device()
        theirs.send(b"1")
        with trio.testing.assert_checkpoints():
            await device.wait_readable(ours.fileno())  # the first turn begins in the scheduler
        with trio.testing.assert_no_checkpoints():
            await device.wait_readable(ours.fileno())
            clock.now += TURN * 0.9
            await device.wait_readable(ours.fileno())
        clock.now += TURN * 0.2
        with trio.testing.assert_checkpoints():
            await device.wait_readable(ours.fileno())

    trio.run(main)


def test_what_comes_later_is_waited_for_in_the_scheduler(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    seen = []

    async def main() -> None:
        device = Device()

        async def reader() -> None:
            for _ in range(2):
                await device.wait_readable(ours.fileno())
                seen.append(ours.recv(1))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                for message in (b"1", b"2"):
                    await trio.testing.wait_all_tasks_blocked()  # which it is only if it waits in trio
                    theirs.send(message)

    trio.run(main)
    assert seen == [b"1", b"2"]


def test_a_closed_descriptor_wakes_the_reader(pair: tuple[socket.socket, socket.socket]) -> None:
    """pyfuse3.terminate says notify_closing through what it takes for trio."""
    ours, _ = pair
    scheduler = Turns()

    async def main() -> None:
        async def reader() -> None:
            with pytest.raises(scheduler.ClosedResourceError):
                await scheduler.lowlevel.wait_readable(ours.fileno())

        with trio.fail_after(10):
            async with scheduler.open_nursery() as nursery:
                nursery.start_soon(reader)
                await trio.testing.wait_all_tasks_blocked()
                scheduler.lowlevel.notify_closing(ours.fileno())

    trio.run(main)


def test_the_lock_costs_no_checkpoint_and_excludes() -> None:
    inside: list[str] = []

    async def main() -> None:
        lock, first_may_go = Lock(), trio.Event()

        async def first() -> None:
            async with lock:
                inside.append("first in")
                await first_may_go.wait()
                inside.append("first out")

        async def second() -> None:
            async with lock:
                inside.append("second in")

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(second)
                await trio.testing.wait_all_tasks_blocked()
                first_may_go.set()
            with trio.testing.assert_no_checkpoints():
                async with lock:
                    pass

    trio.run(main)
    assert inside == ["first in", "first out", "second in"]


def test_who_takes_it_again_keeps_it_and_who_waits_lets_others_in() -> None:
    """A worker that goes on reading is not interrupted; when its handler waits, or it ends, another reads."""
    order: list[str] = []

    async def main() -> None:
        lock, room = Lock(), trio.Event()

        async def busy() -> None:
            for number in range(3):
                async with lock:
                    order.append(f"busy {number}")
                    await trio.lowlevel.checkpoint()  # the other looks, and finds it taken
            await room.wait()

        async def idle() -> None:
            async with lock:
                order.append("idle")
            room.set()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(busy)
                await trio.lowlevel.checkpoint()
                nursery.start_soon(idle)

    trio.run(main)
    assert order == ["busy 0", "busy 1", "busy 2", "idle"]


class Others:
    """Stands in for what else wants the processors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.preemptions, self.processors = 0, {0, 1}
        monkeypatch.setattr(module, "_preemptions", lambda: self.preemptions)
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: self.processors)


def test_the_window_opens_where_requests_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    Others(monkeypatch)
    window = Window()
    assert window.seconds == 0
    window.slept(SHORT * 2)
    assert window.seconds == 0
    window.slept(SHORT / 2)
    assert window.seconds == WINDOW
    window.missed()
    assert 0 < window.seconds < WINDOW
    window.hit()
    assert window.seconds == WINDOW


def test_the_window_shuts_where_they_do_not_and_opens_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    Others(monkeypatch)
    window, sleeps = Window(), []
    for _ in range(10):
        count = 0
        while not window.seconds:
            window.slept(SHORT / 2)
            count += 1
        sleeps.append(count)
        while window.seconds:
            window.missed()
    assert sleeps == sorted(sleeps) and sleeps[0] == 1 and sleeps[-1] > 50


@pytest.mark.parametrize("who", ["preempted", "one processor"])
def test_no_window_while_others_want_the_processor(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    others = Others(monkeypatch)
    window = Window()
    window.slept(0)
    if who == "preempted":
        others.preemptions += 1
    else:
        others.processors = {1}
    window.turn()
    for _ in range(200):
        window.slept(0)
    assert window.seconds == 0
    others.processors = {0, 1}
    for _ in range(20):
        window.turn()
    window.slept(0)
    assert window.seconds == WINDOW


def test_a_request_inside_the_window_is_found_without_sleep(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    Others(monkeypatch)
    ours, theirs = pair
    asked: list[float] = []

    async def main() -> None:
        device = Device()
        theirs.send(b"1")
        await device.wait_readable(ours.fileno())
        ours.recv(1)

        def poll(milliseconds: float) -> list[int]:
            asked.append(milliseconds)
            return [1] if len(asked) in (1, 6) else []

        monkeypatch.setattr(device, "_poll", poll)
        assert device.linger() and asked == [1]  # it slept, and not for long
        assert device.linger() and asked[1:] == [0] * 5

    trio.run(main)
