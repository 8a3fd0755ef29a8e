# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl report: pages that the last boot found, reserved, relocated and lost, and the time of each phase.

    kernel     generation 2, kexec boot of builtin
    found      2 nodes, 110 MiB in 3 ranges
    lost       nothing

    NODE           SIZE   RANGES   PAGES RELOCATED   UNCHECKED
    shmem-one   100 MiB        2                12     nothing

    LAST KEXEC      PREDICTED      SEEN
    pause              0.51 s    0.48 s

    NEXT KERNEL    PAGES      SIZE   COPIED AT MOST
    bans          16,387    64 MiB        512 pages
    scratch       34,816   136 MiB          nothing

After every restart the first question is whether all data came back; this answers it on one page,
from the report that boot left in kernel.json (`--json` gives that as it is, with `prediction` and `ways`), and
from what was predicted of the kexec (prediction.py). In a crash kernel it tells what is known about the dead
one. The last table is there while a kernel is loaded:
what it costs in PKRAM's way and what it would cost in KHO's (kernel/costs.py).
"""

import argparse
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, prediction, render
from pkramfs.cli.nodes import without_sum
from pkramfs.errors import MachineError, PkramfsError
from pkramfs.units import PAGE_SIZE, format_pfn, format_size, plural

if TYPE_CHECKING:
    from pkramfs.kernel.costs import Costs
    from pkramfs.kernel.kernelrecord import KernelInfo
    from pkramfs.machine.directory import Machine

_DYING_WORDS = 10
"""Lines of a dead kernel's log that are shown; `--json` has more."""


def show(args: argparse.Namespace) -> None:
    """Print the report of the running kernel."""
    from pkramfs.kernel import kernelrecord

    machine = arguments.existing(args)
    info = kernelrecord.read(machine, any_layout=True)
    if info is None:
        raise MachineError("no kernel is running, so there is no report: mount a tree first")
    costs, predicted = _costs_now(machine), prediction.of_boot(machine, info)
    if arguments.wants_json(args):
        more = {"prediction": predicted.to_json() if predicted else None, "ways": costs.to_json() if costs else None}
        render.emit_json(info.report | more)
        return
    report = info.report
    render.fields([*_summary(info), *_dead(report.get("dead") or {})])
    nodes = [
        [n["name"], _pages(n["pages"]), n["ranges"], n.get("moved", 0), _unchecked(n)]
        for n in report.get("nodes") or []
    ]
    _table("NODE", nodes, "RANGES", "PAGES RELOCATED", "UNCHECKED")
    if predicted:
        prediction.show(predicted)
    _numa(report.get("numa") or {})
    _phases(report.get("phases") or {})
    _lines("LOADED SEGMENT", report.get("segments") or [])
    if costs:
        _print_costs(costs)
    _lines("LAST WORDS OF THE DEAD KERNEL", (report.get("dead") or {}).get("dmesg", [])[-_DYING_WORDS:])


def costs(machine: "Machine") -> "Costs | None":
    """Return the costs of the loaded kernel with bans and with scratch; None if none is loaded or PKRAM is off."""
    from pkramfs.kernel import running, staging
    from pkramfs.kernel.costs import compare

    kernel, loaded = running.look(machine, any_layout=True), staging.read(machine)
    if loaded is None or not kernel.info.pkram:
        return None
    return compare(kernel, loaded, kernel.store.preserved())


def _costs_now(machine: "Machine") -> "Costs | None":
    """Return the same, or None with a warning: damage of now must not hide the report of the last boot."""
    try:
        return costs(machine)
    except PkramfsError as error:
        arguments.warn("pkramctl", f"the costs of the loaded kernel are unknown: {error}")
        return None


def _summary(info: "KernelInfo") -> list[tuple[str, Any]]:
    report = info.report
    nodes, lost = report.get("nodes") or [], report.get("lost") or []
    reserved = report.get("reserved_bytes") or {}
    found = f"{plural(len(nodes), 'node')}, {_pages(report.get('preserved_pages', 0))} in "
    found += plural(report.get("preserved_ranges", 0), "range")
    slots = report.get("kaslr_slots")
    return [
        ("kernel", f"generation {info.generation}, {info.kind} boot of {info.image}"),
        ("cmdline", report.get("cmdline") or "(empty)"),
        ("found", found if nodes else "nothing preserved"),
        ("lost", ", ".join(f"{node['name']}{_lost_size(node['pages'])}" for node in lost) or "nothing"),
        ("reserved", ", ".join(f"{name} {format_size(size)}" for name, size in reserved.items()) or None),
        ("placed", f"in one of {plural(slots, 'slot')}" if slots else "without KASLR"),
    ]


def _lost_size(count: int) -> str:
    return f" ({_pages(count)})" if count else ""  # pages of trees that were never preserved are not counted


def _unchecked(node: dict[str, Any]) -> str:
    """Return how much of a node crossed without a checksum; `-` if an older kernel wrote the report."""
    return without_sum(node["name"], node["unchecked"]) if "unchecked" in node else "-"


def _dead(dead: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the lines about the dead kernel, in a crash kernel."""
    if not dead:
        return []
    where = f"super block at pfn {format_pfn(dead['super_pfn'])}" if dead["super_pfn"] else "PKRAM was off"
    return [
        ("died", f"generation {dead['generation']}, {where}, lease table at pfn {format_pfn(dead['lease_table_pfn'])}"),
        ("its line", dead["cmdline"]),
        ("read it", "pkramctl inspect superblock, then any record by its pfn; leave with pkram-kexec --cold"),
    ]


def _pages(count: int) -> str:
    return format_size(count * PAGE_SIZE)


def _table(title: str, rows: list[list[Any]], *figures: str) -> None:
    if rows:
        render.say()
        columns = [render.Column(title), render.Column("SIZE", True), *(render.Column(f, True) for f in figures)]
        render.table(columns, [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows])


def _lines(title: str, lines: list[str]) -> None:
    if lines:
        render.say()
        render.table([render.Column(title)], [[line] for line in lines])


def _print_costs(costs: "Costs") -> None:
    render.say()
    names = [render.Column("NEXT KERNEL"), *(render.Column(n, True) for n in ("PAGES", "SIZE", "COPIED AT MOST"))]
    bans = ["bans", f"{costs.banned:,}", _pages(costs.banned), plural(costs.copies, "page")]
    scratch = ["scratch", f"{costs.aside:,}", _pages(costs.aside), "nothing"]
    render.table(names, [bans, scratch])
    for line in costs.describe():
        render.say(line)


def _numa(nodes: dict[str, dict[str, int]]) -> None:
    if len(nodes) > 1:
        rows = list(nodes.items())
        cells = [[name, _pages(node["pages"]), _pages(node["preserved"])] for name, node in rows]
        _table("NUMA NODE", cells, "PRESERVED")


def _phases(phases: dict[str, float]) -> None:
    if phases:
        render.say()
        rows = [[name.replace("_", " "), f"{seconds * 1000:.1f} ms"] for name, seconds in phases.items()]
        rows.append(["all", f"{sum(phases.values()) * 1000:.1f} ms"])
        render.table([render.Column("PHASE OF BOOT"), render.Column("TIME", True)], rows)
