# SPDX-License-Identifier: GPL-2.0-or-later
"""One flipped bit never costs a tree: the lease table, kernel.json and nvram.json are not believed alone."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.cli import verify
from pkramfs.errors import FormatError, MachineError, PkramfsError
from pkramfs.kernel import kernelrecord, nvram, running, staging, succession
from pkramfs.machine import directory, mounts
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import FREE, HOLE, KERNEL, RESERVE, is_tree_id, new_tree_id
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

DOUBT = r"Lease table at pfn \w+: owner of page block \w+ is .*, expected .*; nothing was freed"


def test_a_flipped_bit_leaves_no_tree_id() -> None:
    for tree_id in (new_tree_id() for _ in range(20)):
        assert is_tree_id(tree_id)
        assert not any(is_tree_id(tree_id ^ 1 << bit) for bit in range(64))
    assert not any(is_tree_id(word) for word in (0, 1, 255, 256, 1 << 63))


@pytest.mark.parametrize("when", ["mounted", "damaged"])
def test_a_tree_that_a_dead_daemon_left_is_swept_by_nobody(lab: Any, when: str, monkeypatch: Any) -> None:
    """Not even while somebody mounts it, between two looks at who lives; nor if its entry cannot be read."""
    frames, runs, total = lab.grow(700)
    lock = lab.machine.claim(frames.tree_id)
    lock.write_entry({"name": "a", "journal": runs[0][0]})
    lock.abandon()
    entry = Path(lock.path("json"))
    if when == "damaged":
        entry.write_bytes(entry.read_bytes()[:-9])

    def look_and_mount(directory: str, look: Any = mounts.live_ids) -> set[int]:
        found: set[int] = look(directory)
        if when == "mounted" and not taken:
            taken.append(lab.machine.claim(frames.tree_id))
        return found

    taken: list[mounts.MountLock] = []
    for module in (mounts, directory):
        monkeypatch.setattr(module, "live_ids", look_and_mount)
    assert lab.up().sweep() == 0
    assert lab.up().leases.blocks_of(frames.tree_id)
    assert [crc_of(lab, runs)] == [total]
    monkeypatch.undo()
    for one in taken:
        one.abandon()
    entry.unlink()
    assert lab.up().sweep() > 0  # nothing names it any more


def crc_of(lab: Any, runs: Any) -> int:
    """Return the checksum of pages, as `grow` does."""
    total = 0
    for start, count in runs:
        total = zlib.crc32(lab.up().ram.words(start, count).data, total)
    return total


def block_of(lab: Any, which: str) -> int:
    """Return a block of preserved node a, of a living tree, of the kernel, …"""
    kernel = lab.up()
    if which == "node":
        return int(lab.up().store.find(b"a").pfn // BLOCK_PAGES)
    if which == "free":
        return int(kernel.leases.taken().gaps(0, kernel.info.blocks).starts[0])
    spans = kernel.leases.blocks_of({"hole": HOLE, "kernel": KERNEL, "reserve": RESERVE}[which])
    return int(spans.starts[0])


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("which", ["node", "free", "hole", "kernel", "reserve"])
def test_every_bit_of_a_word_of_the_lease_table(lab: Any, which: str, some: Any) -> None:
    lab.preserve("a", 700)
    lab.preserve("b", 300, seed=2)
    kernel, block = lab.up(), block_of(lab, which)
    good = int(kernel.leases.ids[block])
    before = kernel.ram.backed
    for bit in some(range(64), 16):
        fresh = running.look(lab.machine)
        fresh.leases.ids[block] = good ^ 1 << bit
        with pytest.raises(FormatError, match=DOUBT) as caught:
            fresh.sweep()
        assert f"block {block:x} " in str(caught.value)
        assert verify.check(fresh, [])[1], "verify says so, too"
        fresh.leases.ids[block] = good
    assert lab.intact("a") and lab.intact("b")
    assert kernel.sweep() == 0 and kernel.ram.backed == before


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("word", [FREE, new_tree_id()], ids=["free", "dead"])
@pytest.mark.parametrize("which", ["node", "hole", "kernel", "reserve"])
def test_a_block_that_others_vouch_for_is_never_leased_nor_swept(lab: Any, which: str, word: int) -> None:
    """Damage words to zeros, and to ids that would pass for a dead owner's."""
    lab.preserve("a", 700)
    lab.preserve("b", 300, seed=2)
    kernel, block = running.look(lab.machine), block_of(lab, which)
    kernel.leases.ids[block] = word
    with pytest.raises(FormatError, match=DOUBT):
        kernel.sweep()
    free = kernel.leases.counts()["free"] - (word == FREE)
    taken = kernel.leases.lease(new_tree_id(), free)
    assert block not in taken
    with pytest.raises(PkramfsError, match="RAM is full"):
        kernel.leases.lease(new_tree_id(), 1)
    assert lab.intact("a") and lab.intact("b")


