# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may write when room is short, with a kernel made of dictionaries that keeps what was written until it is told."""

import errno
import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio

pytest.importorskip("pyfuse3")

from pkramfs.fs.pagecache import PageMap
from pkramfs.fuse import brake
from pkramfs.fuse.brake import LONG, SHORT, Brake
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


# -- where /proc says what a write brings ---------------------------------------------------------


class Told(Machine):
    """A machine whose writers are looked at: each says how much it writes, and where (None: it appends)."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(size)
        monkeypatch.setattr(brake, "look", self.look)
        self.running = 0

    def look(self, pid: int) -> Any:
        if self.running:
            self.running -= 1
            raise BlockingIOError
        return SimpleNamespace(count=self.count, place=lambda size: size if self.at is None else self.at)

    def file(self, number: int, count: int = 0) -> None:
        runs = PageMap()
        if count:
            runs.insert(0, number << 30, count)
        self.writing[number] = SimpleNamespace(ino=number, size=count * PAGE_SIZE, pages=runs)
        self.limits.pages += count

    def arrive(self, number: int) -> None:
        inode, written = self.writing[number], self.unwritten.pop(number, [])
        for start, count in written:
            start = inode.size if start is None else start
            for index, size in inode.pages.holes(start >> 12, pages(start + count)):
                size = min(size, self.limits.max_pages - self.limits.pages)
                if size:
                    inode.pages.insert(index, (number << 30) + index, size)
                    self.limits.pages += size
            self.lost += len(inode.pages.holes(start >> 12, pages(start + count)))
            inode.size = max(inode.size, start + count)

    def put(self, number: int, at: int | None, count: int) -> bool:
        """Write; False for ENOSPC."""
        self.at, self.count = at, count

        async def main() -> None:
            before = self.brake.ask(number, NOBODY)
            if before is not None:
                await before

        try:
            trio.run(main)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return False
        if count:
            self.unwritten.setdefault(number, []).append((at, count))
        return True


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """A full machine of 100 pages, 99 of them in file 1, and an empty file 2."""
    machine = Told(100, monkeypatch)
    machine.file(1, 99)
    machine.file(2)
    return machine


def test_overwriting_needs_no_writing_back(told: Told) -> None:
    for number in range(50):
        assert told.put(1, number * 1000, 5000)
    assert (told.written_back, told.lost) == (0, 0)
    assert told.put(2, 0, 4096)
    assert told.put(1, 0, 99 * PAGE_SIZE)
    assert not told.put(1, None, 1), "the last page is another's"
    assert not told.put(1, 98 * PAGE_SIZE, 5000)
    assert told.put(1, None, 0)


def test_who_only_overwrote_and_appends(told: Told) -> None:
    for _ in range(100):
        assert told.put(1, 0, 100)
    assert not told.put(1, None, 2 * PAGE_SIZE)
    assert told.put(1, None, PAGE_SIZE)
    assert not told.put(1, None, 1)
    told.arrive(1)
    assert told.lost == 0


def test_a_page_that_is_on_its_way_is_counted_once(told: Told) -> None:
    assert told.put(1, None, 10)
    assert told.put(1, None, PAGE_SIZE - 10), "where the file ends the kernel knows better"
    assert not told.put(1, None, 1)
    told.arrive(1)
    assert told.lost == 0


def test_who_does_not_wait_yet_is_looked_at_again(told: Told) -> None:
    told.running = 3
    assert not told.put(1, None, 2 * PAGE_SIZE)
    told.running = 3
    assert told.put(1, 0, 1)
    assert not told.running


def test_who_was_let_through_and_has_not_written_yet(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread is looked at until it has, so that the kernel writes that back, too."""
    slow, looks = 7, 0

    def look(pid: int) -> Any:
        nonlocal looks
        looks += pid == slow
        if looks == 4:
            told.unwritten[2] = [(0, 1)]
        return told.look(pid) if pid != slow or looks < 4 else None

    assert told.put(1, None, PAGE_SIZE)
    told.arrive(1)
    told.limits.max_pages = 105
    told.at, told.count = 0, 1
    monkeypatch.setattr(brake, "look", look)
    monkeypatch.setattr(brake, "run_time", lambda _: 0)
    monkeypatch.setattr(brake, "_LONGEST", 60 * 10**9)  # however long this process has to wait between the looks
    assert told.brake.ask(2, slow) is None
    assert not told.put(1, None, 5 * PAGE_SIZE)
    assert told.put(1, None, 4 * PAGE_SIZE)
    told.arrive(1)
    assert (told.lost, looks) == (0, 4)


@pytest.mark.parametrize(
    ("ran", "longest"),
    [([0, 0, brake._FLIGHT + 1], 60 * 10**9), ([0] * 3, -1), ([None] * 3, 60 * 10**9)],
    ids=["it has run", "long ago", "nobody knows whether it has run"],
)
def test_who_was_let_through_is_not_waited_for_without_end(
    told: Told, monkeypatch: pytest.MonkeyPatch, ran: list[int | None], longest: int
) -> None:
    """A thread that seems to run goes on with something else when it has run for long enough."""
    busy, times, looks = 7, iter(ran), 0

    def look(pid: int) -> Any:
        nonlocal looks
        looks += pid == busy
        if pid == busy and looks > 1:
            raise BlockingIOError
        return told.look(pid)

    assert told.put(1, None, PAGE_SIZE)
    told.arrive(1)
    told.limits.max_pages = 105
    told.at, told.count = 0, 1
    monkeypatch.setattr(brake, "look", look)
    monkeypatch.setattr(brake, "run_time", lambda _: next(times, ran[-1]))
    monkeypatch.setattr(brake, "_LONGEST", longest)
    assert told.brake.ask(2, busy) is None
    assert told.put(1, None, 4 * PAGE_SIZE)


def test_pages_that_are_taken_without_a_write(told: Told) -> None:
    """fallocate waits for what is on its way, and its pages are not taken for those."""

    def take() -> int:
        got = min(told.limits.max_pages - told.limits.pages, 5)
        told.limits.pages += got
        return got

    async def main() -> int:
        taken: Any = told.brake.taking(5, take)
        return taken if isinstance(taken, int) else await taken

    assert told.put(1, None, 1)
    assert trio.run(main) == 0, "the last page is the write's"
    told.limits.max_pages = 120
    assert told.put(2, 0, 10 * PAGE_SIZE)
    assert trio.run(main) == 5
    assert not told.put(2, 10 * PAGE_SIZE, 6 * PAGE_SIZE)
    assert told.put(2, 10 * PAGE_SIZE, 5 * PAGE_SIZE)
    told.arrive(2)
    assert told.lost == 0


def test_who_takes_pages_where_there_is_room_looks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until what has been taken since leaves less than twice what is short."""
    machine, looks = Machine(3 * SHORT), 0

    def room() -> int:
        nonlocal looks
        looks += 1
        return 1 << 40

    monkeypatch.setattr(machine, "room", room)
    monkeypatch.setattr(brake, "_LOOK", 1 << 62)
    assert [machine.brake.taking(SHORT // 4, lambda: looks) for _ in range(7)] == [1, 1, 1, 1, 1, 2, 2]
    assert [machine.brake.taking(0, lambda: looks) for _ in range(3)] == [2, 2, 2]


def test_a_file_of_small_writes_need_not_ask_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Told(SHORT // 2, monkeypatch)
    machine.file(1)
    for _ in range(65):
        assert machine.put(1, None, 100)
        with machine.brake.resting():
            rests = machine.good > 0
    assert rests
    assert machine.written_back == 1
