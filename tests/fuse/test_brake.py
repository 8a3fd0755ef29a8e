# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may write when room is short, with a kernel made of dictionaries that keeps what was written until it is told."""

import errno
import os
import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio

pytest.importorskip("pyfuse3")

from pkramfs.fuse import brake
from pkramfs.fuse.brake import LONG, SHORT, Brake
from pkramfs.fuse.translate import only_reads
from pkramfs.units import PAGE_SIZE, pages

NOBODY = 1 << 30
"""The number of no process."""


class Machine:
    """A tree of `size` pages and a kernel in front of it: a host, a teller and a tree in one."""

    def __init__(self, size: int) -> None:
        self.limits = SimpleNamespace(max_pages=size, pages=0)
        self.losses = SimpleNamespace(files=set())
        self.writing: dict[int, Any] = {}
        self.unwritten: dict[int, int] = {}
        self.lost = self.written_back = self.forgettable = 0
        self.good = LONG
        self.cache = SimpleNamespace(write_back=self.write_back)
        self.brake = Brake(self, self, self)  # type: ignore[arg-type]

    def inode(self, number: int) -> Any:
        return self.writing[number]

    def room(self) -> int:
        return 1 << 40

    def hold(self, nanoseconds: int) -> None:
        self.good = nanoseconds

    def may_forget(self) -> bool:
        return self.forgettable > 0

    async def wait_for_room(self) -> None:
        self.limits.pages -= self.forgettable
        self.forgettable = 0

    async def write_back(self) -> None:
        self.written_back += 1
        for number in list(self.unwritten):
            self.arrive(number)
        await trio.lowlevel.checkpoint()

    def arrive(self, number: int) -> None:
        """Have the kernel write back what it has of one file."""
        inode, size = self.writing[number], self.unwritten.pop(number, 0)
        if not size:
            return
        inode.size += size
        room = self.limits.max_pages - self.limits.pages
        wanted = pages(inode.size) - inode.pages.count
        inode.pages.count += min(room, wanted)
        self.limits.pages += min(room, wanted)
        if wanted > room:
            self.lost += wanted - room
            self.losses.files.add(number)

    def file(self, number: int, count: int = 0) -> None:
        self.writing[number] = SimpleNamespace(ino=number, size=count * PAGE_SIZE, pages=SimpleNamespace(count=count))
        self.limits.pages += count

    async def write(self, number: int, size: int) -> bool:
        """Write behind the end of a file; False for ENOSPC."""
        try:
            before = self.brake.ask(number, NOBODY)
            if before is not None:
                await before
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return False
        with self.brake.resting():
            pass
        self.unwritten[number] = self.unwritten.get(number, 0) + size
        return True


@pytest.mark.parametrize("size", [PAGE_SIZE, 65536, 1 << 20])
def test_who_writes_alike_loses_nothing_and_fills_it(size: int) -> None:
    machine, written = Machine(10_000), 0
    machine.file(1)

    async def main() -> None:
        nonlocal written
        while await machine.write(1, size):
            written += 1
        await machine.write_back()

    trio.run(main)
    assert (written, machine.lost) == (10_000 * PAGE_SIZE // size, 0)
    assert machine.written_back < 70


@pytest.mark.parametrize("seed", range(20))
def test_many_writers(seed: int) -> None:
    """Whatever the kernel writes back by itself meanwhile: all but the last write of each file is there."""
    choice, machine = random.Random(seed), Machine(2000)
    sizes = {number: choice.choice([100, 4096, 5000, 65536, 300_000]) for number in range(1, 6)}

    async def main() -> None:
        going = list(sizes)
        for number in going:
            machine.file(number)
        while going:
            number = choice.choice(going)
            if not await machine.write(number, sizes[number]):
                going.remove(number)
            if choice.random() < 0.2:
                machine.arrive(choice.choice(list(sizes)))
        await machine.write_back()

    trio.run(main)
    assert machine.lost <= sum(pages(size) for size in sizes.values())
    assert machine.limits.pages > 1500


def test_who_overwrites_is_not_refused() -> None:
    machine = Machine(100)
    machine.file(1, 100)
    for _ in range(300):
        assert trio.run(machine.write, 1, 0)
    machine.file(2)
    assert not trio.run(machine.write, 2, 1)


def test_deleted_files_are_waited_for() -> None:
    machine = Machine(100)
    machine.file(1, 100)
    machine.file(2)
    machine.forgettable = 50
    assert trio.run(machine.write, 2, 1)


def test_the_less_room_the_sooner_it_is_asked_again() -> None:
    """Not at all for half a second with much; and each time with little, but for files of small writes."""
    machine = Machine(1 << 30)
    machine.file(1)
    assert machine.brake.ask(1, NOBODY) is None and machine.good == LONG
    machine.limits.pages = (1 << 30) - 2 * SHORT
    assert machine.brake.ask(1, NOBODY) is None and 0 < machine.good < LONG
    machine.limits.pages = (1 << 30) - SHORT // 2
    for _ in range(100):
        assert trio.run(machine.write, 1, 100)
    assert machine.brake.ask(1, NOBODY) is None
    with machine.brake.resting():
        assert 0 < machine.good < LONG
    assert machine.good == 0


def test_the_rest_of_one_file_is_not_anothers() -> None:
    """Where an answer was never made, as after others had settled, nobody else may go without asking."""
    machine = Machine(SHORT // 2)
    machine.file(1)
    machine.file(2)
    for _ in range(100):
        assert trio.run(machine.write, 1, 100)
    assert machine.brake.ask(1, NOBODY) is None  # and no answer is made
    other = machine.brake.ask(2, NOBODY)
    assert other is not None
    other.close()
    with machine.brake.resting():
        assert machine.good == 0


def test_opening_looks_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1 << 30)
    machine.brake.glance()
    machine.limits.pages = (1 << 30) - 1
    machine.brake.glance()
    assert machine.good == LONG
    monkeypatch.setattr(brake, "_LOOK", 0)
    machine.brake._next_look = 0
    machine.brake.glance()
    assert machine.good == 0


def test_who_reads() -> None:
    """A thread that waits in read(2) is found out; one that is gone, or waits for something else, may be writing."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(ours, 1)
        os._exit(0)
    while os.uname().machine == "x86_64" and not only_reads(pid):
        pass
    os.write(theirs, b"x")
    os.waitpid(pid, 0)
    for fd in (ours, theirs):
        os.close(fd)
    assert not only_reads(pid)
