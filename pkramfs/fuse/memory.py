# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that may have no more memory (RLIMIT_AS, or a host without overcommit) refuses, and goes on answering.

    enough       each request that makes the tree larger is worked on
    no more      what was kept for that moment is let go, so that answering goes on; such requests are ENOMEM ...
    enough again ... until as much can be kept again

What fails first need not be a handler, whose caller can be told: pyfuse3 and trio need memory, too, and a request that
is lost there is never answered. So it is seen beforehand whether a few MiB can be had. Where memory is short in
spite of it the process ends (session.py, daemon/mount.py), which wakes whoever waits for an answer.

Kernel: mm/util.c (__vm_enough_memory), mm/mmap.c (may_expand_vm)
"""

import logging
import mmap

_SPARE, _NEAR, _EACH = 16 << 20, 2 << 20, 16
"""Bytes of address space that are kept, and that must still be to be had; one request of so many looks."""

log = logging.getLogger(__name__)


class Spare:
    """Address space that is there for answers only."""

    def __init__(self) -> None:
        self._kept: mmap.mmap | None = mmap.mmap(-1, _SPARE)
        self._grown = 0

    def expect(self) -> None:
        """Raise MemoryError if there is not enough to make the tree larger and still to answer whoever asks."""
        self._grown += 1
        if self._kept is not None and self._grown % _EACH:
            return
        try:
            mmap.mmap(-1, _NEAR if self._kept is not None else _SPARE + _NEAR).close()
            if self._kept is None:
                self._kept = mmap.mmap(-1, _SPARE)
        except OSError:
            raise MemoryError from None

    def let_go(self) -> None:
        """Have memory for answers, and for the log, which is told once."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
            log.error("out of memory: nothing more can be stored until there is some (see prlimit --as)")
