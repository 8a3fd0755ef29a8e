# SPDX-License-Identifier: GPL-2.0-or-later
"""Python's collector of cyclic garbage, kept from walking the tree.

A tree is some objects for each file, all of them alive; what it gives up is freed at once, by reference
counts, for a removed inode is in no cycle. But the collector does not know that, and looks at all
of them each time that there are a quarter more. So a tree that is *settled* is passed over:

    born ──▶ young ──full collection──▶ survived: settled, never looked at again

Each object is then looked at by one full collection and not by all that follow. Creating a million
files in one tree took 11 full collections of 1.5 s together, the longest 273 ms, in which no request was
answered; settled, 22 of 0.7 s, the longest 60 ms. What a request leaves in cycles (tracebacks) is young
and collected as ever; only objects that become cyclic after a full collection leak.

The kernel's kmem_cache_free() frees at once; RCU, too, waits for readers only.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FULL = 2
"""The oldest generation, in gc's callbacks."""


@contextmanager
def paused() -> Iterator[None]:
    """Keep the collector off while hundreds of thousands of objects are made, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def settle() -> None:
    """Pass over what is alive, and from now on what survives a full collection. For a process that serves a tree."""
    if _freeze not in gc.callbacks:
        gc.callbacks.append(_freeze)
    gc.freeze()


def _freeze(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == FULL:
        gc.freeze()
