# SPDX-License-Identifier: GPL-2.0-or-later
"""The header in page 0: written to two places in turn, so that no write that was cut short loses it."""

from dataclasses import replace
from typing import Any

import pytest

from pkramfs.errors import FormatError, VersionError
from pkramfs.machine import header
from pkramfs.machine.header import HEADER, SLOTS, Header
from pkramfs.machine.ram import Ram
from pkramfs.units import PAGE_SIZE


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
