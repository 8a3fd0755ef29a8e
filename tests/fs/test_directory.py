# SPDX-License-Identifier: GPL-2.0-or-later
"""Listings that neither skip nor repeat while entries come and go."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkramfs.fs.directory import LAST, Directory
from pkramfs.fs.inode import Inode

NAMES = [b"%d" % n for n in range(40)]


def inode(number: int) -> Inode:
    return Inode(number, 0o100644, 0, 0, 0, 0, 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "remove", "rename", "replace", "read"]), st.integers(0, 39), st.integers(0, 39)
        )
    ),
    st.integers(1, 7),
)
@settings(max_examples=300, deadline=None)
def test_what_is_there_all_the_time_is_listed_exactly_once(steps, bite) -> None:
    directory = Directory(inode(1))
    for number in range(0, 40, 2):
        directory.add(NAMES[number], inode(number))
    untouched = set(directory.entries)
    seen: list[bytes] = []
    place = 0
    for action, one, two in steps:
        a, b = NAMES[one], NAMES[two]
        if action == "add" and a not in directory.entries:
            directory.add(a, inode(one))
        elif action == "remove" and a in directory.entries:
            directory.remove(a)
            untouched.discard(a)
        elif action == "rename" and a in directory.entries and b not in directory.entries:
            old = directory.entries[a][0]
            directory.remove(a)
            directory.add(b, old)
            untouched -= {a, b}
        elif action == "replace" and a in directory.entries:
            directory.remove(a)
            directory.add(a, inode(99))
            untouched.discard(a)
        elif action == "read":
            batch = list(islice(directory.after(place), bite))
            seen += [name for name, _, _ in batch]
            place = batch[-1][2] if batch else place
    seen += [name for name, _, _ in directory.after(place)]
    assert all(seen.count(name) == 1 for name in untouched)
    assert {name for name, _, _ in directory.after(0)} == set(directory.entries)
    names, inodes, cookies = directory.columns()
    listed = [(name, one) for name, one, _ in directory.after(0)]
    assert list(zip(names, inodes, strict=True))[::-1] == listed
    assert list(cookies) == sorted(cookies)
    places = [place for _, _, place in directory.after(0)]
    assert places == sorted(set(places)) and places[-1:] in ([], [LAST])
    for number, place in enumerate(places, 1):
        assert [name for name, _, _ in directory.after(place)] == [name for name, _ in listed[number:]]


def test_creating_or_renaming_what_one_lists_comes_to_an_end() -> None:
    directory = Directory(inode(1))
    for number in range(1000):
        directory.add(b"%d" % number, inode(number))
    count = 0
    for name, _, _ in directory.after(0):
        directory.remove(name)
        directory.add(b"renamed" + name, inode(4))
        directory.add(b"created" + name, inode(5))
        count += 1
    assert count == 1000


def test_removing_while_listing_sees_every_entry() -> None:
    directory = Directory(inode(1))
    for number in range(5000):
        directory.add(b"%d" % number, inode(number))
    for name, _, _ in directory.after(0):
        directory.remove(name)
    assert not directory.entries
    assert len(directory._names) < 64, "dead entries are squeezed out"


def test_the_end_is_the_last_place_and_nothing_before_it_is() -> None:
    """Places that nobody was told, between two entries, go on with the next entry (LAST: see 32 bits)."""
    directory = Directory(inode(1))
    assert list(directory.after(0)) == []
    for number in range(20):
        directory.add(NAMES[number], inode(number))
    places = [place for _, _, place in directory.after(0)]
    assert places[-1] == LAST == max(places) == 0x7FFFFFFF
    assert all(list(directory.after(place)) for place in [0, 1, 3, LAST // 2, *range(places[0] - 9, places[-2] + 1)])
    for place in (LAST, LAST + 1, 1 << 62):
        assert list(directory.after(place)) == []
    directory.remove(NAMES[0])
    assert [place for _, _, place in directory.after(0)][-1] == LAST
    assert list(directory.after(places[-2])) == [], "what a listing had still to show is gone"


def test_numbers_begin_again_before_they_outgrow_31_bits() -> None:
    directory = Directory(inode(1))
    for number in range(5):
        directory.add(NAMES[number], inode(number))
    directory.remove(NAMES[2])
    directory.next_cookie = LAST - 5
    for number in range(5, 12):
        directory.add(NAMES[number], inode(number))
    listed = list(directory.after(0))
    assert [name for name, _, _ in listed] == [NAMES[n] for n in (11, 10, 9, 8, 7, 6, 5, 4, 3, 1, 0)]
    assert all(2 < place <= LAST for _, _, place in listed)
    directory.remove(NAMES[7])
    assert next(directory.after(listed[3][2]))[0] == NAMES[6]
    other = Directory(inode(1))
    other.fill(NAMES[:3], [inode(n) for n in range(3)], [3, LAST, 1 << 61])
    assert [place for _, _, place in other.after(0)] == [LAST - 4, LAST - 3, LAST]


def test_a_cookie_is_a_place_for_good() -> None:
    directory = Directory(inode(1))
    for number in range(100):
        directory.add(b"%d" % number, inode(number))
    place = [cookie for _, _, cookie in directory.after(0)][49]
    for number in range(10, 100):
        if number != 40:
            directory.remove(b"%d" % number)
    assert next(directory.after(place))[0] == b"40"


def test_a_million_entries(request: pytest.FixtureRequest) -> None:
    """A million with --long, a quarter of it else."""
    directory = Directory(inode(1))
    one = inode(2)
    total = 1_000_000 if request.config.getoption("--long") else 250_000
    names = [b"%d" % number for number in range(total)]
    directory.fill(names, [one] * total, list(range(3, total + 3)))
    half = total // 2
    assert next(directory.after(LAST + 1 - half))[2] == LAST + 2 - half
    for name in names[half - 10 :]:
        directory.remove(name)
    assert next(directory.after(0))[0] == names[half - 11]
