# SPDX-License-Identifier: GPL-2.0-or-later
"""`mount -o remount,…` on a mounted tree: preserve it, take that back, change its limits.

    asked for                 result ro?   what is done
    preserve                  yes          kernel ro ─▶ daemon preserves        fails: kernel rw again
    preserve                  no           refused
    preserve,lossy            yes          as preserve, also without data that a refused write-back lost
    rw                        no           daemon, if frozen, withdraws and thaws ─▶ kernel rw
    nopreserve                either       daemon withdraws and thaws ─▶ kernel as asked
    ro                        yes          kernel ro only; the tree stays live
    size= nr_inodes= huge= mpol=           the daemon takes them on, before anything else

mount(8) merges the current options, or those of fstab, with what was said, in any order, and leaves out what
cancels out: noexec and exec become nothing. So what it passes on is the *result*, as for mount(2). From
others it is a change: flags that are not named stay. Without root the kernel's flag stays as it is and the
daemon's freeze alone makes the tree read-only.

The daemon is found by the device number of what is mounted there, so a bind mount will do as well, in whichever
machine of PKRAM_ROOT it is. The mount is known by its id: what the daemon does takes time, in which the path may be
made to lead elsewhere. Whether a mount is read-only is told to the daemon, too, for preserve makes it so and a
kexec undoes that.

Kernel: fs/namespace.c (do_remount), mm/shmem.c (shmem_reconfigure), patch 24
"""

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from pkramfs.cli import render, signals
from pkramfs.cli.arguments import warn
from pkramfs.control.client import call, call_long
from pkramfs.control.protocol import unnamed
from pkramfs.errors import DaemonError, PkramfsError, UsageError
from pkramfs.mounting.helper import PROGRAM, MountError
from pkramfs.mounting.options import MS_RDONLY, MS_REMOUNT, Options
from pkramfs.mounting.syscalls import FSTYPE, Mounted, holding, is_dead, mount, mount_id, mounts
from pkramfs.units import PAGE_SHIFT, format_size, plural

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

_OURS = ("size", "nr_blocks", "nr_inodes", "huge", "mpol", "noswap")
"""Options that a daemon may be told again."""
REMOUNT_SECONDS = 600.0
"""How long the kernel may take to write back before a mount is read-only."""
_NAMED = 5
"""How many files a refusal names."""


def remount(directory: str, options: Options, verbose: bool = False) -> int:
    """Do what the options ask for; PkramfsError with the reason if that is refused."""
    with holding(directory) as held:
        found = mount_id(held)
    mounted = next((one for one in mounts() if one.id == found), None)
    if mounted is None or mounted.mountpoint != directory or mounted.fstype != FSTYPE:
        raise MountError(f"{directory} is not a pkramfs mount")
    _remount(Target(directory, mounted), options, verbose)
    return 0


class Target(NamedTuple):
    """A mount, and the directory by which it was found."""

    directory: str
    mounted: Mounted

    def set_flags(self, before: int, flags: int) -> None:
        """Have the kernel change the flags; without root they stay as they are.

        Held only meanwhile: nobody could unmount what is held.
        """
        from pkramfs.mounting.patience import within

        if os.geteuid() != 0 or flags == before:
            return
        with holding(self.directory) as held:
            if mount_id(held) != self.mounted.id:
                raise MountError(f"{self.directory} is not the mount any more that it was: look at it, and try again")
            within(
                lambda: mount("none", self.directory, FSTYPE, flags | MS_REMOUNT, "", held=held),
                REMOUNT_SECONDS,
                f"the kernel to write back what is dirty on {self.directory}",
            )


def _remount(target: Target, options: Options, verbose: bool) -> None:
    directory, before = target.directory, target.mounted.flags
    machine, entry = _found(directory, target.mounted.dev, options)
    if options.name not in (None, entry.name):
        raise UsageError(
            f"{directory} is mounted as {entry.name or 'a tree without a name'}: pkram= cannot be changed by a remount"
        )
    flags = options.flags(0 if _is_result(options) else before)
    read_only = bool(flags & MS_RDONLY)
    if options.preserve and not read_only:
        how = "mount" if os.geteuid() == 0 else f"{PROGRAM} none"
        raise UsageError(f"preserve needs a read-only mount: {how} {directory} -o remount,preserve,ro")
    _reconfigure(machine, entry, options)
    if options.preserve:
        answer = _preserve(entry, target, flags, options)
        for path in answer["open_deleted"]:
            warn(PROGRAM, f"{directory}: {path} is not preserved")
        if more := unnamed(answer, "open_deleted"):
            warn(PROGRAM, f"{directory}: {plural(more, 'more open file')} not preserved")
        _tell(verbose, f"{entry.name} preserved: {_figures(answer)}")
        return
    if read_only and options.preserve is None:
        _make_read_only(entry, target, flags)
    else:
        if options.preserve is False or call(entry.socket, "status")["frozen"]:
            call(entry.socket, "unpreserve")
        target.set_flags(before, flags)
    _note(entry, flags)


