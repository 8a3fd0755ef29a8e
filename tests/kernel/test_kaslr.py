# SPDX-License-Identifier: GPL-2.0-or-later
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pkramfs.kernel import kaslr
from pkramfs.spans import Spans


def every(slots: kaslr.Slots) -> list[int]:
    return [slots[i] for i in range(slots.total)]


@given(
    st.lists(st.booleans(), min_size=1, max_size=60),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 20),
)
def test_slots_are_those_that_trying_every_address_finds(free: list[bool], size: int, align: int, minimum: int) -> None:
    brute = [
        at for at in range(len(free) - size + 1) if at >= minimum and at % align == 0 and all(free[at : at + size])
    ]
    assert every(kaslr.find_slots(Spans.from_mask(free), size, align, minimum=minimum)) == brute


def test_no_room_is_no_choice() -> None:
    slots = kaslr.find_slots(Spans([(1, 3), (5, 7)]), 4, 1)
    assert slots.total == 0
    assert kaslr.choose(slots, 1, 1) is None
    assert kaslr.choose(kaslr.find_slots(Spans(), 1, 1), 1, 1) is None


def test_the_choice_is_repeatable_and_differs_by_boot() -> None:
    slots = kaslr.find_slots(Spans([(0, 100000)]), 16, 16)
    assert kaslr.choose(slots, 7, 3) == kaslr.choose(slots, 7, 3)
    assert len({kaslr.choose(slots, 7, boot) for boot in range(20)}) > 15
    assert len({kaslr.choose(slots, seed, 1) for seed in range(20)}) > 15


def test_the_choice_is_uniform_over_slots() -> None:
    # two spans of very different size: 1 slot and 9 slots
    slots = kaslr.find_slots(Spans([(0, 4), (100, 112)]), 4, 1)
    assert slots.total == 10
    seen = Counter(kaslr.choose(slots, 42, boot) for boot in range(5000))
    assert set(seen) == set(every(slots))
    chi = sum((n - 500) ** 2 / 500 for n in seen.values())
    assert chi < 27.9, "chi-square over 9 degrees of freedom, p = 0.001"