@pytest.mark.usefixtures("damaged")
def test_a_living_tree_s_block_with_a_damaged_word_is_not_punched(lab: Any, some: Any) -> None:
    frames, runs, _ = lab.grow(1500)
    claim = lab.machine.claim(frames.tree_id)
    kernel = lab.up()
    total = lab.fill(runs, 1)
    block = int(kernel.leases.blocks_of(frames.tree_id).starts[0])
    for bit in some(range(64), 16):
        kernel.leases.ids[block] = frames.tree_id ^ 1 << bit
        with pytest.raises(FormatError, match=DOUBT):
            running.look(lab.machine).sweep()
        kernel.leases.ids[block] = frames.tree_id
    kernel.leases.ids[block] = frames.tree_id ^ 1 << 40
    before = [int(kernel.ram.words(start, count).sum()) for start, count in runs]
    frames.free(*zip(*runs, strict=True))
    frames.release_all()
    assert int(kernel.leases.ids[block]) == frames.tree_id ^ 1 << 40, "what is not known to be ours is left alone"
    assert before and total
    claim.release()


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("live", [False, True], ids=["alone", "mounted"])
def test_a_refusal_names_only_commands_that_help(lab: Any, live: bool) -> None:
    frames, _, _ = lab.grow(1500)
    claim = lab.machine.claim(frames.tree_id)
    if not live:
        claim.release()
    kernel = lab.up()
    kernel.leases.ids[int(kernel.leases.blocks_of(frames.tree_id).starts[0])] = frames.tree_id ^ 1 << 40
    with pytest.raises(FormatError, match="pkram-kexec makes the table anew") as refused:
        kernel.sweep()
    assert ("free --damaged" in str(refused.value)) is not live
    running.look(lab.machine).ownership.mend(lambda *_: None)
    if live:
        with pytest.raises(FormatError, match="page block"):
            running.look(lab.machine).sweep()
        claim.release()
    else:
        running.look(lab.machine).sweep()


@pytest.mark.usefixtures("damaged")
def test_a_kexec_makes_the_table_anew(lab: Any) -> None:
    lab.preserve("a", 700)
    kernel, block = lab.up(), block_of(lab, "node")
    kernel.leases.ids[block] = FREE
    kernel = lab.cycle()
    assert kernel.sweep() == 0
    assert lab.intact("a")
    assert verify.check(kernel, [])[1] == []


def test_ids_of_older_releases_are_swept_when_their_lock_file_is_there(lab: Any) -> None:
    """Sweep ids without a check: a dead daemon's lock file says that its word is no damage."""
    kernel, old = lab.up(), 0x1234567890ABCDEF
    assert not is_tree_id(old)
    Frames(kernel.ram, kernel.leases, old).allocate(10)
    Path(lab.machine.path("mounts", f"{old:016x}.lock")).touch()
    assert kernel.sweep() > 0


# -- kernel.json and nvram.json ---------------------------------------------------------------------


