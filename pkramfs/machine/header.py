# SPDX-License-Identifier: GPL-2.0-or-later
"""The header in page 0 of RAM that the user named: everything beside RAM that must survive a boot of the host.

    0        512      2048      2560     4096
    | slot 0 | mounts | slot 1 | mounts   |          page 0 is never usable, so nothing else is written there

The directory of a machine may lie in /run, and end with the host's kernel. RAM stays, if both kernels set it aside.
The header identifies the machine, its size, the last kernel, and the pfn of its super block: a new directory is made
from it. A header is written to the slot that does not hold the current one, with a higher sequence number, and its last
store makes the checksum valid, so a torn write leaves the header before it. A boot writes both slots, one after the
other: then neither names an old super block, and damage to one loses nothing.

Behind each slot is a list of mounts, so that they can be mounted again without fstab. The header has the length and
checksum of the list. A damaged list counts as empty; it does not invalidate the header.

It is reached through the mapping alone, whatever lies behind RAM. Only the holder of the machine lock writes it.

Kernel: drivers/nvdimm/label.c (two index blocks with sequence numbers), drivers/nvdimm/pfn.h (struct nd_pfn_sb)
"""

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import xxhash

from pkramfs import schema
from pkramfs.errors import FormatError, VersionError
from pkramfs.machine.ram import Ram
from pkramfs.record import F, Record
from pkramfs.units import PAGE_SIZE, format_size

