# SPDX-License-Identifier: GPL-2.0-or-later
"""One FUSE mount: made, served, detached.

    root     open /dev/fuse ─▶ mount(2) with fd=N ─┐
    a user   fusermount3, which sends the fd back ─┴▶ handshake ─▶ pyfuse3 ─▶ serve

In both cases the daemon holds the descriptor itself, so that it can pass it to another process. As root mount(2) gets
the flags that root asked for (libfuse would add nosuid and nodev). The source is the user's word, by custom `none`,
and `fuse.pkramfs` the type, which sends remounts to /sbin/mount.fuse.pkramfs.

The session ends when the kernel says so (umount, the last user gone) or after `terminate`. A daemon
that dies leaves ENOTCONN at the mount point, never an empty directory that looks like lost files.

Two tasks take turns at reading and answering, so that one may wait (for room) while the other goes
on. There is one session in a process, because pyfuse3 keeps it in globals. Reading never blocks: a request
whose caller was killed may be gone before it is read, and then the daemon must still answer verbs.

Kernel: fs/fuse/inode.c (fuse_fill_super), fs/fuse/dev.c; libfuse util/fusermount.c
"""

import array
import logging
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pyfuse3
import trio

from pkramfs.errors import MachineError, explain
from pkramfs.fuse.filter import Filter
from pkramfs.fuse.handshake import ALLOW_IDMAP, HAS_RESEND, MAX_WRITE, Handshake, Init
from pkramfs.fuse.operations import Operations
from pkramfs.fuse.requests import Requests
from pkramfs.fuse.turns import Turns
from pkramfs.mounting import syscalls
from pkramfs.mounting.options import MS_NOATIME, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, NO_SOURCE, source_word

_USER_FLAGS = {MS_RDONLY: "ro", MS_NOEXEC: "noexec", MS_NOSUID: "nosuid", MS_NODEV: "nodev", MS_NOATIME: "noatime"}
_TASKS, _MOST = 2, 1000
"""Requests that are worked on at once: as many as wait for something, and one more to answer what they wait for."""
_MOUNT_SECONDS = 60.0
_QUIET_SECONDS, _POLL_SECONDS = 3.0, 0.005
"""How long requests that wait for something, room or the kernel's cache, may take to come to an end."""
_TUNING = "/sys/class/bdi/{}:{}"
_DIRTY = 256 << 20

log = logging.getLogger(__name__)


