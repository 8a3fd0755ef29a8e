# SPDX-License-Identifier: GPL-2.0-or-later
"""The beginning of an object's byte stream, read without the rest, to list nodes.

Object page and first link are checked, the bytes are not: their checksum is that of the whole stream.

Kernel: mm/pkram.c (pkram_read)
"""

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import ENTRY_PFN_SHIFT, LINK, LINK_MAGIC, OBJECT, OBJECT_MAGIC
from pkramfs.pkram.page import check_pfn, read_page


def first_page(ram: Ram, pfn: int) -> bytes:
    """Return the first page of an object's byte stream; raise FormatError if there is none, or the way is damaged."""
    record = read_page(ram, pfn, OBJECT, OBJECT_MAGIC)
    if not record.data_length:
        raise FormatError("Object", "data_length", pfn=pfn, found=0, expected="at least 1")
    read_page(ram, record.bytes_head, LINK, LINK_MAGIC)
    entry = int.from_bytes(ram.peek(record.bytes_head)[LINK.size : LINK.size + 8], "little")
    page = entry >> ENTRY_PFN_SHIFT
    check_pfn(ram, page, "Link", "entry")
    return ram.peek(page)