def changed(data: Any) -> Iterator[Any]:
    """Yield JSON data with one value changed, for each value, by type."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from (data | {key: other} for other in changed(value))
    elif isinstance(data, list):
        for at, value in enumerate(data):
            yield from ([*data[:at], other, *data[at + 1 :]] for other in changed(value))
        yield [*data, 7] if not data else data[:-1]
    elif isinstance(data, bool):
        yield not data
    elif isinstance(data, int | float):
        yield from (data ^ 1 << bit for bit in (0, 9)) if isinstance(data, int) else (data + 1,)
        yield 0 if data else 5
    elif isinstance(data, str):
        yield data + "x"
    else:
        yield 5


@pytest.mark.usefixtures("damaged")
def test_no_value_of_kernel_json_is_believed_alone(lab: Any) -> None:
    lab.preserve("a", 700)
    good = json.loads(lab.machine.read_text(kernelrecord.NAME) or "")
    for data in changed({key: value for key, value in good.items() if key not in ("report", "layout")}):
        lab.machine.write_json(kernelrecord.NAME, good | data)
        with pytest.raises(MachineError, match=r"kernel\.json is damaged|cannot be read"):
            running.look(lab.machine)
    lab.machine.write_json(kernelrecord.NAME, {key: value for key, value in good.items() if key != "checksum"})
    with pytest.raises(MachineError, match=r"kernel\.json is damaged: its checksum"):
        running.look(lab.machine)
    lab.machine.write_json(kernelrecord.NAME, good)
    assert lab.intact("a")


@pytest.mark.usefixtures("damaged")
def test_a_pending_boot_that_was_damaged_copies_nothing(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 700)
    lab.load()

    def stopped(*_: Any, **__: Any) -> None:
        raise MachineError("stopped")

    with monkeypatch.context() as patched, pytest.raises(MachineError, match="stopped"):
        patched.setattr(staging, "copy_into_ram", stopped)
        lab.execute()
    good = lab.machine.read_json(nvram.NAME)
    kernel = next(s for s in good["pending"]["segments"] if s["name"] == "kernel")
    kernel["pfn"] ^= 1 << 9
    lab.machine.write_json(nvram.NAME, good)
    with pytest.raises(MachineError, match=r"nvram\.json is damaged: its checksum"):
        lab.up()
    kernel["pfn"] ^= 1 << 9
    lab.machine.write_json(nvram.NAME, good)
    assert lab.up().generation == 2
    assert lab.intact("a")


@pytest.mark.usefixtures("damaged")
def test_taking_over_punches_nothing_that_is_preserved(lab: Any) -> None:
    lab.preserve("a", 700)
    kernel = lab.up()
    node = kernel.store.find(b"a")
    info = kernelrecord.read(lab.machine)
    object.__setattr__(info, "stale", ((node.pfn, node.pfn + 1),))
    with pytest.raises(FormatError, match="in use, expected pages that only boot needed"):
        succession.take_over(lab.machine, info)
    object.__setattr__(info, "stale", ())
    object.__setattr__(info, "old_super_pfn", node.pfn)
    with pytest.raises(FormatError, match="expected a super block to be consumed"):
        succession.take_over(lab.machine, info)
    assert lab.intact("a")


def test_the_next_kernel_is_not_put_where_a_node_is(lab: Any) -> None:
    """Choose destinations outside of what nodes name, although the table calls the block free."""
    lab.preserve("a", 700)
    kernel = lab.up()
    nodes = kernel.ownership.guarded()
    good = {block: int(kernel.leases.ids[block]) for start, end in nodes for block in range(start, end)}
    for block in good:
        kernel.leases.ids[block] = FREE
    report = lab.load()
    for block, word in good.items():
        kernel.leases.ids[block] = word
    pages = Spans((s.pfn, s.end) for s in report.loaded.segments)
    assert not pages & kernel.store.preserved()
    assert os.path.exists(lab.machine.path(staging.KEXEC_JSON))
