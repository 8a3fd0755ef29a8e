# SPDX-License-Identifier: GPL-2.0-or-later
"""Destinations: found in holes, or checked against whose pages they would overwrite."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkramfs.errors import ConflictError, ExhaustedError
from pkramfs.kernel import segments
from pkramfs.kernel.segments import LOWEST_PFN, Segment
from pkramfs.spans import Spans


def seg(name: str, pages: int, *, align: int = 1, pfn: int = 0) -> Segment:
    return Segment(name, name, pages * 4096, pages, align, pfn)


def test_places_are_taken_from_the_top_and_aligned() -> None:
    room = Spans([(0, 10000)])
    kernel, initrd = segments.place_all([seg("kernel", 100, align=512), seg("initrd", 300)], [room])
    assert (initrd.pfn, kernel.pfn) == (9700, 9216)
    (low,) = segments.place_all([seg("kernel", 100, align=512)], [room], top_down=False)
    assert low.pfn == 512


def test_the_first_mib_is_never_used() -> None:
    with pytest.raises(ExhaustedError, match=r"no place for the a: 4\.0 KiB wanted, the largest of 0 holes"):
        segments.place_all([seg("a", 1)], [Spans([(1, LOWEST_PFN)])])


def test_a_worse_room_is_used_if_the_better_one_is_too_small() -> None:
    best, worse = Spans([(1000, 1004)]), Spans([(1000, 1010), (2000, 2003)])
    assert segments.place_all([seg("a", 4)], [best, worse])[0].pfn == 1000
    a, b = segments.place_all([seg("a", 8), seg("b", 3)], [best, worse])
    assert (a.pfn, b.pfn) == (1002, 2000)
    with pytest.raises(
        ExhaustedError, match=r"no place for the a: 80\.0 KiB wanted, the largest of 1 hole is 16\.0 KiB"
    ):
        segments.place_all([seg("a", 20)], [best, worse])


def test_a_fixed_address_stays() -> None:
    fixed, other = segments.place_all([seg("kernel", 10, pfn=5000), seg("b", 10)], [Spans([(4990, 5010)])])
    assert fixed.pfn == 5000
    assert other.pfn == 4990 or not Spans([(5000, 5010)]).overlaps(other.pfn, other.end)


@given(
    st.lists(st.booleans(), min_size=1, max_size=50),
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 4])), min_size=1, max_size=4),
    st.booleans(),
)
def test_places_lie_in_the_room_apart_and_aligned(
    free: list[bool], wanted: list[tuple[int, int]], top_down: bool
) -> None:
    room = Spans.from_mask(free, LOWEST_PFN)
    asked = [seg(f"s{n}", pages, align=align) for n, (pages, align) in enumerate(wanted)]
    try:
        placed = segments.place_all(asked, [room], top_down=top_down)
    except ExhaustedError:
        return
    assert [s.name for s in placed] == [s.name for s in asked]
    assert all(room.covers(s.pfn, s.end) and s.pfn % s.align == 0 for s in placed)
    assert segments.destinations(placed).total == sum(s.pages for s in placed)


def test_conflicts_say_whose_pages() -> None:
    usable = Spans([(256, 10000)])
    owners = {"node a": Spans([(1000, 1010), (1020, 1030)]), "node b": Spans([(2000, 2001)])}
    segments.check_destinations([seg("x", 10, pfn=990), seg("y", 10, pfn=1010)], usable, owners, "")
    with pytest.raises(ConflictError, match="4 conflicts, the first is z") as caught:
        segments.check_destinations(
            [seg("x", 30, pfn=995), seg("y", 4, pfn=1998), seg("z", 1, pfn=10000)], usable, owners, "go away"
        )
    assert caught.value.conflicts == [
        "z (made by the loader): 4.0 KiB to 0x2710000-0x2710fff (pfn 2710, 1 page): not all of it is usable RAM",
        "x at 0x3e3000: 0x3e8000-0x3f1fff (10 pages) belongs to node a",
        "x at 0x3e3000: 0x3fc000-0x400fff (5 pages) belongs to node a",
        "y at 0x7ce000: 0x7d0000-0x7d0fff (1 page) belongs to node b",
    ]


def test_segments_that_overlap_each_other_are_refused() -> None:
    with pytest.raises(ConflictError, match="overlaps the x"):
        segments.check_destinations([seg("y", 10, pfn=1005), seg("x", 10, pfn=1000)], Spans([(256, 10000)]), {}, "")


def test_json_gives_the_same_segments() -> None:
    found = [seg("kernel", 5, align=512, pfn=77)]
    assert segments.from_json([s.to_json() for s in found]) == found


@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.integers(1, 6),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_d25_a_hole_is_where_trying_every_address_finds_it(
    free: list[bool], pages: int, align: int, top_down: bool
) -> None:
    """Search in both directions; the kernel's own search from below knows nothing of preserved pages."""
    places = [
        LOWEST_PFN + at
        for at in range(len(free) - pages + 1)
        if (LOWEST_PFN + at) % align == 0 and all(free[at : at + pages])
    ]
    room = Spans.from_mask(free, LOWEST_PFN)
    try:
        (found,) = segments.place_all([seg("a", pages, align=align)], [room], top_down=top_down)
    except ExhaustedError:
        assert places == []
        return
    assert found.pfn == (places[-1] if top_down else places[0])


@given(st.lists(st.booleans(), min_size=1, max_size=14), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_what_is_refused_does_not_fit_largest_first(free: list[bool], wanted: list[int]) -> None:
    """Check a refusal against the same rule applied one page at a time."""
    room, taken = list(free), []
    for pages in sorted(wanted, reverse=True):
        places = [at for at in range(len(room) - pages + 1) if all(room[at : at + pages])]
        if not places:
            break
        taken.append(places[-1])
        room[places[-1] : places[-1] + pages] = [False] * pages
    asked = [seg(f"s{n}", pages) for n, pages in enumerate(wanted)]
    try:
        placed = segments.place_all(asked, [Spans.from_mask(free, LOWEST_PFN)])
    except ExhaustedError:
        assert len(taken) < len(wanted)
        return
    assert sorted(s.pfn - LOWEST_PFN for s in placed) == sorted(taken)
