# SPDX-License-Identifier: GPL-2.0-or-later
"""Render answers: tables on a terminal, columns in a pipe, JSON for programs.

    NAME      MOUNTED ON   STATE       FILES   SIZE
    mytmpfs   /mnt         preserved       1   2.0 GiB

A command gathers plain data first (dicts, lists, numbers, text) and renders last, so that --json
is the same data without a second way of finding it. rich is imported only for a terminal: it costs
50 ms and a pipe has no use for colours. Text that came from RAM or from file names may hold
anything; so only this module prints, and it escapes whatever could talk to the terminal (text.py).

JSON is ASCII, whatever the locale. Text in it is exact: a byte that is not UTF-8 is a lone surrogate \\udc80 to
\\udcff, so that os.fsencode() gives the name of a file again.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from typing import Any, NamedTuple

from pkramfs import stdio
from pkramfs.cli import progress
from pkramfs.text import exact, printable


class Column(NamedTuple):
    """A column of a table: its title, and whether it holds figures (which align right)."""

    title: str
    figures: bool = False


def emit_json(data: Any) -> None:
    """Print data as JSON, for programs. Bytes become text as file names do."""
    import json

    print(json.dumps(data, indent=2, default=_plain).replace("\x7f", "\\u007f"))


def emit(text: str) -> None:
    """Print text in a format for programs, as it is."""
    print(text, end="")


def settle() -> None:
    """Escape characters that the locale does not have, so that every message can be printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def can_show(text: str) -> bool:
    """Return True if stdout's locale has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def say(line: Any = "", *, error: bool = False) -> None:
    """Print one line of a result on stdout, or of an error on stderr."""
    progress.clear()
    if error:
        stdio.say(printable(line))
    else:
        print(printable(line))


def tell(line: Any) -> None:
    """Print one line of progress now. If it cannot be printed, the work goes on."""
    progress.clear()
    stdio.tell(printable(line))


def _plain(value: Any) -> Any:
    """Return a value that JSON does not know, as one that it knows."""
    if isinstance(value, bytes | bytearray):
        return exact(bytes(value))
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "_asdict"):
        return value._asdict()
    if hasattr(value, "tolist"):  # numpy
        return value.tolist()
    return str(value)


def table(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their titles."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if _fancy():
        _rich_table(columns, cells)
    else:
        for line in plain_table(columns, cells):
            say(line)


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in plain text, padded to the widest cell, no trailing blanks."""
    titles = [column.title for column in columns]
    widths = [max(len(line[i]) for line in [titles, *rows]) for i in range(len(columns))]
    return [_line(columns, widths, cells) for cells in [titles, *rows]]


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    padded = [
        cell.rjust(width) if column.figures else cell.ljust(width)
        for column, width, cell in zip(columns, widths, cells, strict=True)
    ]
    return "   ".join(padded).rstrip()


def fields(pairs: Sequence[tuple[str, Any]]) -> None:
    """Print `name   value` lines; pairs whose value is None are left out."""
    shown = [(name, printable(value)) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        say(f"{name.ljust(width)}   {value}".rstrip())


def paint(lines: Iterable[Sequence[tuple[str, str]]]) -> None:
    """Print lines of pieces, each a text and a style of rich's, which a pipe does not see."""
    if not _fancy():
        for line in lines:
            say("".join(text for text, _ in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text.assemble(*((printable(text), style) for text, style in line)))


def heading(text: str) -> None:
    """Print a title."""
    if not _fancy():
        say(text)
        return
    from rich.console import Console

    Console(highlight=False).print(printable(text), style="bold", markup=False)


def _fancy() -> bool:
    """Return True if stdout is a terminal that shows colours."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and "NO_COLOR" not in os.environ


def _rich_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        drawn.add_column(column.title, justify="right" if column.figures else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(drawn)