MAGIC = int.from_bytes(b"PKRAMhd1", "little")
VERSION = 1
_COVERED = 16
HEADER = Record(
    "Header",
    512,
    "One of the two headers in page 0 of RAM that the user named (`pkramctl machine create --ram PATH`).",
    [
        F("magic", "u8", 0, '"PKRAMhd1"'),
        F("checksum", "u8", 8, "XXH3-64 of bytes 16-511, seeded with the slot's number"),
        F("sequence", "u8", 16, "the higher one of two sound headers is the current one"),
        F("version", "u4", 24, "1"),
        F("features", "u4", 28, "0; unknown ones are refused"),
        F("uuid", "16s", 32, "identifies the machine, whatever the path of its memory"),
        F("size", "u8", 48, "bytes of RAM, page 0 included"),
        F("seed", "u8", 56, "seed of all random choices"),
        F("generation", "u8", 64, "how many kernels the machine has had; 0 before the first boot"),
        F("super_pfn", "u8", 72, "pfn of the super block of the last kernel, 0 if it had none"),
        F("boot_id", "16s", 80, "the host's boot in which that kernel was booted"),
        F("created", "i8", 96, "when the machine was made, ns since the epoch"),
        F("name_length", "u4", 104, "bytes of the machine's name, 1 to 255"),
        F("name", "255s", 108, "the machine's name, zero-padded"),
        F("mounts_length", "u4", 364, "bytes of the list of mounts, which begins at the end of this header"),
        F("mounts_checksum", "u8", 368, "XXH3-64 of that list"),
    ],
)
SLOTS = (0, PAGE_SIZE // 2)
LIST_SIZE = PAGE_SIZE // 2 - HEADER.size
"""Bytes that a list of mounts may have."""
_WORDS = schema.MapOf(schema.OneOf((schema.Text(), schema.Flag())))
_LIST = schema.ListOf(schema.Row((schema.Text(), schema.Text(), _WORDS)))


class Mount(NamedTuple):
    """A mount that can be made again: NAME, mount point, and the options by which it gets the same again."""

    name: str
    directory: str
    options: dict[str, str | bool]


@dataclass(frozen=True)
class Header:
    """The header of a machine. `boot_id` and `uuid` are 32 hexadecimal digits."""

    uuid: str
    size: int
    name: str
    seed: int = 0
    generation: int = 0
    super_pfn: int = 0
    boot_id: str = "0" * 32
    created: int = 0
    sequence: int = 0
    mounts: tuple[Mount, ...] = ()
    slot: int = field(default=1, compare=False)
    """Where it was read."""


def new(name: str, size: int, seed: int) -> Header:
    """Return the header of a machine that never booted."""
    return Header(uuid.uuid4().hex, size, name, seed, created=time.time_ns())


def read(ram: Ram) -> Header | None:
    """Return the current header, None if there is none; raise VersionError if a later version of pkramfs wrote it."""
    return parse(ram.peek(0), ram.size)


def parse(page: bytes, size: int = 0) -> Header | None:
    """Return the current header of page 0, of RAM with `size` bytes (0: unknown)."""
    sound = [found for slot in range(len(SLOTS)) if (found := _slot(page, slot)) is not None]
    if not sound:
        return None
    newest = max(sound, key=lambda header: header.sequence)
    if size and newest.size > size:
        whole = format_size(newest.size)
        raise FormatError("Header", "size", pfn=0, found=whole, expected=f"at most the {format_size(size)} of memory")
    return newest


def _slot(page: bytes, slot: int) -> Header | None:
    """Return the header of one slot, None if it is not sound."""
    data = page[SLOTS[slot] : SLOTS[slot] + HEADER.size]
    found = HEADER.read(data)
    if found.magic != MAGIC or found.checksum != _checksum(data, slot):
        return None
    for key, known in (("version", VERSION), ("features", 0)):
        if getattr(found, key) != known:
            raise VersionError("Header", key, pfn=0, found=getattr(found, key), expected=known)
    machine = found.name[: found.name_length].decode("utf-8", "surrogateescape")
    words: dict[str, Any] = {key: getattr(found, key) for key in ("size", "seed", "generation", "super_pfn")}
    words |= {key: getattr(found, key) for key in ("created", "sequence")}
    words["mounts"] = _listed(page[SLOTS[slot] + HEADER.size :][: found.mounts_length], found.mounts_checksum)
    return Header(found.uuid.hex(), name=machine, boot_id=found.boot_id.hex(), slot=slot, **words)


def _listed(data: bytes, checksum: int) -> tuple[Mount, ...]:
    """Return the mounts of a list, none if it is damaged."""
    if not data or xxhash.xxh3_64_intdigest(data) != checksum:
        return ()
    return tuple(Mount(*row) for row in _LIST.read(json.loads(data)))


def fitting(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """Return the first mounts, as many as there is room for."""
    found = tuple(mounts)
    while len(_packed(found)) > LIST_SIZE:
        found = found[:-1]
    return found


def _packed(mounts: Iterable[Mount]) -> bytes:
    rows = [list(mount) for mount in mounts]
    return json.dumps(rows, separators=(",", ":")).encode("ascii") if rows else b""


def write(ram: Ram, header: Header) -> Header:
    """Make a header the current one, and return it as it is read. Its mounts are `fitting`."""
    written = replace(header, sequence=header.sequence + 1, slot=1 - header.slot)
    data, at, listed = encoded(written), SLOTS[written.slot], _packed(written.mounts)
    ram.back_run(0, 1)
    ram.bytes[at + HEADER.size : at + HEADER.size + len(listed)] = listed
    ram.bytes[at + _COVERED : at + HEADER.size] = data[_COVERED:]
    ram.bytes[at : at + _COVERED] = data[:_COVERED]
    return written


def write_both(ram: Ram, header: Header) -> Header:
    """Make a header the current one in both slots, so that damage to either is harmless."""
    return write(ram, write(ram, header))


def is_alone(ram: Ram, header: Header) -> bool:
    """Return True if the other slot differs from the current header, apart from the lists of mounts."""
    other = _slot(ram.peek(0), 1 - header.slot)
    return other is None or replace(other, sequence=header.sequence, mounts=header.mounts) != header


def encoded(header: Header) -> bytes:
    """Return the bytes of a header, for the slot that it names."""
    name, listed = header.name.encode("utf-8", "surrogateescape"), _packed(header.mounts)
    words = {key: getattr(header, key) for key in ("size", "seed", "generation", "super_pfn", "created", "sequence")}
    data = HEADER.pack(
        magic=MAGIC,
        version=VERSION,
        uuid=bytes.fromhex(header.uuid),
        boot_id=bytes.fromhex(header.boot_id),
        name_length=len(name),
        name=name,
        mounts_length=len(listed),
        mounts_checksum=xxhash.xxh3_64_intdigest(listed) if listed else 0,
        **words,
    )
    return data[:8] + _checksum(data, header.slot).to_bytes(8, "little") + data[_COVERED:]


def wipe(ram: Ram) -> None:
    """Remove both headers."""
    ram.back_run(0, 1)
    ram.zero(0)


def _checksum(data: bytes, slot: int) -> int:
    return xxhash.xxh3_64_intdigest(data[_COVERED:], seed=slot)
