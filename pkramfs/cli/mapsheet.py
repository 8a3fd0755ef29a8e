# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM as a sheet of SVG: rows of coloured cells with their addresses, a legend, and the moves of the last kexec.

    address │ cells                 before │ ① ─── ② │ now
            │ 7.0 GiB free                 │         │
                                    ① Kernel image: another kernel, from pfn 1b400 to pfn 1b5200: KASLR chose …

Rows are those of the terminal (kernel/memorymap.py). A pair has the same rows on both sides, so that parts that stayed
are at the same height, and lines join parts that moved.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.cli.drawing import COLOURS, FAINT, INK, Sheet, colour
from pkramfs.cli.ramview import WORDS, Earlier, View, both, lay_out, numbers, runs, size_of
from pkramfs.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.kernel.memorymap import Part, Row
    from pkramfs.kernel.moves import Move
    from pkramfs.spans import Spans

_WIDTH, _ROW, _FOLD = 960, 13, 15
_LEFT, _GUTTER = 112, 96
_CELLS, _PAIR_CELLS = 104, 48
_NUMBERS = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
_SIGNS = {"stayed": "=", "moved": "→", "ended": "×"}

Known = dict[tuple[str, str], int]
"""The number of each owner among those of its kind, by kind and owner."""


class Place(NamedTuple):
    """Where a map is on the sheet: its left edge, its top, the width of a cell, and which picture it shows."""

    x: float
    y: float
    cell: float
    which: int


def draw(view: View, earlier: Earlier | None) -> Sheet:
    """Draw RAM now, or the pair before and after the last kexec."""
    sheet = Sheet(_WIDTH, view.title)
    if earlier is None:
        _single(sheet, view)
    else:
        _pair(sheet, view, earlier)
    return sheet


def _single(sheet: Sheet, view: View) -> None:
    unit, rows = lay_out([view.parts], _CELLS)
    sheet.text(20, sheet.bottom + 10, f"a cell is {format_size(unit)}", fill=FAINT)
    place = Place(_LEFT, sheet.bottom + 14, (_WIDTH - _LEFT - 20) / _CELLS, 0)
    known = numbers([view.parts])
    _addresses(sheet, place, rows)
    _map(sheet, place, view.parts, rows, known)
    sheet.legend(_legend(view.parts, known))


def _pair(sheet: Sheet, view: View, earlier: Earlier) -> None:
    pictures = [earlier.parts, view.parts]
    known, (unit, rows) = numbers(pictures), lay_out(pictures, _PAIR_CELLS)
    wide = (_WIDTH - _LEFT - _GUTTER - 20) / 2
    sheet.text(20, sheet.bottom + 10, f"a cell is {format_size(unit)}", fill=FAINT)
    top = sheet.bottom + 32
    left = Place(_LEFT, top, wide / _PAIR_CELLS, 0)
    right = Place(_LEFT + wide + _GUTTER, top, wide / _PAIR_CELLS, 1)
    _addresses(sheet, left, rows)
    for place, title in ((left, earlier.when), (right, f"now, kernel {view.kernel.generation}")):
        sheet.text(place.x, top - 7, title, bold=True)
        _map(sheet, place, pictures[place.which], rows, known)
    _ties(sheet, (left, right), rows, earlier.moves, known)
    sheet.legend(_legend(both(pictures), known))
    sheet.bottom += 24
    sheet.text(20, sheet.bottom, "What moved, and why", size=14, bold=True)
    marks = _numbered(earlier.moves)
    for one in earlier.moves:
        sheet.paragraph(20, f"{marks.get(one.owner) or _SIGNS[one.what]} {one.owner}: {one.why}")


def _numbered(moves: "Sequence[Move]") -> dict[str, str]:
    """Return the number of each owner that moved."""
    return dict(zip((one.owner for one in moves if one.what == "moved"), cycle(_NUMBERS), strict=False))


