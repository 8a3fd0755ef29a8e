# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl map: RAM as a picture, in the terminal or as SVG; with --before-after as a pair across the last kexec.

    a character is 512 KiB
    000000000   %#AAAAAAAAAAAAAAAAAAAAAAAAAAAA..
    01a000000   ..aaaa....*****.
                5.1 GiB free

    MARK   WHO              OF              SIZE   RANGES
    #      kernel           Kernel image  16 MiB        1
    A      preserved        shmem-one    300 MiB        2
    a      leased by        /mnt2         50 MiB        3

ramview.py gathers, kernel/memorymap.py finds the owners and lays them out, mapsheet.py draws the SVG.

Kernel: /proc/iomem, tools/mm/page-types.c
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pkramfs.cli import arguments, render
from pkramfs.cli.ramview import WORDS, Earlier, View, both, lay_out, numbers, runs, size_of
from pkramfs.cli.render import Column
from pkramfs.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.kernel.memorymap import Part, Row

_GAP = 3
_MARKS = {"hole": " ", "free": ".", "ended": "?", "reserve": "%", "kernel": "#", "destination": "*"}
_LETTERS = {"leased": "abcdefghijklmnopqrstuvwxyz", "preserved": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_STYLES = {
    "hole": "",
    "free": "dim",
    "ended": "bright_black",
    "leased": "black on bright_blue",
    "preserved": "black on green",
    "reserve": "black on magenta",
    "kernel": "white on bright_black",
    "destination": "black on yellow",
}


def add(made: argparse.ArgumentParser) -> None:
    """Add the options of `map` to its parser."""
    made.add_argument("--svg", metavar="FILE", help="write the picture as SVG, with a legend (- is stdout)")
    made.add_argument("--before-after", action="store_true", help="also draw RAM before the last kexec, and what moved")


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl map`."""
    machine = arguments.existing(args)
    view = View(machine)
    earlier = Earlier(view) if args.before_after else None
    if args.svg is not None:
        from pkramfs.cli import mapsheet

        mapsheet.draw(view, earlier).save(args.svg)
    elif arguments.wants_json(args):
        render.emit_json(view.to_json() | (earlier.to_json() if earlier else {}))
    elif earlier:
        _show_pair(view, earlier)
    else:
        show(view.parts)


def mark(part: "Part", number: int) -> str:
    """Return the character that stands for the `number`th owner of its kind."""
    letters = _LETTERS.get(part.kind, "")
    return letters[min(number, len(letters) - 1)] if letters else _MARKS[part.kind]


def show(parts: "Sequence[Part]") -> None:
    """Print RAM as rows of characters, as wide as the terminal, and their meaning."""
    unit, rows = lay_out([parts], _cells([parts]))
    render.say(f"a character is {format_size(unit)}")
    known = numbers([parts])
    render.paint(_lines(parts, rows, 0, known))
    render.say()
    _legend(parts, known)


def _show_pair(view: View, earlier: Earlier) -> None:
    from pkramfs.units import plural

    pictures = [earlier.parts, view.parts]
    known, (unit, rows) = numbers(pictures), lay_out(pictures, _cells(pictures))
    render.say(f"a character is {format_size(unit)}")
    for number, (title, parts) in enumerate(((earlier.when, earlier.parts), (_now(view), view.parts))):
        render.say()
        render.heading(title)
        render.paint(_lines(parts, rows, number, known))
    render.say()
    _legend(both(pictures), known)
    render.say()
    render.heading(f"what moved, and why ({plural(len(earlier.moves), 'owner')})")
    for move in earlier.moves:
        render.say(f"{move.what}   {move.owner}: {move.why}")


def _now(view: View) -> str:
    return f"now, kernel {view.kernel.generation}"


def _cells(pictures: "Sequence[Sequence[Part]]") -> int:
    """Return how many cells a row of the terminal has beside its address."""
    return max(arguments.columns() - _digits(pictures[0]) - _GAP, 8)


def _digits(parts: "Sequence[Part]") -> int:
    """Return the hexadecimal digits of the highest address."""
    return len(f"{max(int(part.pages.ends[-1]) for part in parts) * PAGE_SIZE - 1:x}")


def _lines(
    parts: "Sequence[Part]", rows: "Sequence[Row]", which: int, known: dict[tuple[str, str], int]
) -> Iterator[list[tuple[str, str]]]:
    """Yield each row as pieces of text with their styles: the address, then runs of equal cells."""
    chars, digits = [mark(part, known[part[:2]]) for part in parts], _digits(parts)
    for row in rows:
        if row.folded:
            part = parts[row.cells[which][0]]
            yield [(f"{'':{digits + _GAP}}{size_of(row)} {WORDS[part.kind]}", "dim")]
            continue
        pieces = [(f"{row.start * PAGE_SIZE:0{digits}x}{'':{_GAP}}", "dim")]
        for cell, count in runs(row.cells[which]):
            if cell >= 0:
                pieces.append((chars[cell] * count, _STYLES[parts[cell].kind]))
        yield pieces


def _legend(parts: "Sequence[Part]", known: dict[tuple[str, str], int]) -> None:
    columns = [Column("MARK"), Column("WHO"), Column("OF"), Column("SIZE", True), Column("RANGES", True)]
    render.table(
        columns,
        [(mark(part, known[part[:2]]), WORDS[part.kind], part.owner, *_figures(part)) for part in parts],
    )


def _figures(part: "Part") -> tuple[str, str]:
    return format_size(part.pages.total * PAGE_SIZE), f"{len(part.pages):,}"
