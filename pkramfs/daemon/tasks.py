# SPDX-License-Identifier: GPL-2.0-or-later
"""How a daemon runs: under trio, with threads for calls that may wait for its own mount.

Kernel: kernel/kthread.c
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from pkramfs.errors import explain
from pkramfs.mounting import syscalls

log = logging.getLogger("pkramfs")


def run(function: Callable[[], Awaitable[None]]) -> None:
    """Run under trio; of several exceptions raise the first, from which the others follow."""
    try:
        trio.run(function)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def in_thread(work: Callable[[], None]) -> None:
    """Run a call that may wait for this daemon's mount in a thread, so that requests are answered meanwhile."""
    await trio.to_thread.run_sync(work, abandon_on_cancel=True)


async def flush(dev: int | None) -> None:
    """Make the kernel write back dirty data, through a path where the mount can still be reached."""
    for place in syscalls.places(dev)[:1]:
        try:
            await in_thread(partial(syscalls.syncfs, place, dev))
        except OSError as error:
            log.warning("not all was written back: %s", explain(error))
