# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures are the tests: what a list looks like before a call, and after it.

    mem("|..RR..PP  ..|")     one character is 1 MiB
         . free memory   R reserved   P preserved   (blank) no memory   r, p: reserved, but no memory
         N NOMAP         H HOTPLUG    M MIRROR      digits in a second picture: the node

Searches run in both directions; the model at the end is one byte a unit and knows no regions.
"""

import errno
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkramfs.errors import ExhaustedError, PkramError
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.memblock import ANYWHERE, NO_NODE, Flag, Memblock, Region, Regions
from pkramfs.spans import Spans
from pkramfs.units import GIB, MIB, PAGE_SIZE

MEMORY = {"N": Flag.NOMAP, "H": Flag.HOTPLUG, "M": Flag.MIRROR}


def mem(picture: str, nodes: str = "", *, bottom_up: bool = False) -> Memblock:
    """The lists that a picture shows."""
    made = Memblock(bottom_up=bottom_up)
    for at, what in enumerate(inside(picture)):
        if what not in " rp":
            made.add(at * MIB, MIB, flags=MEMORY.get(what, Flag.NONE))
        if what in "Rr":
            made.reserve(at * MIB, MIB)
        if what in "Pp":
            made.reserve(at * MIB, MIB, flags=Flag.PRESERVED)
    for at, nid in enumerate(inside(nodes) if nodes else ""):
        made.set_node(at * MIB, MIB, int(nid))
    return made


def inside(picture: str) -> str:
    assert picture[0] == picture[-1] == "|"
    return picture[1:-1]


def draw(block: Memblock, width: int) -> str:
    """The picture of lists."""
    shown = [" "] * width
    letters = {flag: letter for letter, flag in MEMORY.items()}
    for region in block.memory:
        shown[region.base // MIB : region.end // MIB] = letters.get(region.flags, ".") * (region.size // MIB)
    for region in block.reserved:
        letter = "P" if region.flags & Flag.PRESERVED else "R"
        for at in range(region.base // MIB, region.end // MIB):
            shown[at] = letter.lower() if shown[at] == " " else letter
    return f"|{''.join(shown)}|"


def draw_nodes(regions: Regions, width: int) -> str:
    shown = [" "] * width
    for region in regions:
        shown[region.base // MIB : region.end // MIB] = ("-" if region.nid < 0 else str(region.nid)) * (
            region.size // MIB
        )
    return f"|{''.join(shown)}|"


Call = Callable[[Memblock], object]


def call(verb: str, at: int, size: int) -> Call:
    return lambda block: getattr(block, verb)(at * MIB, size * MIB)


# -- the lists ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "what", "after", "regions"),
    [
        # the new one stands alone
        ("|..  ......|", call("add", 3, 0), "|..  ......|", 2),
        ("|..     ...|", call("add", 4, 1), "|..  .  ...|", 3),
        # it touches one neighbour, or closes the gap between two
        ("|..     ...|", call("add", 2, 1), "|...    ...|", 2),
        ("|..     ...|", call("add", 6, 1), "|..    ....|", 2),
        ("|..     ...|", call("add", 2, 5), "|..........|", 1),
        # it overlaps the end of one, the start of another, all of several
        ("|...    ...|", call("add", 1, 4), "|.....  ...|", 2),
        ("|...    ...|", call("add", 5, 4), "|...  .....|", 2),
        ("|. . . .   |", call("add", 0, 8), "|........  |", 1),
        # it lies within
        ("|..........|", call("add", 3, 3), "|..........|", 1),
        # other flags are left as they are, and keep neighbours apart
        ("|..N..     |", call("add", 0, 6), "|..N...    |", 3),
        ("|..........|", call("remove", 0, 3), "|   .......|", 1),
        ("|..........|", call("remove", 7, 9), "|.......   |", 1),
        ("|..........|", call("remove", 4, 2), "|....  ....|", 2),
        ("|... .. ...|", call("remove", 2, 6), "|..      ..|", 2),
        ("|..      ..|", call("remove", 3, 4), "|..      ..|", 2),
        ("|..........|", call("remove", 0, 10), "|          |", 0),
        ("|..........|", lambda b: b.cap(2 * MIB, 5 * MIB), "|  .....   |", 1),
    ],
)
def test_memory(before: str, what: Call, after: str, regions: int) -> None:
    block = mem(before)
    what(block)
    assert draw(block, 10) == after
    assert len(block.memory) == regions
    what(block)  # repeated: no harm
    assert draw(block, 10) == after


@pytest.mark.parametrize(
    ("before", "what", "after", "regions"),
    [
        ("|..........|", call("reserve", 2, 3), "|..RRR.....|", 1),
        ("|..RR......|", call("reserve", 4, 2), "|..RRRR....|", 1),
        ("|..RR..RR..|", call("reserve", 3, 4), "|..RRRRRR..|", 1),
        ("|..RR..    |", call("reserve", 5, 3), "|..RR.Rrr  |", 2),
        ("|..RRRR....|", call("free", 2, 1), "|...RRR....|", 1),
        ("|..RRRR....|", call("free", 3, 2), "|..R..R....|", 2),
        ("|..RR..RR..|", call("free", 0, 10), "|..........|", 0),
        # what is preserved stays apart from what is reserved beside it, and is not overwritten
        ("|..PP......|", call("reserve", 4, 2), "|..PPRR....|", 2),
        ("|..PP......|", call("reserve", 0, 6), "|RRPPRR....|", 3),
        ("|..PPPP....|", call("free", 3, 1), "|..P.PP....|", 2),
    ],
)
def test_reserved(before: str, what: Call, after: str, regions: int) -> None:
    block = mem(before)
    what(block)
    assert draw(block, 10) == after
    assert len(block.reserved) == regions


def test_flags_split_and_join() -> None:
    block = mem("|..........|")
    block.mark(3 * MIB, 2 * MIB, Flag.NOMAP)
    assert draw(block, 10) == "|...NN.....|"
    assert len(block.memory) == 3
    block.clear(4 * MIB, 3 * MIB, Flag.NOMAP)
    assert draw(block, 10) == "|...N......|"
    block.clear(0, 10 * MIB, Flag.NOMAP)
    assert len(block.memory) == 1


def test_nodes_split_and_join() -> None:
    block = mem("|..........|", "|0001111222|")
    assert draw_nodes(block.memory, 10) == "|0001111222|"
    assert len(block.memory) == 3
    block.set_node(3 * MIB, 4 * MIB, 0)
    assert [region.nid for region in block.memory] == [0, 2]


def test_trimming_keeps_what_is_aligned() -> None:
    block = mem("|.... .   .... ......|")
    block.trim(4 * MIB)
    assert draw(block, 20) == "|....            ....|"


def test_totals_and_questions() -> None:
    block = mem("|..RR  PP..|")
    assert (block.memory.total, block.reserved.total) == (8 * MIB, 4 * MIB)
    assert block.is_memory(0, 4 * MIB) and not block.is_memory(0, 5 * MIB)
    assert block.is_reserved(2 * MIB, 2 * MIB) and not block.is_reserved(2 * MIB, 3 * MIB)
    assert block.overlaps(3 * MIB, 3 * MIB) and not block.overlaps(4 * MIB, 2 * MIB)
    assert block.is_preserved(0, 10 * MIB) and not block.is_preserved(0, 6 * MIB)
    assert list(block.free_spans()) == [(0, 2 * MIB), (8 * MIB, 10 * MIB)]


def test_a_dump_shows_every_region() -> None:
    assert mem("|..RP|", "|0011|").dump() == [
        "memory size = 0x400000 reserved size = 0x200000",
        "memory.cnt = 2",
        "memory[0] [0x0000000000000000-0x00000000001fffff], 0x200000 bytes on node 0 flags: 0x0",
        "memory[1] [0x0000000000200000-0x00000000003fffff], 0x200000 bytes on node 1 flags: 0x0",
        "reserved.cnt = 2",
        "reserved[0] [0x0000000000200000-0x00000000002fffff], 0x100000 bytes flags: 0x0",
        "reserved[1] [0x0000000000300000-0x00000000003fffff], 0x100000 bytes flags: 0x8",
    ]


# -- the search, in both directions ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "size", "align", "top_down", "bottom_up"),
    [
        ("|R.........|", 2, 1, "|R.......RR|", "|RRR.......|"),
        ("|R....RR...|", 3, 1, "|R....RRRRR|", "|RRRR.RR...|"),
        ("|R....RR...|", 4, 1, "|RRRRRRR...|", "|RRRRRRR...|"),
        ("|R...RR....|", 2, 4, "|R...RR..RR|", "|R...RR..RR|"),
        ("|R...RRRR  |", 2, 4, "|R...RRRR  |", "|R...RRRR  |"),
        ("|R.........|", 2, 4, "|R.......RR|", "|R...RR....|"),
        ("|R.....  ..|", 3, 2, "|R.RRR.  ..|", "|R.RRR.  ..|"),
        ("|RPP.PP.PP.|", 1, 1, "|RPP.PP.PPR|", "|RPPRPP.PP.|"),
        ("|R.N.......|", 2, 1, "|R.N.....RR|", "|R.NRR.....|"),
        ("|RNNNNNNN..|", 2, 1, "|RNNNNNNNRR|", "|RNNNNNNNRR|"),
    ],
)
@pytest.mark.parametrize("direction", ["top_down", "bottom_up"])
def test_allocating(before: str, size: int, align: int, top_down: str, bottom_up: str, direction: str) -> None:
    block = mem(before, bottom_up=direction == "bottom_up")
    after = {"top_down": top_down, "bottom_up": bottom_up}[direction]
    if after == before:
        with pytest.raises(ExhaustedError) as refused:
            block.allocate(size * MIB, align * MIB)
        assert refused.value.errno == errno.ENOMEM
    else:
        block.allocate(size * MIB, align * MIB)
    assert draw(block, 10) == after


@pytest.mark.parametrize(("bottom_up", "after"), [(False, "|R...RR....|"), (True, "|R..RR.....|")])
def test_limits(bottom_up: bool, after: str) -> None:
    block = mem("|R.........|", bottom_up=bottom_up)
    block.allocate(2 * MIB, minimum=3 * MIB, maximum=6 * MIB)
    assert draw(block, 10) == after


@pytest.mark.parametrize("bottom_up", [False, True])
def test_a_minimum_is_given_up_before_the_search_is(bottom_up: bool) -> None:
    block = mem("|R..RRRRRRR|", bottom_up=bottom_up)
    assert block.allocate(2 * MIB, minimum=3 * MIB) == MIB
    with pytest.raises(ExhaustedError, match=r"early boot: no 1\.0 MiB aligned to 4\.0 KiB are free; 0 B are, in 0"):
        block.allocate(MIB)


def test_the_limit_of_all_allocations() -> None:
    block = mem("|R.........|")
    block.limit = 5 * MIB
    assert block.allocate(MIB) == 4 * MIB


@pytest.mark.parametrize(("bottom_up", "place"), [(False, 2), (True, 1)])
def test_page_0_means_none(bottom_up: bool, place: int) -> None:
    block = Memblock(bottom_up=bottom_up)
    block.add(0, 3 * PAGE_SIZE)
    assert block.allocate(PAGE_SIZE) == place * PAGE_SIZE
    block.allocate(PAGE_SIZE)
    assert block.find(PAGE_SIZE) is None


@pytest.mark.parametrize(
    ("nid", "exact", "top_down", "bottom_up"),
    [
        (0, False, "|R.RR......|", "|RRR.......|"),
        (1, False, "|R...RR....|", "|R...RR....|"),
        (2, False, "|R.......RR|", "|R.....RR..|"),
        (3, False, "|R.......RR|", "|RRR.......|"),  # a node without memory: any other
        (3, True, "", ""),
    ],
)
@pytest.mark.parametrize("direction", ["top_down", "bottom_up"])
def test_nodes(nid: int, exact: bool, top_down: str, bottom_up: str, direction: str) -> None:
    block = mem("|R.........|", "|0000112222|", bottom_up=direction == "bottom_up")
    after = {"top_down": top_down, "bottom_up": bottom_up}[direction]
    if not after:
        with pytest.raises(ExhaustedError, match="on node 3"):
            block.allocate(2 * MIB, nid=nid, exact=exact)
        return
    block.allocate(2 * MIB, nid=nid, exact=exact)
    assert draw(block, 10) == after


def test_a_place_is_on_one_node() -> None:
    block = mem("|R.........|", "|0000111111|")
    assert block.find(7 * MIB) is None
    assert block.find(6 * MIB) == 4 * MIB
    assert list(block.free_spans()) == [(MIB, 10 * MIB)]
    assert list(block.free_spans(0)) == [(MIB, 4 * MIB)]


@pytest.mark.parametrize(("bottom_up", "place"), [(False, 7), (True, 4)])
def test_mirrored_memory_is_preferred(bottom_up: bool, place: int) -> None:
    block = mem("|R...MMMM..|", bottom_up=bottom_up)
    block.mirror = True
    assert block.allocate(MIB) == place * MIB
    block.reserve(4 * MIB, 4 * MIB)
    assert block.find(MIB) == (MIB if bottom_up else 9 * MIB)


def test_memory_that_may_go_away_is_not_used_while_it_may() -> None:
    block = mem("|R...HHHHHH|")
    assert block.find(MIB) == 9 * MIB
    block.movable_node = True
    assert block.find(MIB) == 3 * MIB


# -- preserved ranges ------------------------------------------------------------------------------


def rows(regions: Regions) -> list[tuple[int, int, Flag]]:
    return [(r.base, r.size, r.flags) for r in regions]


def test_preserved_ranges_are_merged_and_stay_apart() -> None:
    block = Memblock()
    block.reserve(0, 0x1000)
    block.reserve(0x4000, 0x2000)
    block.merge_preserved(Spans([(0x1000, 0x4000), (0x8000, 0x9000)]))
    assert rows(block.reserved) == [
        (0, 0x1000, Flag.NONE),
        (0x1000, 0x3000, Flag.PRESERVED),
        (0x4000, 0x2000, Flag.NONE),
        (0x8000, 0x1000, Flag.PRESERVED),
    ]
    assert all(region.nid == NO_NODE for region in block.reserved)


@pytest.mark.parametrize(
    ("taken", "preserved"),
    [((0x4000, 0x6000), (0x5000, 0x6000)), ((0x4000, 0x6000), (0x3000, 0x7000)), ((0x4000, 0x6000), (0x3000, 0x4001))],
)
def test_an_overlap_changes_nothing_and_names_both(taken: tuple[int, int], preserved: tuple[int, int]) -> None:
    block = Memblock()
    block.reserve(taken[0], taken[1] - taken[0])
    with pytest.raises(PkramError) as refused:
        block.merge_preserved(Spans([(0x1000, 0x2000), preserved]))
    assert refused.value.errno == errno.EBUSY
    first, _, second = str(refused.value).partition("overlaps")
    assert f"{preserved[0]:#018x}-{preserved[1] - 1:#018x}" in first
    assert f"{taken[0]:#018x}-{taken[1] - 1:#018x}" in second
    assert rows(block.reserved) == [(0x4000, 0x2000, Flag.NONE)]


def test_a_quarter_of_a_million_ranges_are_one_pass() -> None:
    block = Memblock.of(Spans([(0, 1 << 20)]))
    block.reserve_pages(Spans((page, page + 1) for page in range(2, 1 << 19, 4)))
    block.merge_preserved(Spans((page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in range(4, 1 << 19, 4)))
    assert len(block.reserved) == (1 << 17) + (1 << 17) - 1
    assert block.find_beside(Spans(), 3 * PAGE_SIZE) == ((1 << 20) - 3) * PAGE_SIZE


def test_ranges_are_cut_at_the_borders_of_nodes() -> None:
    block = mem("|..PPPP.RR.|", "|0000111222|")
    assert draw_nodes(block.reserved, 10) == "|  ---- -- |"
    block.isolate()
    assert draw_nodes(block.reserved, 10) == "|  0011 22 |"
    assert [(r.base // MIB, r.flags, r.nid) for r in block.reserved] == [
        (2, Flag.PRESERVED, 0),
        (4, Flag.PRESERVED, 1),
        (7, Flag.NONE, 2),
    ]


def test_what_lies_in_no_memory_has_no_node() -> None:
    block = mem("|.... pp...|")
    block.set_node(0, 10 * MIB, 1)
    block.isolate()
    assert draw_nodes(block.reserved, 10) == "|     --   |"


def test_nodes_come_from_the_firmware() -> None:
    hardware = FirmwareMap.default(8 * GIB, nodes=3)
    block = Memblock.of(hardware.usable)
    block.set_nodes(hardware)
    for nid, pages in hardware.node_spans().items():
        assert block.memory.on_node(nid) == pages.scale(PAGE_SIZE)


def test_room_is_found_beside_what_will_be_merged() -> None:
    block = mem("|R......RR.|")
    preserved = Spans([(3 * MIB, 4 * MIB), (9 * MIB, 10 * MIB)])
    assert block.find_beside(preserved, 2 * MIB) == 5 * MIB
    assert block.find_beside(preserved, 3 * MIB) == 4 * MIB
    assert block.find_beside(preserved, 4 * MIB) is None


def test_d21_a_search_from_the_top_ends_although_nothing_fits() -> None:
    block = mem("|PPPPPPPPPP|")
    assert block.find_beside(block.reserved.spans, MIB) is None
    assert mem("|R.R.R.R.R.|").find_beside(Spans(), 2 * MIB) is None


def test_d22_ranges_above_the_limit_do_not_wrap_around() -> None:
    block = mem("|R.........|")
    block.limit = 4 * MIB
    assert block.find_beside(Spans([(8 * MIB, 20 * MIB)]), 3 * MIB) == MIB
    assert block.find_beside(Spans([(8 * MIB, 20 * MIB)]), 4 * MIB) is None
    assert block.find(MIB, minimum=9 * MIB) is None
    assert block.find(ANYWHERE) is None


# -- the model -------------------------------------------------------------------------------------

SIZE = 24
AREA = st.tuples(st.integers(0, SIZE), st.integers(0, 8))
STEP = st.one_of(
    st.tuples(st.sampled_from(["add", "remove", "reserve", "free"]), AREA),
    st.tuples(st.sampled_from(["mark", "clear"]), AREA),
    st.tuples(st.just("set_node"), AREA, st.integers(0, 2)),
    st.tuples(
        st.just("allocate"), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.booleans(), st.none() | st.integers(0, 2)
    ),
)


class Bitmap:
    """One entry a page: is it memory, NOMAP, reserved; whose node."""

    def __init__(self) -> None:
        self.memory = [False] * (SIZE + 8)
        self.nomap = [False] * (SIZE + 8)
        self.reserved = [False] * (SIZE + 8)
        self.nodes = [NO_NODE] * (SIZE + 8)

    def apply(self, verb: str, start: int, count: int, nid: int) -> None:
        for page in range(start, start + count):
            if verb == "add" and not self.memory[page]:
                self.memory[page], self.nomap[page], self.nodes[page] = True, False, NO_NODE
            elif verb == "remove":
                self.memory[page] = False
            elif verb in ("reserve", "free"):
                self.reserved[page] = verb == "reserve"
            elif verb in ("mark", "clear"):
                self.nomap[page] = verb == "mark"
            elif verb == "set_node":
                self.nodes[page] = nid

    def places(self, count: int, align: int, nid: int | None) -> list[int]:
        return [p for p in range(align, SIZE + 8 - count + 1, align) if self._fits(range(p, p + count), nid)]

    def _fits(self, pages: range, nid: int | None) -> bool:
        free = all(self.memory[p] and not self.reserved[p] and not self.nomap[p] for p in pages)
        nodes = {self.nodes[p] for p in pages}
        return free and len(nodes) == 1 and nid in (None, *nodes)


@given(st.lists(STEP, max_size=40))
def test_lists_are_what_a_bitmap_is(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    block, model = Memblock(), Bitmap()
    for step in steps:
        if step[0] == "allocate":
            _, count, align, bottom_up, nid = step
            places = model.places(count, align, nid)
            found = block.find(count * PAGE_SIZE, align * PAGE_SIZE, nid=nid, bottom_up=bottom_up)
            assert found == (places[0 if bottom_up else -1] * PAGE_SIZE if places else None)
            if found is not None:
                assert block.allocate(count * PAGE_SIZE, align * PAGE_SIZE, nid=nid, bottom_up=bottom_up) == found
                model.apply("reserve", found // PAGE_SIZE, count, 0)
            continue
        verb, (start, count), *rest = step
        extra = {"mark": [Flag.NOMAP], "clear": [Flag.NOMAP], "set_node": rest}.get(verb, [])
        getattr(block, verb)(start * PAGE_SIZE, count * PAGE_SIZE, *extra)
        if verb in ("mark", "clear", "set_node"):  # of memory only
            for page in range(start, start + count):
                if model.memory[page]:
                    model.apply(verb, page, 1, rest[0] if rest else 0)
        else:
            model.apply(verb, start, count, 0)
        assert_well_formed(block.memory)
        assert_well_formed(block.reserved)
    assert block.memory.spans == Spans.from_mask(model.memory).scale(PAGE_SIZE)
    assert block.reserved.spans == Spans.from_mask(model.reserved).scale(PAGE_SIZE)
    for region in block.memory:
        for page in range(region.base // PAGE_SIZE, region.end // PAGE_SIZE):
            assert (region.nid, bool(region.flags & Flag.NOMAP)) == (model.nodes[page], model.nomap[page])


def assert_well_formed(regions: Regions) -> None:
    """Sorted, none empty, none overlapping, no two that touch and are alike."""
    found = list(regions)
    assert all(region.size > 0 for region in found)
    for before, after in pairwise(found):
        assert before.end <= after.base
        assert before.end < after.base or (before.flags, before.nid) != (after.flags, after.nid)


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_merging_is_a_union_or_refused(reserved: set[int], preserved: set[int]) -> None:
    block = Memblock()
    for page in reserved:
        block.reserve(page * PAGE_SIZE, PAGE_SIZE)
    wanted = Spans((page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in preserved)
    if reserved & preserved:
        with pytest.raises(PkramError):
            block.merge_preserved(wanted)
        assert not block.reserved.marked(Flag.PRESERVED)
        return
    block.merge_preserved(wanted)
    assert block.reserved.marked(Flag.PRESERVED) == wanted
    assert {p for r in block.reserved for p in range(r.base // PAGE_SIZE, r.end // PAGE_SIZE)} == reserved | preserved


def test_a_region_for_people() -> None:
    assert str(Region(0, 16)) == "[0x0000000000000000-0x000000000000000f], 0x10 bytes flags: 0x0"
