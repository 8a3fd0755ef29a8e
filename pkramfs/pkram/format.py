# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract, first half: every record of PKRAM that crosses a kexec. Printed as pkramfs-format(5).

    super block ──► node ──► node ──► …                    by published words
                     │  └──► page table                    which frames are the node's
                     └─────► object ──► object             in save order
                               ├──► link ──► link          page stream: frames of contents
                               └──► link ──► link          byte stream: frames of bytes
    super block ──► regions ──► regions                    all preserved ranges, for early boot

Two modules declare all that crosses a kexec in RAM: this one the records of a node, `treeformat` the byte stream
of a file tree's node. Nothing here knows of files, and nothing there of frames: other users of the library save
byte streams of their own.

A change of any record here needs a new FORMAT_VERSION (readers of every older version stay, and a RAM
image of each is kept in the tests); an addition that old readers may ignore needs a feature bit.
Everything is little-endian and of fixed width; a pointer is a pfn, 0 is none; all other bytes are zero.

Every metadata page but those of the page table begins with the same 40 bytes (PAGE). The checksum
is XXH3-64 over bytes 32 to 4095 with the page's own pfn as seed, so a page that was copied
elsewhere does not pass. The two words at 16 and 24 stand outside of it, because they change by one
8-byte store while the page lives: they are *published words*, with the pfn in the low 40 bits and above
it 24 bits of check over the pfn and the word's own address (`page.seal`). A zeroed word is damage, not
the end of a list. Page table pages are 512 plain entries; one checksum in the node covers them all.

Entries of link pages are PKRAM's own: order in bits 0-4, flags in 5-11, frame above. PKRAM saves one
entry for each page; pkramfs uses the same encoding for the largest naturally aligned blocks of a physical run.

Kernel: mm/pkram.c (struct pkram_super_block, pkram_node, pkram_obj, pkram_link, pkram_region)
"""

from pkramfs.record import F, Record
from pkramfs.units import PAGE_SIZE

FORMAT_VERSION = 1
FEATURES = 0
"""Feature bits this version may find set; a super block with others is refused."""

NAME_MAX = 255
"""Bytes of a node's name."""


def _magic(text: bytes) -> int:
    return int.from_bytes(text, "little")


SUPER_MAGIC = _magic(b"PKRAMsb1")
CONSUMED_MAGIC = _magic(b"PKRAMgon")
NODE_MAGIC = _magic(b"PKRAMnd1")
WITHDRAWN_MAGIC = _magic(b"PKRAMnd0")
"""Magic of a node that was withdrawn from the list: a search for lost nodes passes over it."""
OBJECT_MAGIC = _magic(b"PKRAMob1")
LINK_MAGIC = _magic(b"PKRAMln1")
REGIONS_MAGIC = _magic(b"PKRAMrl1")

NEXT, OTHER = 16, 24
"""Byte offsets of the two published words of a page."""
COVERED = 32
"""First byte that the checksum covers."""

_PAGE = [
    F("magic", "u8", 0, "which record this page holds, eight ASCII letters"),
    F("checksum", "u8", 8, "XXH3-64 of bytes 32-4095, seeded with the page's pfn"),
]


def _page(name: str, size: int, meaning: str, fields: list[F]) -> Record:
    return Record(name, size, meaning, _PAGE + fields)


