# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon is started with: by a command, or by the holder of a mount whose daemon has died.

Kernel: struct fs_context
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pkramfs.mounting.starting import Expected

HANDED_OVER, FINAL = 75, 76
"""Exit statuses of a daemon that leaves its place to another, and of one that another could not replace."""
Tell = Callable[..., None]
"""What gives a holder the device, the lock and facts to go on with; without arguments, that the daemon is well."""


class Job(NamedTuple):
    """What a command wants to be mounted, and the descriptor on which it waits for the answer."""

    fd: int
    mountpoint: str
    text: str
    expected: Expected


class Held(NamedTuple):
    """What a holder has of a mount whose daemon has died."""

    device: int
    lock: int
    facts: dict[str, Any]
    suspect: bool
    """Requests that were not answered may be what daemons die of."""
