"""Crash kernels: booted where they were loaded, with PKRAM off, so that a dead kernel can be looked at.

    |…… memory of the dead kernel, untouched ……[crash kernel, its table]……|
                                                └── crashkernel= ───────┘

Nothing is saved, frozen or handed over: a panic leaves no time for that. The crash kernel reserves
all but its own window, so nothing of the dead one is overwritten; what is known about that one (its
super block, its last log lines) is in the boot report. Leaving a crash kernel is a cold boot.

Kernel: kernel/crash_core.c, kernel/panic.c, include/linux/crash_dump.h (is_kdump_kernel), patch 20
"""

from pkramfs.errors import MachineError
from pkramfs.kernel import nvram, running, staging
from pkramfs.kernel.nvram import Pending
from pkramfs.kernel.running import Running
from pkramfs.machine.directory import Machine

_LAST_LINES = 50


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
        "dmesg": machine.dmesg().splitlines()[-_LAST_LINES:],
    }
    boot = Pending(
        nvram.CRASH,
        kernel.generation + 1,
        loaded.cmdline,
        loaded.image,
        loaded.segments,
        crash=window,
        dead=dead,
    )
    nvram.set_pending(machine, boot, [])
    running.retire(machine)
    return running.bring_up(machine)
