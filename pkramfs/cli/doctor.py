# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl doctor: find what would prevent a mount, or lose a preserved tree, and name the remedy.

    ok        fuse       /dev/fuse can be opened
    error     helpers    /sbin/mount.fuse.pkramfs is missing: `mount -o remount` does not work
                         → ln -sfn /usr/local/bin/mount.pkramfs /sbin/mount.fuse.pkramfs
    note      room       RAM has 64 GiB, /dev/shm (tmpfs) holds 32 GiB, 30 GiB of it may still be used: …
                         → mount -o remount,size=66G /dev/shm

The checks of the host are in checkup.py, those of its own kexec in reserving.py; those of the machine are here: its
place, the room behind RAM, its kernel and its mounts. Nothing is changed, and nothing that cannot be checked hides the
rest. The exit status says the worst.
"""

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkramfs.cli import arguments, checkup, render, reserving, status
from pkramfs.cli.checkup import ERROR, LEVELS, NOTE, OK, WARNING, Finding, Host
from pkramfs.units import GIB, MIB, PAGE_SIZE, format_size, plural

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine

STATUS = {OK: 0, NOTE: 0, WARNING: 10, ERROR: 11}
"""The exit status for the worst finding."""
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_LITTLE = 256 * MIB


def act(args: argparse.Namespace) -> int:
    """Run `pkramctl doctor`; the exit status is that of the worst finding."""
    machine = arguments.machine(args)
    if args.reserve is not None:
        return STATUS[_worst(reserving.act(args, machine.host))]
    found = list(examine(machine, Host("/", os.geteuid())))
    worst = _worst(found)
    if arguments.wants_json(args):
        render.emit_json({"worst": worst, "findings": [one._asdict() for one in found]})
    else:
        show(found)
    return STATUS[worst]


def _worst(found: list[Finding]) -> str:
    return max((one.level for one in found), key=LEVELS.index, default=OK)


def examine(machine: "Machine", host: Host) -> Iterator[Finding]:
    """Yield all findings about a host and a machine, which need not exist yet."""
    from pkramfs.machine.directory import host_memory

    yield from checkup.guarded("versions", checkup.versions(host))
    yield from checkup.guarded("fuse", checkup.fuse(host))
    yield from checkup.guarded("helpers", checkup.helpers(host))
    place = list(checkup.guarded("machine", _place(machine)))
    yield from place
    sound = machine.exists() and all(one.level != ERROR for one in place)
    ram = machine.hardware().usable.total * PAGE_SIZE if sound else host_memory()
    yield from checkup.guarded("limits", checkup.limits(machine.hardware().size if sound else ram))
    yield from checkup.guarded("cgroup", checkup.cgroup(ram))
    yield from checkup.guarded("room", _room(machine, ram))
    yield from checkup.guarded("logind", checkup.logind(host, machine.path()))
    yield from checkup.guarded("kexec", reserving.summary(machine.host))
    if sound:
        yield from checkup.guarded("kernel", _running(machine))


def _place(machine: "Machine") -> Iterator[Finding]:
    """Check that the machine's directory is ours and can be used, or made."""
    if machine.exists():
        machine.hardware()  # raises an error for a machine of another user, or a damaged one
        named = machine.elsewhere()
        for name in ("", "mounts", "kexec", *(["ram"] if named is None else [])):
            path = machine.path(name) if name else machine.path()
            if not os.access(path, os.R_OK | os.W_OK):
                missing = not os.path.exists(path)
                what = "is missing" if missing else "cannot be read and written"
                remedy = "pkram-kexec --cold --force makes what is missing, with empty memory" if missing else ""
                yield Finding("machine", ERROR, f"{path} {what}", remedy or f"chmod u+rwX {path}")
        yield Finding("machine", OK, f"{machine.path()} can be used")
        if named is not None:
            yield Finding("machine", OK, f"RAM is {named.spec} ({named.kind}); it survives {named.traits.survives}")
        return
    above = _nearest(machine.path())
    if not os.access(above, os.W_OK | os.X_OK):
        found = f"{machine.path()} cannot be made: {above} cannot be written"
        yield Finding("machine", ERROR, found, "chmod it, or set PKRAM_ROOT to a directory of yours on a tmpfs")
    elif machine.has("ram"):
        yield Finding("machine", WARNING, machine.missing())
    else:
        yield Finding("machine", OK, f"{machine.path()} is made by the first mount")


