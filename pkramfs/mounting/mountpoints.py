# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory to mount on: found without asking a daemon that may be dead, and made ready.

Kernel: fs/namei.c (path_lookupat), fs/namespace.c (lock_mount)
"""

import os
from collections.abc import Callable
from typing import TypeVar

from pkramfs.mounting import patience, syscalls
from pkramfs.mounting.helper import MountError

T = TypeVar("T")


def resolve(directory: str) -> str:
    """Return the directory without symbolic links.

    A path at which something is mounted has none, so that nothing is asked there.
    """
    if not directory:
        raise MountError("invalid mount point '': give a directory")
    if os.pardir not in directory.split("/") and syscalls.mounted_at(os.path.abspath(directory)):
        return os.path.abspath(directory)
    return _answer(directory, lambda: os.path.realpath(directory))


def prepare(directory: str) -> None:
    """Check that the mount point is a directory, after detaching a dead mount of ours that lies over it."""
    while syscalls.is_dead(directory):
        syscalls.detach(directory)
    exists, is_directory = _answer(directory, lambda: (os.path.lexists(directory), os.path.isdir(directory)))
    if not exists:
        raise MountError(f"mount point {directory} does not exist")
    if not is_directory:
        raise MountError(f"mount point {directory} is not a directory")


def _answer(directory: str, question: Callable[[], T]) -> T:
    """Return the answer to a question about a directory; raise StuckError if it takes too long."""
    return patience.within(question, patience.ANSWER_SECONDS, f"{directory} to answer")
