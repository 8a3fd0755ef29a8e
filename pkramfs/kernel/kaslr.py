# SPDX-License-Identifier: GPL-2.0-or-later
"""KASLR: the physical places where a kernel may land, and the choice of one.

    free    |....####..........##......|      # preserved, segments, holes, reserved
    slots    ^          ^ ^ ^                 a kernel of 3 fits, aligned to 2, above the minimum

A slot is an aligned start from which the whole kernel lies in free memory. The set of slots is
exact: array operations compute one (first, count) pair for each free span, and tests compare it with
trying every address. The choice is uniform over slots, not over spans. It comes from the machine's
seed and the generation, so a repeated boot lands in the same place. The original walks the preserved
list once per candidate; here the list is subtracted once.

Kernel: arch/x86/boot/compressed/kaslr.c (process_mem_region, slots_fetch_random), patch 21
"""

import hashlib
import random
from dataclasses import dataclass

import numpy as np

from pkramfs.spans import U64, Spans


@dataclass(frozen=True)
class Slots:
    """Every place for a kernel: `firsts[i]` and the `counts[i] - 1` next multiples of `align`, in pages."""

    firsts: U64
    counts: U64
    align: int

    @property
    def total(self) -> int:
        """Return the number of slots."""
        return int(self.counts.sum())

    def __getitem__(self, index: int) -> int:
        """Return slot number `index`, in ascending order."""
        ends = np.cumsum(self.counts)
        at = int(np.searchsorted(ends, np.uint64(index), side="right"))
        before = int(ends[at - 1]) if at else 0
        return int(self.firsts[at]) + (index - before) * self.align


def find_slots(free: Spans, size: int, align: int, *, minimum: int = 0) -> Slots:
    """Find the slots for `size` pages in `free`, starting at multiples of `align` at or above `minimum`."""
    step = np.uint64(align)
    # one element for each free span: its first slot, then only the spans that hold a kernel, then their slots
    low = np.maximum(free.starts, np.uint64(minimum))
    firsts = (low + step - np.uint64(1)) // step * step
    fits = firsts + np.uint64(size) <= free.ends
    firsts, room = firsts[fits], free.ends[fits] - np.uint64(size)
    return Slots(firsts, (room - firsts) // step + np.uint64(1), align)


def choose(slots: Slots, seed: int, generation: int) -> int | None:
    """Choose one slot, uniformly, from the machine's seed and the generation; None where there is none."""
    if slots.total == 0:
        return None
    entropy = hashlib.sha256(f"{seed}:{generation}".encode()).digest()
    return slots[random.Random(entropy).randrange(slots.total)]
