# SPDX-License-Identifier: GPL-2.0-or-later
"""Directory reading: order, while entries come and go, places to come back to, many entries."""

import itertools
import os
from typing import Any

import pytest

from tests.conformance.kinds import make, write
from tests.conformance.system import EXCHANGE, DirStream, getdents, renameat2

pytestmark = pytest.mark.mount


def scan(path: str) -> list[tuple[str, bool, bool]]:
    return [(entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in os.scandir(path)]


def rest(stream: DirStream) -> list[bytes]:
    return stream.rest()


@pytest.mark.parametrize("count", [0, 1, 3, 100, 1000])
def test_order(both: Any, count: int) -> None:
    def case(t: Any) -> None:
        os.mkdir("d")
        for number in range(count):
            write(f"d/{number * 7919 % 10007}")
        t(os.listdir, "d")
        t(scan, "d")
        t(os.stat, "d")

    both(case)


def test_types(both: Any) -> None:
    def case(t: Any) -> None:
        for kind in ("file", "dir", "link", "fifo", "socket"):
            make(kind, kind)
        t(scan, ".")

    both(case)


def test_ten_thousand(both: Any) -> None:
    def case(t: Any) -> None:
        os.mkdir("d")
        for number in range(10_000):
            os.close(os.open(f"d/entry{number}", os.O_CREAT | os.O_WRONLY))
        t(os.listdir, "d")
        for number in range(10_000):
            if number % 10:
                os.unlink(f"d/entry{number}")
        t(os.listdir, "d")
        t(os.stat, "d")
        t(os.rmdir, "d")

    both(case)


@pytest.mark.few(1, each="change")
@pytest.mark.parametrize("count", [10, 300, 1000])
@pytest.mark.parametrize("change", ["unlink", "create", "rename", "replace", "exchange", "unlinkall", "recreate"])
def test_changes_while_reading(both: Any, change: str, count: int) -> None:
    """What was there all the time is seen exactly once, and nothing is seen twice."""

    def case(t: Any) -> None:
        os.mkdir("d")
        for number in range(count):
            write(f"d/{number:05}")
        stream = DirStream("d")
        seen = [stream.read() for _ in range(5)]
        stable = _change(change, count)
        seen += stream.rest()
        t.note("stable seen once:", all(seen.count(name) == 1 for name in stable[:100]))
        t.note("repeated:", len(seen) - len(set(seen)))
        stream.rewind()
        t(rest, stream)
        t(os.listdir, "d")
        stream.close()

    both(case)


def _change(change: str, count: int) -> list[bytes]:
    """Do it, and return the names that were there before and after."""
    numbers = [b"%05d" % number for number in range(count)]
    odd, even = numbers[1::2], numbers[::2]
    match change:
        case "unlink":
            for name in odd:
                os.unlink(b"d/" + name)
        case "unlinkall":
            for name in numbers:
                os.unlink(b"d/" + name)
            return []
        case "create":
            for name in numbers:
                write(b"d/new" + name)
            return numbers
        case "rename":
            for name in odd[:50]:
                os.rename(b"d/" + name, b"d/moved" + name)
        case "replace":
            for name in odd[:50]:
                write(b"x")
                os.rename(b"x", b"d/" + name)
        case "exchange":
            for a, b in zip(odd[:20], odd[20:40], strict=False):
                renameat2(b"d/" + a, b"d/" + b, EXCHANGE)
        case "recreate":
            for name in odd[:100]:
                os.unlink(b"d/" + name)
                write(b"d/" + name)
    return even


@pytest.mark.parametrize("count", [1, 50, 1000])
def test_places(both: Any, count: int) -> None:
    def case(t: Any) -> None:
        os.mkdir("d")
        for number in range(count):
            write(f"d/{number}")
        stream = DirStream("d")
        places = [(stream.tell(), name) for name in iter(stream.read, None)]  # the place after the name
        good = True
        for (place, _), (_, following) in zip(places[-2::-1], places[:0:-1], strict=True):
            stream.seek(place)
            good &= stream.read() == following
        t.note("every place leads to its name:", good, len(places))
        stream.seek(places[len(places) // 2][0])
        t(rest, stream)
        stream.rewind()
        t(rest, stream)
        os.unlink("d/0")
        stream.seek(places[max(len(places) - 3, 0)][0])
        t(rest, stream)
        stream.close()

    both(case)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="a system call by its number")
@pytest.mark.parametrize("count", [0, 1, 2, 20, 300])
@pytest.mark.parametrize("change", ["none", "first", "last", "all"])
def test_the_end_is_the_largest_place(both: Any, change: str, count: int) -> None:
    """Every place that is less than the last is not the end; at the last and behind it nothing is read.

    Which numbers the places between have is a file system's own business, as long as 31 bits hold them.
    """

    def all_of(fd: int) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        while more := getdents(fd, 4096):
            found += more
        return found

    def case(t: Any) -> None:
        os.mkdir("d")
        for number in range(count):
            write(f"d/{number:04}")
        gone = {"none": [], "all": range(count), "first": [0] * (count > 0), "last": [count - 1] * (count > 0)}
        for number in gone[change]:
            os.unlink(f"d/{number:04}")
        fd = os.open("d", os.O_RDONLY)
        rows = all_of(fd)
        places = [place for place, _ in rows]
        t.note([name for _, name in rows], hex(places[-1]), places[-1] == max(places), min(places) > 0)
        for place in (places[-1], 0x7FFFFFFF):
            os.lseek(fd, place, os.SEEK_SET)
            t.note(hex(place), getdents(fd))
        for number, (place, _) in [*enumerate(rows)][:: len(rows) // 20 + 1]:
            os.lseek(fd, place, os.SEEK_SET)
            t.note(all_of(fd) == rows[number + 1 :])
        between = [(one + two) // 2 for one, two in itertools.pairwise(places[:-1])]
        between += [place + 1 for place in places[1:-2]]
        ends = 0
        for place in between:
            os.lseek(fd, place, os.SEEK_SET)
            ends += not getdents(fd, 100)
        t.note("between two entries:", len(between), "ends:", ends)

    both(case)


def test_two_readers(both: Any) -> None:
    def case(t: Any) -> None:
        for number in range(500):
            write(f"{number}")
        one, two = DirStream("."), DirStream(".")
        first = [one.read() for _ in range(100)]
        t(rest, two)
        t.note(len({*first, *one.rest()}))
        one.close()
        two.close()

    both(case)


def test_copying_into_the_directory_that_is_read_ends(both: Any) -> None:
    def case(t: Any) -> None:
        for number in range(300):
            write(f"{number}")
        count = 0
        for entry in os.scandir("."):
            write(f"copy-{entry.name}")
            count += 1
        t.note(count)
        t(os.listdir, ".")

    both(case)


def test_removing_what_is_read(both: Any) -> None:
    def case(t: Any) -> None:
        os.mkdir("d")
        for number in range(2000):
            write(f"d/{number}")
        with os.scandir("d") as entries:
            for entry in entries:
                os.unlink(entry)
        t(os.rmdir, "d")

    both(case)
