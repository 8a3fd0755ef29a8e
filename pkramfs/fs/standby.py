# SPDX-License-Identifier: GPL-2.0-or-later
"""Follow the log of a living tree, so as to have it at once when its daemon dies.

    prepare    rebuild the tree from the last checkpoint and the log, verified as a recovery is
    follow     apply what has been committed since; when another checkpoint counts, it is time to begin anew
    finish     the same once more, when nobody appends any more, and say which frames the files have

Every record is checked as it is applied. The whole is not verified again at the end: that would take what this is to
save. But which frames files have is known from what was verified and from the files that were changed since, and no
frame may be in two of them.

Who appends knows nothing of this reader. What it frees may be used for something else while we read. So the base is
looked at again after reading.

Kernel: fs/jbd2/recovery.c, run while the other node of a cluster lives
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pkramfs.errors import FormatError
from pkramfs.fs.picture import Progress
from pkramfs.fs.recheck import frames_of_all
from pkramfs.fs.recover import Rebuilt, rebuild
from pkramfs.journal.layout import TAIL_AT, read_position
from pkramfs.journal.reader import Opened, chunks, open_log
from pkramfs.units import BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.fs.limits import Limits
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.store import Store
    from pkramfs.spans import Spans


class Follower:
    """A copy of a living tree, made from its log."""

    def __init__(self, store: Store, live: int, ram: Ram, frames: Frames, limits: Limits) -> None:
        self._store, self._live, self._ram, self._frames, self._limits = store, live, ram, frames, limits
        self._rebuilt: Rebuilt | None = None
        self.position = 0
        """How far the log was followed."""

    def prepare(self) -> Generator[Progress, None, None]:
        """Make the copy; FormatError if that fails, also because the log was changed meanwhile."""
        rebuilt = yield from rebuild(self._store, self._live, self._ram, self._frames, self._limits)
        rebuilt.replay.touched = {}
        self._rebuilt, self.position = rebuilt, rebuilt.log.live.tail

    def follow(self) -> bool:
        """Bring the copy up to date; return False if it cannot be any more."""
        if read_position(self._ram, self._live, TAIL_AT, "tail") == self.position:
            return True
        return self._catch_up() is not None

    def _catch_up(self) -> Opened | None:
        """Apply what is new and return the log; None if another checkpoint counts."""
        assert self._rebuilt is not None
        base = self._rebuilt.log.base
        try:
            log = self._open()
            if log.base != base:
                return None
            self._rebuilt.replay.run(chunks(self._ram, log, start=self.position))
        except FormatError:
            if self._open().base != base:
                return None  # what we read belongs to somebody else by now
            raise
        if self._open().base != base:
            return None
        self._rebuilt.replay.go_on(log.live.zeroed)
        self.position = log.live.tail
        return log

    def _open(self) -> Opened:
        return open_log(self._ram, self._live, self._allowed())

    def _allowed(self) -> Spans:
        return self._frames.leases.blocks_of(self._frames.tree_id).scale(BLOCK_PAGES)

    def finish(self) -> Rebuilt | None:
        """Return the tree as it was when its daemon died, or None if it must be recovered in the ordinary way."""
        log = self._catch_up()
        rebuilt = self._rebuilt
        if log is None or rebuilt is None:
            return None
        rebuilt.replay.finish()
        data = frames_of_all(rebuilt.tree, rebuilt.replay.touched, rebuilt.data)
        if outside := data - self._allowed():
            pfn = int(outside.starts[0])
            raise FormatError("Journal", "pfn", found=f"{pfn:x}", expected="a frame in this tree's page blocks")
        return rebuilt._replace(log=log, data=data)
