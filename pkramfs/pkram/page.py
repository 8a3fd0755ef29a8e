# SPDX-License-Identifier: GPL-2.0-or-later
"""Metadata pages: sealing a page that is written, checking a page that is read.

Writers fill a page, set its checksum with `seal_page`, and make it reachable last. Readers use
`read_page`, which trusts nothing: the pfn must be memory, the magic and the checksum right. The words
that lead from page to page are written with `write_word` and read with `read_word`, check included.

PRAM, the ancestor of 2013, had checksums; PKRAM has none (defect D15).
"""

from typing import Any

import numpy as np
import xxhash

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import COVERED
from pkramfs.record import Record
from pkramfs.spans import U64
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE, Pfn

_PFN_BITS = 40
_PFN_MASK = (1 << _PFN_BITS) - 1
_PFN_FACTOR, _AT_FACTOR = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_WORD = (1 << 64) - 1


def seal(pfn: int, address: int) -> int:
    """Return the published word for `pfn` at physical `address`: pfn and 24 bits of check."""
    mixed = (pfn * _PFN_FACTOR + address * _AT_FACTOR) & _WORD
    return mixed >> _PFN_BITS << _PFN_BITS | pfn


def seal_array(pfns: U64, addresses: U64) -> U64:
    """Return the published words for arrays of pfns and addresses: `seal`, vectorised."""
    mixed: U64 = pfns * np.uint64(_PFN_FACTOR)
    mixed += addresses * np.uint64(_AT_FACTOR)
    mixed &= np.uint64(_WORD - _PFN_MASK)
    mixed |= pfns
    return mixed


def unseal(word: int, address: int, record: str, field: str) -> Pfn:
    """Return the pfn of a published word; FormatError if its check does not fit."""
    pfn = word & _PFN_MASK
    if seal(pfn, address) != word:
        raise FormatError(
            record, field, pfn=address >> PAGE_SHIFT, found=f"{word:#018x}", expected="a pfn with its check"
        )
    return Pfn(pfn)


def corrected(word: int, address: int) -> int | None:
    """Return the pfn of a published word in which one bit has flipped, None if it is damaged in another way."""
    near = [word ^ 1 << bit for bit in range(64)]
    found = [one & _PFN_MASK for one in near if seal(one & _PFN_MASK, address) == one]
    return found[0] if len(found) == 1 else None


def read_word(ram: Ram, page: int, offset: int, record: str, field: str) -> Pfn:
    """Return the pfn published at byte `offset` of a page."""
    address = (page << PAGE_SHIFT) + offset
    return unseal(ram.load(address), address, record, field)


def write_word(ram: Ram, page: int, offset: int, pfn: int) -> None:
    """Write the published word for `pfn` at byte `offset` of a page, by one store."""
    address = (page << PAGE_SHIFT) + offset
    ram.publish(address, seal(pfn, address))


def checksum(ram: Ram, pfn: int) -> int:
    """Return the checksum that a metadata page should carry."""
    start = pfn << PAGE_SHIFT
    return _digest(ram.bytes[start : start + PAGE_SIZE], pfn)


def _digest(page: Any, pfn: int) -> int:
    return xxhash.xxh3_64_intdigest(memoryview(page)[COVERED:], seed=pfn)


def seal_page(ram: Ram, pfn: int) -> None:
    """Set a page's checksum: its contents are final."""
    ram.u64[(pfn << PAGE_SHIFT >> 3) + 1] = checksum(ram, pfn)


def write_page(ram: Ram, pfn: int, record: Record, words: dict[int, int], **values: Any) -> None:
    """Write a whole metadata page: zeros, the record, published words {offset: pfn}, checksum."""
    page = ram.page(pfn)
    head = record.pack(**values)
    page[: len(head)] = head
    page[len(head) :] = bytes(PAGE_SIZE - len(head))
    for offset, target in words.items():
        write_word(ram, pfn, offset, target)
    seal_page(ram, pfn)


def check_pfn(ram: Ram, pfn: int, record: str, field: str, at: int | None = None) -> None:
    """Raise FormatError unless `pfn` can be a page of this RAM."""
    if not 0 < pfn < ram.pages:
        raise FormatError(record, field, pfn=at, found=f"pfn {pfn:x}", expected=f"1 to {ram.pages - 1:x}")


def read_page(ram: Ram, pfn: int, record: Record, magic: int) -> Any:
    """Check magic and checksum of a metadata page; return its record."""
    check_pfn(ram, pfn, record.name, "pfn")
    page = ram.peek(pfn)  # not through the mapping: a damaged pointer may lead to a page that the host never backed
    found = record.read(page)
    if found.magic != magic:
        raise FormatError(record.name, "magic", pfn=pfn, found=letters(found.magic), expected=letters(magic))
    expected = _digest(page, pfn)
    if found.checksum != expected:
        raise FormatError(record.name, "checksum", pfn=pfn, found=f"{found.checksum:016x}", expected=f"{expected:016x}")
    return found


def expect_unused(ram: Ram, pfn: int, record: str, offset: int, field: str) -> None:
    """Raise FormatError unless a published word that this record does not use is a sealed 0."""
    if target := read_word(ram, pfn, offset, record, field):
        raise FormatError(record, field, pfn=pfn, found=f"pfn {target:x}", expected="none")


def expect_flags(record: str, pfn: int, found: int, known: int = 0) -> None:
    """Raise FormatError if flags are set that this version does not know."""
    if found & ~known:
        raise FormatError(record, "flags", pfn=pfn, found=f"{found:#x}", expected=f"nothing but {known:#x}")


def letters(magic: int) -> str:
    """Return a magic as its eight letters, or as a number if it is none."""
    raw = magic.to_bytes(8, "little")
    return repr(raw.decode("ascii")) if raw.isalnum() else f"{magic:#018x}"
