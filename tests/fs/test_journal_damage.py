# SPDX-License-Identifier: GPL-2.0-or-later
"""A damaged log is refused with position and field, or comes to a tree that holds; and never to anything else."""

import contextlib
import random
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
import xxhash

from pkramfs.errors import FormatError
from pkramfs.fs import brief, records
from pkramfs.fs.inode import Inode
from pkramfs.fs.records import Kind
from pkramfs.journal import layout
from pkramfs.machine.ram import Ram
from tests.fs.conftest import audit
from tests.support.journals import Checkpoint, Driver, Memory, live, state
from tests.support.stores import image
from tests.support.whole import Both

WORDS = [0, 1, 7, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    with Memory.make(8) as made:
        yield made


@pytest.fixture(scope="module")
def begun(memory: Memory) -> int:
    """Where a log begins that has a checkpoint and a hundred requests, none with a large value."""
    tree = memory.tree()
    driver = Driver(tree, 3)
    driver.requests = [one for one in driver.requests if one not in (driver.do_xattr, driver.do_symlink)]
    for number in range(140):
        driver.step()
        if number == 40:
            tree.symlink(1, b"symlink", b"target")
            tree.setxattr(1, b"user.one", b"first")
            Checkpoint(memory, tree).finish()
        if number == 80:
            tree.symlink(1, b"another", b"target of the other")
            tree.setxattr(1, b"user.two", b"second")
    return live(tree)


def inode_record(ino: int, marks: int = 0, **changed: int) -> bytes:
    """The record of an inode that was never one."""
    inode = Inode(ino, changed.pop("mode", 0o100644), 0, 0, 0, 0, 0)
    inode.nlink = 1
    for field, value in changed.items():
        setattr(inode, field, value)
    return records.pack_inode(inode, ())[:-4] + marks.to_bytes(4, "little")


def told(packer: brief.Packer, ino: int, *about: Any, **changed: int) -> bytes:
    """A record that tells a request about an inode that is otherwise like any file."""
    inode = Inode(ino, changed.pop("mode", 0o100644), 0, 0, 0, 0, 0)
    for field, value in changed.items():
        setattr(inode, field, value)
    return packer((packer, inode, *about), 0, 0)[brief.AHEAD :]


ROOT, FILE = Inode(1, 0o041777, 0, 0, 0, 0, 0), Inode(2, 0o100644, 0, 0, 0, 0, 0)
HUGE = Inode(1, 0o041777, 0, 0, 0, 0, 0, size=1 << 63)
LINKED = Inode(1, 0o041777, 0, 0, 0, 0, 0, nlink=1 << 63)


def pages(memory: Memory, begun: int) -> dict[int, int]:
    """The pages of the log, and how many bytes of each count."""
    log = memory.rebuild(begun).log
    (segment,) = log.segments
    end = log.live.tail - segment.base + 64
    there = {segment.pfn + at: min(4096, end - at * 4096) for at in range((end + 4095) // 4096)}
    return {begun: 4096, log.live.base: 4096, **there}


def damage(ram: Ram, used: dict[int, int], choice: random.Random) -> str:
    """Change one thing on a page of the log, in one of five cases on one of the first two."""
    pfn = choice.choice(list(used)[:2] if choice.random() < 0.2 else list(used)[2:])
    page, at = ram.page(pfn), choice.randrange(min(used[pfn], 512 if choice.random() < 0.3 else 4096))
    kind = choice.choice(["bit", "byte", "word", "half", "cut", "copy"])
    if kind == "bit":
        page[at] ^= 1 << choice.randrange(8)
    elif kind == "byte":
        page[at] = choice.randrange(256)
    elif kind == "word":
        page[at & -8 : (at & -8) + 8] = choice.choice(WORDS).to_bytes(8, "little")
    elif kind == "half":
        page[at & -4 : (at & -4) + 4] = (choice.choice(WORDS) & 0xFFFFFFFF).to_bytes(4, "little")
    elif kind == "cut":
        page[at:] = bytes(4096 - at)
    else:
        size = min(64, 4096 - at)
        there = choice.randrange(4096 - size)
        page[at : at + size] = bytes(page[there : there + size])
    return f"{kind} at {at} of pfn {pfn:x}"


def seal(memory: Memory, begun: int, used: dict[int, int]) -> None:
    """Make every checksum fit again, so that what the damage says is believed, in the pages that are used."""
    ram = memory.ram
    page = ram.page(begun)
    page[8:16] = xxhash.xxh3_64_intdigest(page[128:], seed=begun).to_bytes(8, "little")
    with contextlib.suppress(FormatError, ValueError, OverflowError, struct.error):
        found = layout.read_live(ram, begun)
        if found.base not in used:
            return
        base = ram.page(found.base)
        base[8:16] = xxhash.xxh3_64_intdigest(base[32:], seed=found.base).to_bytes(8, "little")
        pfn, position = layout.read_base(ram, found.base, found.tree_id).segment, 0
        if pfn not in used:
            return
        head = ram.page(pfn)[:64]
        head[8:16] = xxhash.xxh3_64_intdigest(head[24:64], seed=pfn).to_bytes(8, "little")
        segment, _ = layout.read_segment(ram, pfn, found.tree_id)
        data = ram.page(pfn, segment.pages)
        position = layout.read_base(ram, found.base, found.tree_id).position
        while position < found.tail:
            at = 64 + position - segment.base
            length, kind, flags, _, _, asker = layout.CHUNK.unpack_from(data, at)
            if length < layout.CHUNK.size or at + length > len(data):
                return
            data[at + 16 : at + 24] = position.to_bytes(8, "little")
            digest = layout.chunk_digest(data[at + layout.COVERED : at + length], flags)
            data[at : at + layout.CHUNK.size] = layout.CHUNK.pack(length, kind, flags, digest, position, asker)
            position += length


def outcome(memory: Memory, begun: int, expected: Any, where: str) -> str:
    """What becomes of a log that was damaged: `refused`, `equal`, or `another` tree, which holds, whoever looks."""
    began = time.thread_time()
    try:
        tree = memory.rebuild(begun).tree
    except FormatError as error:
        assert error.field and str(error), where
        return "refused"
    finally:
        assert time.thread_time() - began < 2, f"{where} took long"
    tree.wake()
    return "equal" if state(tree) == expected else "another"


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with checksums that fit"])
def test_damage(
    request: pytest.FixtureRequest,
    memory: Memory,
    begun: int,
    seed: int,
    sealed: bool,
) -> None:
    """Whatever is changed, nothing else is; and without a checksum that fits nothing comes to another tree."""
    choice, used = random.Random(seed), pages(memory, begun)
    expected, counts = state(memory.rebuild(begun).tree), dict.fromkeys(("refused", "equal", "another"), 0)
    for number in range(50_000 if request.config.getoption("--long") else 250):
        held = {one: bytes(memory.ram.page(one)) for one in used}
        where = f"seed {seed}, number {number}: " + damage(memory.ram, used, choice)
        if sealed:
            seal(memory, begun, used)
        before = image(memory.ram) if number % 25 == 0 else None
        with pytest.MonkeyPatch.context() as patch:
            if number % 5 == 0:
                Both(patch)
            counts[outcome(memory, begun, expected, where)] += 1
        assert before is None or image(memory.ram) == before, where
        for one, data in held.items():
            memory.ram.page(one)[:] = data
    print(f"\n{counts}")
    assert counts["refused"] > 50
    assert state(memory.rebuild(begun).tree) == expected
    if not sealed:
        assert counts["another"] == 0


WRONG = [
    (records.pack_leave(1, b"missing"), "name"),
    (records.pack_leave(2, b"file"), "name"),
    (records.pack_enter(1, b"file", 2, 9), "name"),
    (records.pack_enter(2, b"new", 2, 9), "folder"),
    (records.pack_enter(1, b"new", 99, 9), "ino"),
    (records.pack_run(2, 0, 600, 1), "index"),
    (records.pack_run(2, 9, 600, 0), "count"),
    (records.pack_run(2, 1 << 60, 600, 1), "count"),
    (records.pack_run(2, 9, 0, 1), "pfn"),
    (records.pack_run(2, 9, 1 << 40, 1), "pfn"),
    (records.pack_run(1, 9, 600, 1), "ino"),
    (records.pack_range(Kind.CUT, 1, 0, 1), "ino"),
    (records.pack_range(Kind.RESERVED, 1, 0, 1), "count"),
    (records.pack_range(Kind.ZERO, 2, 10, 9000), "start"),
    (records.pack_reaped(2), "ino"),
    (records.pack_reaped(99), "ino"),
    (records.pack_lost(99, 5, 0, {}), "ino"),
    (records.pack_lost(1, 5, 0, {}), "ino"),
    (inode_record(ino=1 << 63), "ino"),
    (inode_record(ino=99, mode=0o010644, size=5), "size"),
    (inode_record(ino=99, mode=0o120777, size=5), "target"),
    (inode_record(ino=2, mode=0o040755), "mode"),
    (inode_record(ino=2, size=1 << 63), "size"),
    (inode_record(ino=2, rdev=1 << 63), "rdev"),
    (inode_record(ino=2, marks=records.UNNAMED), "marks"),
    (told(brief.pack_made, 2, ROOT, b"new", 9, 0), "ino"),
    (told(brief.pack_made, 1 << 63, ROOT, b"new", 9, 0), "ino"),
    (told(brief.pack_made, 99, ROOT, b"file", 9, 0), "name"),
    (told(brief.pack_made, 99, FILE, b"new", 9, 0), "folder"),
    (told(brief.pack_made, 99, HUGE, b"new", 9, 0), "size"),
    (told(brief.pack_made, 99, LINKED, b"new", 9, 0), "nlink"),
    (told(brief.pack_made, 99, ROOT, b"new", 9, 0, mode=0o120777, size=5), "target"),
    (told(brief.pack_made, 99, ROOT, b"new", 9, 0, rdev=1 << 63), "rdev"),
    (told(brief.pack_gone, 2, ROOT, b"missing", 0), "name"),
    (told(brief.pack_gone, 1, ROOT, b"file", 0), "name"),
    (told(brief.pack_gone, 2, FILE, b"file", 0), "name"),
    (told(brief.pack_gone, 99, ROOT, b"file", 0), "ino"),
    (told(brief.pack_moved, 2, ROOT, b"missing", ROOT, b"new", 9, 0, 0), "name"),
    (told(brief.pack_moved, 1, ROOT, b"file", ROOT, b"new", 9, 0, 0), "name"),
    (told(brief.pack_moved, 2, ROOT, b"file", ROOT, b"new", 9, 2, 0), "name"),
    (told(brief.pack_moved, 2, ROOT, b"file", FILE, b"new", 9, 0, 0), "folder"),
    (told(brief.pack_moved, 2, ROOT, b"file", ROOT, b"new", 9, 99, 0), "ino"),
    (told(brief.pack_times, 99), "ino"),
    (told(brief.pack_wrote, 99, (0, 0, 0)), "ino"),
    (told(brief.pack_wrote, 1, (0, 0, 0)), "size"),
    (told(brief.pack_wrote, 2, (0, 0, 0), size=1 << 63), "size"),
    (told(brief.pack_wrote, 2, (0, 600, 1)), "index"),
    (told(brief.pack_wrote, 2, (1 << 60, 600, 1)), "count"),
    (told(brief.pack_wrote, 2, (9, 1 << 40, 1)), "pfn"),
    (b"\x12\0\x09\0" + told(brief.pack_gone, 2, ROOT, b"file", 0)[4:], "record"),
    (b"\x13\0\x09\0" + told(brief.pack_moved, 2, ROOT, b"file", ROOT, b"new", 9, 0, 0)[4:], "record"),
    (records.pack_unset(2, b"x")[:-8] + b"y" * 16, "length"),
    (b"\x63\0\0\0\x10\0\0\0" + bytes(8), "kind"),
    (b"\x01\0\0\0\x10\0\0\0" + bytes(8), "record"),
]


@pytest.mark.parametrize(("record", "field"), WRONG, ids=[f"{n}-{field}" for n, (_, field) in enumerate(WRONG)])
def test_records_that_do_not_fit(record: bytes, field: str) -> None:
    with Memory.make(2) as memory:
        tree = memory.tree()
        tree.write(tree.create(1, b"file", 0o644).ino, 0, b"x" * 10_000)
        tree.commit()
        assert tree.journal is not None
        log = tree.journal.log
        position = log.position
        log.write([record])
        log.commit()
        before = image(memory.ram)
        with pytest.raises(FormatError, match=rf"Journal: {field} at position {position}\b"):
            memory.recover(log.live)
        assert image(memory.ram) == before


def test_a_tree_that_another_log_comes_to_holds(memory: Memory, begun: int, seed: int) -> None:
    """Where a change is believed and comes to a tree, that is one like any other: audited, recovered, written to."""
    choice, used, tried = random.Random(seed + 1), pages(memory, begun), 0
    for number in range(50):
        with memory.copy() as other:
            where = f"seed {seed}, number {number}: " + damage(other.ram, used, choice)
            seal(other, begun, used)
            try:
                tree = other.recover(begun)
            except FormatError:
                continue
            tried += 1
            audit(tree)
            driver = Driver(tree, number)
            for _ in range(5):
                driver.step()
            assert state(other.rebuild(begun).tree) == state(tree), where
            audit(tree)
    assert tried > 5
