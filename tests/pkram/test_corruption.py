# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input: any field of any record set to any value, with and without a checksum that fits.

A reader may find that nothing is wrong (a time of saving can be any number), or raise a FormatError
that names record, field and page. Nothing else: no other exception, no endless walk, no other node
harmed. A field that is set with a checksum that fits is what a program with a bug would write, so
every rule behind the checksum must hold on its own.
"""

import random
from typing import Any

import numpy as np
import pytest

from pkramfs.errors import FormatError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import check, format, page, regions, superblock
from pkramfs.pkram.store import Store
from pkramfs.pkram.table import reader as pagetable
from pkramfs.record import F, Record
from pkramfs.spans import Spans

from .conftest import SUPER_PFN, TREE

RECORDS = {
    "Super": format.SUPER,
    "Node": format.NODE,
    "Object": format.OBJECT,
    "Link": format.LINK,
    "Regions": format.REGIONS,
}
PUBLISHED = (format.NEXT, format.OTHER)
FIELDS = [(name, field.name) for name, record in RECORDS.items() for field in record.fields]


class Victim:
    """Two nodes and a region list; `places` are the pages of the first node's records."""

    def __init__(self, ram: Ram, store: Store, frames: Any) -> None:
        self.ram, self.store = ram, store
        ((self.start, _),) = frames.allocate(1400)
        self._save(b"bystander", [(0, self.start, 100)], frames)
        runs = [(0, self.start + 200, 600), (1000, self.start + 900, 3), (2**20, self.start + 1000, 1)]
        self._save(b"victim", runs, frames)
        listed = store.preserved() | Spans([(SUPER_PFN, SUPER_PFN + 1)])
        superblock.set_regions(ram, SUPER_PFN, regions.build(ram, listed, frames.allocate_pages, generation=7))
        node = store.find(b"victim")
        assert node is not None
        record = format.OBJECT.read(ram.bytes, node.object_pfn << 12)
        self.node, self.table = node, node.table_pfn
        self.places = {
            "Super": SUPER_PFN,
            "Node": node.pfn,
            "Object": node.object_pfn,
            "Link": record.pages_head,
            "Regions": superblock.check(ram, SUPER_PFN).region_pfn,
        }
        self.known = [*self.places.values(), self.table, record.bytes_head, record.pages_tail, self.start + 200]
        self.good = self.contents(b"bystander")

    def _save(self, name: bytes, runs: list[tuple[int, int, int]], frames: Any) -> None:
        with self.store.prepare_save(name, tree_id=TREE + len(name), frames=frames) as saving:
            with saving.object() as writer:
                writer.write(name * 1000)
                for index, pfn, count in runs:
                    writer.save_runs([index], [pfn], [count])
            with saving.object() as writer:
                writer.write(b"")
            saving.finish()

    def contents(self, name: bytes) -> list[Any]:
        with self.store.prepare_load(name) as load:
            return [(one.read(), [column.tolist() for column in one.load_runs()]) for one in load]

    def poke(self, pfn: int, field: F, value: int | bytes, *, seal: bool) -> None:
        """Set a field, and with `seal` make the page's checksum and the word's check fit."""
        at = (pfn << 12) + field.offset
        if isinstance(value, int):
            if seal and field.offset in PUBLISHED:
                value = page.seal(value & ((1 << 40) - 1), at)
            value = (value & ((1 << 8 * field.size) - 1)).to_bytes(field.size, "little")
        self.ram.bytes[at : at + field.size] = value.ljust(field.size, b"\0")[: field.size]
        if seal and field.name != "checksum":
            page.seal_page(self.ram, pfn)

    def look(self) -> list[FormatError]:
        """Do all that boot and load do; the errors on the way."""
        found: list[FormatError] = []

        def attempt(work: Any) -> Any:
            try:
                return work()
            except FormatError as error:
                assert error.record and error.field and error.found is not None and error.expected is not None
                assert "\n" not in str(error)
                found.append(error)

        super_block = attempt(lambda: superblock.check(self.ram, SUPER_PFN))
        if super_block is not None and super_block.region_pfn:
            attempt(lambda: regions.read(self.ram, super_block.region_pfn))
        for node in attempt(self.store.nodes) or ():
            attempt(lambda: self.store.pages_of(node))  # noqa: B023
            attempt(lambda: self.contents(node.name))  # noqa: B023
        check.check(self.ram, SUPER_PFN)
        return found

    def values(self, field: F, present: int | bytes) -> list[int | bytes]:
        if isinstance(present, bytes):
            return [b"", b"\0" * 10 + b"x", b"\xff" * 256, b"a" * 256, b"victi"]
        edges = [0, 1, 0xFFFF, 2**32 - 1, 2**40 - 1, 2**52, 2**63, 2**64 - 1, self.ram.pages]
        near = [present - 1, present + 1, present << 1]
        return [value for value in [*edges, *near, *self.known] if value != present and value >= 0]


