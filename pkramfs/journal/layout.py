# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages of a log: live page, base page, seal page, segments, chunks.

They outlive a daemon, and the next daemon may run a later version of this program: hence a version, which readers
check. All but the live page cross a kexec, too, if a node names the log as its tree.

    version 1   chunks of kind 0x4a43, records up to DAMAGED
    version 2   chunks of kind 0x4a44 behind them, and records that describe a whole request

A daemon that continues a log of version 1 turns it into version 2 (`renew`), which older programs refuse. So an upgrade
from version 1 to 2 has no way back (daemon/trial). A later version should write what its predecessor can read.

    live page   bytes 16 to 55 are published words, which change; the checksum covers bytes 128 to 4095
    base page   never changes: the beginning of the log
    seal page   never changes: beginning and end of the log when the tree was preserved
    segment     64 bytes of header, then chunks; `next` is published when the next segment is ready
    chunk       32 bytes of header, then records (fs/records)

A published position has 16 bits of check above it, over itself and its own address.

Kernel: include/linux/jbd2.h (journal_superblock_t, journal_header_t)
"""

import struct
from typing import NamedTuple

import xxhash

from pkramfs.errors import FormatError, VersionError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.page import check_pfn, letters, read_page, read_word, write_page, write_word
from pkramfs.record import F, Record
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

VERSION, OLDEST = 2, 1
NAME_MAX = 255

LIVE_MAGIC = int.from_bytes(b"PKRAMlv1", "little")
BASE_MAGIC = int.from_bytes(b"PKRAMbs1", "little")
SEGMENT_MAGIC = int.from_bytes(b"PKRAMsg1", "little")
SEAL_MAGIC = int.from_bytes(b"PKRAMsl1", "little")

BASE_AT, TAIL_AT, ZEROED_AT, GROWING_AT, GROWN_AT = 16, 24, 32, 40, 48
"""Byte offsets of the published words of a live page."""
_COVERED, _VERSION_AT = 128, 128

LIVE = Record(
    "Live",
    416,
    "The live page of a tree: where its log begins and ends.",
    [
        F("magic", "u8", 0, "PKRAMlv1"),
        F("checksum", "u8", 8, "XXH3-64 of bytes 128-4095, seeded with the page's pfn"),
        F("base", "u8", BASE_AT, "published: base page"),
        F("tail", "u8", TAIL_AT, "published: position of the end of the log"),
        F("zeroed", "u8", ZEROED_AT, "published: up to here, parts of pages that were cut are zeros"),
        F("growing", "u8", GROWING_AT, "published: inode number of the file that was written behind its end last"),
        F("grown", "u8", GROWN_AT, "published: no byte from there on was written"),
        F("version", "u4", 128, "of the log and its records"),
        F("name_length", "u4", 132, "bytes of the name, 1 to 255"),
        F("tree_id", "u8", 136, "owner of the page blocks that hold tree and log"),
        F("generation", "u8", 144, "boot count of the kernel under which it began"),
        F("name", "256s", 160, "the name that the tree is mounted by, zero-padded"),
    ],
)
BASE = Record(
    "Base",
    80,
    "The beginning of a log.",
    [
        F("magic", "u8", 0, "PKRAMbs1"),
        F("checksum", "u8", 8, "XXH3-64 of bytes 32-4095, seeded with the page's pfn"),
        F("generation", "u8", 32, "as the live page's"),
        F("tree_id", "u8", 40, "as the live page's"),
        F("node", "u8", 48, "pfn of the node that holds the tree as it was, 0: it was empty"),
        F("segment", "u8", 56, "pfn of the segment that holds the position"),
        F("position", "u8", 64, "position of the first byte of the log"),
    ],
)
SEAL = Record(
    "Seal",
    136,
    "The beginning and the end of the log that holds a preserved tree.",
    [
        F("magic", "u8", 0, "PKRAMsl1"),
        F("checksum", "u8", 8, "XXH3-64 of bytes 32-4095, seeded with the page's pfn"),
        F("generation", "u8", 32, "boot count of the kernel that preserved it"),
        F("tree_id", "u8", 40, "as the live page's"),
        F("version", "u4", 48, "as the live page's"),
        F("base", "u8", 56, "pfn of the base page"),
        F("segment", "u8", 64, "pfn of the last segment"),
        F("tail", "u8", 72, "position of the end of the log"),
        F("live", "u8", 80, "pfn of the live page; a reader of the node ignores it"),
        F("inodes", "u8", 88, "inodes of the tree, deleted ones that were open included"),
        F("pages", "u8", 96, "pages of the tree, as size= counts them"),
        F("bytes", "u8", 104, "sum of the sizes of all files, modulo 2^64: sparse files may add up to more"),
        F("inode_space", "u8", 112, "bytes of inode space, as nr_inodes= counts them"),
        F("summed", "u4", 120, "1 if data have checksums"),
        F("unsummed", "u8", 128, "pieces that have frames and no checksum"),
    ],
)
SEGMENT = Record(
    "Segment",
    64,
    "The header of a segment.",
    [
        F("magic", "u8", 0, "PKRAMsg1"),
        F("checksum", "u8", 8, "XXH3-64 of bytes 24-63, seeded with the first page's pfn"),
        F("next", "u8", 16, "published: the next segment, 0 while this is the last"),
        F("base", "u8", 24, "position of the first chunk"),
        F("size", "u8", 32, "bytes, header included: whole pages"),
        F("tree_id", "u8", 40, "as the live page's"),
    ],
)
_NEXT_AT, _SEGMENT_COVERED = 16, 24

CHUNK = struct.Struct("<IHHQQQ")
"""Length with this header (a multiple of 8), kind, flags, checksum, position, who asked."""
CHUNK_KIND, OLD_KIND = 0x4A44, 0x4A43
COVERED = 16
"""The checksum of a chunk covers all from this byte on, seeded with the flags."""
LAST = 1
"""Flag of the last chunk of a request."""
MOST = 1 << 26
"""Bytes of the longest segment."""

BITS = 48
_MASK = (1 << BITS) - 1
FACTOR, WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1
CHECK = WORD - _MASK


def guard(position: int, address: int) -> int:
    """Return the published word for a position at a physical address: 16 bits of check above the position."""
    return (position ^ address << 20) * FACTOR & CHECK | position


def read_position(ram: Ram, pfn: int, offset: int, field: str) -> int:
    """Return the position that a live page publishes."""
    address = (pfn << PAGE_SHIFT) + offset
    word = int.from_bytes(ram.peek(pfn)[offset : offset + 8], "little")
    position = word & _MASK
    if guard(position, address) != word:
        raise FormatError("Live", field, pfn=pfn, found=f"{word:#018x}", expected="a position with its check")
    return position


def write_position(ram: Ram, pfn: int, offset: int, position: int) -> None:
    """Publish a position in a live page."""
    address = (pfn << PAGE_SHIFT) + offset
    ram.publish(address, guard(position, address))


class Live(NamedTuple):
    """A live page that was read."""

    pfn: int
    name: bytes
    tree_id: int
    generation: int
    base: int
    tail: int
    zeroed: int
    growing: int
    grown: int


def write_live(ram: Ram, pfn: int, name: bytes, tree_id: int, generation: int, base: int) -> None:
    """Write a live page of a log without a committed chunk."""
    page = ram.page(pfn)
    fields = {"version": VERSION, "name_length": len(name), "name": name, "tree_id": tree_id, "generation": generation}
    head = LIVE.pack(magic=LIVE_MAGIC, **fields)
    page[: len(head)] = head
    page[len(head) :] = bytes(PAGE_SIZE - len(head))
    for offset in (TAIL_AT, ZEROED_AT):
        write_position(ram, pfn, offset, 0)
    write_word(ram, pfn, BASE_AT, base)
    ram.publish((pfn << PAGE_SHIFT) + 8, _live_digest(page, pfn))


def read_live(ram: Ram, pfn: int) -> Live:
    """Read and check a live page; raise VersionError for one of a later version."""
    check_pfn(ram, pfn, "Live", "pfn")
    page = ram.peek(pfn)
    found = LIVE.read(page)
    if found.magic != LIVE_MAGIC:
        raise FormatError("Live", "magic", pfn=pfn, found=letters(found.magic), expected=letters(LIVE_MAGIC))
    expected = _live_digest(page, pfn)
    if found.checksum not in (expected, _digest_before(page, pfn)):
        raise FormatError("Live", "checksum", pfn=pfn, found=f"{found.checksum:016x}", expected=f"{expected:016x}")
    _check_version("Live", pfn, found.version)
    if not 0 < found.name_length <= NAME_MAX:
        raise FormatError("Live", "name_length", pfn=pfn, found=found.name_length, expected=f"1 to {NAME_MAX}")
    return Live(
        pfn,
        found.name[: found.name_length],
        found.tree_id,
        found.generation,
        read_word(ram, pfn, BASE_AT, "Live", "base"),
        read_position(ram, pfn, TAIL_AT, "tail"),
        read_position(ram, pfn, ZEROED_AT, "zeroed"),
        found.growing,
        found.grown,
    )


def renew(ram: Ram, pfn: int) -> None:
    """Set the version of a log in its live page to this version, whose records will follow.

    Between the two stores the page has this version and the checksum of the version before, which `read_live` accepts.
    """
    page, at = ram.page(pfn), pfn << PAGE_SHIFT
    if LIVE.read(page).version != VERSION:
        word = int.from_bytes(page[_VERSION_AT : _VERSION_AT + 8], "little")
        ram.publish(at + _VERSION_AT, word >> 32 << 32 | VERSION)
        ram.publish(at + 8, _live_digest(page, pfn))


def _check_version(record: str, pfn: int, version: int) -> None:
    if not OLDEST <= version <= VERSION:
        raise VersionError(record, "version", pfn=pfn, found=version, expected=f"at most {VERSION}, this program's")


def _live_digest(page: bytes | memoryview, pfn: int) -> int:
    return xxhash.xxh3_64_intdigest(memoryview(page)[_COVERED:], seed=pfn)


def _digest_before(page: bytes, pfn: int) -> int:
    """Return the checksum that a page of this version had before `renew`."""
    if int.from_bytes(page[_VERSION_AT : _VERSION_AT + 4], "little") != VERSION:
        return -1
    return _live_digest(page[:_VERSION_AT] + OLDEST.to_bytes(4, "little") + page[_VERSION_AT + 4 :], pfn)


class Base(NamedTuple):
    """A base page that was read."""

    node: int
    segment: int
    position: int


def write_base(ram: Ram, pfn: int, base: Base, tree_id: int, generation: int) -> None:
    """Write a base page."""
    write_page(ram, pfn, BASE, {}, magic=BASE_MAGIC, generation=generation, tree_id=tree_id, **base._asdict())


def read_base(ram: Ram, pfn: int, tree_id: int) -> Base:
    """Read and check a base page."""
    found = read_page(ram, pfn, BASE, BASE_MAGIC)
    if found.tree_id != tree_id:
        raise FormatError("Base", "tree_id", pfn=pfn, found=f"{found.tree_id:016x}", expected=f"{tree_id:016x}")
    return Base(found.node, found.segment, found.position)


class Figures(NamedTuple):
    """The figures that a tree and its copy must have in common."""

    inodes: int
    pages: int
    bytes: int
    inode_space: int

    def stored(self) -> "Figures":
        """Return the figures in the form of a seal page."""
        return self._replace(bytes=self.bytes & WORD)


class Seal(NamedTuple):
    """A seal page that was read."""

    base: int
    segment: int
    tail: int
    live: int
    figures: Figures
    unsummed: int | None = None
    """Pieces that have frames and no checksum, None if nobody makes any."""


def write_seal(ram: Ram, pfn: int, seal: Seal, tree_id: int, generation: int) -> None:
    """Write a seal page."""
    fields = seal._asdict()
    fields |= fields.pop("figures").stored()._asdict()
    fields["summed"], fields["unsummed"] = int(seal.unsummed is not None), seal.unsummed or 0
    write_page(ram, pfn, SEAL, {}, magic=SEAL_MAGIC, generation=generation, tree_id=tree_id, version=VERSION, **fields)


def read_seal(ram: Ram, pfn: int, tree_id: int) -> Seal:
    """Read and check a seal page; raise VersionError for one of a later version."""
    found = read_page(ram, pfn, SEAL, SEAL_MAGIC)
    _check_version("Seal", pfn, found.version)
    if found.tree_id != tree_id:
        raise FormatError("Seal", "tree_id", pfn=pfn, found=f"{found.tree_id:016x}", expected=f"{tree_id:016x}")
    figures = Figures(found.inodes, found.pages, found.bytes, found.inode_space)
    unsummed = found.unsummed if found.summed else None
    return Seal(found.base, found.segment, found.tail, found.live, figures, unsummed)


class Segment(NamedTuple):
    """A segment: its first page, its pages, and the position of its first chunk."""

    pfn: int
    pages: int
    base: int

    @property
    def room(self) -> int:
        """Return the room for chunks, in bytes."""
        return (self.pages << PAGE_SHIFT) - SEGMENT.size

    def address(self, position: int) -> int:
        """Return the physical address of a position."""
        return (self.pfn << PAGE_SHIFT) + SEGMENT.size + position - self.base


def write_segment(ram: Ram, segment: Segment, tree_id: int) -> None:
    """Write the header of a segment that is not linked yet."""
    head = bytearray(
        SEGMENT.pack(magic=SEGMENT_MAGIC, base=segment.base, size=segment.pages << PAGE_SHIFT, tree_id=tree_id)
    )
    head[8:16] = _segment_digest(head, segment.pfn).to_bytes(8, "little")
    ram.overwrite(segment.pfn << PAGE_SHIFT, memoryview(head))
    write_word(ram, segment.pfn, _NEXT_AT, 0)


def link_segment(ram: Ram, pfn: int, following: int) -> None:
    """Publish the segment that comes behind another."""
    write_word(ram, pfn, _NEXT_AT, following)


def read_segment(ram: Ram, pfn: int, tree_id: int) -> tuple[Segment, int]:
    """Read and check the header of a segment; return it, and the pfn of the next one, 0 at the end."""
    check_pfn(ram, pfn, "Segment", "pfn")
    head = ram.peek(pfn)[: SEGMENT.size]
    found = SEGMENT.read(head)
    if found.magic != SEGMENT_MAGIC:
        raise FormatError("Segment", "magic", pfn=pfn, found=letters(found.magic), expected=letters(SEGMENT_MAGIC))
    expected = _segment_digest(head, pfn)
    if found.checksum != expected:
        raise FormatError("Segment", "checksum", pfn=pfn, found=f"{found.checksum:016x}", expected=f"{expected:016x}")
    if found.tree_id != tree_id:
        raise FormatError("Segment", "tree_id", pfn=pfn, found=f"{found.tree_id:016x}", expected=f"{tree_id:016x}")
    size = found.size
    if size % PAGE_SIZE or not PAGE_SIZE <= size <= MOST or pfn + (size >> PAGE_SHIFT) > ram.pages:
        raise FormatError("Segment", "size", pfn=pfn, found=size, expected="whole pages of RAM")
    return Segment(pfn, size >> PAGE_SHIFT, found.base), read_word(ram, pfn, _NEXT_AT, "Segment", "next")


def _segment_digest(head: bytes | bytearray, pfn: int) -> int:
    return xxhash.xxh3_64_intdigest(memoryview(head)[_SEGMENT_COVERED : SEGMENT.size], seed=pfn)


def old_digest(length: int, flags: int, position: int, asker: int, body: bytes | memoryview) -> int:
    """Return the checksum of a chunk of version 1: of its records, seeded with its header."""
    seed = (position << 16 ^ asker << 8 ^ length << 40 ^ flags) & WORD
    return xxhash.xxh3_64_intdigest(body, seed=seed)


def chunk_digest(covered: bytes | memoryview, flags: int) -> int:
    """Return the checksum of a chunk, over all bytes behind the checksum, seeded with the chunk's flags."""
    return xxhash.xxh3_64_intdigest(covered, seed=flags)
