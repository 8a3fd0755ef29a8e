# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture of RAM by owner: the parts, and rows of cells to draw them in.

    parts          hole, kernel, reserve, leased, preserved, ended and free part RAM: each page is in one of them.
                   The destination of a loaded image lies over the others.
    remember       note the parts for the time after a kexec (history.py), few ranges of each
    rows           what a terminal or a sheet has room for. Rows in a row that nobody has are folded to one, so that
                   a few MiB in a machine of TiBs are drawn as finely as they deserve.

    1b0000000   ....####....aaaa
                7.0 GiB free                       (folded)
    3f0000000   AAAA%%%%........

A cell shows the owner of most of it; free pages count least, and a destination most. The work grows with ranges and
cells, not with pages. iomem.py shows the same as text, by address.

Kernel: /proc/iomem, /proc/kpageflags, tools/mm/page-types.c
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pkramfs.errors import PkramfsError
from pkramfs.kernel import history, incoming, staging
from pkramfs.kernel.incoming import IncomingNode
from pkramfs.kernel.kernelrecord import LAYOUT
from pkramfs.kernel.running import Running
from pkramfs.kernel.segments import destinations
from pkramfs.machine.directory import Machine
from pkramfs.machine.leases import KERNEL as KERNEL_WORD
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT

HOLE, FREE, ENDED, LEASED, PRESERVED, RESERVE, KERNEL, DESTINATION = KINDS = (
    *("hole", "free", "ended", "leased", "preserved", "reserve", "kernel", "destination"),
)
"""Kinds of parts, by how much they count where a cell has several in equal shares."""
_REST = "rest of its page blocks"
_MOST_PARTS, _MOST_RANGES = 64, 64
"""Parts, and ranges of each, that are noted for the time after a kexec."""


class Part(NamedTuple):
    """One owner's pages: one of KINDS, the owner for people (empty where the kind says all), and the pages."""

    kind: str
    owner: str
    pages: Spans


class Row(NamedTuple):
    """Pages [start, end). `cells` has the part of each cell, for each picture; a folded row has one cell."""

    start: int
    end: int
    cells: tuple[tuple[int, ...], ...]

    @property
    def folded(self) -> bool:
        """Return True if none of it has an owner."""
        return all(len(row) == 1 for row in self.cells)


def parts(kernel: Running, mounts: Mapping[int, str], *, readable: bool = True) -> list[Part]:
    """Return the owners of all pages now; `mounts` has the mount point of each live tree.

    Raise FormatError if the nodes cannot be read, or leave them out if they are not `readable`.
    """
    info, leases = kernel.info, kernel.leases
    whole, usable = Spans([(0, kernel.ram.pages)]), kernel.machine.hardware().usable
    nodes = incoming.nodes(kernel.ram, info.super_pfn) if info.pkram and readable else []
    found = [Part(HOLE, "", whole - usable)]
    found += [Part(KERNEL, name, Spans([part])) for name, part in info.reserved.items() if part not in _reserve(kernel)]
    found += [Part(RESERVE, "PKRAM reserve", info.reserve_pages)]
    found += [Part(PRESERVED, node.name, node.spans) for node in sorted(nodes, key=lambda node: node.name)]
    found += sorted(_leased(kernel, mounts, nodes), key=lambda part: part[:2])
    found += [Part(KERNEL, _REST, leases.blocks_of(KERNEL_WORD).scale(BLOCK_PAGES) & usable)]
    found = _apart(found)
    found.append(Part(FREE, "", whole - Spans.union(part.pages for part in found)))
    if loaded := staging.read(kernel.machine):
        found.append(Part(DESTINATION, loaded.image.name, destinations(loaded.segments)))
    return [part for part in found if part.pages]


def _reserve(kernel: Running) -> list[tuple[int, int]]:
    """Return the reserve as the ranges that the kernel's record has."""
    return list(kernel.info.reserve_pages)


def _leased(kernel: Running, mounts: Mapping[int, str], nodes: Sequence[IncomingNode]) -> list[Part]:
    """Return the page blocks of each tree: a living mount's, what its node does not use, or an ended one's."""
    if kernel.info.crash:
        return []  # the dead kernel's table names trees that this one knows nothing of
    found, named = [], {node.tree_id: node.name for node in nodes}
    for tree in sorted(kernel.leases.tree_ids()):
        pages = kernel.leases.blocks_of(tree).scale(BLOCK_PAGES)
        if tree in mounts:
            found.append(Part(LEASED, mounts[tree], pages))
        elif tree in named:
            found.append(Part(LEASED, f"{named[tree]}, {_REST}", pages))
        else:
            found.append(Part(ENDED, f"tree {tree:016x}, whose mount has ended", pages))
    return found


def _apart(found: Iterable[Part]) -> list[Part]:
    """Return parts without the pages of earlier ones, so that each page is in one part."""
    taken, apart = Spans(), []
    for part in found:
        apart.append(part._replace(pages=part.pages - taken))
        taken = taken | part.pages
    return apart


def remember(kernel: Running) -> None:
    """Note the owners of all pages, for a picture after the kexec; a failure is logged, and stops nothing."""
    machine = kernel.machine
    try:
        if kernel.info.layout == LAYOUT:
            mounts = {entry.tree_id: entry.mountpoint for entry in machine.mounts() if entry.alive}
            found = [part for part in parts(kernel, mounts) if part.kind not in (HOLE, FREE)]
            largest = sorted(found, key=lambda part: -part.pages.total)[:_MOST_PARTS]
            history.note_before(machine, kernel.generation, [to_json(part, _MOST_RANGES) for part in largest])
    except PkramfsError as error:
        machine.log(f"history: who has which pages is not noted: {error}")


