# SPDX-License-Identifier: GPL-2.0-or-later
from typing import Any

from pkramfs.kernel import iomem
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.spans import Spans
from pkramfs.units import MIB

EXPECTED = """\
00000000-0009ffff : System RAM
000a0000-000fffff : Reserved
00100000-07ffffff : System RAM
  00200000-003fffff : Kernel image
  00400000-00400fff : shmem-a
  00402000-00403fff : shmem-a
"""


def test_the_map_reads_like_proc_iomem() -> None:
    owners = [("shmem-a", Spans([(1024, 1025), (1026, 1028)])), ("Kernel image", Spans([(512, 1024)]))]
    assert iomem.render(FirmwareMap.default(128 * MIB), owners) == EXPECTED


def test_a_tree_in_many_pieces_is_one_line() -> None:
    pieces = Spans((pfn, pfn + 1) for pfn in range(512, 5000, 2))
    text = iomem.render(FirmwareMap.default(128 * MIB), [("shmem-a", pieces)])
    assert "  00200000-01386fff : shmem-a (2244 ranges, 2244 pages)\n" in text


def test_the_map_of_now_shows_what_was_saved_and_withdrawn_since(lab: Any) -> None:
    kernel = lab.up()
    assert iomem.current(kernel) == lab.machine.read_text("iomem")
    lab.preserve("a", 700)
    assert iomem.current(kernel).count(" : a\n") == len(kernel.store.preserved())
    lab.cycle()
    kernel = lab.up()
    assert iomem.current(kernel) == lab.machine.read_text("iomem")
    kernel.store.withdraw(b"a")
    assert " : a\n" not in iomem.current(kernel)
