# SPDX-License-Identifier: GPL-2.0-or-later
"""Draw a sheet of SVG: boxes, lines and text, with one palette and one legend for all pictures.

    sheet = Sheet(960, "RAM of default")
    sheet.box(20, 40, 100, 12, "preserved", "shmem-one, 2.0 GiB")     a tip that a browser shows
    sheet.save(FILE)                                                  `-` is stdout

SVG is XML, and XML has no control characters, so all text is escaped as for a terminal (text.py). Colours differ in
lightness as well as in hue (Okabe and Ito's palette, for people who see fewer), and every box has a name in text.
"""

from collections.abc import Sequence
from xml.etree import ElementTree

from pkramfs.cli.destination import destination
from pkramfs.text import printable

COLOURS = {
    "hole": "#e4e4e4",
    "free": "#ffffff",
    "ended": "#b0b0b0",
    "leased": "#56b4e9",
    "preserved": "#009e73",
    "reserve": "#cc79a7",
    "kernel": "#404040",
    "destination": "#e69f00",
    "cold": "#0072b2",
    "kexec": "#009e73",
    "crash": "#d55e00",
    "died": "#d55e00",
    "taken": "#f0e442",
    "refused": "#e69f00",
    "lost": "#d55e00",
    "runs": "#404040",
    "pause": "#d55e00",
}
"""The colour of each kind of thing in a picture."""
_TINTS = {"leased": ("#56b4e9", "#0072b2", "#9ad2f2", "#3f8fc4"), "preserved": ("#009e73", "#66c5a8", "#00664a")}
_FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"
_MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"
INK, FAINT = "#202020", "#707070"
_NARROW = "fijlrt.,:;'|!()[]{} /-I"


def colour(kind: str, number: int = 0) -> str:
    """Return the colour of a kind; its `number`th owner has a tint of it."""
    tints = _TINTS.get(kind)
    return tints[number % len(tints)] if tints else COLOURS[kind]


class Sheet:
    """A picture of `width` units that grows downwards: `bottom` is where the next thing may begin."""

    def __init__(self, width: int, title: str) -> None:
        self.width, self.bottom = width, 0.0
        self._root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": _FONT})
        ElementTree.SubElement(self._root, "title").text = printable(title)
        ElementTree.SubElement(self._root, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
        self.text(20, 28, title, size=17, bold=True)
        self.bottom = 40

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, tip: str = "", *, line: str = "none"
    ) -> None:
        """Draw a box of a colour, with a tip."""
        place = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height)}
        made = ElementTree.SubElement(self._root, "rect", {**place, "fill": fill, "stroke": line})
        if tip:
            ElementTree.SubElement(made, "title").text = printable(tip)
        self.bottom = max(self.bottom, y + height)

    def line(
        self, points: Sequence[tuple[float, float]], stroke: str, *, width: float = 1, dashed: bool = False
    ) -> None:
        """Draw a line through points; with four of them, a curve from the first to the last."""
        (x, y), *rest = points
        kind = "C" if len(points) == 4 else "L"
        path = f"M{_n(x)},{_n(y)} {kind}" + " ".join(f"{_n(x)},{_n(y)}" for x, y in rest)
        style = {"stroke": stroke, "stroke-width": _n(width), "fill": "none"}
        if dashed:
            style["stroke-dasharray"] = "3,3"
        ElementTree.SubElement(self._root, "path", {"d": path, **style})

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        fill: str = INK,
        bold: bool = False,
        mono: bool = False,
        anchor: str = "start",
    ) -> None:
        """Write a line of text whose base line is at y."""
        style = {"font-size": _n(size), "fill": fill, "text-anchor": anchor}
        if bold:
            style["font-weight"] = "bold"
        if mono:
            style["font-family"] = _MONO
        made = ElementTree.SubElement(self._root, "text", {"x": _n(x), "y": _n(y), **style})
        made.text = printable(text)
        self.bottom = max(self.bottom, y + size * 0.3)

    def paragraph(self, x: float, text: str, *, size: float = 12, fill: str = INK) -> None:
        """Write text below the drawing, broken at the edge of the sheet."""
        for line in broken(printable(text), (self.width - x - 20) / size):
            self.text(x, self.bottom + size * 1.25, line, size=size, fill=fill)

    def legend(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Write the legend below the drawing, in two columns: colour, name, figures."""
        self.bottom += 14
        half, top = -(-len(rows) // 2), self.bottom
        column = (self.width - 40) / 2
        for number, (fill, name, figures) in enumerate(rows):
            x, y = 20 + column * (number // half), top + 18 * (number % half)
            self.box(x, y, 14, 12, fill, line="#909090")
            self.text(x + 22, y + 10.5, cut(printable(name), (column - 130) / 12))
            self.text(x + column - 20, y + 10.5, figures, anchor="end", fill=FAINT)

    def save(self, path: str) -> None:
        """Write the picture to a file, `-` is stdout; OSError if that cannot be."""
        height = self.bottom + 16
        size = {"width": _n(self.width), "height": _n(height), "viewBox": f"0 0 {_n(self.width)} {_n(height)}"}
        self._root.attrib.update(size)
        ElementTree.indent(self._root, " ")
        text = ElementTree.tostring(self._root, encoding="us-ascii").decode() + "\n"  # with references for all else
        with destination(path, text=True) as write:
            write(text.encode("ascii"))


def wide(text: str) -> float:
    """Return an upper estimate of the width of text in a proportional face, in ems."""
    return sum(1.0 if char in "mwMW@%" or not char.isascii() else 0.4 if char in _NARROW else 0.7 for char in text)


def cut(text: str, room: float) -> str:
    """Return text that fits into so many ems; a text that is cut ends in an ellipsis."""
    if wide(text) <= room:
        return text
    while text and wide(text) + 1 > room:
        text = text[:-1]
    return f"{text}…"


def broken(text: str, room: float) -> list[str]:
    """Return the lines of text that fit in so many ems, broken at blanks, and in words that are longer than a line."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and wide(f"{line} {word}") > room:
            lines.append(line)
            line = "   "
        line += f" {word}" if line.strip() else word
        while wide(line) > room:
            fits = len(cut(line, room)) - 1
            lines.append(line[:fits])
            line = f"   {line[fits:]}"
    return [*lines, line]


def _n(value: float) -> str:
    """Return a number with a decimal at most where it has one."""
    return f"{value:.1f}".removesuffix(".0")
