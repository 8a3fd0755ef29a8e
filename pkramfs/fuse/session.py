"""One FUSE mount: made, served, detached.

As root:    open /dev/fuse ─▶ mount(2) with fd=N ─▶ pyfuse3.init("/dev/fd/N") ─▶ serve
As a user:  pyfuse3.init(DIR), which has libfuse run fusermount3 ─▶ serve

As root we hold the descriptor ourselves, so that another process could, and give mount(2) the flags
that root asked for (libfuse would add nosuid and nodev). `none` is the source, as in the announcement,
and `fuse.pkramfs` the type, which sends remounts to /sbin/mount.fuse.pkramfs.

The session ends when the kernel says so (umount, the last user gone) or after `terminate`. A daemon
that dies leaves ENOTCONN at the mount point, never an empty directory that looks like lost files.

Two tasks take turns at reading and answering, so that one may wait (for room) while the other goes
on. There is one session in a process, pyfuse3 keeps it in globals.

Kernel: fs/fuse/inode.c (fuse_fill_super), fs/fuse/dev.c
"""

import os
import stat

import pyfuse3
import trio

from pkramfs.errors import MachineError, explain
from pkramfs.fuse import syscalls
from pkramfs.fuse.operations import Operations
from pkramfs.fuse.options import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY

_USER_FLAGS = {MS_RDONLY: "ro", MS_NOEXEC: "noexec", MS_NOSUID: "nosuid", MS_NODEV: "nodev"}

_TASKS = 2


class Session:
    """The mount of `operations` at the absolute path `mountpoint`."""

    def __init__(self, operations: Operations, mountpoint: str) -> None:
        self.operations, self.mountpoint = operations, mountpoint
        self.ready = trio.Event()
        self.dev: int | None = None
        self._fd = -1
        operations.ready = self.ready.set

    def mount(self, flags: int) -> None:
        """Attach to the directory; MachineError with the reason if the system refuses."""
        if os.geteuid() == 0:
            self._mount_as_root(flags)
        else:
            self._mount_as_user(flags)
        mounted = syscalls.mounted_at(self.mountpoint)
        self.dev = mounted.dev if mounted else None

    def _mount_as_root(self, flags: int) -> None:
        try:
            self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MachineError(f"cannot open {explain(error)}; is the fuse module loaded?") from None
        kind = stat.S_IFMT(os.stat(self.mountpoint).st_mode)
        data = f"fd={self._fd},rootmode={kind:o},user_id=0,group_id=0,default_permissions,allow_other"
        try:
            syscalls.mount("none", self.mountpoint, syscalls.FSTYPE, flags, data)
        except OSError as error:
            raise MachineError(f"cannot mount on {explain(error)}") from None
        try:
            pyfuse3.init(self.operations, f"/dev/fd/{self._fd}", set())
        except RuntimeError as error:
            syscalls.umount(self.mountpoint, lazy=True)
            raise MachineError(f"libfuse does not take the mount: {error}") from None

    def _mount_as_user(self, flags: int) -> None:
        words = {word for bit, word in _USER_FLAGS.items() if flags & bit}
        try:
            pyfuse3.init(
                self.operations, self.mountpoint, {"fsname=none", "subtype=pkramfs", "default_permissions", *words}
            )
        except RuntimeError as error:
            raise MachineError(f"cannot mount on {self.mountpoint}: {error}") from None

    async def serve(self) -> None:
        """Answer requests until the mount is gone."""
        await pyfuse3.main(_TASKS, 4 * _TASKS)

    def terminate(self) -> None:
        """Stop serving; what is still open there gets ENOTCONN when the process ends."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Let go of the kernel's end. Call it once, after `serve`."""
        pyfuse3.close(unmount=False)