SUPER = _page(
    "Super",
    48,
    "The super block: the one page whose pfn the next kernel is told (pkram=).",
    [
        F("node", "u8", NEXT, "published: first node"),
        F("regions", "u8", OTHER, "published: first page of the region list, set at kexec"),
        F("generation", "u8", 32, "boot count of the kernel that made it"),
        F("version", "u4", 40, "FORMAT_VERSION"),
        F("features", "u4", 44, "feature bits; unknown ones are refused"),
    ],
)
NODE = _page(
    "Node",
    376,
    "A named node: one saved tree, or whatever a user of the library saves.",
    [
        F("next", "u8", NEXT, "published: next node"),
        F("other", "u8", OTHER, "sealed: 0, unused"),
        F("generation", "u8", 32, "boot count of the kernel that saved it"),
        F("tree_id", "u8", 40, "owner of the page blocks that hold the node's frames"),
        F("object", "u8", 48, "pfn of the first object, 0 if none"),
        F("table", "u8", 56, "pfn of the page table's root"),
        F("table_checksum", "u8", 64, "XXH3-64 of all page table pages in walking order"),
        F("pages", "u8", 72, "frames preserved by the node, its own metadata included"),
        F("created", "i8", 80, "time of saving, ns since the epoch"),
        F("objects", "u4", 88, "number of objects"),
        F("name_length", "u4", 92, "bytes of the name, 1 to 255"),
        F("flags", "u8", 96, "bit 0: saved as PKRAM does (strict); bit 1: a log holds it, and no objects"),
        F("name", "256s", 104, "the name, zero-padded; bytes, not text"),
        F("moved", "u8", 360, "frames that hold copies of pages that lay in banned memory"),
        F("log", "u8", 368, "pfn of the page that seals the log, 0 without bit 1"),
    ],
)
OBJECT = _page(
    "Object",
    128,
    "One object: a byte stream and a page stream.",
    [
        F("next", "u8", NEXT, "sealed: 0, unused: objects do not change"),
        F("other", "u8", OTHER, "sealed: 0, unused"),
        F("generation", "u8", 32, "as the node's"),
        F("object", "u8", 40, "pfn of the next object in save order, 0 at the end"),
        F("pages_head", "u8", 48, "pfn of the first link of the page stream, 0 if it is empty"),
        F("pages_tail", "u8", 56, "pfn of the last link of the page stream"),
        F("bytes_head", "u8", 64, "pfn of the first link of the byte stream, 0 if it is empty"),
        F("bytes_tail", "u8", 72, "pfn of the last link of the byte stream"),
        F("data_length", "u8", 80, "bytes in the byte stream"),
        F("data_checksum", "u8", 88, "XXH3-64 of the byte stream"),
        F("page_count", "u8", 96, "frames in the page stream"),
        F("page_links", "u8", 104, "links of the page stream"),
        F("byte_links", "u8", 112, "links of the byte stream"),
        F("flags", "u8", 120, "0"),
    ],
)
LINK = _page(
    "Link",
    64,
    "A link page: this header and 504 entries of one index-contiguous run.",
    [
        F("next", "u8", NEXT, "sealed: next link of the stream"),
        F("other", "u8", OTHER, "sealed: 0, unused"),
        F("generation", "u8", 32, "as the node's"),
        F("index", "u8", 40, "index of the first entry's first page in the stream"),
        F("count", "u4", 48, "entries in use, 1 to 504"),
        F("flags", "u4", 52, "0"),
        F("zero", "u8", 56, "0"),
    ],
)
LINK_CAPACITY = (PAGE_SIZE - LINK.size) // 8
ENTRY_ORDER_MASK = 0x1F
ENTRY_FLAGS_SHIFT, ENTRY_FLAGS_MASK = 5, 0x7F
ENTRY_PFN_SHIFT = 12
ENTRY_HUGE = 0x1
"""Entry flag: the frames are one transparent huge page."""

REGIONS = _page(
    "Regions",
    64,
    "A page of the region list: this header and 252 regions, ascending, apart from one another.",
    [
        F("next", "u8", NEXT, "sealed: next page"),
        F("previous", "u8", OTHER, "sealed: previous page; the first page's names the last"),
        F("generation", "u8", 32, "boot count of the kernel that wrote the list"),
        F("count", "u4", 40, "regions in this page"),
        F("flags", "u4", 44, "0"),
        F("regions", "u8", 48, "regions in the whole list"),
        F("pages", "u8", 56, "frames in the whole list"),
    ],
)
REGION = Record(
    "Region",
    16,
    "One preserved range.",
    [F("base", "u8", 0, "physical byte address"), F("size", "u8", 8, "bytes")],
)
REGIONS_CAPACITY = (PAGE_SIZE - REGIONS.size) // REGION.size

TABLE_FULL = 1 << 7
"""Page table entry: every page below is preserved; there is no child."""
TABLE_SLOT_MASK = 0x3F
"""Page table entry of the lowest level: which 64-byte bitmap of the page in bits 12-63."""

assert SUPER.size <= PAGE_SIZE and NODE.size <= PAGE_SIZE and OBJECT.size <= PAGE_SIZE
assert LINK.size + LINK_CAPACITY * 8 == PAGE_SIZE and LINK_CAPACITY == 504
assert REGIONS.size + REGIONS_CAPACITY * REGION.size == PAGE_SIZE and REGIONS_CAPACITY == 252

RECORDS = (SUPER, NODE, OBJECT, LINK, REGIONS, REGION)
