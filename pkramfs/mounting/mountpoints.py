# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory to mount on: found without asking a daemon that may be dead, and made ready.

Kernel: fs/namei.c (path_lookupat), fs/namespace.c (lock_mount)
"""

import os

from pkramfs.mounting import syscalls
from pkramfs.mounting.helper import MountError
from pkramfs.mounting.patience import ANSWER_SECONDS, within


def resolve(directory: str) -> str:
    """Return the directory without symbolic links.

    A path at which something is mounted has none, so that nothing is asked there.
    """
    if os.pardir not in directory.split("/") and syscalls.mounted_at(os.path.abspath(directory)):
        return os.path.abspath(directory)
    return within(lambda: os.path.realpath(directory), ANSWER_SECONDS, f"{directory} to answer")


def prepare(directory: str) -> None:
    """Check that the mount point is a directory, after detaching a dead mount of ours that lies over it."""
    while syscalls.is_dead(directory):
        syscalls.detach(directory)
    exists, is_directory = within(
        lambda: (os.path.lexists(directory), os.path.isdir(directory)), ANSWER_SECONDS, f"{directory} to answer"
    )
    if not exists:
        raise MountError(f"mount point {directory} does not exist")
    if not is_directory:
        raise MountError(f"mount point {directory} is not a directory")