def _ties(
    sheet: Sheet, places: tuple[Place, Place], rows: "Sequence[Row]", moves: "Sequence[Move]", known: Known
) -> None:
    """Draw between two maps: a level line in each row for parts that stayed, a curve for each move."""
    left, right = places
    x, tops, marks = left.x + left.cell * _PAIR_CELLS, _heights(rows), _numbered(moves)
    for move in moves:
        if move.owner in marks:
            _join(sheet, rows, (left, move.before), (right, move.now), marks[move.owner])
        elif move.what == "stayed" and ("preserved", move.owner) in known:
            fill = colour("preserved", known["preserved", move.owner])
            for row, top in zip(rows, tops, strict=False):
                if all(pages.overlaps(row.start, row.end) for pages in (move.before, move.now)):
                    sheet.line([(x + 4, left.y + top + 6), (right.x - 4, left.y + top + 6)], fill, dashed=True)


def _heights(rows: "Sequence[Row]") -> list[float]:
    """Return where each row begins below the top of its map, and where the last one ends."""
    tops = [0.0]
    for row in rows:
        tops.append(tops[-1] + (_FOLD if row.folded else _ROW))
    return tops


def _addresses(sheet: Sheet, place: Place, rows: "Sequence[Row]") -> None:
    digits = len(f"{rows[-1].end * PAGE_SIZE - 1:x}")
    for row, top in zip(rows, _heights(rows), strict=False):
        if not row.folded:
            text = f"{row.start * PAGE_SIZE:0{digits}x}"
            sheet.text(place.x - 8, place.y + top + 9.5, text, size=10, mono=True, fill=FAINT, anchor="end")


def _map(sheet: Sheet, place: Place, parts: "Sequence[Part]", rows: "Sequence[Row]", known: Known) -> None:
    """Draw the rows of one picture."""
    fills = [_fill(part, known) for part in parts]
    wide = place.cell * max(len(row.cells[place.which]) for row in rows)
    for row, top in zip(rows, _heights(rows), strict=False):
        y = place.y + top
        if row.folded:
            part = parts[row.cells[place.which][0]]
            sheet.text(place.x + 4, y + 11, f"⋮  {size_of(row)} {WORDS[part.kind]}", size=10, fill=FAINT)
            continue
        x = place.x
        for cell, count in runs(row.cells[place.which]):
            if cell >= 0:
                sheet.box(x, y, count * place.cell, _ROW - 1, fills[cell], _tip(parts[cell]))
            x += count * place.cell
        sheet.line([(place.x, y + _ROW - 0.5), (place.x + wide, y + _ROW - 0.5)], "#d8d8d8", width=0.5)
    sheet.bottom = max(sheet.bottom, place.y + _heights(rows)[-1])


def _fill(part: "Part", known: Known) -> str:
    return colour(part.kind, known[part[:2]])


def _name(part: "Part") -> str:
    """Return the name of a part in the legend."""
    return part.owner if part.kind in ("kernel", "reserve") else f"{WORDS[part.kind]} {part.owner}".strip()


def _tip(part: "Part") -> str:
    """Return the tooltip of a part."""
    return f"{_name(part)}, {format_size(part.pages.total * PAGE_SIZE)}"


def _legend(parts: "Sequence[Part]", known: Known) -> list[tuple[str, str, str]]:
    return [(_fill(part, known), _name(part), format_size(part.pages.total * PAGE_SIZE)) for part in parts]


def _join(
    sheet: Sheet, rows: "Sequence[Row]", one: "tuple[Place, Spans]", other: "tuple[Place, Spans]", mark: str
) -> None:
    """Draw a curve from the old to the new place of a part, with its number at both ends."""
    (left, before), (right, now) = one, other
    tops = _heights(rows)
    start = left.y + _height(rows, tops, int(before.starts[0]))
    end = right.y + _height(rows, tops, int(now.starts[0]))
    x, to = left.x + left.cell * _PAIR_CELLS, right.x
    sheet.line([(x + 16, start), (x + _GUTTER / 2, start), (to - _GUTTER / 2, end), (to - 16, end)], COLOURS["pause"])
    sheet.text(x + 9, start + 4, mark, anchor="middle", fill=INK)
    sheet.text(to - 9, end + 4, mark, anchor="middle", fill=INK)


def _height(rows: "Sequence[Row]", tops: Sequence[float], pfn: int) -> float:
    """Return how far below the top of a map a page is."""
    number = next(number for number, row in enumerate(rows) if pfn < row.end)
    return (tops[number] + tops[number + 1]) / 2
