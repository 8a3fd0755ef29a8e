# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine's kernels as a sheet of SVG: a bar for each, to scale, with what happened while it ran.

    1  cold   builtin    ▇▇▇▇▇▇▇╮                       6.1 s
                                 ╰ pause 0.71 s
    2  kexec  builtin            ▇▇▇▇▇×▇▇▇▇▇▇▇▇▇▇       up for 3 h 2 min; found 2 nodes, 350 MiB

A bar is at least a few units wide, because a kernel may live for a moment. Deaths, refusals and losses are marked and
listed; a stripe is a takeover: another daemon went on with a mount. Mounts and preserves are ticks.
"""

import time
from typing import Any

from pkramfs.cli.drawing import COLOURS, FAINT, Sheet, colour, cut
from pkramfs.cli.generations import facts, lasting

_WIDTH, _ROW, _BAR = 960, 40, 13
_LEFT, _RIGHT = 190, 20
_LEAST = 3
_LISTED = 14
_WORDS = {"died": "died", "refused": "refused", "lost": "lost"}
_TOLD = {"died": "a daemon or kernel died", "taken": "another daemon took over"}
_KINDS = {"cold": "cold boot", "kexec": "by kexec", "crash": "crash kernel"}


class Axis:
    """Time from left to right: from the first boot to now, or to the last end."""

    def __init__(self, kernels: list[dict[str, Any]], now: float) -> None:
        self.start = min(kernel["booted"] for kernel in kernels)
        self.end = max(max(kernel["ended"] or now for kernel in kernels), self.start + 1)

    def x(self, when: float) -> float:
        """Return where a moment is."""
        part = min(max((when - self.start) / (self.end - self.start), 0), 1)
        return float(_LEFT + part * (_WIDTH - _LEFT - _RIGHT))

    def labels(self) -> list[tuple[float, str]]:
        """Return five moments and their names."""
        long = self.end - self.start > 86400
        shape = "%F %H:%M" if long else "%T"
        moments = [self.start + (self.end - self.start) * part / 4 for part in range(5)]
        return [(moment, time.strftime(shape, time.localtime(moment))) for moment in moments]


def draw(title: str, kernels: list[dict[str, Any]], now: float) -> Sheet:
    """Draw kernels, oldest first."""
    sheet, axis = Sheet(_WIDTH, title), Axis(kernels, now)
    top = sheet.bottom + 22
    _scale(sheet, axis, top, len(kernels))
    for number, kernel in enumerate(kernels):
        _kernel(sheet, axis, kernel, top + 8 + number * _ROW, now)
        if number and kernel["pause"] is not None:
            _pause(sheet, axis, (kernels[number - 1], kernel), top + 8 + number * _ROW)
    sheet.bottom = top + 8 + len(kernels) * _ROW
    kinds = sorted({kernel["kind"] for kernel in kernels})
    said = sorted({event["kind"] for kernel in kernels for event in kernel["events"]} & {*_WORDS, "taken"})
    rows = [(colour(kind), _KINDS.get(kind, kind), "") for kind in kinds if kind in COLOURS]
    sheet.legend([*rows, *((colour(kind), _TOLD.get(kind, kind), "") for kind in said)])
    _events(sheet, kernels)
    return sheet


def _scale(sheet: Sheet, axis: Axis, top: float, count: int) -> None:
    for moment, text in axis.labels():
        x = axis.x(moment)
        sheet.line([(x, top), (x, top + 4 + count * _ROW)], "#e4e4e4")
        anchor = "start" if x == _LEFT else "end" if moment == axis.end else "middle"
        sheet.text(x, top - 6, text, size=10, fill=FAINT, anchor=anchor)


def _kernel(sheet: Sheet, axis: Axis, kernel: dict[str, Any], y: float, now: float) -> None:
    start, end = axis.x(kernel["booted"]), axis.x(kernel["ended"] or now)
    wide = max(end - start, _LEAST)
    sheet.text(20, y + 11, f"{kernel['generation']}", bold=True)
    image = kernel["image"].rpartition("/")[2]
    sheet.text(52, y + 11, cut(image, (_LEFT - 60) / 12))
    line = facts(kernel, now)
    sheet.box(start, y, wide, _BAR, COLOURS.get(kernel["kind"], FAINT), f"kernel {kernel['generation']}: {line}")
    for event in kernel["events"]:
        x = min(axis.x(kernel["booted"] + event["at"]), start + wide)
        if event["kind"] in _WORDS:
            _cross(sheet, x, y + _BAR / 2, colour(event["kind"]))
        elif event["kind"] == "taken":
            _stripe(sheet, x, y, colour(event["kind"]))
        else:
            sheet.line([(x, y + _BAR), (x, y + _BAR + 4)], FAINT)
    right = start > _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2
    sheet.text(end if right else start, y + _BAR + 13, line, size=10, fill=FAINT, anchor="end" if right else "start")


def _cross(sheet: Sheet, x: float, y: float, stroke: str) -> None:
    """Mark a moment with a cross that is seen on every bar."""
    for fill, width in (("#ffffff", 5.0), (stroke, 2.4)):
        for way in (1, -1):
            sheet.line([(x - 5, y - 5 * way), (x + 5, y + 5 * way)], fill, width=width)


def _stripe(sheet: Sheet, x: float, y: float, stroke: str) -> None:
    """Mark a moment with a stripe that a cross beside it does not hide."""
    for fill, width in (("#404040", 4.0), (stroke, 2.4)):
        sheet.line([(x, y - 3), (x, y + _BAR + 3)], fill, width=width)


def _pause(sheet: Sheet, axis: Axis, pair: tuple[dict[str, Any], dict[str, Any]], y: float) -> None:
    """Join the end of a kernel with the beginning of the next, and write the pause between them."""
    before, after = pair
    start, end = axis.x(before["ended"] or after["booted"]), axis.x(after["booted"])
    sheet.line([(start, y - _ROW + _BAR), (end, y)], COLOURS["pause"], dashed=True)
    text, left = f"pause {lasting(after['pause'])}", start > _LEFT + 90
    place, anchor = (start - 6, "end") if left else (end + 6, "start")
    sheet.text(place, y - 3, text, size=10, fill=COLOURS["pause"], anchor=anchor)


def _events(sheet: Sheet, kernels: list[dict[str, Any]]) -> None:
    """List the last deaths, refusals and losses."""
    found = [(kernel, event) for kernel in kernels for event in kernel["events"] if event["kind"] in _WORDS]
    if not found:
        return
    sheet.bottom += 24
    sheet.text(20, sheet.bottom, "What went wrong", size=14, bold=True)
    for kernel, event in found[-_LISTED:]:
        when = time.strftime("%F %T", time.localtime(kernel["booted"] + event["at"]))
        sheet.paragraph(20, f"{when}, kernel {kernel['generation']}: {event['text']}")
