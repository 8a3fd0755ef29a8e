# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures and the table they make."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FLOOR_FACTOR = 1.2
FLOOR = f"{FLOOR_FACTOR}x of the floor"


@dataclass
class Figure:
    """One row. `value`, `reference` and `floor` are medians in `unit`.

    A `target` bounds the value, or its ratio to the reference where it ends in x: "<5 ms" or ">0.8x" or "<1.3x".
    Alternatives are joined by " or "; FLOOR may be one of them, for what comes that near to the floor. `met` is
    None where there is no target.
    """

    section: str
    name: str
    value: float
    unit: str
    low: float
    high: float
    reference: float | None = None
    reference_name: str = ""
    target: str = ""
    note: str = ""
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.value / self.reference if self.reference else None

    @property
    def above_floor(self) -> float | None:
        """How many times the floor's cost this is."""
        if not self.floor:
            return None
        return self.floor / self.value if self.unit.endswith("/s") else self.value / self.floor

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        alternatives = [self._meets(part.strip()) for part in self.target.split(" or ")]
        return any(alternatives)

    def _meets(self, target: str) -> bool:
        if target == FLOOR:
            return self.above_floor is not None and self.above_floor <= FLOOR_FACTOR
        bound = float(target[1:].split()[0].rstrip("x"))
        found = self.ratio if target.endswith("x") else self.value
        if found is None:
            return False
        return found <= bound if target[0] == "<" else found >= bound


class Table:
    """Collects figures, showing each as it comes."""

    def __init__(self, runs: int, quick: bool) -> None:
        self.runs, self.quick = runs, quick
        self.figures: list[Figure] = []

    def repeat(self, what: str, once: Callable[[], float], runs: int | None = None) -> list[float]:
        """`once` several times, with progress on stderr; each call returns its own figure."""
        values = []
        for number in range(runs or self.runs):
            if sys.stderr.isatty():
                print(f"\r\033[K{what}: run {number + 1}", end="", file=sys.stderr, flush=True)
            values.append(once())
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return values

    def add(
        self,
        section: str,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        reference: Sequence[float] | None = None,
        reference_name: str = "",
        target: str = "",
        note: str = "",
        floor: Sequence[float] | None = None,
    ) -> None:
        """Record a figure from its runs and print its row."""
        figure = Figure(
            section,
            name,
            statistics.median(values),
            unit,
            min(values),
            max(values),
            statistics.median(reference) if reference else None,
            reference_name,
            target,
            note,
            statistics.median(floor) if floor else None,
        )
        self.figures.append(figure)
        print(row(figure), flush=True)

    def write_json(self, path: str) -> None:
        """The figures as a list of objects."""
        derived = ("ratio", "above_floor", "met")
        data: list[dict[str, Any]] = [
            asdict(figure) | {name: getattr(figure, name) for name in derived} for figure in self.figures
        ]
        with open(path, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)

    def verdict(self) -> str:
        judged = [figure for figure in self.figures if figure.met is not None]
        missed = [f"{figure.section}: {figure.name}" for figure in judged if not figure.met]
        text = f"{len(judged) - len(missed)} of {len(judged)} targets met"
        return text + ("; missed: " + "; ".join(missed) if missed else "")


def row(figure: Figure) -> str:
    spread = f"({number(figure.low)}-{number(figure.high)})"
    beside = ""
    if figure.reference is not None:
        beside = f"{figure.reference_name} {number(figure.reference)}, ratio {figure.ratio:.2f}"
    if figure.floor is not None:
        beside += f", floor {number(figure.floor)}, {figure.above_floor:.2f}x of it"
    judged = "" if figure.met is None else f"{figure.target}: {'met' if figure.met else 'MISSED'}"
    value = f"{number(figure.value)} {figure.unit}"
    return f"{figure.section:7} {figure.name:60} {value:>14} {spread:>19}  {beside:72} {judged} {figure.note}".rstrip()


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(work: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def milliseconds(work: Callable[[], Any]) -> float:
    return seconds(work) * 1000