class Session:
    """The mount of `operations` at the absolute path `mountpoint`."""

    def __init__(
        self,
        operations: Operations,
        mountpoint: str,
        source: str = NO_SOURCE,
        *,
        dirty: int | None = None,
        filtered: bool = True,
    ) -> None:
        """Allow at most `dirty` unwritten bytes, if given; answer requests in front of pyfuse3 if `filtered`."""
        self.operations, self.mountpoint, self.source, self._dirty = operations, mountpoint, source, dirty
        self._turns, self._filtered = Turns(), filtered
        self.ready = trio.Event()
        self.connected: Callable[[], object] = lambda: None
        """Called when requests can be answered, before the first is read."""
        self.filter: Filter | None = None
        self.dev: int | None = None
        self.on: tuple[int, int] | None = None
        """Device and inode number of the directory below the mount."""

    def mount(self, flags: int, *, allow_other: bool = False, on: tuple[int, int | None] | None = None) -> None:
        """Attach to the directory; raise MachineError with the reason if the system refuses.

        `allow_other` is for users: root's mounts are for all anyway. `on` is the directory that it must be.
        """
        before = syscalls.mounts()
        with self._directory(on) as held:
            if os.geteuid() == 0:
                device = _mount_as_root(self.mountpoint, held, flags, self.source)
            else:
                device = _mount_as_user(self.mountpoint, flags, allow_other, self.source)
        mounted = syscalls.mounted_since(before, self.mountpoint)
        self.dev = mounted.dev if mounted else None
        try:
            self._handshake = Handshake(device, ALLOW_IDMAP if self._filtered else 0)
            _tune(self.dev, self._dirty)
            self.operations.ready = self._connected
            pyfuse3.init(self.operations, f"/dev/fd/{self._handshake.fd}", set())
        except (RuntimeError, MachineError, OSError) as error:
            syscalls.detach_all(self.dev)
            raise MachineError(f"cannot serve {self.mountpoint}: {error}") from None

    def take_over(self, device: int, init: Init, dev: int | None, on: tuple[int, int] | None) -> None:
        """Take over a mount whose daemon has died, through its connection."""
        self.dev, self.on = dev, on
        try:
            self._handshake = Handshake.again(device, init)
            _tune(self.dev, self._dirty)
            self.operations.ready = self._connected
            pyfuse3.init(self.operations, f"/dev/fd/{self._handshake.fd}", set())
        except (RuntimeError, MachineError, OSError) as error:
            raise MachineError(f"cannot take {self.mountpoint} over: {error}") from None

    @property
    def descriptor(self) -> int:
        """Return the descriptor of the connection; once it is served, requests are read from it."""
        return self._handshake.fd if self._handshake.device < 0 else self._handshake.device

    @property
    def sends_again(self) -> bool:
        """Return True if the kernel can send unanswered requests again."""
        return bool(self._handshake.init.more & HAS_RESEND)

    @property
    def init(self) -> Init:
        """Return the kernel's offer (INIT) when the connection was made."""
        return self._handshake.init

    @contextmanager
    def _directory(self, expected: tuple[int, int | None] | None) -> Iterator[int]:
        """Open the directory to mount on, and check that it is the expected one."""
        with ExitStack() as stack:
            try:
                held = stack.enter_context(syscalls.holding(self.mountpoint))
                self.on = syscalls.identity(held)
            except OSError as error:
                raise MachineError(f"cannot mount on {explain(error)}") from None
            if expected is not None and not syscalls.same(self.on, expected):
                raise MachineError(f"cannot mount on {self.mountpoint}: {syscalls.ANOTHER}")
            yield held

    def _connected(self) -> None:
        self._handshake.complete()
        if self._filtered:
            self._turns.lowlevel.filter = self.filter = Filter(
                Requests(self.operations), self._handshake.fd, self._spawn
            )
        self.ready.set()
        self.connected()

    async def serve(self) -> None:
        """Answer requests until the mount is gone."""
        pyfuse3.trio = self._turns  # type: ignore[attr-defined]
        self.answer_all()
        serving = True
        while serving:
            serving = False
            try:
                async with trio.open_nursery() as nursery:
                    self._spawn = nursery.start_soon
                    await pyfuse3.main(_TASKS, _MOST)
            except* BlockingIOError:
                serving = True  # the caller was killed between poll and read
            except* MemoryError:
                self.operations.spare.let_go()
                raise  # a request is lost, and only the end of the connection wakes its caller

    async def stand_still(self) -> bool:
        """Read no more requests until `go_on`; return False if a request that was read stays unanswered for long.

        A task calls it, so no request is being read, and only requests that wait for something are unanswered.
        """
        assert self.filter is not None
        with trio.move_on_after(_QUIET_SECONDS):
            while self.filter.waiting:
                await trio.sleep(_POLL_SECONDS)
        if self.filter.waiting:
            return False
        self._turns.lowlevel.shut = trio.Event()
        return True

    def go_on(self) -> None:
        """Read requests again."""
        shut, self._turns.lowlevel.shut = self._turns.lowlevel.shut, None
        if shut is not None:
            shut.set()

    def answer_all(self) -> None:
        """Answer the requests that can no longer be served."""
        sys.unraisablehook = self._unanswered

    def _unanswered(self, failure: "sys.UnraisableHookArgs") -> None:
        """End the process if memory was short outside of a handler, as on the way from C to one: that request is
        never answered, and only the end of the connection wakes its caller."""
        if isinstance(failure.exc_value, MemoryError):
            try:
                self.operations.spare.let_go()
                log.critical("a request was lost for want of memory: the daemon ends")
                self.terminate()
            except BaseException:
                os._exit(1)
        else:
            sys.__unraisablehook__(failure)

    def terminate(self) -> None:
        """Stop serving; files that are still open there answer ENOTCONN when the process ends."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Close the connection. Call it once, after `serve`."""
        pyfuse3.close(unmount=False)


