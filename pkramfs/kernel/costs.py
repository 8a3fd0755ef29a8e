# SPDX-License-Identifier: GPL-2.0-or-later
"""Costs of a kexec in each of two ways: PKRAM's bans and relocation, or KHO's scratch.

    bans       a loaded kernel's destinations are banned: pages there are copied when they are
               preserved later; pages preserved already make the kernel be loaded elsewhere.
               Nothing is set aside, but preserved ranges take KASLR slots away
    scratch    a slice that never holds preserved pages: nothing ever conflicts, but trees can
               never use those pages

The figures are of this moment: the loaded kernel, the preserved pages, and those that trees hold.

Kernel: patches 15, 16 and 21; kernel/liveupdate/kexec_handover.c (scratch areas)
"""

from dataclasses import asdict, dataclass
from typing import Any

from pkramfs.errors import ExhaustedError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import nvram, placement
from pkramfs.kernel.kernelrecord import LAYOUT
from pkramfs.kernel.nvram import Pending
from pkramfs.kernel.running import Running
from pkramfs.kernel.segments import destinations
from pkramfs.kernel.staging import Loaded
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE, format_size, plural


@dataclass(frozen=True)
class Costs:
    """Figures in pages; slots are KASLR's without scratch, beside what is preserved and on an empty machine."""

    banned: int
    conflicting: int
    at_risk: int
    slots: int
    slots_without: int
    aside: int
    aside_now: int

    @property
    def copies(self) -> int:
        """Return how many pages bans would have copied at most; scratch copies none."""
        return self.conflicting + self.at_risk

    def to_json(self) -> dict[str, Any]:
        """Return for programs the figures, and the pages and bytes that each way withholds and copies."""
        bans = {"pages": self.banned, "bytes": self.banned * PAGE_SIZE}
        scratch = {"pages": self.aside, "bytes": self.aside * PAGE_SIZE}
        return {
            "bans": bans | {"copies": self.copies, "copied_bytes": self.copies * PAGE_SIZE},
            "scratch": scratch | {"copies": 0, "copied_bytes": 0},
            "figures": asdict(self),
        }

    def describe(self) -> list[str]:
        """Describe both ways for people."""
        gone = self.slots_without - self.slots
        now = f" (set aside now: {_size(self.aside_now)})" if self.aside_now else ""
        return [
            f"bans: {plural(self.banned, 'page')} ({_size(self.banned)}) may not be preserved in place: "
            f"{self.conflicting:,} are preserved there now, up to {self.at_risk:,} that trees hold would be copied; "
            f"preserved ranges take {gone:,} of {plural(self.slots_without, 'KASLR slot')}",
            f"scratch: {plural(self.aside, 'page')} ({_size(self.aside)}) set aside for ever "
            f"(scratch={self.aside * PAGE_SIZE >> 20}M){now}, nothing copied, no conflict",
        ]


def compare(kernel: Running, loaded: Loaded, preserved: Spans) -> Costs:
    """Compare the costs of the loaded kernel in both ways, on this machine now."""
    banned = destinations(loaded.segments)
    scratch = kernel.info.reserved.get("Scratch", (0, 0))
    return Costs(
        banned=banned.total,
        conflicting=(banned & preserved).total,
        at_risk=_at_risk(kernel, banned - preserved),
        slots=_slots(kernel, loaded, preserved),
        slots_without=_slots(kernel, loaded, Spans()),
        aside=placement.scratch_pages(_pending(kernel, loaded), kernel.info.blocks),
        aside_now=scratch[1] - scratch[0],
    )


def _at_risk(kernel: Running, banned: Spans) -> int:
    """Count the pages of trees' blocks in destinations: an upper bound, because a block need not be full."""
    if kernel.info.layout != LAYOUT:
        return 0
    return (kernel.leases.trees().scale(BLOCK_PAGES) & banned).total


def _pending(kernel: Running, loaded: Loaded) -> Pending:
    """Return the pending boot of the loaded kernel as it would be without scratch."""
    cmdline = words.remove(loaded.cmdline, "scratch")
    return Pending(nvram.KEXEC, kernel.generation + 1, cmdline, loaded.image, loaded.segments)


def _slots(kernel: Running, loaded: Loaded, preserved: Spans) -> int:
    try:
        return placement.place(kernel.machine.hardware(), _pending(kernel, loaded), preserved).slots
    except ExhaustedError:
        return 0


def _size(count: int) -> str:
    return format_size(count * PAGE_SIZE)
