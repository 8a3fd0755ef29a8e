# SPDX-License-Identifier: GPL-2.0-or-later
"""The prediction of the kexec that booted this kernel beside the result: a part of pkramctl report.

    LAST KEXEC      PREDICTED      SEEN
    pause              0.51 s    0.48 s
    nodes                   2         2
    preserved         110 MiB   110 MiB
    relocated              12        12
    lost                    0         0
    mounted again           1         1

The prediction is that of the plan which `pkram-kexec -e` carried out, and which its dry run prints (kernel/history.py
keeps it); the boot has counted on its own. Differences are named below.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from pkramfs.cli import render
from pkramfs.errors import MachineError
from pkramfs.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from pkramfs.kernel.kernelrecord import KernelInfo
    from pkramfs.machine.directory import Machine

_COUNTS = ("nodes", "pages", "moved", "lost", "mounts")
_WORDS = {"nodes": "nodes", "pages": "preserved", "moved": "relocated", "lost": "lost", "mounts": "mounted again"}


class Prediction(NamedTuple):
    """Figures by name, as predicted and as seen; `pause` is None if it was not measured."""

    foreseen: dict[str, Any]
    seen: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return both for programs."""
        return {"foreseen": self.foreseen, "seen": self.seen}

    def differences(self) -> list[str]:
        """Name the nodes that are in only one of both, in words."""
        before, after = self.foreseen["names"], self.seen["names"]
        if self.foreseen["nodes"] != len(before):
            return []  # only the first are named
        missing = [f"{name} was predicted, and is not there" for name in before if name not in after]
        return missing + [f"{name} is there, and was not predicted" for name in after if name not in before]


def of_boot(machine: "Machine", info: "KernelInfo") -> Prediction | None:
    """Return the prediction of the kexec that booted this kernel, None if there was none."""
    from pkramfs.kernel import history, nvram

    try:
        kexec, waiting = history.read(machine)["kexec"], len(nvram.mounts(machine))
    except MachineError:
        return None  # of files that are only shown here; status names the damage
    if kexec is None or kexec["generation"] != info.generation:
        return None
    nodes, foreseen = info.report.get("nodes") or [], kexec["foreseen"]
    seen = {
        "pause": kexec["pause"],
        "mounts": max(foreseen["mounts"] - waiting, 0),
        "nodes": len(nodes),
        "pages": sum(node["pages"] for node in nodes),
        "moved": sum(node.get("moved", 0) for node in nodes),
        "lost": len(info.report.get("lost") or []),
        "names": [node["name"] for node in nodes],
    }
    return Prediction(foreseen, seen)


def show(found: Prediction) -> None:
    """Print figures that were predicted and seen, side by side."""
    render.say()
    rows = [["pause", *(_seconds(side["pause"]) for side in found)]]
    rows += [[_WORDS[name], *(_figure(name, side[name]) for side in found)] for name in _COUNTS]
    columns = [render.Column("LAST KEXEC"), render.Column("PREDICTED", True), render.Column("SEEN", True)]
    render.table(columns, rows)
    for line in found.differences():
        render.say(line)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _figure(name: str, value: int) -> str:
    return format_size(value * PAGE_SIZE) if name == "pages" else f"{value:,}"
