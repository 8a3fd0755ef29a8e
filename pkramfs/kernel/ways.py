"""What a kexec costs in each of two ways: PKRAM's bans and relocation, or KHO's scratch.

    bans       a loaded kernel's destinations are banned: what is preserved later and lies there is
               copied first, and what is preserved already makes the kernel be loaded elsewhere.
               Nothing is set aside; but preserved ranges take KASLR's slots away
    scratch    a slice that never holds preserved pages: nothing ever conflicts, and those pages are
               not there for trees, at any time

The comparison is of now: the loaded kernel, what is preserved, and what trees hold that may yet be.

Kernel: patches 15, 16 and 21; kernel/liveupdate/kexec_handover.c (scratch areas)
"""

from dataclasses import dataclass, replace

from pkramfs.errors import ExhaustedError
from pkramfs.kernel import nvram, placement
from pkramfs.kernel.nvram import Pending
from pkramfs.kernel.running import Running
from pkramfs.kernel.segments import destinations
from pkramfs.kernel.staging import Loaded
from pkramfs.kernel.state import LAYOUT
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE, format_size, pages, plural, round_up


@dataclass(frozen=True)
class Ways:
    """Figures in pages; slots are KASLR's, with what is preserved and without."""

    banned: int
    conflicting: int
    at_risk: int
    slots: int
    slots_without: int
    aside: int
    aside_now: int

    def describe(self) -> list[str]:
        """Both ways for people."""
        gone = self.slots_without - self.slots
        now = f" (set aside now: {_size(self.aside_now)})" if self.aside_now else ""
        return [
            f"bans: {plural(self.banned, 'page')} ({_size(self.banned)}) may not be preserved in place: "
            f"{self.conflicting} are preserved there now, up to {self.at_risk} that trees hold would be copied; "
            f"preserved ranges take {gone} of {plural(self.slots_without, 'KASLR slot')}",
            f"scratch: {_size(self.aside)} set aside for ever (scratch={self.aside * PAGE_SIZE >> 20}M){now}, "
            "nothing copied, no conflict",
        ]


def compare(kernel: Running, loaded: Loaded, preserved: Spans) -> Ways:
    """What the loaded kernel costs in either way, on this machine now."""
    banned = destinations(loaded.segments)
    at_risk = 0
    if kernel.info.layout == LAYOUT:
        at_risk = kernel.leases.counts_in({0: banned.outward(BLOCK_PAGES)})[0]["tree"] * BLOCK_PAGES
    scratch = kernel.info.reserved.get("Scratch", (0, 0))
    return Ways(
        banned=banned.total,
        conflicting=(banned & preserved).total,
        at_risk=min(at_risk, banned.total),
        slots=_slots(kernel, loaded, preserved),
        slots_without=_slots(kernel, loaded, Spans()),
        aside=scratch_pages(loaded, kernel.info.blocks),
        aside_now=scratch[1] - scratch[0],
    )


def scratch_pages(loaded: Loaded, blocks: int) -> int:
    """The slice in which this kernel always has room: where it is loaded, where it runs, and its table."""
    align = max(BLOCK_PAGES, loaded.image.align // PAGE_SIZE)
    runs = round_up(pages(loaded.image.init_size), align)
    lies = sum(round_up(s.pages, max(BLOCK_PAGES, s.align)) for s in loaded.segments)
    return runs + lies + round_up(pages(blocks * 8), BLOCK_PAGES)


def _slots(kernel: Running, loaded: Loaded, preserved: Spans) -> int:
    boot = Pending(nvram.KEXEC, kernel.generation + 1, loaded.cmdline, loaded.image, loaded.segments)
    boot = replace(boot, scratch=kernel.info.reserved.get("Scratch"))
    try:
        return placement.place(kernel.machine.hardware(), boot, preserved).slots
    except ExhaustedError:
        return 0


def _size(count: int) -> str:
    return format_size(count * PAGE_SIZE)
