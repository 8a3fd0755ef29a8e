# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernels of a machine, one after the other, for a terminal (timeline.py) and as SVG (timesheet.py) alike.

Those that have ended are in history.json, the one that runs is in its own records (kernel/history.py).
"""

from typing import TYPE_CHECKING, Any

from pkramfs.errors import MachineError
from pkramfs.units import PAGE_SIZE, format_size, plural

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine


def gather(machine: "Machine") -> list[dict[str, Any]]:
    """Return the kernels that are known, oldest first; the last one may be running."""
    from pkramfs.kernel import history

    found = list(history.read(machine)["kernels"])
    if now := history.current(machine):
        found.append(now)
    if not found:
        raise MachineError("no kernel has run here yet: mount a tree first")
    return found


def up_for(kernel: dict[str, Any], now: float) -> float:
    """Return the seconds for which a kernel ran, or has run."""
    return float(max((kernel["ended"] or now) - kernel["booted"], 0))


def lasting(seconds: float) -> str:
    """Return a duration for people: two units at most."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    parts: list[str] = []
    left = round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (parts and len(parts) < 2):
            parts.append(f"{count} {unit}")
        if len(parts) == 2:
            break
    return " ".join(parts)


def facts(kernel: dict[str, Any], now: float) -> str:
    """Describe a kernel in a line: how long it ran, the nodes that it found and lost."""
    said = [f"{'' if kernel['ended'] else 'up for '}{lasting(up_for(kernel, now))}"]
    if kernel["nodes"]:
        size = format_size(sum(node["pages"] for node in kernel["nodes"]) * PAGE_SIZE)
        said.append(f"found {plural(len(kernel['nodes']), 'node')}, {size}")
    if kernel["lost"]:
        said.append(f"{len(kernel['lost'])} lost")
    return "; ".join(said)