def to_json(part: Part, most: int | None = None) -> dict[str, Any]:
    """Return a part as JSON data: its pages, and its ranges, joined to `most` at most where gaps are small."""
    pages, unit = part.pages, 1
    while most is not None and len(pages.outward(unit)) > most:
        unit *= 2
    ranges = [list(one) for one in pages.outward(unit).scale(unit).clip(int(pages.starts[0]), int(pages.ends[-1]))]
    return {"kind": part.kind, "owner": part.owner, "pages": pages.total, "ranges": ranges}


def remembered(machine: Machine, before: Mapping[str, Any]) -> list[Part]:
    """Return the parts that were noted, each page once, and what is left as holes and free pages."""
    hardware = machine.hardware()
    whole = Spans([(0, hardware.size >> PAGE_SHIFT)])
    noted = [Part(part["kind"], part["owner"], Spans(map(tuple, part["ranges"]))) for part in before["parts"]]
    over = [part for part in noted if part.kind == DESTINATION]
    base = _apart([Part(HOLE, "", whole - hardware.usable), *(part for part in noted if part.kind != DESTINATION)])
    base.append(Part(FREE, "", whole - Spans.union(part.pages for part in base)))
    return [part for part in [*base, *over] if part.pages]


# -- rows -----------------------------------------------------------------------------------------


def rows(pictures: Sequence[Sequence[Part]], columns: int, most: int) -> tuple[int, list[Row]]:
    """Lay pictures of one RAM out alike, in at most `most` rows of `columns` cells (more, if it cannot be less).

    Return the pages of a cell, a power of two, and the rows.
    """
    pages = max(int(part.pages.ends[-1]) for part in pictures[0])
    unit = 1
    while True:
        whole = -(-pages // (unit * columns))
        alike = _alike(pictures, unit * columns, whole)
        mixed = Spans([(0, whole)]) - Spans.union(alike)
        if mixed.total + len(alike) <= most or whole <= 1:
            return unit, _drawn(pictures, unit, columns, [*alike, *_singles(mixed)], pages)
        unit *= 2


def _alike(pictures: Sequence[Sequence[Part]], size: int, whole: int) -> list[Spans]:
    """Return runs of two rows or more of which nobody has anything in any picture; `size` is the pages of a row."""
    found = [Spans([(0, whole)])]
    for picture in pictures:
        over = Spans.union(part.pages for part in picture if part.kind == DESTINATION).outward(size)
        nobody = [part.pages.inward(size) - over for part in picture if part.kind in (HOLE, FREE)]
        found = [both for one in found for some in nobody if (both := one & some)]
    runs = [run for some in found for run in some if run[1] - run[0] > 1]
    return [Spans([run]) for run in sorted(runs)]


def _singles(rows: Spans) -> list[Spans]:
    return [Spans([(row, row + 1)]) for start, end in rows for row in range(start, end)]


def _drawn(
    pictures: Sequence[Sequence[Part]], unit: int, columns: int, chosen: Sequence[Spans], pages: int
) -> list[Row]:
    """Fill the cells of the chosen rows."""
    bounds = sorted((int(one.starts[0]), int(one.ends[0])) for one in chosen)
    size = unit * columns
    edges = [
        np.array([start * size, min(end * size, pages)])
        if end - start > 1
        else np.minimum(np.arange(columns + 1) * unit + start * size, pages)
        for start, end in bounds
    ]
    owners = [_owners(picture, edges) for picture in pictures]
    return [
        Row(start * size, min(end * size, pages), tuple(picture[number] for picture in owners))
        for number, (start, end) in enumerate(bounds)
    ]


def _owners(picture: Sequence[Part], edges: Sequence[npt.NDArray[np.int64]]) -> list[tuple[int, ...]]:
    """Return the part that counts most in each cell between edges, -1 behind the end of RAM. Shape: as `edges`."""
    flat = np.concatenate(edges)
    weights = [_weight(part.kind) * np.diff(_below(part.pages, flat)) for part in picture]
    table = np.array(weights)  # shape (parts, cells, with one between two rows that is none)
    best = np.where(table.max(axis=0) > 0, table.argmax(axis=0), -1)
    found, at = [], 0
    for row in edges:
        found.append(tuple(best[at : at + len(row) - 1].tolist()))
        at += len(row)
    return found


def _weight(kind: str) -> float:
    """Return what a page of a kind counts: a destination most, nobody least; ties go to the kind that is rarer."""
    if kind in (HOLE, FREE):
        return 1e-12
    return 1e12 if kind == DESTINATION else 1 + KINDS.index(kind) * 1e-6


def _below(pages: Spans, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return how many of `pages` lie below each edge."""
    counts: U64 = np.concatenate([np.zeros(1, np.uint64), np.cumsum(pages.counts)])
    behind = np.searchsorted(pages.starts.astype(np.int64), edges, side="right")
    last = pages.ends.astype(np.int64)[np.maximum(behind - 1, 0)] if len(pages) else np.zeros(len(edges), np.int64)
    beyond = np.where(behind > 0, np.maximum(last - edges, 0), 0)
    return counts[behind].astype(np.float64) - beyond
