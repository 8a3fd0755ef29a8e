# SPDX-License-Identifier: GPL-2.0-or-later
"""Checksums of data made and compared in the background (`-o verify=data`).

    restored ──▶ all sums are compared ──▶ rested pieces get a sum ──▶ sleep until something is changed
                 a step at a time, the digests in a thread

The steps give way to requests: while this process is busy with requests, nothing is digested for nine tenths of the
time.

Kernel: fs/btrfs/scrub.c, drivers/md/md.c (speed_limit_min limits a resync)
"""

import contextlib
import errno
import time
from collections.abc import Callable
from typing import Any

import trio

from pkramfs.errors import ErrnoError, ExhaustedError
from pkramfs.fs.pieces import PIECE_SIZE
from pkramfs.fs.summing import Summing, begin
from pkramfs.fs.sums import Sums
from pkramfs.fs.tree import Tree
from pkramfs.pkram.parallel import workers
from pkramfs.text import exact

REST_SECONDS = 2.0
"""How long data must have been left alone before they get a sum."""
_BUSY, _GIVE_WAY = 0.25, 9
"""Part of the time for which requests may be served before steps give way; how many times as long as the last one."""
_NAMED = 10
"""Damaged pieces that the log names one by one."""
_MOST_NAMED = 100
"""Damaged ranges that a status names."""
_MOST_THREADS = 4


class Background:
    """The sums of one mount. `say` writes to the kernel log."""

    def __init__(self, tree: Tree, mountpoint: str, say: Callable[[str], None]) -> None:
        self._tree, self._mountpoint, self._say = tree, mountpoint, say
        self._work: Summing | None = None
        self._stirred = trio.Event()
        self._said = 0
        self._turn = trio.Lock()

    def switch(self, *, on: bool) -> None:
        """Switch checksums of data on, or off, which drops the existing ones."""
        if not on:
            self._work = None
            self._tree.forget_sums()
            with contextlib.suppress(ExhaustedError):  # committed before any store
                self._tree.commit()
        elif self._work is None:
            self._tree.sums = sums = self._tree.sums or Sums(self._tree)
            sums.found, sums.table.stirred = self._found, self._stir
            if not sums.complete:
                begin(self._tree, sums)
            sums.complete = False
            self._work = Summing(self._tree, sums, max(1, min(_MOST_THREADS, workers() // 2)))
            self._stir()

    def _stir(self) -> None:
        self._stirred.set()

    def _found(self, ino: int, piece: int) -> None:
        """Write a damaged piece to the kernel log."""
        self._said += 1
        if self._said <= _NAMED:
            path = exact(self._tree.path(self._tree.inode(ino)))
            self._say(
                f"pkramfs: {self._mountpoint}: data of {path} are damaged between byte {piece * PIECE_SIZE} and "
                f"{(piece + 1) * PIECE_SIZE}: they are not what their checksum says"
            )
        elif self._said == _NAMED + 1:
            self._say(f"pkramfs: {self._mountpoint}: more data are damaged: see pkramctl status")

    def status(self) -> dict[str, Any]:
        """Return the fields of a status; see control/replies."""
        sums = self._tree.sums
        if self._work is None or sums is None:
            return {}
        return {
            "unsummed": sums.lacking,
            "to_compare": sums.table.doubted,
            "damaged": sums.lines(_MOST_NAMED),
            "damaged_count": len(sums.broken()),
        }

    def compare(self) -> None:
        """Compare all data with their sums again."""
        if self._work is None:
            raise ErrnoError(
                f"{self._mountpoint} was mounted without verify=data: there are no checksums", errno.EINVAL
            )
        self._work.sums.table.doubt()
        self._stir()

    # -- the work -------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Make and compare sums until cancelled."""
        while True:
            self._stirred = trio.Event()
            work = self._work
            if work is not None:
                await self._settle(work)
                table = work.sums.table
                if table.touched:
                    table.turn()
                    await trio.sleep(REST_SECONDS)
                    continue
            await self._stirred.wait()

    async def _settle(self, work: Summing) -> None:
        """Sum and compare pieces until none is left, giving way to requests."""
        busy = _Busy()
        while work is self._work:
            began = time.monotonic()
            if not await self._step(work):
                return
            if busy.is_busy():
                await trio.sleep(_GIVE_WAY * (time.monotonic() - began))

    async def _step(self, work: Summing, *, compare: bool = True) -> bool:
        """Work on some pieces, in a thread; return False if there is none."""
        async with self._turn:
            try:
                self._tree.commit()  # the rest of a cut page is zeros only after the commit
            except ExhaustedError:
                return False
            jobs = work.take(compare=compare)
            if not jobs:
                return False
            digests = await trio.to_thread.run_sync(work.digests, jobs)
            if work is self._work:
                with contextlib.suppress(ExhaustedError):  # the next commit has it, too
                    work.settle(jobs, digests)
            return True

    async def sum_all(self) -> None:
        """Give all data of a frozen tree a checksum now."""
        work = self._work
        if work is None:
            return  # PKRAM is off; the preserve will report this
        for _ in range(2):  # changes of this round, and of the round before
            while await self._step(work, compare=False):
                pass
            work.sums.table.turn()
        while await self._step(work, compare=False):
            pass


class _Busy:
    """Tells whether this thread was busy since the last question."""

    def __init__(self) -> None:
        self._wall, self._own = time.monotonic(), time.thread_time()

    def is_busy(self) -> bool:
        wall, own = time.monotonic(), time.thread_time()
        spent, passed = own - self._own, wall - self._wall
        self._wall, self._own = wall, own
        return passed > 0 and spent / passed > _BUSY
