"""Banned memory: where preserved pages may not lie, and how they are moved out of it.

A kexec image that is loaded already has fixed destinations; what the kernel reserved early and the
crash kernel's window are out of bounds as well. Pages that a save finds there are copied to frames
elsewhere and the copies are what is preserved. The original stays the file's; the caller keeps the
tree frozen until the node is withdrawn, so the copy cannot become stale (D7).

    run   [----------====-----]        ==== banned
    kept  [----------]    [---]
    moved             [==]  ─► one run elsewhere, or several: the largest pieces that fit

Only the banned part of a huge page moves; both parts are then entries of the largest orders that
fit, where PKRAM copies all of it into base pages. Bans are a set of spans, so there is no table to
overflow (D12).

Kernel: mm/pkram.c (banned_regions, pkram_alloc_page, __pkram_save_page), patches 5 and 15
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from pkramfs.machine.ram import Ram
from pkramfs.spans import U64, Spans

Run = tuple[int, int]


class Allocator(Protocol):
    """What a save needs of a frame allocator: see `machine.frames.Frames`."""

    def allocate(self, count: int, order: int = 0, *, held: bool = False) -> list[Run]: ...

    def free(self, starts: list[int], counts: list[int]) -> None: ...


def touched(banned: Spans, pfn: U64, count: U64) -> npt.NDArray[np.bool_]:
    """For each run, whether any page of it is banned."""
    if not banned:
        return np.zeros(len(pfn), dtype=bool)
    at = np.searchsorted(banned.ends, pfn, side="right")
    first = np.append(banned.starts, ~np.uint64(0))[at]
    hit: npt.NDArray[np.bool_] = first < pfn + count
    return hit


def allocate_outside(frames: Allocator, count: int, banned: Spans) -> list[Run]:
    """Runs of `count` frames outside of `banned`.

    Frames found inside are parked until the end, so that the allocator does not offer them again.
    """
    if not banned:
        return frames.allocate(count, held=True)
    good: list[Run] = []
    parked: list[Run] = []
    try:
        while count:
            for start, size in frames.allocate(count, held=True):
                run = Spans([(start, start + size)])
                parked += [(a, b - a) for a, b in run & banned]
                fine = [(a, b - a) for a, b in run - banned]
                good += fine
                count -= sum(size for _, size in fine)
    except BaseException:
        _free(frames, good)
        raise
    finally:
        _free(frames, parked)
    return good


def _free(frames: Allocator, runs: list[Run]) -> None:
    if runs:
        frames.free([start for start, _ in runs], [count for _, count in runs])


def move_out(
    ram: Ram, frames: Allocator, index: U64, pfn: U64, count: U64, banned: Spans
) -> tuple[U64, U64, U64, list[Run]]:
    """Runs (index, pfn, count) with every banned part replaced by a copy elsewhere.

    Returns the new runs, by index, and the frames that hold the copies.
    """
    hit = touched(banned, pfn, count)
    if not hit.any():
        return index, pfn, count, []
    rows = [np.column_stack((index, pfn, count))[~hit]]
    copies: list[Run] = []
    try:
        for first, start, size in zip(index[hit].tolist(), pfn[hit].tolist(), count[hit].tolist(), strict=True):
            run = Spans([(start, start + size)])
            kept = [(first + a - start, a, b - a) for a, b in run - banned]
            for a, b in run & banned:
                moved = _copy(ram, frames, first + a - start, a, b, banned)
                copies += [(target, length) for _, target, length in moved]
                kept += moved
            rows.append(np.array(kept, dtype=np.uint64).reshape(-1, 3))
    except BaseException:
        _free(frames, copies)
        raise
    table = np.concatenate(rows)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), copies


def _copy(ram: Ram, frames: Allocator, index: int, start: int, end: int, banned: Spans) -> list[tuple[int, int, int]]:
    """Copy one banned run elsewhere; rows (index, pfn, count) of the copies."""
    rows = []
    for target, size in allocate_outside(frames, end - start, banned):
        ram.copy(start, target, size)
        rows.append((index, target, size))
        index, start = index + size, start + size
    return rows
