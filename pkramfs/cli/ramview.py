# SPDX-License-Identifier: GPL-2.0-or-later
"""The content of pkramctl map, in a terminal (maps.py) and as SVG (mapsheet.py): RAM now, RAM earlier, its rows.

View       the owners of all pages now
Earlier    the owners before the last kexec, and the moves since
lay_out    the rows and cells of pictures of one RAM
numbers    each owner has a number among those of its kind: a letter, and a tint
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments
from pkramfs.errors import FormatError, MachineError
from pkramfs.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.kernel.memorymap import Part, Row
    from pkramfs.kernel.moves import Move
    from pkramfs.kernel.running import Running
    from pkramfs.machine.directory import Machine

PROGRAM = "pkramctl"
ROWS = 24
"""Rows of a picture, at most."""
WORDS = {
    "hole": "no memory",
    "free": "free",
    "ended": "left by",
    "leased": "leased by",
    "preserved": "preserved",
    "reserve": "reserve",
    "kernel": "kernel",
    "destination": "destination of",
}
"""What each kind of part is called for people."""


class View:
    """RAM of a machine as it is now. Nodes that cannot be read are left out, with a warning."""

    def __init__(self, machine: "Machine") -> None:
        from pkramfs.kernel import running

        self.machine = machine
        self.kernel = running.look(machine)
        self.parts = _parts(self.kernel)

    @property
    def title(self) -> str:
        """Return a title for the picture."""
        info = self.kernel.info
        size = format_size(self.machine.hardware().usable.total * PAGE_SIZE)
        return f"RAM of {self.machine.path()}: {size}, kernel {info.generation} ({info.image})"

    def to_json(self) -> dict[str, Any]:
        """Return the parts as JSON data; ranges are pfns, ends exclusive."""
        from pkramfs.kernel.memorymap import to_json

        return {"generation": self.kernel.generation, "parts": [to_json(part) for part in self.parts]}


def _parts(kernel: "Running") -> "list[Part]":
    from pkramfs.cli import daemons
    from pkramfs.kernel import memorymap

    mounts = {entry.tree_id: entry.mountpoint for entry in daemons.alive(kernel.machine)}
    try:
        return memorymap.parts(kernel, mounts)
    except FormatError as error:
        arguments.warn(PROGRAM, f"the nodes cannot be read, so their trees are shown as left by nobody: {error}")
        return memorymap.parts(kernel, mounts, readable=False)


class Earlier:
    """RAM before the last kexec, and the moves since."""

    def __init__(self, view: View) -> None:
        from pkramfs.kernel import history, memorymap, moves

        found, info = history.read(view.machine)["before"], view.kernel.info
        if found is None or found["generation"] >= info.generation:
            raise MachineError("there is no picture of RAM before a kexec: pkram-kexec -e takes it")
        self.generation, self.taken = int(found["generation"]), float(found["taken"])
        self.parts = memorymap.remembered(view.machine, found)
        self.moves: list[Move] = moves.moves(self.parts, view.parts, info)

    @property
    def when(self) -> str:
        """Return when the picture was taken, in words."""
        return f"before the kexec, kernel {self.generation}, {time.strftime('%F %T', time.localtime(self.taken))}"

    def to_json(self) -> dict[str, Any]:
        """Return the earlier parts and the moves as JSON data."""
        from pkramfs.kernel.memorymap import to_json

        parts = [to_json(part) for part in self.parts]
        moved = [{"what": one.what, "owner": one.owner, "why": one.why} for one in self.moves]
        return {"before": {"generation": self.generation, "taken": self.taken, "parts": parts}, "moves": moved}


def numbers(pictures: "Sequence[Sequence[Part]]") -> dict[tuple[str, str], int]:
    """Number the owners of each kind, in all pictures alike: each has a letter and a tint of its own."""
    found: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    for part in (part for picture in pictures for part in picture):
        if part[:2] not in found:
            found[part[:2]] = counts.get(part.kind, 0)
            counts[part.kind] = found[part[:2]] + 1
    return found


def lay_out(pictures: "Sequence[Sequence[Part]]", columns: int) -> "tuple[int, list[Row]]":
    """Lay pictures of one RAM out; return the bytes of a cell, and the rows."""
    from pkramfs.kernel import memorymap

    unit, rows = memorymap.rows(pictures, columns, ROWS)
    return unit * PAGE_SIZE, rows


def size_of(row: "Row") -> str:
    """Return the size of a row for people."""
    return format_size((row.end - row.start) * PAGE_SIZE)


def runs(cells: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each run of equal cells: the cell and how many."""
    from itertools import groupby

    for cell, group in groupby(cells):
        yield cell, len(list(group))


def both(pictures: "Sequence[Sequence[Part]]") -> "list[Part]":
    """Return the parts of the last picture, and those of the others that are not in it."""
    *others, last = pictures
    there = {part[:2] for part in last}
    return [*last, *(part for picture in others for part in picture if part[:2] not in there)]
