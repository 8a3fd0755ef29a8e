# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a machine at power-on: the firmware's map, with holes, and NUMA nodes.

    0      640K  1M                 3G           4G                     top
    |usable|.....|usable            |............|usable                |

The map is part of machine.json: like DIMMs it survives a kexec. Entries are byte ranges of a kind
(`usable`, `reserved`, `acpi`); what no entry names is a hole. The first 4 KiB are never usable, so
that pfn 0 can mean "none". NUMA nodes are byte ranges with a node number.

Kernel: arch/x86/kernel/e820.c, arch/x86/mm/srat.c
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pkramfs.errors import MachineError
from pkramfs.spans import Spans
from pkramfs.text import literal
from pkramfs.units import GIB, KIB, MIB, PAGE_SIZE, format_size, round_down, round_up
from pkramfs.units import pages as page_count

KINDS = ("usable", "reserved", "acpi")
LOWEST, HIGHEST = 64 * MIB, 1 << 46
MAX_NODES = 64

Range = tuple[int, int, Any]


@dataclass(frozen=True)
class FirmwareMap:
    """The hardware. `entries` are (start, end, kind), `nodes` are (start, end, node), all in bytes."""

    entries: tuple[tuple[int, int, str], ...]
    nodes: tuple[tuple[int, int, int], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_ranges("firmware map", self.entries)
        _check_ranges("NUMA nodes", self.nodes)
        for start, end, kind in self.entries:
            if kind not in KINDS:
                raise MachineError(
                    f"firmware map: {start:#x}-{end:#x} is {literal(kind)}, expected one of {', '.join(KINDS)}"
                )
        for start, end, node in self.nodes:
            if not 0 <= node < MAX_NODES:
                raise MachineError(f"NUMA nodes: {start:#x}-{end:#x} is node {node}, expected 0 to {MAX_NODES - 1}")
        if not self.usable:
            raise MachineError("firmware map: there is no usable memory in it")

    @property
    def size(self) -> int:
        """Return the bytes of the RAM file: the end of the highest entry."""
        return round_up(max(end for _, end, _ in self.entries), PAGE_SIZE)

    @cached_property
    def usable(self) -> Spans:
        """Return the pages that software may use: whole ones only, page 0 excluded."""
        ranges = Spans((start, end) for start, end, kind in self.entries if kind == "usable")
        return ranges.inward(PAGE_SIZE) - Spans([(0, 1)])

    @property
    def pages(self) -> int:
        """Return the number of usable pages."""
        return self.usable.total

    def node_spans(self) -> dict[int, Spans]:
        """Return the usable pages of each NUMA node; what no range names belongs to node 0."""
        usable, found = self.usable, {}
        pages = [(page_count(start), page_count(end), node) for start, end, node in self.nodes]
        named = Spans((start, end) for start, end, _ in pages)
        for node in sorted({node for _, _, node in pages} | {0}):
            its = Spans((start, end) for start, end, owner in pages if owner == node) & usable
            found[node] = its | (usable - named) if node == 0 else its
        return found

    def node_of(self, pfns: Any) -> Any:
        """Return the NUMA node of each pfn of an array: that of the page's first byte."""
        nodes = np.zeros(len(pfns), dtype=np.int64)
        for start, end, node in self.nodes:
            nodes[(pfns >= page_count(start)) & (pfns < page_count(end))] = node
        return nodes

    @classmethod
    def default(cls, ram_bytes: int, nodes: int = 1, seed: int = 0) -> "FirmwareMap":
        """Make a PC with `ram_bytes` of memory, spread evenly over `nodes` NUMA nodes."""
        if not LOWEST <= ram_bytes <= HIGHEST:
            raise MachineError(
                f"invalid RAM size {format_size(ram_bytes)}: give {format_size(LOWEST)} to {format_size(HIGHEST)}"
            )
        if not 1 <= nodes <= MAX_NODES:
            raise MachineError(f"invalid number of NUMA nodes {nodes}: give 1 to {MAX_NODES}")
        if ram_bytes < nodes * 2 * MIB:
            raise MachineError(
                f"invalid number of NUMA nodes {nodes}: {format_size(ram_bytes)} has less than 2 MiB for each"
            )
        ram_bytes = round_down(ram_bytes, PAGE_SIZE)
        low = min(ram_bytes, 3 * GIB)
        entries = [(0, 640 * KIB, "usable"), (640 * KIB, MIB, "reserved"), (MIB, low, "usable")]
        if ram_bytes > low:
            entries.append((4 * GIB, 4 * GIB + ram_bytes - low, "usable"))
        return cls(tuple(entries), _even_nodes(entries[-1][1], nodes), seed)

    @classmethod
    def flat(cls, size: int, seed: int = 0) -> "FirmwareMap":
        """Make memory that the user named: one range without holes."""
        return cls(((0, size, "usable"),), (), seed)

    def to_json(self) -> dict[str, Any]:
        """Return the hardware as machine.json has it."""
        return {
            "ram_bytes": self.size,
            "map": [{"start": s, "end": e, "kind": k} for s, e, k in self.entries],
            "nodes": [{"start": s, "end": e, "node": n} for s, e, n in self.nodes],
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Any) -> "FirmwareMap":
        """Read the hardware that `to_json` returned; raise MachineError for anything else."""
        if not isinstance(data, dict):
            raise MachineError("firmware map: not an object with `map`, `nodes` and `seed`, as machine.json has it")
        entries = _rows("map", data.get("map"), "kind")
        nodes = _rows("nodes", data.get("nodes", []), "node")
        try:
            found = tuple((start, end, str(kind)) for start, end, kind in entries)
            return _known(found, tuple((s, e, _whole(node)) for s, e, node in nodes), _whole(data.get("seed", 0)))
        except TypeError as error:
            raise MachineError(f"firmware map: not what machine.json should hold ({error})") from None


@lru_cache(maxsize=8)
def _known(entries: tuple[Range, ...], nodes: tuple[Range, ...], seed: int) -> FirmwareMap:
    """Return the one map of this content: a command reads machine.json ten times, and checks it once."""
    return FirmwareMap(entries, nodes, seed)


def _rows(name: str, rows: Any, third: str) -> list[Range]:
    """Read the ranges of one list of machine.json, in order; a MachineError names the entry and the field."""
    if not isinstance(rows, list | tuple):
        raise MachineError(f"firmware map: `{name}` is not a list of {{start, end, {third}}}")
    found = []
    for number, row in enumerate(rows):
        try:
            found.append((_whole(row["start"]), _whole(row["end"]), row[third]))
        except KeyError as error:
            raise MachineError(f"firmware map: entry {number} of `{name}` has no {error}") from None
        except TypeError as error:
            raise MachineError(f"firmware map: entry {number} of `{name}` is not a range ({error})") from None
    return sorted(found, key=lambda row: row[:2])


def _whole(value: Any) -> int:
    """Return a whole number of JSON; raise TypeError for anything else, such as 1.5, "1" and true."""
    if type(value) is not int:
        raise TypeError(f"{literal(value)} is not a whole number")
    if abs(value) >= 1 << 64:
        raise TypeError(f"{literal(value)} has more than 64 bits")
    return value


def _even_nodes(top: int, nodes: int) -> tuple[tuple[int, int, int], ...]:
    """Cut the address space into equal slices, at multiples of 2 MiB."""
    cuts = [round_down(top * n // nodes, 2 * MIB) for n in range(nodes)] + [top]
    return tuple((cuts[n], cuts[n + 1], n) for n in range(nodes)) if nodes > 1 else ()


def _check_ranges(what: str, ranges: tuple[Range, ...]) -> None:
    at = 0
    for start, end, _ in ranges:
        if not 0 <= start < end <= HIGHEST * 2:
            raise MachineError(f"{what}: {start:#x}-{end:#x} is not a range")
        if start < at:
            raise MachineError(f"{what}: {start:#x}-{end:#x} overlaps or precedes the range before it")
        at = end
