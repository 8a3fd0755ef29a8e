# SPDX-License-Identifier: GPL-2.0-or-later
"""Which accesses update access times, by the flags of a mount.

    relatime      the first access after a change, and after a day        the kernel's default
    strictatime   every access
    nodiratime    none of directories
    noatime, ro   none

A tree knows no mounts. The code that serves it (fuse) returns the rule each time that an access is due to be noted.

Kernel: fs/inode.c (atime_needs_update, relatime_need_update)
"""

from typing import NamedTuple


class Access(NamedTuple):
    """Which accesses are noted: of files and links, of directories; `always` notes each, not only the first."""

    files: bool = True
    directories: bool = True
    always: bool = False


RELATIME = Access()
NOATIME = Access(files=False, directories=False)


def relatime() -> Access:
    """Return the rule of a mount without other flags."""
    return RELATIME
