# SPDX-License-Identifier: GPL-2.0-or-later
"""Which accesses the mount's flags ask to be noted, as they are now.

FUSE's kernel leaves access times to the daemon and does not say with which flags a file was reached. They
stand in mountinfo, where a remount, by whatever program, shows before it returns: poll(2) says then that
something was mounted or changed, and our line is read again.

A tree may lie in several places (bind mounts) with other flags each: those of its own mount point count, or,
where it is not there any more, of the first place.

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
    """The rule for access times of one mount: call it to know what applies now."""

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
        """Let go of the table."""
        self._table.close()

    def _read(self) -> None:
        try:
            found = syscalls.places_of(self._dev)
        except OSError as error:
            log.warning("access times go on as they are: %s", explain(error))
            return
        here = [mounted for mounted in found if mounted.mountpoint == self._mountpoint] or found
        if here:  # else it is detached, and whoever is still inside goes on as before
            self._rule = rule(here[0].flags)


def rule(flags: int) -> Access:
    """Return what MS_ flags, as mountinfo shows them, say about access times."""
    noted = not flags & (MS_NOATIME | MS_RDONLY)
    return Access(noted, noted and not flags & MS_NODIRATIME, noted and not flags & MS_RELATIME)
