# SPDX-License-Identifier: GPL-2.0-or-later
"""Crash kernels: booted where they were loaded, with PKRAM off, to look at a dead kernel.

    |…… memory of the dead kernel, untouched ……[crash kernel, its table]……|
                                                └── crashkernel= ───────┘

Nothing is saved, frozen or handed over: a panic leaves no time for that. The crash kernel reserves
all but its own window, so nothing of the dead kernel is overwritten. The boot report has the dead
kernel's super block and last log lines. Leaving a crash kernel is a cold boot.

A mount daemon that aborts or faults (SIGABRT, SIGSEGV, SIGBUS, …) is this kernel's oops: its
interpreter writes into the daemon's log how it ended. With `panic_on_oops` on the command line the
oops is a panic. No process is the kernel and could see it happen; so the next mount or pkram-kexec
finds the dead daemon's entry and panics before doing anything else (`notice`). A daemon killed with
SIGKILL is not an oops, but intended. Without a crash kernel the log reports it and the kernel goes
on, because a panic could only lose every other tree.

Kernel: kernel/crash_core.c, kernel/panic.c (panic_on_oops), include/linux/crash_dump.h (is_kdump_kernel),
        patch 20
"""

import time

from pkramfs.errors import MachineError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import kernelrecord, nvram, running, staging, succession
from pkramfs.kernel.nvram import Pending
from pkramfs.kernel.running import Running
from pkramfs.machine.directory import Machine
from pkramfs.machine.mounts import MountEntry, kill, last_words

_LAST_LINES = 50
_GONE_SECONDS = 30.0
_POLL_SECONDS = 0.01


def notice(machine: Machine) -> Running | None:
    """Panic if a daemon of this kernel has oopsed and the command line asks for it. Takes the machine lock."""
    if not machine.exists() or _oops(machine) is None:
        return None
    with machine.lifecycle(shared=False):
        oops = _oops(machine)
        if oops is None:
            return None  # another process noticed it first
        entry, how = oops
        reason = f"Fatal exception: {how} in the daemon of {entry.mountpoint} (pid {entry.pid})"
        if staging.read(machine, staging.CRASH_JSON) is None:
            machine.log(f"{reason}; {words.PANIC_ON_OOPS}, but no crash kernel is loaded: going on")
            machine.claim(entry.tree_id).release()
            return None
        _kill_all(machine)
        return panic(machine, reason)


def _oops(machine: Machine) -> tuple[MountEntry, str] | None:
    """Return a daemon that oopsed under the running kernel, and how; None unless that is a panic."""
    info = kernelrecord.read(machine, any_layout=True)
    if info is None or not info.pkram or not words.panics_on_oops(machine.read_text("cmdline") or ""):
        return None
    for entry in machine.mounts():
        ended = last_words(machine.path("mounts"), entry)
        if ended is not None and ended[1] >= info.booted:
            return entry, ended[0]
    return None


def _kill_all(machine: Machine) -> None:
    """Kill every other daemon and wait for its end: a panic asks no daemon."""
    for entry in machine.mounts():
        if entry.alive:
            kill(entry)
    deadline = time.monotonic() + _GONE_SECONDS
    while machine.live_ids():
        if time.monotonic() > deadline:
            raise MachineError("a mount daemon does not end: kill -9 it, then run pkram-kexec --panic")
        time.sleep(_POLL_SECONDS)


def panic(machine: Machine, reason: str = "sysrq triggered crash") -> Running:
    """Boot the crash kernel. The caller holds the machine lock exclusively and has killed the mounts."""
    kernel = running.look(machine)
    loaded = staging.read(machine, staging.CRASH_JSON)
    window = kernel.info.reserved.get("Crash kernel")
    if loaded is None or window is None:
        raise MachineError("no crash kernel is loaded: boot with crashkernel=SIZE, then pkram-kexec -p IMAGE")
    staging.verify_in_ram(kernel.ram, loaded.segments)
    machine.log(f"Kernel panic - not syncing: {reason}")
    dead = {
        "generation": kernel.generation,
        "super_pfn": kernel.info.super_pfn,
        "lease_table_pfn": kernel.info.lease_table_pfn,
        "cmdline": kernel.cmdline,
        "dmesg": machine.last_lines(_LAST_LINES),
    }
    pending = Pending(
        nvram.CRASH,
        kernel.generation + 1,
        loaded.cmdline,
        loaded.image,
        loaded.segments,
        crash=window,
        dead=dead,
    )
    nvram.set_pending(machine, pending, [])
    succession.retire(machine)
    return Running(machine, succession.bring_up(machine))
