# SPDX-License-Identifier: GPL-2.0-or-later
"""Progress of long work: a bar on a terminal, lines of JSON for programs, nothing in a pipe.

    export ━━━━━━━━━━━━━━━╸━━━━━━━━━━━ 1.2 GiB of 3.0 GiB   812 MiB/s   0:00:02 left        --progress=auto, the default
    {"stage": "export", "done": 1288490188, "total": 3221225472, "seconds": 1.5, "rate": 858993458.7, "left": 2.25}

A bar appears on stderr after half a second, if stderr is a terminal, and leaves nothing behind. Lines of JSON go to
stderr, two a second and one at the end; `total` and `left` are null if not known. Work that yields Progress is
driven by `drive`; while a command only waits for others (`waiting`), mounting.patience calls us now and then. No
thread draws: a fork in the middle of its work would inherit its locks.
"""

import argparse
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pkramfs import stdio
from pkramfs.mounting import patience
from pkramfs.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Drawn

T = TypeVar("T")

MODES = ("auto", "json", "none")
FIRST_SECONDS = 0.5
"""How long work may take before it is worth a bar."""
_DRAW_SECONDS, _JSON_SECONDS = 0.1, 0.5
_BYTES = frozenset(("export", "import", "copy", "compare", "verify"))
"""Stages that are counted in bytes; others are counted in steps."""
_BAR_COLUMNS = 72
"""A narrower terminal has figures only."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --progress."""
    parser.add_argument(
        "--progress", choices=MODES, default="auto", metavar="HOW", help=f"show progress: {', '.join(MODES)}"
    )


class Bar:
    """The progress of one work. `title` names it until it names its own stages."""

    def __init__(self, title: str, mode: str = "auto") -> None:
        self._stage, self._done, self._total = title, 0, 0
        self._part = 1.0
        self._began = self._next = time.monotonic()
        self._mode = mode if mode != "auto" else "bar" if _fits() else "none"
        self._next += FIRST_SECONDS if self._mode == "bar" else _JSON_SECONDS
        self._drawn: Drawn | None = None

    def show(self, stage: str, done: int, total: int) -> None:
        """Note how far the work is, and draw it if it is time."""
        self._stage, self._done, self._total = stage, done, total
        self._part = 1.0
        self.tick()

    def begin(self, stage: str, number: int, total: int) -> None:
        """Note that the `number`th of `total` steps begins; the bar moves while `within` tells of it."""
        self._stage, self._done, self._total = stage, number, total
        self.within(0.0)

    def within(self, part: float) -> None:
        """Note how much of the present step is done, from 0 to 1."""
        self._part = min(max(part, 0.0), 1.0)
        self.tick()

    def tick(self) -> None:
        """Draw the progress, if it is time."""
        if self._mode == "none" or (now := time.monotonic()) < self._next:
            return
        self._next = now + (_DRAW_SECONDS if self._mode == "bar" else _JSON_SECONDS)
        if self._mode == "bar":
            self._draw()
        else:
            self._tell()

    def hide(self) -> None:
        """Take the bar away, because something else is printed; it comes again."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None

    def close(self) -> None:
        """End: the bar goes; a program gets the last line."""
        self.hide()
        if self._mode == "json":
            self._tell()
        self._mode = "none"

    def _figures(self) -> tuple[float, float | None, float | None]:
        """Return the seconds so far, and bytes a second and seconds left where they are known."""
        seconds = max(time.monotonic() - self._began, 0.001)
        if self._stage not in _BYTES or not self._done:
            return seconds, None, None
        rate = self._done / seconds
        return seconds, rate, max(self._total - self._done, 0) / rate if self._total else None

    def _tell(self) -> None:
        import json

        seconds, rate, left = self._figures()
        known = {"stage": self._stage, "done": self._done, "total": self._total or None}
        times = {"seconds": seconds, "rate": rate, "left": left}
        rounded = {name: None if value is None else round(value, 3) for name, value in times.items()}
        stdio.say(json.dumps(known | rounded))

    def _draw(self) -> None:
        seconds, rate, left = self._figures()
        in_bytes = self._stage in _BYTES
        counted = in_bytes or (self._done > 0 and self._total > 1)
        done, total = (format_size(n) if in_bytes else f"{n:,}" for n in (self._done, self._total))
        size = f"{done} of {total}" if counted and self._total else done if counted else ""
        speed = "" if rate is None else f"{format_size(round(rate))}/s"
        time_left = "" if left is None else f"{_clock(left)} left"
        try:
            drawn, self._drawn = self._drawn, self._drawn or _begin()
            figures = _fitted(
                self._drawn.console.width - len(self._stage) - 1, size, speed, time_left or _clock(seconds)
            )
            self._drawn.update(
                self._drawn.task_ids[0],
                description=self._stage,
                figures=figures,
                completed=self._done - 1 + self._part if counted else 0,
                total=self._total if counted and self._total else None,
            )
            (self._drawn.start if drawn is None else self._drawn.refresh)()
        except (OSError, ValueError):
            self._mode = "none"  # a terminal that is gone: printing never decides


def _fitted(room: int, size: str, speed: str, time: str) -> str:
    """Return as many figures as there is room for: the time rather than the size, the size rather than the speed."""
    ways = ((size, speed, time), (size, time), (time,))
    lines = ["   ".join(filter(None, way)) for way in ways]
    return next((line for line in lines if len(line) <= room), lines[-1])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _fits() -> bool:
    """Return True if stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _begin() -> "Drawn":
    """Return an empty bar; one whose total is unknown moves to and fro."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, no_color="NO_COLOR" in os.environ, highlight=False)
    drawn = Progress(
        TextColumn("{task.description}", markup=False),
        *([BarColumn()] if console.width >= _BAR_COLUMNS else []),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    drawn.add_task("", total=None, figures="")
    return drawn


_bars: list[Bar] = []


def clear() -> None:
    """Take the bar away, because a line is printed; it comes again."""
    for drawn in _bars:
        drawn.hide()


@contextmanager
def waiting(args: argparse.Namespace | None, title: str) -> Iterator[Bar]:
    """Give a bar that goes on while the command waits for others."""
    made = Bar(title, getattr(args, "progress", "auto"))
    _bars.append(made)
    try:
        with patience.calling(made.tick, made.within):
            yield made
    finally:
        _bars.remove(made)
        made.close()


def drive(work: Generator[Any, None, T], args: argparse.Namespace | None = None) -> T:
    """Run long work to its end and return its result; show its progress."""
    with waiting(args, "") as drawn:
        while True:
            try:
                drawn.show(*next(work))
            except StopIteration as done:
                value: T = done.value
                return value


def shown(work: Iterator[T], args: argparse.Namespace | None = None) -> Iterator[T]:
    """Yield the results of long work; show its Progress."""
    from pkramfs.fs.picture import Progress

    with waiting(args, "") as drawn:
        for one in work:
            if isinstance(one, Progress):
                drawn.show(*one)
            else:
                yield one
