# SPDX-License-Identifier: GPL-2.0-or-later
"""`mount -o remount,…` on a mounted tree: preserve it, take that back, change its limits.

    asked for                 result ro?   action
    preserve                  yes          kernel ro ─▶ daemon preserves        fails: kernel rw again
    preserve                  no           refused
    preserve,verify           yes          as preserve, once all data have checksums
    preserve,lossy            yes          as preserve, also without data that a refused write-back lost
    preserve,dryrun           either       none; prints what preserve would do (rehearse.py)
    rw                        no           daemon, if frozen, withdraws and thaws ─▶ kernel rw
    nopreserve                either       daemon withdraws and thaws ─▶ kernel as asked
    ro                        yes          kernel ro only; the tree stays live
    size= nr_inodes= huge= mpol=           the daemon takes them on, before anything else

mount(8) merges the current options, or those of fstab, with what was said, in any order, and leaves out what
cancels out: noexec and exec become nothing. So its options are the *result*, as for mount(2). Options from
anybody else are a change: flags that are not named stay. Without root the kernel's flag stays as it is and the
daemon's freeze alone makes the tree read-only.

The daemon is found by the device number of what is mounted there, so a bind mount will do as well, in whichever
machine of PKRAM_ROOT it is. The mount is known by its id: the daemon's work takes time, and meanwhile the path may
be made to lead elsewhere. The daemon is also told whether the mount is read-only of itself, because preserve makes
it read-only and a kexec undoes that.

Kernel: fs/namespace.c (do_remount), mm/shmem.c (shmem_reconfigure), patch 24
"""

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.cli import daemons, rehearse, render, signals
from pkramfs.cli.arguments import warn
from pkramfs.errors import DaemonError, PkramfsError, UsageError
from pkramfs.mounting import patience
from pkramfs.mounting.helper import PROGRAM, MountError
from pkramfs.mounting.options import MS_RDONLY, MS_REMOUNT, Options, with_flags
from pkramfs.mounting.patience import within
from pkramfs.mounting.syscalls import FSTYPE, Mounted, holding, is_dead, mount, mount_id, mounts
from pkramfs.units import MIB, PAGE_SHIFT, format_size, plural

if TYPE_CHECKING:
    from pkramfs.control.commands import Commands
    from pkramfs.control.replies import Status
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

_OURS = ("size", "nr_blocks", "nr_inodes", "huge", "mpol", "noswap", "format", "verify")
"""Options that a daemon may be told again."""
REMOUNT_SECONDS = 600.0
"""How long the kernel may take to write back before a mount is read-only."""
_NAMED = 5
"""How many files a refusal names."""


def remount(directory: str, options: Options, verbose: bool = False) -> int:
    """Carry out the options; raise PkramfsError with the reason if they are refused."""
    with holding(directory) as held:
        found = mount_id(held)
    mounted = next((one for one in mounts() if one.id == found), None)
    if mounted is None or mounted.mountpoint != directory or mounted.fstype != FSTYPE:
        raise MountError(f"{directory} is not a pkramfs mount")
    machine, entry, daemon = _found(directory, mounted.dev, options)
    return _remount(Target(directory, mounted, machine, entry, daemon), options, verbose)


class Target(NamedTuple):
    """A mount, the directory by which it was found, and its daemon."""

    directory: str
    mounted: Mounted
    machine: "Machine"
    entry: "MountEntry"
    daemon: "Commands"

    def set_flags(self, before: int, flags: int) -> None:
        """Have the kernel change the flags; without root they stay as they are.

        The mount is held only meanwhile, because it cannot be unmounted while it is held.
        """
        if os.geteuid() != 0 or flags == before:
            return
        with holding(self.directory) as held:
            if mount_id(held) != self.mounted.id:
                raise MountError(f"{self.directory} has another mount on it now: check it, and try again")
            within(
                lambda: mount("none", self.directory, FSTYPE, flags | MS_REMOUNT, "", held=held),
                REMOUNT_SECONDS,
                f"the kernel to write back what is dirty on {self.directory}",
            )


def _remount(target: Target, options: Options, verbose: bool) -> int:
    """Do it, and return the exit status."""
    directory, before, entry = target.directory, target.mounted.flags, target.entry
    if options.name not in (None, entry.name):
        raise UsageError(
            f"{directory} is mounted as {entry.name or 'a tree without a name'}: pkram= cannot be changed by a remount"
        )
    if options.dryrun:
        return rehearse.rehearse(directory, entry, target.daemon, options)
    flags = options.flags(0 if _is_result(options) else before)
    read_only = bool(flags & MS_RDONLY)
    if options.preserve and not read_only:
        how = "mount" if os.geteuid() == 0 else f"{PROGRAM} none"
        raise UsageError(f"preserve needs a read-only mount: {how} {directory} -o remount,preserve,ro")
    _reconfigure(target, options)
    if options.preserve:
        _say_preserved(target, _preserve(target, flags, options), verbose)
        _remember(target)
        return 0
    if read_only and options.preserve is None:
        _make_read_only(target, flags)
    else:
        if options.preserve is False or target.daemon.status()["frozen"]:
            target.daemon.unpreserve()
        target.set_flags(before, flags)
    _note(target, flags)
    return 0


def _is_result(options: Options) -> bool:
    """Return True if mount(8) speaks: it passes on the kernel's own words, or it is our parent."""
    if any(word.startswith("user_id=") for word in options.words):
        return True
    try:
        with open(f"/proc/{os.getppid()}/comm", "rb") as name:
            return name.read() == b"mount\n"
    except OSError:
        return False  # it is gone; mount(8) would have waited


