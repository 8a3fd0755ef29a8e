# SPDX-License-Identifier: GPL-2.0-or-later
"""The arguments of a daemon, from a command, or from the holder of a mount whose daemon has died.

Kernel: struct fs_context
"""

import json
import sys
from typing import Any, NamedTuple

from pkramfs.mounting.starting import Expected

HANDED_OVER, FINAL, CROSSED = 75, 76, 77
"""Exit statuses of a daemon that leaves its place to another, of one that another could not replace, and of one whose
place another takes after a kexec."""

LASTING = ("taken", "went_back")
"""Facts that one daemon has of the others: how many were replaced, and why new code was given up."""


class Job(NamedTuple):
    """What to mount, and the descriptor on which the command waits for the answer."""

    fd: int
    mountpoint: str
    text: str
    expected: Expected


class Held(NamedTuple):
    """The parts of a mount that a holder keeps when its daemon has died."""

    device: int
    lock: int
    facts: dict[str, Any]
    suspect: bool
    """Requests that were not answered may be what daemons die of."""
    users: int = -1
    """The file that says who uses the tree, if a kexec was to come (crossing.py)."""
    trial: int = -1
    """What a daemon of new code has open until it is proven (trial.py)."""


def words(job: Job, held: Held, *daemon: int) -> list[str]:
    """Return the command line of a holder that continues a mount, perhaps with pidfd and socket of its daemon."""
    said = [str(held.device), str(held.lock), json.dumps(held.facts), str(held.users), *map(str, daemon)]
    return [sys.executable, "-P", "-m", "pkramfs", "hold", job.mountpoint, job.text, *said]
