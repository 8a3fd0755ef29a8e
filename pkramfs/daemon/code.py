# SPDX-License-Identifier: GPL-2.0-or-later
"""Which code this process runs, told by the files that it came from.

A kexec boots the code on disk. A holder that runs that code already need not start again.

Kernel: Makefile (KERNELRELEASE)
"""

import os
import sys
from functools import cache

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fingerprint() -> int:
    """Return a number that changes when the interpreter or a file of this package on disk does."""
    found = [_state(os.path.realpath(sys.executable))]
    for directory, _, names in os.walk(_PACKAGE):
        found += [_state(os.path.join(directory, name)) for name in sorted(names) if name.endswith(".py")]
    return hash(tuple(found))


@cache
def running() -> int:
    """Return the fingerprint of what this process runs: it is asked for when all is imported, and inherited."""
    return fingerprint()


def _state(path: str) -> tuple[int, int, int, int]:
    """Return what tells one content of a file from another; nothing of a file that is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0, 0)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