def _found(directory: str, dev: int, options: Options) -> "tuple[Machine, MountEntry, Commands]":
    """Return the machine and the daemon of the mount, which answers; of all machines, unless one is named."""
    from pkramfs.control.commands import Commands
    from pkramfs.machine.directory import Machine, default_root

    if (found := daemons.owner(dev, options.machine)) is not None:
        machine, entry = found
        daemon = Commands(entry.socket)
        _expect_answer(directory, entry, daemon)
        return machine, entry, daemon
    if is_dead(directory):
        raise MountError(
            f"the daemon of {directory} has died: umount {directory}, and if it was mounted with pkram=NAME, mount it "
            "again: its tree is in RAM"
        )
    root = os.environ.get("PKRAM_ROOT") or default_root()
    if options.machine:
        where, remedy = f"the machine {Machine.locate(options.machine).path()}", "leave machine= out"
    else:
        where, remedy = root, "set PKRAM_ROOT to where its machine is"
    raise MountError(f"{directory} belongs to no mount daemon of {where}: {remedy}")


def _expect_answer(directory: str, entry: "MountEntry", daemon: "Commands") -> None:
    """Ask the daemon before the kernel waits for it, which would wait for ever."""
    try:
        daemon.status(timeout=patience.ANSWER_SECONDS)
    except DaemonError as error:
        raise MountError(
            f"the daemon of {directory} (pid {entry.pid}) does not answer ({error}): kill -9 {entry.pid}"
            + (", and another daemon takes over" if entry.holder else f", which loses its tree, and umount {directory}")
        ) from None


def _reconfigure(target: Target, options: Options) -> None:
    words = {key: value for key, value in options.lasting().items() if key in _OURS}
    if not words:
        return
    pages, inodes = options.limits(target.machine.hardware().pages << PAGE_SHIFT)
    target.daemon.reconfigure(
        words,
        pages=None if options.size is None else pages,
        inodes=None if options.nr_inodes is None else inodes,
    )


def _preserve(target: Target, flags: int, options: Options) -> "Status":
    """Make the mount read-only first, so that no new writer comes; go back to rw if the daemon refuses, or a signal
    ends us."""
    before, daemon = target.mounted.flags, target.daemon
    if not daemon.status()["frozen"]:  # else it is read-only because it is preserved
        _note(target, before)
    try:
        _make_read_only(target, flags)
    except KeyboardInterrupt:
        _make_writable(target, flags, before)
        raise
    try:
        return daemon.preserve(strict=options.strict, lossy=options.lossy, verify=options.sum_all)
    except KeyboardInterrupt:
        if not before & MS_RDONLY:
            with signals.deferred():
                daemon.unpreserve(patient=True)
        _make_writable(target, flags, before)
        raise
    except PkramfsError:
        _make_writable(target, flags, before)
        raise


def _say_preserved(target: Target, status: "Status", verbose: bool) -> None:
    """Warn of files that are not preserved, and with -v print the figures."""
    from pkramfs.control.replies import unnamed

    for path in status["open_deleted"]:
        warn(PROGRAM, f"{target.directory}: {path} is not preserved")
    if more := unnamed(status, "open_deleted"):
        warn(PROGRAM, f"{target.directory}: {plural(more, 'more open file')} not preserved")
    if verbose:
        figures = f"{plural(status['files'], 'file')}, {format_size(status['pages'] << PAGE_SHIFT)}"
        if unsummed := status.get("unsummed"):
            figures += f", up to {format_size(unsummed * MIB)} unchecked"
        render.tell(f"{PROGRAM}: {target.entry.name} preserved: {figures}")


def _remember(target: Target) -> None:
    """Note how a tree is mounted where memory outlives the host's kernel; in the simulation pkram-kexec notes it."""
    machine, entry = target.machine, target.entry
    if entry.name is None or machine.elsewhere() is None:
        return
    from pkramfs.kernel import hostboot, running
    from pkramfs.machine.header import Mount

    with machine.lifecycle(shared=True):
        nodes = {node.name for node in running.look(machine).store.nodes()}
        options = with_flags(entry.options, target.mounted.flags)
        if not hostboot.remember(machine, Mount(entry.name, target.mounted.mountpoint, options), nodes):
            warn(PROGRAM, f"{target.directory}: no room to note how it is mounted: after a boot, mount it by hand")


def _make_writable(target: Target, flags: int, before: int) -> None:
    """Undo `_make_read_only`, if the mount was not read-only before."""
    if not before & MS_RDONLY:
        with signals.deferred():
            target.set_flags(flags, before)


def _note(target: Target, flags: int) -> None:
    """Tell the daemon whether the mount is read-only of itself, not because it is preserved."""
    if os.geteuid() == 0:
        target.daemon.reconfigure({"ro" if flags & MS_RDONLY else "rw": True})


def _make_read_only(target: Target, flags: int) -> None:
    try:
        target.set_flags(target.mounted.flags, flags)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise MountError(f"{target.directory} is busy: {_users(target.daemon)}") from None


def _users(daemon: "Commands") -> str:
    """Name the files that keep a mount from becoming read-only, as the daemon knows them."""
    from pkramfs.control.replies import unnamed

    status = daemon.status()
    reasons = [f"{path} is open for writing" for path in status["writers"]]
    reasons += [f"{path} is still open" for path in status["open_deleted"]]
    more = len(reasons[_NAMED:]) + unnamed(status, "writers") + unnamed(status, "open_deleted")
    shown = ", ".join(reasons[:_NAMED]) + (f" and {more:,} more" if more else "")
    return (shown or "a file is open for writing") + "; close it and try again"
