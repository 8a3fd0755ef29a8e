# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl timeline: a machine's kernels one after the other, as far as its records have them.

    KERNEL   KIND    IMAGE       BOOTED                UP FOR       PAUSE    NODES   LOST
         1   cold    builtin     2026-11-29 13:30:55   6.1 s            -        0      0
         2   kexec   builtin     2026-11-29 13:31:02   3 h 2 min   0.71 s        2      0

    KERNEL         AFTER   WHAT
         2       5.000 s   pkramfs: daemon of tree 00000000000abcde (pid 7, /mnt) has died

The records are history.json for the kernels that have ended (kernel/history.py), kernel.json, the kernel log and
nvram.json for the one that runs. PAUSE is what the kexec took that brought the kernel up, without copying. With --svg
the same is drawn to scale.

Kernel: last(1), journalctl --list-boots
"""

import argparse
import time
from typing import Any

from pkramfs.cli import arguments, render
from pkramfs.cli.generations import gather, lasting, up_for
from pkramfs.cli.render import Column


def add(made: argparse.ArgumentParser) -> None:
    """Add the option of `timeline` to its parser."""
    made.add_argument("--svg", metavar="FILE", help="write a picture as SVG (- is stdout)")


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl timeline`."""
    machine = arguments.existing(args)
    kernels = gather(machine)
    if args.svg is not None:
        from pkramfs.cli import timesheet

        timesheet.draw(f"Kernels of {machine.path()}", kernels, time.time()).save(args.svg)
    elif arguments.wants_json(args):
        render.emit_json(kernels)
    else:
        show(kernels, time.time())


def show(kernels: list[dict[str, Any]], now: float) -> None:
    """Print kernels as a table, and their events as another."""
    columns = [Column("KERNEL", True), Column("KIND"), Column("IMAGE"), Column("BOOTED")]
    columns += [Column(title, True) for title in ("UP FOR", "PAUSE", "NODES", "LOST")]
    render.table(columns, [_row(kernel, now) for kernel in kernels])
    events = [(kernel["generation"], event) for kernel in kernels for event in kernel["events"]]
    if events:
        render.say()
        rows = [(number, f"{event['at']:.3f} s", event["text"]) for number, event in events]
        render.table([Column("KERNEL", True), Column("AFTER", True), Column("WHAT")], rows)


def _row(kernel: dict[str, Any], now: float) -> list[Any]:
    return [
        kernel["generation"],
        kernel["kind"],
        kernel["image"],
        time.strftime("%F %T", time.localtime(kernel["booted"])),
        lasting(up_for(kernel, now)),
        "-" if kernel["pause"] is None else lasting(kernel["pause"]),
        len(kernel["nodes"]),
        len(kernel["lost"]),
    ]
