# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves in RAM over the last kexec, with reasons, from two pictures of RAM (memorymap.py) and the report of the boot.

    stayed     a preserved tree is where it was: a kexec copies none of its pages. Some may have been moved when it was
               preserved, out of the way of the loaded kernel
    moved      the kernel, to the slot that KASLR chose; tables that boot made anew
    ended      segments copied only for the boot; trees that were not preserved; memory freed since

The earlier picture is coarse where a part had many ranges, so ranges decide nothing here but to show.

Kernel: kernel/kexec_core.c, arch/x86/boot/compressed/kaslr.c
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.kernel.memorymap import DESTINATION, KERNEL, LEASED, PRESERVED, RESERVE, Part
from pkramfs.spans import Spans
from pkramfs.units import format_pfn, plural

STAYED, MOVED, ENDED = "stayed", "moved", "ended"
_IMAGE = "Kernel image"


class Move(NamedTuple):
    """One owner over a kexec: what became of it, why, its pages before, and its pages now (none if it ended)."""

    what: str
    owner: str
    why: str
    before: Spans
    now: Spans


def moves(before: Sequence[Part], now: Sequence[Part], info: KernelInfo) -> list[Move]:
    """Return the move of each owner in `before`; `info` is the running kernel's record."""
    found = []
    for part in before:
        if part.kind == PRESERVED:
            found.append(_tree(part, now, info.report))
        elif part.kind == LEASED and (lost := _lost(part, info.report)):
            found.append(Move(ENDED, part.owner, lost, part.pages, Spans()))
        elif part.kind == DESTINATION:
            why = f"the loaded kernel was copied here, and booted; its memory {_freed(part, now)}"
            found.append(Move(ENDED, part.owner, why, part.pages, Spans()))
        elif part.kind in (KERNEL, RESERVE):
            found += _kernels(part, now, info.report)
    return found


def _tree(part: Part, now: Sequence[Part], report: dict[str, Any]) -> Move:
    """Return the move of a preserved tree."""
    after = next((one for one in now if (one.kind, one.owner) == (PRESERVED, part.owner)), None)
    node = next((node for node in report.get("nodes") or [] if node["name"] == part.owner), None)
    if node is None:
        return Move(ENDED, part.owner, "lost: the new kernel did not find its node", part.pages, Spans())
    moved = node.get("moved", 0)
    earlier = f"; {plural(moved, 'page')} had been moved out of the way of the loaded kernel" if moved else ""
    stayed = f"{plural(node['pages'], 'page')} stayed where they were: a kexec copies none{earlier}"
    if after is not None:
        return Move(STAYED, part.owner, stayed, part.pages, after.pages)
    mounts = [one for one in now if one.kind == LEASED and one.pages & part.pages]
    if mounts:
        largest = max(mounts, key=lambda one: (one.pages & part.pages).total)
        why = f"{stayed}; live since, on {largest.owner}: its node was withdrawn by the first change"
        return Move(STAYED, part.owner, why, part.pages, largest.pages)
    return Move(ENDED, part.owner, f"{stayed}; given back since", part.pages, Spans())


def _lost(part: Part, report: dict[str, Any]) -> str:
    """Return why a living mount's pages were lost, nothing if its tree was preserved."""
    lost = any(entry["name"].startswith(f"{part.owner} (") for entry in report.get("lost") or [])
    return "lost: nobody had preserved it" if lost else ""


def _freed(part: Part, now: Iterable[Part]) -> str:
    used = Spans.union(one.pages for one in now if one.kind in (KERNEL, RESERVE))
    return "was freed, but for what the kernel runs in" if used & part.pages else "was freed"


def _kernels(part: Part, now: Iterable[Part], report: dict[str, Any]) -> list[Move]:
    """Return the move of one of the kernel's own ranges."""
    after = next((one for one in now if (one.kind, one.owner) == (part.kind, part.owner)), None)
    if after is None:
        return []
    if part.owner == _IMAGE:
        slots = report.get("kaslr_slots")
        how = f"KASLR chose one of {plural(slots, 'slot')}" if slots else "it runs where it was loaded"
        why = f"another kernel, from pfn {_first(part)} to pfn {_first(after)}: {how}"
    elif part.pages == after.pages:
        return [Move(STAYED, part.owner, "made anew by boot, in the same place", part.pages, after.pages)]
    else:
        why = f"made anew by boot, from pfn {_first(part)} to pfn {_first(after)}: clear of what is preserved"
    return [Move(MOVED, part.owner, why, part.pages, after.pages)]


def _first(part: Part) -> str:
    return format_pfn(int(part.pages.starts[0]))
