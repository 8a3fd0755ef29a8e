"""pkramctl report: what the last boot found, reserved and lost, and where its time went.

After every restart the first question is whether all data came back; this answers it on one page,
from the report that boot left in kernel.json (`--json` gives that as it is).
"""

import argparse
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, render
from pkramfs.errors import MachineError
from pkramfs.units import PAGE_SIZE, format_size, plural

if TYPE_CHECKING:
    from pkramfs.kernel.state import KernelInfo


def show(args: argparse.Namespace) -> None:
    """Print the report of the running kernel."""
    from pkramfs.kernel import state

    info = state.read(arguments.existing(args), any_layout=True)
    if info is None:
        raise MachineError("no kernel is running, so there is no boot to report")
    if arguments.wants_json(args):
        render.emit_json(info.report)
        return
    render.fields(_summary(info))
    report = info.report
    nodes = [[n["name"], _pages(n["pages"]), n["ranges"], n.get("moved", 0)] for n in report.get("nodes") or []]
    _table("NODE", nodes, "RANGES", "PAGES RELOCATED")
    _numa(report.get("numa") or {})
    _phases(report.get("phases") or {})


def _summary(info: "KernelInfo") -> list[tuple[str, Any]]:
    report = info.report
    nodes, lost = report.get("nodes") or [], report.get("lost") or []
    reserved = report.get("reserved_bytes") or {}
    found = f"{plural(len(nodes), 'node')}, {_pages(report.get('preserved_pages', 0))} in "
    found += plural(report.get("preserved_ranges", 0), "range")
    slots = report.get("kaslr_slots")
    return [
        ("kernel", f"generation {info.generation}, {info.kind} boot of {info.image}"),
        ("cmdline", report.get("cmdline")),
        ("found", found if nodes else "nothing preserved"),
        ("lost", ", ".join(f"{node['name']} ({_pages(node['pages'])})" for node in lost) or "nothing"),
        ("reserved", ", ".join(f"{name} {format_size(size)}" for name, size in reserved.items()) or None),
        ("placed", f"in one of {slots:,} slots" if slots else None),
        *((f"segment{number or ''}", text) for number, text in enumerate(report.get("segments") or [])),
    ]


def _pages(count: int) -> str:
    return format_size(count * PAGE_SIZE)


def _table(title: str, rows: list[list[Any]], *figures: str) -> None:
    if rows:
        print()
        columns = [render.Column(title), render.Column("SIZE", True), *(render.Column(f, True) for f in figures)]
        render.table(columns, rows)


def _numa(nodes: dict[str, dict[str, int]]) -> None:
    if len(nodes) > 1:
        rows = list(nodes.items())
        cells = [[name, _pages(node["pages"]), _pages(node["preserved"])] for name, node in rows]
        _table("NUMA NODE", cells, "PRESERVED")


def _phases(phases: dict[str, float]) -> None:
    if phases:
        print()
        rows = [[name.replace("_", " "), f"{seconds * 1000:.1f} ms"] for name, seconds in phases.items()]
        rows.append(["all", f"{sum(phases.values()) * 1000:.1f} ms"])
        render.table([render.Column("PHASE OF BOOT"), render.Column("TIME", True)], rows)
