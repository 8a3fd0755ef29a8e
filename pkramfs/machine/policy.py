# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory policy of a mount (`mpol=`): the NUMA nodes from which new memory comes.

    default, local           anywhere: a daemon runs on no node of its machine
    prefer:1                 node 1 while it has some, then any
    bind:0,2-3               these nodes only, then ENOSPC
    interleave[:LIST]        equal shares of these nodes (of all), then any

A policy applies when page blocks are leased, so its unit is 2 MiB, as it is for huge pages. Memory
that is leased already stays where it is: a preserved page keeps its node over any number of kexecs.

Kernel: mm/mempolicy.c (mpol_parse_str), mm/shmem.c (shmem_get_sbmpol)
"""

from pkramfs.errors import UsageError
from pkramfs.machine.firmware import MAX_NODES, FirmwareMap
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

Share = tuple[Spans, int]
"""Free blocks, and how many of them to take."""


def node_blocks(hardware: FirmwareMap) -> dict[int, Spans]:
    """Return the whole page blocks of each node."""
    return {node: pages.inward(BLOCK_PAGES) for node, pages in hardware.node_spans().items()}


class Policy:
    """The policy of one mount; `nodes` has the blocks of each node that it names."""

    def __init__(self, text: str, nodes: dict[int, Spans]) -> None:
        self.text, self._nodes, self._turn = text, list(nodes.values()), 0
        self._mode = text.partition(":")[0].partition("=")[0]

    @classmethod
    def parse(cls, text: str | None, hardware: FirmwareMap) -> "Policy | None":
        """Parse the value of `mpol=`; return None if it restricts nothing, raise UsageError for unknown nodes."""
        if text is None:
            return None
        mode, _, listed = text.partition(":")
        mode = mode.partition("=")[0]
        if mode in ("default", "local") or (mode == "prefer" and not listed):
            return None
        there = node_blocks(hardware)
        wanted = _numbers(text, listed) if listed else sorted(there)
        if mode == "bind" and not listed:
            raise UsageError("mount option mpol=bind: which nodes? write mpol=bind:LIST")
        if mode == "prefer" and len(wanted) > 1:
            raise UsageError(f"mount option mpol={text}: prefer names one node")
        for node in wanted:
            if node not in there:
                raise UsageError(
                    f"mount option mpol={text}: there is no node {node}; "
                    f"the machine has {', '.join(map(str, sorted(there)))}"
                )
        return cls(text, {node: there[node] for node in wanted})

    def shares(self, free: Spans, count: int) -> list[Share]:
        """Divide `count` blocks among sets of free blocks; what one share takes is not free for the next.

        The shares are `count` blocks in sum, or fewer if the policy allows no more.
        """
        size, turn = len(self._nodes), self._turn
        if self._mode in ("bind", "prefer"):
            wanted = [count] * size  # the first node that has it
        else:
            wanted = [count // size + ((number - turn) % size < count % size) for number in range(size)]
            self._turn = (turn + count) % size
        shares, left = [], count
        for node, most in zip(self._nodes, wanted, strict=True):
            room = free & node
            taken = min(most, room.total, left)
            shares.append((room, taken))
            left -= taken
        return shares if self._mode == "bind" or not left else [*shares, (free, left)]


def _numbers(text: str, listed: str) -> list[int]:
    """Parse a list of nodes, `0,2-3`."""
    found: set[int] = set()
    for part in listed.split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError:
            raise UsageError(f"mount option mpol={text}: {part!r} is no node and no range of nodes") from None
        if low > high or high >= MAX_NODES:
            raise UsageError(f"mount option mpol={text}: {part!r} is no range of nodes")
        found.update(range(low, high + 1))
    return sorted(found)
