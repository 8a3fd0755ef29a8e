# SPDX-License-Identifier: GPL-2.0-or-later
"""The NAME of a mount (`-o pkram=NAME`) and the node that its tree is preserved in, `shmem-NAME`.

A NAME is text of the command line, a node's name is bytes in memory. They are made from each other here and
nowhere else, so that every command finds the node that the daemon published.

Kernel: mm/shmem_pkram.c (shmem_save_pkram)
"""

import os

from pkramfs.errors import UsageError

NAME_MAX_BYTES = 127
_PREFIX = b"shmem-"


def expect_name(name: str, what: str) -> None:
    """Raise UsageError for a NAME that no mount can have; `what` names the argument."""
    size = len(os.fsencode(name))
    if not 0 < size <= NAME_MAX_BYTES:
        raise UsageError(f"{what} is {size} bytes long: a name has 1 to {NAME_MAX_BYTES} bytes")


def node_name(name: str) -> bytes:
    """Return the name of the node that holds the tree of mount NAME."""
    return _PREFIX + os.fsencode(name)


def mount_name(node: bytes) -> str | None:
    """Return the NAME of the mount whose tree a node holds, or None for a node that holds something else."""
    return os.fsdecode(node.removeprefix(_PREFIX)) if node.startswith(_PREFIX) else None
