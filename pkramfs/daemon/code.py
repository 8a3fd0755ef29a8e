# SPDX-License-Identifier: GPL-2.0-or-later
"""Which code this process runs, identified by the files that it was loaded from.

A kexec boots the code on disk. A holder that runs that code already need not start again.

Kernel: Makefile (KERNELRELEASE)
"""

import os
import sys
from functools import cache

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fingerprint() -> int:
    """Return a number that changes with the interpreter and with every file of this package on disk."""
    found = [_state(os.path.realpath(sys.executable))]
    for directory, _, names in os.walk(_PACKAGE):
        found += [_state(os.path.join(directory, name)) for name in sorted(names) if name.endswith(".py")]
    return hash(tuple(found))


@cache
def running() -> int:
    """Return the fingerprint of the running code: computed after all imports, and inherited by forks."""
    return fingerprint()


def _state(path: str) -> tuple[int, int, int, int]:
    """Return values that change with the content of a file; none for a file that is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0, 0)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
