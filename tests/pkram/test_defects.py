# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong or unguarded in the original, by number (facts, section 9): it cannot happen here."""

import contextlib
import errno
import random

import numpy as np
import pytest

from pkramfs.errors import FormatError, PkramError, StaleError, VersionError
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.pkram import check, format, page, regions, superblock
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans

from .conftest import SUPER_PFN, TREE


def save(store, frames, name, data=b"", runs=(), tree=TREE):
    with store.prepare_save(name, tree_id=tree, frames=frames) as saving:
        with saving.object() as writer:
            writer.write(data)
            if runs:
                writer.save_runs(*zip(*runs, strict=True))
        return saving.finish()


def contents(store, name):
    with store.prepare_load(name) as load:
        return [(one.read(), [column.tolist() for column in one.load_runs()]) for one in load]


def next_kernel(ram, old_pfn, new_pfn, frames):
    """What the end of a kernel and the boot of the next do to the core: list, check, take over, consume."""
    store = Store(ram, old_pfn, contextlib.nullcontext)
    old = superblock.check(ram, old_pfn)
    listed = store.preserved() | Spans([(old_pfn, old_pfn + 1)])
    head = regions.build(ram, listed, frames.allocate_pages, generation=old.generation)
    own = regions.pages_of(ram, head)
    superblock.set_regions(ram, old_pfn, head)
    assert not store.preserved() - regions.read(ram, superblock.check(ram, old_pfn).region_pfn)
    superblock.create(ram, new_pfn, old.generation + 1, superblock.check(ram, old_pfn).node_pfn)
    superblock.consume(ram, old_pfn)
    frames.free(own, np.ones_like(own))
    return Store(ram, new_pfn, contextlib.nullcontext)


def owner(ram, tree):
    """Frames of another owner in page blocks of its own."""
    leases = Leases(ram, 1, 64, contextlib.nullcontext)
    leases.ids[0] = KERNEL
    return Frames(ram, leases, tree)


@pytest.mark.parametrize("seed", range(10))
def test_d1_a_load_that_fails_takes_nothing_and_can_be_tried_again(ram, store, frames, damaged, seed):
    save(store, frames, b"n", b"x" * 9000, [(0, frames.allocate(600)[0][0], 600)])
    good, used = contents(store, b"n"), frames.used_pages
    pages = [p for a, b in store.metadata_pages(b"n") for p in range(a, b) if p != store.nodes()[0].pfn]
    at = (random.Random(seed).choice(pages) << 12) + 33
    ram.bytes[at] ^= 1
    with pytest.raises(FormatError):
        store.prepare_load(b"n")
    with pytest.raises(FormatError):
        store.prepare_load(b"n")
    assert frames.used_pages == used and [node.name for node in store.nodes()] == [b"n"]
    ram.bytes[at] ^= 1
    assert contents(store, b"n") == good
    store.withdraw(b"n")


def test_d2_a_load_leaves_the_only_copy_where_it_is(store, frames):
    save(store, frames, b"n", b"precious")
    for _ in range(3):
        assert contents(store, b"n")[0][0] == b"precious"
    with store.prepare_load(b"n", consume=True) as load:  # PKRAM's own contract, for those who ask
        assert next(iter(load)).read() == b"precious"
    assert store.nodes() == []


@pytest.mark.parametrize("kernels", [2, 3, 10])
def test_d3_a_node_that_nobody_loads_survives_every_kernel(ram, store, frames, damaged, kernels):
    """The original's second range list lacks the data of a node that nobody loaded."""
    ((start, count),) = frames.allocate(700)
    save(store, frames, b"asleep", b"x" * 5000, [(3, start, count)])
    good, pages = contents(store, b"asleep"), store.preserved()
    kernel = owner(ram, 0x5E5E)
    places = [int(pfn) for pfn in kernel.allocate_pages(kernels)]
    old, stores = SUPER_PFN, store
    for generation, new in enumerate(places):
        stores = next_kernel(ram, old, new, kernel)
        assert stores.preserved() == pages | (stores.preserved() - pages)
        assert contents(stores, b"asleep") == good
        other = owner(ram, 0xF00 + generation)
        save(stores, other, b"later %d" % generation, b"y", tree=0xF00 + generation)
        old = new
    assert check.check(ram, old).problems == []
    assert {node.name for node in stores.nodes()} == {b"asleep", *(b"later %d" % n for n in range(kernels))}


def test_d4_a_save_in_progress_is_in_no_list(ram, store, frames):
    """The original drops the node and still lists its frames: they are lost for the next kernel."""
    save(store, frames, b"done", b"x")
    before = store.preserved()
    with store.prepare_save(b"doing", tree_id=TREE + 1, frames=frames) as saving, saving.object() as writer:
        writer.write(b"y" * 100_000)
        assert store.preserved() == before
        assert store.preserved_ids() == {TREE}


