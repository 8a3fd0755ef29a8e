# SPDX-License-Identifier: GPL-2.0-or-later
"""The units of every chapter: pages, page frame numbers, orders, blocks and sizes.

A page is 4 KiB and a page frame number (pfn) is a physical address divided by it. A frame of
order k is 2**k pages, naturally aligned. A page block, the unit in which memory is leased, is one
order-9 frame (2 MiB). Sizes are written as people write them: `2G`, `64M`, `4096`.

Kernel: include/asm/page_types.h, lib/cmdline.c (memparse), include/linux/mmzone.h (pageblock)
"""

import re
from typing import NewType

Pfn = NewType("Pfn", int)
Ino = NewType("Ino", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
MAX_ORDER = 18
"""Largest order of one frame: 2**18 pages, 1 GiB."""

BLOCK_ORDER = 9
BLOCK_PAGES = 1 << BLOCK_ORDER
BLOCK_SIZE = PAGE_SIZE << BLOCK_ORDER

KIB, MIB, GIB, TIB = (1 << 10, 1 << 20, 1 << 30, 1 << 40)

_SUFFIXES = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": 1 << 50, "e": 1 << 60}
_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)\s*([kmgtpe]?)(?:i?b)?", re.IGNORECASE)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def pages(size: int) -> int:
    """Return the number of pages that hold `size` bytes."""
    return -(-size >> PAGE_SHIFT) if size < 0 else (size + PAGE_SIZE - 1) >> PAGE_SHIFT


def round_up(value: int, step: int) -> int:
    """Return the first multiple of `step` at or above `value`."""
    return -(-value // step) * step


def round_down(value: int, step: int) -> int:
    """Return the last multiple of `step` at or below `value`."""
    return value // step * step


def parse_size(text: str) -> int:
    """Parse a size, `2G`, `64MiB`, `0x1000` or `4096`, into bytes; ValueError for anything else.

    Kernel: memparse()
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r} (write a number with k, M, G or T)")
    return int(match[1], 0 if match[1].lower().startswith("0x") else 10) * _SUFFIXES[match[2].lower()]


def format_size(size: int) -> str:
    """Format a size for people: `2.0 GiB`, `640 KiB`, `17 B`."""
    value, unit = float(size), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1
    return f"{value:.{digits}f} {_UNITS[unit]}"


def format_pfn(pfn: int) -> str:
    """Format a pfn as the kernel exports it: hexadecimal without a prefix."""
    return f"{pfn:x}"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return `1 node`, `2 nodes`, `3 entries` (give the plural where it is not noun + s)."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
