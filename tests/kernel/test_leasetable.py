# SPDX-License-Identifier: GPL-2.0-or-later
"""The lease table as boot writes it."""

from typing import Any

import pytest

from pkramfs.errors import FormatError
from pkramfs.kernel import leasetable
from pkramfs.kernel.incoming import IncomingNode
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

B = BLOCK_PAGES
USABLE = Spans([(1, 160), (256, 20 * B)])


def write(ram: Any, nodes: list[IncomingNode], kernel: Spans | None = None) -> list[int]:
    kernel = kernel or Spans([(B, 2 * B + 1)])
    leasetable.write(ram, (256, 257), 24, USABLE, kernel, Spans([(19 * B, 20 * B)]), nodes)
    return [int(word) for word in leasetable.lease_view(ram, 256, 24)]


def test_holes_kernel_reserve_and_trees(lab: Any) -> None:
    nodes = [
        IncomingNode("a", 1000, 5 * B, Spans([(5 * B, 5 * B + 3), (6 * B + 511, 6 * B + 512)])),
        IncomingNode("b", 2000, 9 * B, Spans([(9 * B + 7, 9 * B + 8)])),
    ]
    free = [0] * 2
    expected = [2, 1, 1, *free, 1000, 1000, *free, 2000, *[0] * 9, 3, 2, 2, 2, 2]
    ram = lab.machine.ram()
    ram.poison(Spans([(256, 257)]))
    assert write(ram, nodes) == expected


@pytest.mark.parametrize("spans", [Spans([(B + 1, B + 2)]), Spans([(5 * B + 9, 5 * B + 10)]), Spans([(100, 101)])])
def test_a_block_with_two_owners_is_damage(lab: Any, spans: Spans) -> None:
    nodes = [IncomingNode("a", 1000, 77, Spans([(5 * B, 5 * B + 1)])), IncomingNode("b", 2000, 99, spans)]
    with pytest.raises(FormatError, match=r"Node at pfn 63: pages is page block .*, expected blocks of its own"):
        write(lab.machine.ram(), nodes)


def test_only_what_is_taken_is_written(lab: Any) -> None:
    ram = lab.machine.ram()
    blocks = 512 * 100
    usable = Spans([(256, blocks * B)])
    leasetable.write(ram, (1024, 1124), blocks, usable, Spans([(B, 2 * B)]), Spans(), [])
    assert ram.data_spans(1024, 1124) == Spans([(1024, 1025)])
