# SPDX-License-Identifier: GPL-2.0-or-later
"""Which accesses are noted by the present flags of a mount.

FUSE's kernel leaves access times to the daemon and does not send the flags of the mount. They are in mountinfo,
which shows every remount before it returns: poll(2) then reports that a mount has changed, and the line of this
mount is read again.

A tree may be mounted in several places (bind mounts) with different flags. Those of its own mount point count, or,
if it is no longer there, those of the first place.

Kernel: fs/proc_namespace.c (mounts_poll), fs/namespace.c (touch_mnt_namespace)
"""

import logging
import select

from pkramfs.errors import explain
from pkramfs.fs.access import Access
from pkramfs.mounting import syscalls
from pkramfs.mounting.options import MS_NOATIME, MS_NODIRATIME, MS_RDONLY, MS_RELATIME

log = logging.getLogger(__name__)


class MountFlags:
    """The rule for access times of one mount; calling it returns the present rule."""

    def __init__(self, dev: int, mountpoint: str) -> None:
        self._dev, self._mountpoint, self._rule = dev, mountpoint, Access()
        self._table = open(syscalls.MOUNTINFO, "rb")  # noqa: SIM115  # as long as the mount
        poll = select.poll()
        poll.register(self._table, select.POLLPRI)
        self._changed = poll.poll
        self._changed(0)
        self._read()

    def __call__(self) -> Access:
        if self._changed(0):
            self._read()
        return self._rule

    def close(self) -> None:
        """Close the table."""
        self._table.close()

    def _read(self) -> None:
        try:
            found = syscalls.places_of(self._dev)
        except OSError as error:
            log.warning("access times go on as they are: %s", explain(error))
            return
        here = [mounted for mounted in found if mounted.mountpoint == self._mountpoint] or found
        if here:  # otherwise the mount is detached, and the last rule stays for its users
            self._rule = rule(here[0].flags)


def rule(flags: int) -> Access:
    """Return the rule for access times by MS_ flags, as mountinfo shows them."""
    noted = not flags & (MS_NOATIME | MS_RDONLY)
    return Access(noted, noted and not flags & MS_NODIRATIME, noted and not flags & MS_RELATIME)
