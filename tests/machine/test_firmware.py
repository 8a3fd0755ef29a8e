# SPDX-License-Identifier: GPL-2.0-or-later
"""Hardware: what can be described, and what is no description."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkramfs.errors import MachineError
from pkramfs.machine.firmware import MAX_NODES, FirmwareMap
from pkramfs.spans import Spans
from pkramfs.units import GIB, KIB, MIB, PAGE_SIZE, TIB


@given(st.integers(128 * MIB, 1 << 46), st.integers(1, MAX_NODES))
def test_a_pc_of_any_size(ram: int, nodes: int) -> None:
    made = FirmwareMap.default(ram, nodes)
    assert 0 <= ram - made.pages * PAGE_SIZE <= MIB
    assert 0 not in made.usable
    assert FirmwareMap.from_json(json.loads(json.dumps(made.to_json()))) == made
    found = made.node_spans()
    assert set(found) == set(range(nodes))
    assert sum(spans.total for spans in found.values()) == made.pages


def test_memory_has_the_usual_holes() -> None:
    made = FirmwareMap.default(6 * GIB)
    assert list(made.usable.scale(PAGE_SIZE)) == [
        (4 * KIB, 640 * KIB),
        (MIB, 3 * GIB),
        (4 * GIB, 7 * GIB),
    ]
    assert made.size == 7 * GIB


def test_16_tib_is_a_few_ranges() -> None:
    assert len(FirmwareMap.default(16 * TIB, 8).usable) == 3


@pytest.mark.parametrize("ram", [0, 64 * MIB - 1, (1 << 46) + 1])
def test_sizes_that_cannot_be(ram: int) -> None:
    with pytest.raises(MachineError, match=r"invalid RAM size .*: give"):
        FirmwareMap.default(ram)


def test_nodes_that_cannot_be() -> None:
    assert len(FirmwareMap.default(64 * MIB, 32).node_spans()) == 32
    for nodes in (0, 33, 65):
        with pytest.raises(MachineError, match=f"invalid number of NUMA nodes {nodes}"):
            FirmwareMap.default(64 * MIB, nodes)


def entry(start: object, end: object, kind: object = "usable") -> dict[str, object]:
    return {"start": start, "end": end, "kind": kind}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "not an object with `map`"),
        ([], "not an object with `map`"),
        ({}, "`map` is not a list of"),
        ({"map": 5}, "`map` is not a list of"),
        ({"map": [5]}, "entry 0 of `map` is not a range"),
        ({"map": [{"start": 0, "end": MIB}]}, "'kind'"),
        ({"map": [entry(0, "1M")]}, "'1M' is not a whole number"),
        ({"map": [entry(0, 1.5e6)]}, "is not a whole number"),
        ({"map": [entry(0, True)]}, "True is not a whole number"),
        ({"map": [entry(0, math.inf)]}, "inf is not a whole number"),
        ({"map": [entry(0, None)]}, "None is not a whole number"),
        ({"map": []}, "there is no usable memory"),
        ({"map": [entry(0, MIB, "reserved")]}, "there is no usable memory"),
        ({"map": [entry(0, PAGE_SIZE)]}, "there is no usable memory"),
        ({"map": [entry(0, MIB, "ram")]}, "is 'ram', expected one of usable, reserved, acpi"),
        ({"map": [entry(MIB, 0)]}, "0x100000-0x0 is not a range"),
        ({"map": [entry(-MIB, MIB)]}, "is not a range"),
        ({"map": [entry(0, 1 << 60)]}, "is not a range"),
        ({"map": [entry(0, 2 * MIB), entry(MIB, 3 * MIB)]}, "0x100000-0x300000 overlaps"),
        ({"map": [entry(0, MIB)], "nodes": [{"start": 0, "end": MIB, "node": 64}]}, "is node 64"),
        ({"map": [entry(0, MIB)], "nodes": [{"start": 0, "end": MIB}]}, "'node'"),
        ({"map": [entry(0, MIB)], "nodes": [{"start": 0, "end": MIB, "node": 0}] * 2}, "overlaps"),
        ({"map": [entry(0, MIB)], "seed": "x"}, "'x' is not a whole number"),
    ],
)
def test_what_is_no_description_is_refused_in_one_line(data: object, reason: str) -> None:
    with pytest.raises(MachineError, match=reason) as refused:
        FirmwareMap.from_json(data)
    assert "\n" not in str(refused.value)


def test_ranges_may_come_in_any_order() -> None:
    made = FirmwareMap.from_json({"map": [entry(2 * MIB, 3 * MIB), entry(0, MIB, "acpi")]})
    assert list(made.usable) == [(512, 768)]


def test_only_whole_pages_are_usable() -> None:
    made = FirmwareMap(((0, 100, "reserved"), (5000, 20000, "usable")))
    assert made.usable == Spans([(2, 4)])


def test_every_page_is_on_one_node() -> None:
    odd = FirmwareMap(((0, MIB, "usable"),), ((0, 5000, 1), (5000, 9000, 2)))
    found = odd.node_spans()
    assert {node: list(spans) for node, spans in found.items()} == {0: [(3, 256)], 1: [(1, 2)], 2: [(2, 3)]}
    assert odd.node_of(np.array([1, 2, 3])).tolist() == [1, 2, 0]