@pytest.fixture
def victim(ram: Ram, store: Store, frames: Any, damaged: None) -> Victim:
    return Victim(ram, store, frames)


@pytest.mark.parametrize("seal", [False, True], ids=["torn", "sealed"])
@pytest.mark.parametrize(("name", "field_name"), FIELDS)
def test_d15_any_field_set_to_any_value(victim: Victim, name: str, field_name: str, seal: bool, some: Any) -> None:
    record: Record = RECORDS[name]
    pfn, field = victim.places[name], next(f for f in record.fields if f.name == field_name)
    before = bytes(victim.ram.page(pfn))
    present = getattr(record.read(before), field_name)
    for value in some(victim.values(field, present), 5):
        victim.poke(pfn, field, value, seal=seal)
        if bytes(victim.ram.page(pfn)) == before:
            continue
        errors = victim.look()
        if not seal:
            assert errors, f"{value} was not noticed"
        if name not in ("Super", "Node"):
            assert victim.contents(b"bystander") == victim.good
        victim.ram.page(pfn)[:] = before
    assert victim.look() == []


@pytest.mark.few(6)
@pytest.mark.parametrize("seed", range(12))
def test_entries_of_links_and_regions_set_to_anything(victim: Victim, seed: int, some: Any) -> None:
    rng = random.Random(seed)
    name, head = rng.choice([("Link", format.LINK), ("Regions", format.REGIONS)])
    pfn = victim.places[name]
    word = head.size // 8 + rng.randrange(4)
    field = F("entry", "u8", word * 8, "")
    present = int(victim.ram.words(pfn)[word])
    values = [*victim.values(field, present), rng.getrandbits(64), present | 0x1F, present | 0xFE0, present | 1]
    for value in some(values, 8):
        victim.poke(pfn, field, value, seal=True)
        victim.look()
        assert victim.contents(b"bystander") == victim.good
        victim.poke(pfn, field, present, seal=True)
    assert victim.look() == []


@pytest.mark.few(24)
@pytest.mark.parametrize("seed", range(120))
def test_page_table_entries_set_to_anything(victim: Victim, seed: int) -> None:
    """With a checksum of the table that fits, as far as the table can be walked at all."""
    rng = random.Random(seed)
    table = pagetable.walk(victim.ram, victim.table)
    pfn = int(rng.choice(table.pages))
    words = victim.ram.words(pfn)
    used = np.flatnonzero(words)
    word = int(rng.choice(used)) if rng.random() < 0.7 else rng.randrange(512)
    value = rng.choice([*victim.known, 0, 1 << 20, rng.getrandbits(28), rng.getrandbits(64)])
    words[word] = np.uint64(value << rng.choice((0, 12)) & (2**64 - 1) | rng.choice((0, 0x80, 1, 0x3F)))
    try:
        digest = pagetable.checksum(victim.ram, victim.table)
    except FormatError as error:
        assert error.record == "PageTable" and error.pfn is not None
        digest = 0
    field = next(f for f in format.NODE.fields if f.name == "table_checksum")
    victim.poke(victim.node.pfn, field, digest, seal=True)
    for _ in range(2):  # the page count fits, too
        victim.look()
        try:
            total = pagetable.read(victim.ram, victim.table).total
        except FormatError:
            break
        field = next(f for f in format.NODE.fields if f.name == "pages")
        victim.poke(victim.node.pfn, field, total, seal=True)
    assert victim.contents(b"bystander") == victim.good


