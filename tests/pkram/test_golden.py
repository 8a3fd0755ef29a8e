# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract, pinned: offsets, sizes, magics; and images of every version, which must load for ever."""

import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pkramfs.machine.ram import Ram
from pkramfs.pkram import format, regions, superblock
from pkramfs.pkram.page import seal, unseal
from pkramfs.pkram.store import Store
from pkramfs.pkram.streams import link
from pkramfs.units import BLOCK_SIZE

DATA = Path(__file__).parents[1] / "data"
BUMP = "a record that crosses a kexec has changed: bump FORMAT_VERSION, keep a reader of the old, add an image"

OFFSETS = {
    "Super": "magic:0:u8 checksum:8:u8 node:16:u8 regions:24:u8 generation:32:u8 version:40:u4 features:44:u4 =48",
    "Node": (
        "magic:0:u8 checksum:8:u8 next:16:u8 other:24:u8 generation:32:u8 tree_id:40:u8 object:48:u8 table:56:u8 "
        "table_checksum:64:u8 pages:72:u8 created:80:i8 objects:88:u4 name_length:92:u4 flags:96:u8 "
        "name:104:256s moved:360:u8 log:368:u8 =376"  # log: only with a flag that older readers refuse
    ),
    "Object": (
        "magic:0:u8 checksum:8:u8 next:16:u8 other:24:u8 generation:32:u8 object:40:u8 pages_head:48:u8 "
        "pages_tail:56:u8 bytes_head:64:u8 bytes_tail:72:u8 data_length:80:u8 data_checksum:88:u8 page_count:96:u8 "
        "page_links:104:u8 byte_links:112:u8 flags:120:u8 =128"
    ),
    "Link": (
        "magic:0:u8 checksum:8:u8 next:16:u8 other:24:u8 generation:32:u8 index:40:u8 count:48:u4 flags:52:u4 "
        "zero:56:u8 =64"
    ),
    "Regions": (
        "magic:0:u8 checksum:8:u8 next:16:u8 previous:24:u8 generation:32:u8 count:40:u4 flags:44:u4 regions:48:u8 "
        "pages:56:u8 =64"
    ),
    "Region": "base:0:u8 size:8:u8 =16",
}


def test_version_one_is_as_it_was():
    assert format.FORMAT_VERSION == 1, "add the new version beside the old one here"
    found = {
        record.name: " ".join([*(f"{f.name}:{f.offset}:{f.code}" for f in record.fields), f"={record.size}"])
        for record in format.RECORDS
    }
    assert found == OFFSETS, BUMP


def test_the_numbers_are_as_they_were():
    magics = [
        value.to_bytes(8, "little")
        for value in (
            format.SUPER_MAGIC,
            format.CONSUMED_MAGIC,
            format.NODE_MAGIC,
            format.OBJECT_MAGIC,
            format.LINK_MAGIC,
            format.REGIONS_MAGIC,
        )
    ]
    assert magics == [b"PKRAMsb1", b"PKRAMgon", b"PKRAMnd1", b"PKRAMob1", b"PKRAMln1", b"PKRAMrl1"], BUMP
    assert (format.LINK_CAPACITY, format.REGIONS_CAPACITY) == (504, 252), BUMP
    assert (format.ENTRY_ORDER_MASK, format.ENTRY_FLAGS_SHIFT, format.ENTRY_PFN_SHIFT) == (0x1F, 5, 12), BUMP
    assert seal(0x34F, 0x9010) == 0x26B906000000034F, BUMP


def test_the_worked_entry_of_the_manual():
    entries = link.encode(np.array([0x40000], np.uint64), np.array([9], np.uint8), 1)
    assert entries.tolist() == [0x40000029]


def test_a_published_word_belongs_to_its_place():
    assert unseal(seal(5, 64), 64, "Node", "next") == 5
    for word, at in ((0, 64), (seal(5, 64), 72), (seal(5, 64) ^ 1, 64)):
        with pytest.raises(Exception, match="next"):
            unseal(word, at, "Node", "next")


def maker():
    spec = importlib.util.spec_from_file_location("make_image", DATA / "make_image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("image", sorted(DATA.glob("format-*.ram.xz")), ids=lambda p: p.name)
def test_every_image_loads_for_ever(tmp_path, image):
    make = maker()
    ram = Ram(str(tmp_path / "ram"), make.BLOCKS * BLOCK_SIZE, create=True)
    make.restore(ram, image.read_bytes())
    found = superblock.check(ram, make.SUPER_PFN)
    assert found.generation == 7
    store = Store(ram, make.SUPER_PFN, contextlib.nullcontext)
    (node,) = store.nodes()
    assert (node.name, node.tree_id) == (make.NAME, make.TREE)
    with store.prepare_load(make.NAME) as load:
        first, second = load
        assert first.read() == make.BYTES
        runs = list(zip(*(column.tolist() for column in second.load_runs()), strict=True))
    assert runs == make.expected_pages(runs[0][1])
    listed = regions.read(ram, found.region_pfn)
    assert not store.pages_of(node) - listed
    ram.close()


def test_each_version_has_its_image():
    assert (DATA / f"format-{format.FORMAT_VERSION}.ram.xz").exists(), BUMP
