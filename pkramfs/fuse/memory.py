# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon without more memory (RLIMIT_AS, or a host without overcommit) refuses growth, and still answers requests.

    enough       each request that makes the tree larger is served
    no more      the spare memory is freed, so that answering goes on; such requests fail with ENOMEM ...
    enough again ... until as much spare memory can be allocated again

The first failure need not be in a handler, whose caller gets an errno: pyfuse3 and trio need memory, too, and a request
that is lost there is never answered. So the daemon checks beforehand whether it can allocate a few MiB. If memory is
short in spite of that, the process ends (session.py, daemon/mount.py), which wakes all programs that wait for an
answer.

Kernel: mm/util.c (__vm_enough_memory), mm/mmap.c (may_expand_vm)
"""

import logging
import mmap

_SPARE, _NEAR, _EACH = 16 << 20, 2 << 20, 16
"""Bytes of address space that are kept, and that must still be to be had; one request of so many looks."""

log = logging.getLogger(__name__)


class Spare:
    """Address space that is kept for answers only."""

    def __init__(self) -> None:
        self._kept: mmap.mmap | None = mmap.mmap(-1, _SPARE)
        self._grown = 0

    def expect(self) -> None:
        """Raise MemoryError unless there is enough to make the tree larger and still answer requests."""
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
        """Free the spare memory for answers; note this in the daemon's log once."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
            log.error("out of memory: nothing more can be stored until there is some (see prlimit --as)")
