# SPDX-License-Identifier: GPL-2.0-or-later
"""mpol=: which nodes new page blocks come from."""

import contextlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkramfs.errors import ExhaustedError, UsageError
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import Leases
from pkramfs.machine.policy import Policy, node_blocks
from pkramfs.machine.ram import Ram
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, MIB

MACHINE = FirmwareMap.default(128 * MIB, nodes=4)
TREE = 4711


@pytest.fixture
def four(ram: Ram) -> Leases:
    """64 blocks on four nodes of 16; block 0 has the table."""
    table = Leases(ram, 1, 64, contextlib.nullcontext)
    table.ids[0] = 1
    return table


def on_nodes(leases: Leases) -> list[int]:
    return [counts["tree"] for counts in leases.counts_in(node_blocks(MACHINE)).values()]


@pytest.mark.parametrize("text", [None, "default", "local", "prefer"])
def test_no_wish(text: str | None) -> None:
    assert Policy.parse(text, MACHINE) is None


@pytest.mark.parametrize(
    ("text", "count", "nodes"),
    [
        ("prefer:2", 5, [0, 0, 5, 0]),
        ("prefer:2", 20, [4, 0, 16, 0]),
        ("prefer=static:3", 1, [0, 0, 0, 1]),
        ("bind:1", 16, [0, 16, 0, 0]),
        ("bind:1,3", 20, [0, 16, 0, 4]),
        ("bind:1-2", 32, [0, 16, 16, 0]),
        ("interleave", 10, [3, 3, 2, 2]),
        ("interleave:1,3", 9, [0, 5, 0, 4]),
        ("interleave:1,3", 40, [8, 16, 0, 16]),
        ("weighted interleave:0-3", 8, [2, 2, 2, 2]),
    ],
)
def test_blocks_come_from_the_wanted_nodes(four: Leases, text: str, count: int, nodes: list[int]) -> None:
    assert four.lease(TREE, count, policy=Policy.parse(text, MACHINE)).total == count
    assert on_nodes(four) == nodes


def test_bound_to_a_full_node_is_enospc_and_takes_nothing(four: Leases) -> None:
    policy = Policy.parse("bind:1", MACHINE)
    with pytest.raises(ExhaustedError, match=r"RAM is full for mpol=bind:1: 34\.0 MiB wanted, 32\.0 MiB free"):
        four.lease(TREE, 17, policy=policy)
    assert on_nodes(four) == [0, 0, 0, 0]


def test_single_blocks_take_turns(four: Leases) -> None:
    policy = Policy.parse("interleave:0,2", MACHINE)
    for _ in range(7):
        four.lease(TREE, 1, policy=policy)
    assert on_nodes(four) == [4, 0, 3, 0]


def test_pages_follow(ram: Ram, four: Leases) -> None:
    frames = Frames(ram, four, TREE, Policy.parse("bind:3", MACHINE))
    runs = frames.allocate(5 * BLOCK_PAGES)
    node = MACHINE.node_spans()[3]
    assert all(node.covers(start, start + count) for start, count in runs)
    with pytest.raises(ExhaustedError):
        frames.allocate(12 * BLOCK_PAGES)
    assert frames.used_pages == 5 * BLOCK_PAGES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bind:4", "there is no node 4; the machine has 0, 1, 2, 3"),
        ("bind", "which nodes?"),
        ("prefer:0,1", "prefer names one node"),
        ("bind:3-1", "'3-1' is no range of nodes"),
        ("interleave:0-99999999999", "is no range of nodes"),
        ("bind:1,,2", "'' is no node"),
        ("bind:-1", "'-1' is no node"),
        ("bind:1-", "'1-' is no node"),
    ],
)
def test_wishes_that_cannot_be(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)):
        Policy.parse(text, MACHINE)


@given(st.sets(st.integers(0, 63)), st.integers(0, 80), st.sampled_from(["prefer:1", "bind:0,2", "interleave:1-3"]))
def test_shares_are_there_to_be_taken(taken: set[int], count: int, text: str) -> None:
    policy: Any = Policy.parse(text, MACHINE)
    free = Spans((block, block + 1) for block in range(64) if block not in taken)
    shares = policy.shares(free, count)
    assert all(share <= (room & free).total for room, share in shares[: 3 if "inter" in text else 1])
    wanted = sum(share for _, share in shares)
    allowed = free if "bind" not in text else free & (node_blocks(MACHINE)[0] | node_blocks(MACHINE)[2])
    assert wanted == (min(count, allowed.total) if "bind" in text else count)