def _is_result(options: Options) -> bool:
    """Whether mount(8) speaks: it passes on the kernel's own words, or it is who started us."""
    if any(word.startswith("user_id=") for word in options.words):
        return True
    try:
        with open(f"/proc/{os.getppid()}/comm", "rb") as name:
            return name.read() == b"mount\n"
    except OSError:
        return False  # it is gone; mount(8) would have waited


def _found(directory: str, dev: int, options: Options) -> "tuple[Machine, MountEntry]":
    """Return the machine and the daemon of the mount, which answers; of all machines, unless one is named."""
    from pkramfs.machine.directory import Machine, default_root

    machines = [Machine.locate(options.machine), *([] if options.machine else Machine.all())]
    for machine in machines:
        for entry in machine.mounts():
            if entry.dev == dev and entry.alive:
                _expect_answer(directory, entry)
                return machine, entry
    if is_dead(directory):
        raise MountError(f"the daemon of {directory} has died, its tree is lost: umount {directory}")
    where = f"the machine {machines[0].path()}" if options.machine else os.environ.get("PKRAM_ROOT") or default_root()
    raise MountError(f"{directory} belongs to no mount daemon of {where}: set PKRAM_ROOT to where its machine is")


def _expect_answer(directory: str, entry: "MountEntry") -> None:
    """Ask the daemon before the kernel waits for it, which would wait for ever."""
    from pkramfs.mounting.patience import ANSWER_SECONDS

    try:
        call(entry.socket, "status", timeout=ANSWER_SECONDS)
    except DaemonError as error:
        raise MountError(
            f"the daemon of {directory} (pid {entry.pid}) does not answer ({error}): look at it, or kill {entry.pid}, "
            f"which loses a live tree, and umount {directory}"
        ) from None


def _reconfigure(machine: "Machine", entry: "MountEntry", options: Options) -> None:
    words = {key: value for key, value in options.lasting().items() if key in _OURS}
    if not words:
        return
    pages, inodes = options.limits(machine.hardware().pages << PAGE_SHIFT)
    wanted: dict[str, Any] = {"words": words}
    if options.size is not None:
        wanted["pages"] = pages
    if options.nr_inodes is not None:
        wanted["inodes"] = inodes
    call(entry.socket, "reconfigure", **wanted)


def _preserve(entry: "MountEntry", target: Target, flags: int, options: Options) -> dict[str, Any]:
    """Kernel first, so that no new writer comes; back to rw if the daemon refuses, or a signal ends us."""
    before = target.mounted.flags
    if not call(entry.socket, "status")["frozen"]:  # else it is read-only because it is preserved
        _note(entry, before)
    try:
        _make_read_only(entry, target, flags)
    except KeyboardInterrupt:
        _make_writable(target, flags, before)
        raise
    lossy = {"lossy": True} if options.lossy else {}  # which a daemon of an older version does not know
    try:
        return call_long(entry.socket, "preserve", strict=options.strict, **lossy)
    except KeyboardInterrupt:
        if not before & MS_RDONLY:
            with signals.deferred():
                call_long(entry.socket, "unpreserve")  # waits until a save that is under way is over
        _make_writable(target, flags, before)
        raise
    except PkramfsError:
        _make_writable(target, flags, before)
        raise


def _make_writable(target: Target, flags: int, before: int) -> None:
    """Take back what `_make_read_only` did, if it was not read-only before."""
    if not before & MS_RDONLY:
        with signals.deferred():
            target.set_flags(flags, before)


def _note(entry: "MountEntry", flags: int) -> None:
    """Tell the daemon whether the mount is read-only of itself, not because it is preserved."""
    if os.geteuid() == 0:
        call(entry.socket, "reconfigure", words={"ro" if flags & MS_RDONLY else "rw": True})


def _make_read_only(entry: "MountEntry", target: Target, flags: int) -> None:
    try:
        target.set_flags(target.mounted.flags, flags)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise MountError(f"{target.directory} is busy: {_users(entry)}") from None


def _users(entry: "MountEntry") -> str:
    """Who keeps a mount from becoming read-only, as the daemon knows."""
    status = call(entry.socket, "status")
    reasons = [f"{path} is open for writing" for path in status.get("writers", [])]
    reasons += [f"{path} is still open" for path in status.get("open_deleted", [])]
    more = len(reasons[_NAMED:]) + unnamed(status, "writers") + unnamed(status, "open_deleted")
    shown = ", ".join(reasons[:_NAMED]) + (f" and {more:,} more" if more else "")
    return (shown or "a file is open for writing") + "; close it and try again"


def _figures(answer: dict[str, Any]) -> str:
    return f"{plural(answer['files'], 'file')}, {format_size(answer['pages'] << PAGE_SHIFT)}"


def _tell(verbose: bool, message: str) -> None:
    if verbose:
        render.tell(f"{PROGRAM}: {message}")
