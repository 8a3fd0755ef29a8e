# SPDX-License-Identifier: GPL-2.0-or-later
"""The super block: the one page whose pfn a kernel tells the next (`pkram=`).

A kernel makes its own super block at boot and keeps its node list there, so nothing has to be linked
at the last moment. Kexec adds the region list. The next kernel reads both, takes the nodes over into a
super block of its own, and only then *consumes* the old one: it replaces the magic, so that a later
boot with the same number restores nothing old (D31).

Kernel: mm/pkram.c (struct pkram_super_block, pkram_reserve), patches 8 and 14
"""

from dataclasses import dataclass

from pkramfs.errors import FormatError, StaleError, VersionError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import (
    CONSUMED_MAGIC,
    FEATURES,
    FORMAT_VERSION,
    NEXT,
    OTHER,
    SUPER,
    SUPER_MAGIC,
)
from pkramfs.pkram.page import letters, read_page, read_word, seal, write_page, write_word
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT, Pfn


@dataclass(frozen=True)
class Super:
    """A checked super block."""

    pfn: int
    generation: int
    node_pfn: Pfn
    region_pfn: Pfn


def create(ram: Ram, pfn: int, generation: int, node_pfn: int = 0) -> None:
    """Write a super block to page `pfn`, naming the first node (0: none)."""
    ram.back_run(pfn, 1)
    write_page(
        ram,
        pfn,
        SUPER,
        {NEXT: node_pfn, OTHER: 0},
        magic=SUPER_MAGIC,
        generation=generation,
        version=FORMAT_VERSION,
        features=FEATURES,
    )


def check(ram: Ram, pfn: int, usable: Spans | None = None) -> Super:
    """Read a super block, trusting nothing.

    StaleError if a later kernel consumed it, VersionError for another format, FormatError for
    anything else that is wrong. `usable` are the pages that are memory.
    """
    if pfn <= 0 or pfn >= ram.pages or (usable is not None and pfn not in usable):
        raise FormatError("Super", "pfn", found=f"{pfn:x}", expected="a page of usable memory")
    magic = int.from_bytes(ram.peek(pfn)[:8], "little")
    if magic == CONSUMED_MAGIC:
        raise StaleError("Super", "magic", pfn=pfn, found="consumed by a later kernel", expected="a live super block")
    found = read_page(ram, pfn, SUPER, SUPER_MAGIC)
    if found.version != FORMAT_VERSION:
        raise VersionError("Super", "version", pfn=pfn, found=found.version, expected=FORMAT_VERSION)
    if found.features & ~FEATURES:
        raise VersionError("Super", "features", pfn=pfn, found=f"{found.features:#x}", expected=f"{FEATURES:#x}")
    return Super(
        pfn,
        found.generation,
        read_word(ram, pfn, NEXT, "Super", "node"),
        read_word(ram, pfn, OTHER, "Super", "regions"),
    )


def damage(ram: Ram, pfn: int) -> FormatError | None:
    """Check a super block; return the error, None if it is sound."""
    try:
        check(ram, pfn)
    except FormatError as error:
        return error
    return None


def set_regions(ram: Ram, pfn: int, head: int) -> None:
    """Name the first page of the region list (0: none)."""
    write_word(ram, pfn, OTHER, head)


def has_regions(ram: Ram, pfn: int) -> bool:
    """Return True if a live super block names a region list, or its word for one is damaged."""
    at = pfn << PAGE_SHIFT
    return int.from_bytes(ram.peek(pfn)[:8], "little") == SUPER_MAGIC and ram.load(at + OTHER) != seal(0, at + OTHER)


def consume(ram: Ram, pfn: int) -> None:
    """Make the super block stale by one store. A page that is consumed already, or freed, is left alone."""
    found = int.from_bytes(ram.peek(pfn)[:8], "little")
    if found not in (SUPER_MAGIC, CONSUMED_MAGIC, 0):
        raise FormatError("Super", "magic", pfn=pfn, found=letters(found), expected="a super block to be consumed")
    if found == SUPER_MAGIC:
        ram.publish(pfn << PAGE_SHIFT, CONSUMED_MAGIC)
