# SPDX-License-Identifier: GPL-2.0-or-later
"""The frames that a save takes for itself: metadata, byte pages, copies of banned pages.

All of them lie outside of banned memory; all are given back if the save is discarded, and become part
of the node if it is published. Any number of threads may take frames. The host backs what `take`
returns: on a full host a save ends with an error, and the tree stays as it is.

Kernel: mm/pkram.c (pkram_alloc_page), patch 15
"""

import threading
from collections.abc import Callable

from pkramfs.errors import PkramError
from pkramfs.machine.frames import Run, pfns_of, spans_of
from pkramfs.machine.ram import Ram
from pkramfs.pkram.relocate import Allocator, allocate_outside, free_runs, relocate_banned
from pkramfs.spans import U64, Spans


class SaveFrames:
    """Frames of one save. `no_memory` makes the error to raise (ENOMEM) from the allocator's, or the host's."""

    def __init__(self, ram: Ram, frames: Allocator, banned: Spans, no_memory: Callable[[OSError], PkramError]) -> None:
        self.ram, self.frames, self.banned = ram, frames, banned
        self._no_memory, self._lock = no_memory, threading.Lock()
        self._runs: list[Run] = []
        self._listed = 0

    def take(self, count: int) -> list[Run]:
        """Take runs of `count` zeroed frames outside of banned memory."""
        if not count:
            return []
        with self._lock:
            try:
                runs = allocate_outside(self.frames, count, self.banned)
            except OSError as error:
                raise self._no_memory(error) from error
            self._runs += runs
        self._back(runs)
        return runs

    def _back(self, runs: list[Run]) -> None:
        """Back frames with host memory: most of them are written through the mapping."""
        try:
            for start, count in runs:
                self.ram.back_run(start, count)
        except OSError as error:
            raise self._no_memory(error) from error

    def pages(self, count: int) -> U64:
        """Take `count` zeroed frames; return their pfns."""
        return pfns_of(self.take(count))

    def relocate(self, index: U64, pfn: U64, count: U64) -> tuple[U64, U64, U64, list[Run]]:
        """Copy the banned parts of runs elsewhere; return the new runs and where the copies are."""
        with self._lock:
            try:
                index, pfn, count, copies = relocate_banned(self.ram, self.frames, index, pfn, count, self.banned)
            except OSError as error:
                raise self._no_memory(error) from error
            self._runs += copies
        return index, pfn, count, copies

    def give_back(self, pages: U64) -> None:
        """Return frames that were taken and not used."""
        if len(pages):
            gone = Spans.from_numbers(pages)
            self._runs = [(start, end - start) for start, end in self.spans() - gone]
            self.frames.free(gone.starts.tolist(), gone.counts.tolist())

    def release(self) -> None:
        """Give everything back."""
        runs, self._runs = self._runs, []
        free_runs(self.frames, runs)

    def spans(self) -> Spans:
        """Return every frame that was taken."""
        return spans_of(self._runs)

    def unlisted(self) -> Spans:
        """Return the frames taken since the last call."""
        fresh, self._listed = self._runs[self._listed :], len(self._runs)
        return spans_of(fresh)
