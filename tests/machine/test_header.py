# SPDX-License-Identifier: GPL-2.0-or-later
"""The header in page 0: written to two places in turn, so that no write that was cut short loses it."""

from dataclasses import replace
from typing import Any

import pytest

from pkramfs.errors import FormatError, VersionError
from pkramfs.machine import header
from pkramfs.machine.header import HEADER, LIST_SIZE, SLOTS, Header, Mount
from pkramfs.machine.ram import Ram
from pkramfs.units import PAGE_SIZE

ONE = Mount("tree", "/mnt/a b", {"pkram": "tree", "size": "1G", "ro": True})
TWO = Mount("grün\udcff", "/mnt/\n\udcfe", {"pkram": "grün\udcff"})


@pytest.fixture
def there(ram: Ram) -> Header:
    """Write a header and return it as it is read."""
    return header.write(ram, header.new("default", ram.size, 7))


def test_memory_without_a_header_has_none(ram: Ram) -> None:
    assert header.read(ram) is None
    ram.words(0)[:] = 0x5A5A
    assert header.read(ram) is None


def test_a_header_comes_back_as_it_was_written(ram: Ram, there: Header) -> None:
    now = replace(there, generation=3, super_pfn=0x34F, boot_id="0123456789abcdef" * 2, name="grün\udcff")
    written = header.write(ram, now)
    assert header.read(ram) == written == replace(now, sequence=there.sequence + 1)
    assert written.uuid == there.uuid and written.slot != there.slot


def test_two_slots_take_turns(ram: Ram, there: Header) -> None:
    slots, found = [], there
    for generation in range(5):
        found = header.write(ram, replace(found, generation=generation))
        slots.append(found.slot)
        assert header.read(ram) == found
    assert slots == [1, 0, 1, 0, 1] and there.slot == 0


def test_a_write_that_was_torn_anywhere_leaves_the_header_before_it(ram: Ram, there: Header) -> None:
    before = header.write(ram, replace(there, generation=1, super_pfn=0x100))
    page = bytes(ram.page(0))
    after = header.write(ram, replace(before, generation=2, super_pfn=0x200))
    data, at = header.encoded(after), SLOTS[after.slot]
    whole = page[:at] + data + page[at + HEADER.size :]
    assert header.parse(whole) == after
    differing = [i for i in range(HEADER.size) if page[at + i] != data[i]]
    for torn in range(HEADER.size):  # the first bytes are new, the others are those of the header before the last
        half = page[:at] + data[:torn] + page[at + torn : at + HEADER.size] + page[at + HEADER.size :]
        assert header.parse(half) == (after if torn > differing[-1] else before)
        turned = page[: at + torn] + data[torn:] + page[at + HEADER.size :]
        assert header.parse(turned) == (after if torn <= differing[0] else before)


def test_any_flipped_bit_leaves_the_header_before_it(ram: Ram, there: Header) -> None:
    now = header.write(ram, replace(there, generation=1))
    page = bytearray(ram.page(0))
    for byte in range(HEADER.size):
        page[SLOTS[now.slot] + byte] ^= 1 << byte % 8
        assert header.parse(bytes(page)) == there
        page[SLOTS[now.slot] + byte] ^= 1 << byte % 8


def test_either_of_two_that_say_the_same_is_enough(ram: Ram, there: Header) -> None:
    now = replace(there, generation=2, super_pfn=0x34F)
    assert header.is_alone(ram, there)
    written = header.write_both(ram, now)
    assert not header.is_alone(ram, written) and header.read(ram) == written
    listed = header.write(ram, replace(written, mounts=(ONE,)))
    assert not header.is_alone(ram, listed)  # the list is not worth a second write
    for at in SLOTS:
        page = bytearray(ram.page(0))
        page[at + 70] ^= 1
        found = header.parse(bytes(page))
        assert found is not None and (found.generation, found.super_pfn) == (2, 0x34F)


def test_a_slot_is_not_taken_for_the_other(ram: Ram, there: Header) -> None:
    ram.bytes[SLOTS[1] : SLOTS[1] + HEADER.size] = bytes(ram.bytes[SLOTS[0] : SLOTS[0] + HEADER.size])
    ram.bytes[SLOTS[0] : SLOTS[0] + HEADER.size] = bytes(HEADER.size)
    assert header.read(ram) is None


@pytest.mark.parametrize(("name", "value"), [("version", 2), ("features", 1)])
def test_a_later_version_is_not_guessed_at(ram: Ram, there: Header, name: str, value: Any) -> None:
    data = bytearray(header.encoded(there))
    data[HEADER.offset(name)] = value
    data[8:16] = header._checksum(bytes(data), 0).to_bytes(8, "little")
    with pytest.raises(VersionError, match=f"{name} is {value}"):
        header.parse(bytes(data) + bytes(PAGE_SIZE - len(data)))


def test_memory_that_was_cut_is_named(ram: Ram, there: Header) -> None:
    header.write(ram, replace(there, size=ram.size * 2))
    with pytest.raises(FormatError, match="size is 256 MiB, expected at most the 128 MiB of memory"):
        header.read(ram)


def test_a_wiped_header_is_gone(ram: Ram, there: Header) -> None:
    header.wipe(ram)
    assert header.read(ram) is None and not ram.words(0).any()


def test_a_list_of_mounts_comes_back(ram: Ram, there: Header) -> None:
    now = header.write(ram, replace(there, mounts=(ONE, TWO)))
    assert header.read(ram) == now and now.mounts == (ONE, TWO)
    assert header.write(ram, replace(now, generation=4)).mounts == (ONE, TWO)
    assert there.mounts == ()  # and a header without it, as all were before there was a list, reads as before


def test_a_header_with_a_list_that_was_torn_anywhere_leaves_the_one_before(ram: Ram, there: Header) -> None:
    before = header.write(ram, replace(there, mounts=(ONE,)))
    page = bytes(ram.page(0))
    after = header.write(ram, replace(before, generation=2, mounts=(ONE, TWO)))
    whole, at = bytes(ram.page(0)), SLOTS[after.slot]
    end = at + PAGE_SIZE // 2
    # in the order in which it is written: the list, what the checksum covers, the checksum with the magic number
    order = [*range(at + HEADER.size, end), *range(at + 16, at + HEADER.size), *range(at, at + 16)]
    differing = [number for number, place in enumerate(order) if page[place] != whole[place]]
    half = bytearray(page)
    for number, place in enumerate(order):
        assert header.parse(bytes(half)) == (after if number > differing[-1] else before)
        half[place] = whole[place]
    assert header.parse(bytes(half)) == after


def test_a_damaged_list_does_not_cost_the_header(ram: Ram, there: Header) -> None:
    now = header.write(ram, replace(there, generation=3, mounts=(ONE,)))
    at = SLOTS[now.slot] + HEADER.size
    for place in range(at, at + len(header._packed(now.mounts))):
        ram.bytes[place] ^= 4
        assert header.read(ram) == replace(now, mounts=())
        ram.bytes[place] ^= 4
    assert header.read(ram) == now


def test_no_more_mounts_than_there_is_room_for(ram: Ram, there: Header) -> None:
    many = [Mount(f"tree{number}", f"/mnt/{number}", {"pkram": f"tree{number}"}) for number in range(99)]
    some = header.fitting(many)
    assert 20 < len(some) < 60 and list(some) == many[: len(some)]
    assert header.write(ram, replace(there, mounts=some)).mounts == some
    assert header.fitting([Mount("x", "/" * LIST_SIZE, {})]) == ()
    assert header.read(ram) is not None