@pytest.mark.parametrize("ranges", [1, 251, 252, 253, 254, 504, 63_503, 63_504, 63_505, 65_025])
def test_d8_the_region_list_holds_every_range_and_itself(wide, wide_frames, ranges):
    """The original estimates the pages of the list once: from 65025 ranges on the tail may be lost."""
    first = 1 << 20
    starts = first + 2 * np.arange(ranges, dtype=np.uint64)
    spans = Spans.from_runs(starts, np.ones_like(starts))
    head = regions.build(wide, spans, wide_frames.allocate_pages)
    own = regions.pages_of(wide, head)
    assert regions.read(wide, head) == spans | Spans.from_runs(own, np.ones_like(own))


def test_d8_pages_of_the_list_that_join_ranges(ram, frames):
    """Each page that is added may also join two ranges; the list is right whichever way it goes."""
    for spread in (1, 2, 3):
        pages = frames.allocate_pages(3000)
        some = pages[::spread]
        spans = Spans.from_runs(some, np.ones_like(some))
        rest = iter(pages[1::spread].tolist() if spread > 1 else frames.allocate_pages(50).tolist())
        head = regions.build(ram, spans, lambda n: np.array([next(rest) for _ in range(n)], dtype=np.uint64))  # noqa: B023
        own = regions.pages_of(ram, head)
        assert regions.read(ram, head) == spans | Spans.from_runs(own, np.ones_like(own))


@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 1, 2), (0, 2)])
def test_d9_objects_without_pages_first_last_and_alone(store, frames, empty):
    """In the original an empty file inherits the freed links of the one before it."""
    ((start, _),) = frames.allocate(30)
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        for number in range(3):
            with saving.object() as writer:
                if number not in empty:
                    writer.write(b"%d" % number)
                    writer.save_runs([number], [start + 10 * number], [5])
        saving.finish()
    expected = [
        (b"", [[], [], []]) if number in empty else (b"%d" % number, [[number], [start + 10 * number], [5]])
        for number in range(3)
    ]
    assert contents(store, b"n") == expected


def test_d13_the_super_block_is_found_missing_in_the_region_list(ram, store, frames):
    save(store, frames, b"n", b"x")
    head = regions.build(ram, store.preserved(), frames.allocate_pages)
    superblock.set_regions(ram, SUPER_PFN, head)
    assert any("Regions" in line and "missing" in line for line in check.check(ram, SUPER_PFN).problems)
    superblock.set_regions(ram, SUPER_PFN, 0)


def test_d15_a_page_that_was_copied_elsewhere_does_not_pass(ram, store, frames, damaged):
    """The checksum's seed is the page's place; the original has no checksum and follows any pfn."""
    node = save(store, frames, b"n", b"x")
    copy = int(frames.allocate_pages(1)[0])
    ram.copy(node.pfn, copy)
    page.write_word(ram, SUPER_PFN, format.NEXT, copy)
    with pytest.raises(FormatError, match="checksum"):
        store.nodes()


def test_d19_one_frame_in_two_objects_or_twice_in_one(store, frames):
    ((start, _),) = frames.allocate(100)
    used = frames.used_pages
    for first, second in (((0, start, 50), (90, start + 49, 2)), ((0, start, 1), (1, start, 1))):
        for together in (False, True):
            with pytest.raises(PkramError) as caught, store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
                with saving.object() as writer:
                    writer.save_runs(*zip(*([first, second] if together else [first]), strict=True))
                with saving.object() as writer:
                    if not together:
                        writer.save_runs(*zip(second, strict=True))
                saving.finish()
            assert caught.value.errno == errno.EEXIST
            assert frames.used_pages == used and store.nodes() == []


def test_d31_a_consumed_super_block_restores_nothing(ram, store, frames, damaged):
    save(store, frames, b"n", b"x")
    for _ in range(2):
        superblock.consume(ram, SUPER_PFN)
        with pytest.raises(StaleError):
            superblock.check(ram, SUPER_PFN)


def test_d32_an_empty_super_block_is_not_an_invalid_one(ram, store):
    found = superblock.check(ram, SUPER_PFN)
    assert (found.node_pfn, found.region_pfn) == (0, 0)
    assert store.nodes() == [] and store.preserved() == Spans() and store.free() == 0


