# SPDX-License-Identifier: GPL-2.0-or-later
"""Follow the log of a live tree, so that a copy of the tree is ready when its daemon dies.

    prepare    rebuild the tree from the last checkpoint and the log, verified as a recovery is
    follow     apply the records committed since; when there is a new checkpoint, another standby begins anew
    finish     the same once more, after the daemon has died, and return which frames the files have

Every record is checked as it is applied. The whole tree is not verified again at the end: that would take the time that
a standby is to save. But the frames of all files are known from the last verification and from the files changed since,
and no frame may be in two of them.

The daemon knows nothing of this reader, and may reuse frames of its log while they are read. So the base is checked
again after reading.

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
    """A copy of a live tree, made from its log."""

    def __init__(self, store: Store, live: int, ram: Ram, frames: Frames, limits: Limits) -> None:
        self._store, self._live, self._ram, self._frames, self._limits = store, live, ram, frames, limits
        self._rebuilt: Rebuilt | None = None
        self.position = 0
        """How far the log was followed."""

    def prepare(self) -> Generator[Progress, None, None]:
        """Make the copy; raise FormatError if that fails, perhaps because the log was changed meanwhile."""
        rebuilt = yield from rebuild(self._store, self._live, self._ram, self._frames, self._limits)
        rebuilt.replay.touched = {}
        self._rebuilt, self.position = rebuilt, rebuilt.log.live.tail

    def follow(self) -> bool:
        """Bring the copy up to date; return False if that is no longer possible."""
        if read_position(self._ram, self._live, TAIL_AT, "tail") == self.position:
            return True
        return self._catch_up() is not None

    def _catch_up(self) -> Opened | None:
        """Apply the new records and return the log; None if there is a new checkpoint."""
        assert self._rebuilt is not None
        base = self._rebuilt.log.base
        try:
            log = self._open()
            if log.base != base:
                return None
            self._rebuilt.replay.run(chunks(self._ram, log, start=self.position))
        except FormatError:
            if self._open().base != base:
                return None  # the frames that were read may be used for something else by now
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
        """Return the tree as it was when its daemon died, or None if it has to be recovered from the checkpoint."""
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