def _nearest(path: str) -> str:
    """Return the lowest directory on the way to `path` that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _room(machine: "Machine", ram: int) -> Iterator[Finding]:
    """Check the file system behind RAM: its kind, its size, and its free space."""
    point, kind = _file_system(_nearest(machine.path()))
    host = os.statvfs(_nearest(machine.path()))
    whole, left = host.f_blocks * host.f_frsize, host.f_bavail * host.f_frsize
    where = f"{point} ({kind})"
    if kind not in _IN_MEMORY:
        remedy = "set PKRAM_ROOT to a directory on a tmpfs, unless this is a file system on memory (DAX)"
        yield Finding("room", NOTE, f"RAM lies on {where}, not in memory", remedy)
    if machine.has("ram"):
        file = machine.ram()
        left = max(file.room(), 0)
        file.close()
    found = (
        f"RAM has {format_size(ram)}, {where} holds {format_size(whole)}, {format_size(left)} of it may still be used"
    )
    wanted = f"mount -o remount,size={ram // GIB + 2}G {point}"
    more = wanted if kind in _IN_MEMORY else f"free some on {point}"
    if left <= 0:
        yield Finding("room", ERROR, f"{found}: writes fail with ENOSPC", more)
    elif left < min(_LITTLE, ram // 4):
        yield Finding("room", WARNING, found, more)
    elif whole < ram:
        yield Finding("room", NOTE, f"{found}: trees cannot fill RAM", more)
    else:
        yield Finding("room", OK, found)


def _file_system(path: str) -> tuple[str, str]:
    """Return where the file system that holds a path is mounted, and its type."""
    from pkramfs.mounting import syscalls

    real, dev = os.path.realpath(path), os.stat(path).st_dev
    holders = [one for one in syscalls.mounts() if one.dev == dev and syscalls.inside(real, one.mountpoint)]
    best = max(holders, key=lambda one: len(one.mountpoint), default=None)
    return (best.mountpoint, best.fstype) if best else (real, "of unknown type")


def _running(machine: "Machine") -> Iterator[Finding]:
    """Check the kernel and the mounts, by the problems that `pkramctl status` has."""
    from pkramfs.kernel import kernelrecord

    info = kernelrecord.read(machine, any_layout=True)
    if info is not None and info.layout != kernelrecord.LAYOUT:
        found = f"the kernel runs pkramfs {info.version}, whose tables this version does not touch"
        yield Finding("kernel", WARNING, found, "preserve what is mounted, and pkram-kexec: that is the upgrade")
    elif info is not None and not info.pkram:
        remedy = f"pkram-kexec{machine.words} --cold" if info.crash else "load a kernel with pkram= on its command line"
        yield Finding("kernel", WARNING, "PKRAM is off in this kernel: nothing can be preserved", remedy)
    else:
        yield Finding("kernel", OK, "none runs yet" if info is None else f"generation {info.generation} runs")
    answer = status.gather(machine)
    following = answer["next"] or {}
    if following.get("pending") or following.get("remount"):
        what = "a boot is not finished" if following["pending"] else "a mount waits to be mounted again"
        yield Finding("kernel", WARNING, what, f"pkram-kexec{machine.words} --resume")
    for problem in answer["problems"]:
        yield Finding("kernel", ERROR, *_parted(problem))
    for mount in answer["mounts"]:
        if "problem" in mount:
            yield Finding("mounts", ERROR if mount["state"] == "silent" else WARNING, *_parted(mount["problem"]))
    if answer["mounts"] and not any("problem" in mount for mount in answer["mounts"]):
        yield Finding(
            "mounts", OK, f"{plural(len(answer['mounts']), 'daemon answers', 'daemons answer')}; no data are lost"
        )


def _parted(problem: str) -> tuple[str, str]:
    """Part a message into the fault, and the remedy after its last colon or semicolon, if there is one."""
    for mark in ("; ", ": "):
        what, _, remedy = problem.rpartition(mark)
        if what and not remedy.startswith("/"):
            return what, remedy
    return problem, ""


def show(found: list[Finding]) -> None:
    """Print findings as a table, each remedy below its finding, and the count of those that are not well."""
    rows: list[tuple[str, str, str]] = []
    for one in found:
        rows.append((one.level, one.check, one.found))
        if one.remedy:
            rows.append(("", "", f"→ {one.remedy}"))
    render.table([render.Column("STATE"), render.Column("CHECK"), render.Column("FOUND")], rows)
    counts = [(level, sum(one.level == level for one in found)) for level in (ERROR, WARNING, NOTE)]
    render.say()
    said = ", ".join(plural(count, level) for level, count in counts if count)
    render.say(said or "all is well")