@pytest.mark.few(24)
@pytest.mark.parametrize("seed", range(100))
def test_pages_of_noise(victim: Victim, seed: int) -> None:
    """Whole metadata pages overwritten: with noise, zeros, or another metadata page."""
    rng = random.Random(seed)
    pages = [p for a, b in victim.store.metadata_pages(b"victim") for p in range(a, b)]
    target = rng.choice([p for p in pages if p != victim.node.pfn])
    content = rng.choice([rng.randbytes(4096), bytes(4096), bytes(victim.ram.page(rng.choice(pages)))])
    before = bytes(victim.ram.page(target))
    victim.ram.page(target)[:] = content
    errors = victim.look()
    assert errors or content == before
    assert victim.contents(b"bystander") == victim.good


def test_a_chain_that_bites_its_tail_ends(victim: Victim) -> None:
    """Every counter allows for ever so many, and the last link names the first."""
    record = format.OBJECT.read(victim.ram.bytes, victim.places["Object"] << 12)
    fields = {f.name: f for f in format.OBJECT.fields}
    victim.poke(victim.places["Object"], fields["page_links"], 2**63, seal=True)
    assert any(error.field == "links" for error in victim.look())
    victim.poke(victim.places["Object"], fields["page_links"], victim.node.pages, seal=True)
    page.write_word(victim.ram, record.pages_tail, format.NEXT, record.pages_head)
    assert any(error.field == "next" for error in victim.look())


def test_objects_in_a_circle_end(victim: Victim) -> None:
    count = next(f for f in format.NODE.fields if f.name == "objects")
    following = next(f for f in format.OBJECT.fields if f.name == "object")
    victim.poke(victim.node.pfn, count, 2**32 - 1, seal=True)
    victim.poke(victim.places["Object"], following, victim.places["Object"], seal=True)
    assert any("met before" in str(error) for error in victim.look())


def test_nodes_in_a_circle_end(victim: Victim) -> None:
    page.write_word(victim.ram, victim.node.pfn, format.NEXT, victim.node.pfn)
    with pytest.raises(FormatError, match="met before"):
        victim.store.nodes()
    assert any("met before" in line for line in check.check(victim.ram, SUPER_PFN).problems)


def test_a_pfn_of_another_node_is_not_followed(victim: Victim) -> None:
    """What leads out of the node's own pages is refused before it is read."""
    other = victim.store.find(b"bystander")
    assert other is not None
    for name, field_name, target in (
        ("Object", "bytes_head", other.object_pfn),
        ("Node", "object", other.object_pfn),
        ("Link", "next", other.pfn),
    ):
        before = bytes(victim.ram.page(victim.places[name]))
        field = next(f for f in RECORDS[name].fields if f.name == field_name)
        victim.poke(victim.places[name], field, target, seal=True)
        with pytest.raises(FormatError, match="expected a page of the node's page table"):
            victim.contents(b"victim")
        victim.ram.page(victim.places[name])[:] = before


def test_a_damaged_node_does_not_hide_the_next(victim: Victim) -> None:
    victim.ram.bytes[(victim.node.pfn << 12) + 200] ^= 1
    report = check.check(victim.ram, SUPER_PFN)
    assert [node.name for node in report.nodes] == [b"bystander"]
    assert any(f"Node at pfn {victim.node.pfn:x}: checksum" in line for line in report.problems)