def test_d33_nodes_are_listed_with_sizes_and_freed_by_name(store, frames):
    for number in range(4):
        save(store, frames, b"%d" % number, b"x" * 5000 * number, tree=TREE + number)
    sizes = {node.name: node.pages for node in store.nodes()}
    assert store.free([b"2"]) == sizes.pop(b"2")
    assert store.withdraw(TREE + 1).name == b"1"
    del sizes[b"1"]
    with pytest.raises(PkramError) as caught:
        store.free([b"2"])
    assert caught.value.errno == errno.ENOENT
    with store.prepare_load(b"3"), store.prepare_save(b"4", tree_id=TREE, frames=frames):
        for busy in (b"3", b"4"):
            with pytest.raises(PkramError) as caught:
                store.free([busy])
            assert caught.value.errno == errno.EBUSY
        assert store.free() == sizes.pop(b"0"), "all that nobody saves or loads"
    assert {node.name: node.pages for node in store.nodes()} == sizes


def test_d35_an_object_with_nothing_in_it_is_an_object(store, frames):
    """The original answers EINVAL for ever, and the object stays in the way of the others."""
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        with saving.object():
            pass
        saving.finish()
    assert contents(store, b"n") == [(b"", [[], [], []])]


def test_a_node_without_objects_is_a_node(store, frames):
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        saving.finish()
    assert contents(store, b"n") == []


# -- moments at which things are refused (facts 10.10) --------------------------------------------------


def test_the_states_of_a_name(store, frames):
    with store.prepare_save(b"a", tree_id=TREE, frames=frames) as saving:
        for wrong, code in (
            (lambda: store.prepare_save(b"a", tree_id=TREE, frames=frames), errno.EEXIST),
            (lambda: store.prepare_load(b"a"), errno.EBUSY),
            (lambda: store.withdraw(b"a"), errno.EBUSY),
        ):
            with pytest.raises(PkramError) as caught:
                wrong()
            assert caught.value.errno == code
        node = saving.finish()
    assert node.name == b"a"
    for late in (saving.finish, saving.object):
        with pytest.raises(PkramError) as caught:
            late()
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(PkramError) as caught:
        store.prepare_save(b"a", tree_id=TREE, frames=frames)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(PkramError) as caught:
        store.prepare_load(b"b")
    assert caught.value.errno == errno.ENOENT


def test_objects_come_one_after_the_other(store, frames):
    with store.prepare_save(b"n", tree_id=TREE, frames=frames) as saving:
        first = saving.object()
        with pytest.raises(PkramError) as caught:
            saving.object()
        assert caught.value.errno == errno.EBUSY
        first.finish()
        saving.object().finish()
        saving.finish()
    assert store.nodes()[0].objects == 2


def test_two_saves_of_one_name_from_two_processes(ram, store, frames):
    """The second to publish is refused, and leaves nothing: the list is looked at under the lock."""
    elsewhere, theirs = Store(ram, SUPER_PFN, contextlib.nullcontext), owner(ram, 0x7777)
    with elsewhere.prepare_save(b"n", tree_id=0x7777, frames=theirs) as late:
        save(store, frames, b"n", b"mine")
        with pytest.raises(PkramError) as caught:
            late.finish()
        assert caught.value.errno == errno.EEXIST
    assert contents(store, b"n")[0][0] == b"mine" and theirs.used_pages == 0


@pytest.mark.parametrize("name", ["nodes", "preserved", "preserved_ids", "free"])
def test_switched_off_everything_is_enodev(ram, frames, name):
    """Rows 1 and 20: pkram=off, or a crash kernel."""
    backed = ram.backed
    off = Store(ram, None, contextlib.nullcontext)
    calls = [
        getattr(off, name),
        lambda: off.find(b"n"),
        lambda: off.prepare_save(b"n", tree_id=TREE, frames=frames),
        lambda: off.prepare_load(b"n"),
        lambda: off.withdraw(b"n"),
        lambda: off.metadata_pages(b"n"),
    ]
    for call in calls:
        with pytest.raises(PkramError) as caught:
            call()
        assert caught.value.errno == errno.ENODEV
    assert ram.backed == backed


def test_another_version_is_refused_by_name(ram, store, damaged):
    for field, value in (("version", 2), ("features", 1)):
        at = (SUPER_PFN << 12) + format.SUPER.offset(field)
        before = bytes(ram.page(SUPER_PFN))
        ram.bytes[at : at + 4] = value.to_bytes(4, "little")
        page.seal_page(ram, SUPER_PFN)
        with pytest.raises(VersionError, match=field):
            superblock.check(ram, SUPER_PFN)
        ram.page(SUPER_PFN)[:] = before


def test_a_super_block_outside_of_memory_is_refused(ram, store):
    usable = Spans([(1, 9), (10, ram.pages)])
    for pfn in (0, -1, SUPER_PFN, ram.pages, 1 << 60):
        with pytest.raises(FormatError):
            superblock.check(ram, pfn, usable)