def _mount_as_root(mountpoint: str, held: int, flags: int, source: str) -> int:
    """Mount on the directory that is held and return the connection's descriptor."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError(f"cannot open {explain(error)}; is the fuse module loaded?") from None
    try:
        kind = stat.S_IFMT(os.fstat(held).st_mode)
        data = f"fd={device},rootmode={kind:o},user_id=0,group_id=0,default_permissions,allow_other"
        syscalls.mount(source, mountpoint, syscalls.FSTYPE, flags, data, held=held)
    except OSError as error:
        os.close(device)
        raise MachineError(f"cannot mount on {explain(error)}") from None
    return device


def _mount_as_user(mountpoint: str, flags: int, allow_other: bool, source: str) -> int:
    """Mount through fusermount3, and receive the connection's descriptor from it."""
    words = [source_word(source), "subtype=pkramfs", "default_permissions", *(["allow_other"] * allow_other)]
    words += [word for bit, word in _USER_FLAGS.items() if flags & bit]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(words), "--", mountpoint],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="surrogateescape",
                check=False,
                timeout=_MOUNT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise MachineError(
                f"cannot mount on {mountpoint}: fusermount3 did not end within {_MOUNT_SECONDS:g} s"
            ) from None
        except FileNotFoundError:
            raise MachineError("fusermount3 is missing: install the package fuse3, or mount as root") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["fusermount3 failed"])[-1]
            raise MachineError(f"cannot mount on {mountpoint}: {reason.removeprefix('fusermount3: ')}")
        theirs.close()  # so that no wait is without end
        return _receive_descriptor(ours)


def _tune(dev: int | None, dirty: int | None = None) -> None:
    """Set how much the kernel reads ahead and keeps unwritten for a file system, as root.

    Read-ahead is 128 KiB by default, and so are the requests. With one whole request the first read of a large file
    took two thirds of the time; with more it took as long, and a fault in a mapping, which reads that
    much around it, longer.

    FUSE may have 1 % of all dirty pages, some 40 MiB with 24 GiB of memory, and writers that are faster than WRITE are
    held up from there on. 200 MB of scattered 4 KiB writes went at 26,000 a second, and at 136,000 with this limit;
    sequential writing lost a twentieth (without any limit a quarter: then writing back begins only when all is
    written). More is not wanted: a remount,ro has to wait for it. Where the daemon is in a memory cgroup it is less:
    one full of dirty pages has no memory for the daemon that is to write them.
    """
    if dev is None or os.geteuid() != 0:
        return
    place = _TUNING.format(os.major(dev), os.minor(dev))
    _raise(f"{place}/read_ahead_kb", MAX_WRITE >> 10)
    if dirty is None:
        _raise(f"{place}/max_bytes", _DIRTY)
    else:
        _raise(f"{place}/max_bytes", min(dirty, _DIRTY), lower=True)


def _raise(path: str, value: int, *, lower: bool = False) -> None:
    """Write a number to a file that has a lower one, or with `lower` any other one."""
    try:
        with open(path, "r+", encoding="ascii") as file:
            if lower or int(file.read()) < value:
                file.seek(0)
                file.write(str(value))
    except OSError as error:  # /sys is missing or read-only in many containers, max_bytes before Linux 6.2
        log.info("not tuned: %s", explain(error))


def _receive_descriptor(peer: socket.socket) -> int:
    size = array.array("i").itemsize
    _, extra, _, _ = peer.recvmsg(1, socket.CMSG_SPACE(size))
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= size:
            device = array.array("i", data[:size])[0]
            os.set_inheritable(device, False)
            return device
    raise MachineError("fusermount3 sent no descriptor")
