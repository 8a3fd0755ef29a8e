# SPDX-License-Identifier: GPL-2.0-or-later
"""Orders by extended attribute: what they say, and how much is done at once."""

import random

import pytest

from pkramfs.fuse import doors
from pkramfs.units import PAGE_SIZE


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"0:4096", (0, 4096)), (b"4k:1M", (4096, 1 << 20)), (b" 0x10:1\n", (16, 1)), (b"1G:8T", (1 << 30, 8 << 40))],
)
def test_ranges(text: bytes, expected: tuple[int, int]) -> None:
    assert doors.parse_range(text) == expected


@pytest.mark.parametrize("text", [b"", b"5", b":", b"1:", b":1", b"-1:5", b"1:2:3", b"a:b", b"\xff:1", b"1,2"])
def test_what_is_no_range(text: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        doors.parse_range(text)


def test_where_a_listing_begins() -> None:
    assert doors.parse_start(doors.EXTENTS) == 0
    assert doors.parse_start(doors.EXTENTS + b".8192") == 8192
    for name in (b".", b".-1", b"s", b".0x10"):
        with pytest.raises(OSError, match="No data"):
            doors.parse_start(doors.EXTENTS + name)


def test_a_listing_fits_an_attribute() -> None:
    many = [(number << 40, 4096) for number in range(10_000)]
    text = doors.listing(many)
    assert len(text) < 65536
    lines = [tuple(map(int, line.split(b":"))) for line in text.splitlines()]
    assert lines == many[: len(lines)] and len(lines) > 2000
    assert doors.listing([]) == b""


@pytest.mark.parametrize("seed", range(50))
def test_windows_cover_every_extent_once_and_are_small(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(doors, "WINDOW", rng.choice((1, 2, 7, 64)))
    at, extents, every = 0, [], set()
    for _ in range(rng.randrange(8)):
        at += rng.choice((1, 3, 1000)) if extents else rng.choice((0, 5))
        count = rng.randint(1, 100)
        extents.append((at * PAGE_SIZE, count * PAGE_SIZE - rng.choice((0, 0, 1, 4095))))
        every |= set(range(at, at + count))
        at += count
    found = list(doors.windows(extents))
    covered = [page for first, last in found for page in range(first, last) if page in every]
    assert covered == sorted(every)
    assert all(len(every & set(range(*window))) <= doors.WINDOW for window in found)
