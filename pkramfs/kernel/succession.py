# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of one kernel and the beginning of the next: decide, end, resume, boot, take over.

    decide_cold ─▶ retire ─▶ resume ─▶ start_boot ─▶ take_over
    nvram.json     the point  segments  a fresh       consume the old super block,
    says what      of no      into RAM  process       free what only boot needed,
    comes          return               (boot.py)     clear the pending boot

`bring_up` reads two files and knows how far things are (the table in nvram.py): it cancels a kexec
that died early, resumes one that died late, boots an untouched machine, and finishes a take-over.
Taking over is the kernel's first act and may be repeated. The old super block is consumed so that
its pfn restores nothing twice. Nothing is leased before it is done: there is a Running (running.py)
only when `bring_up` has returned.

RAM with data but no kernel and no pending boot is refused: it was damaged, or is not ours.

Callers hold the machine lock exclusively.

Kernel: init/main.c (kernel_init, free_initmem), mm/pkram.c (pkram_cleanup, patches 13 and 14)
"""

import os

from pkramfs.errors import FormatError, MachineError
from pkramfs.kernel import booting, history, hostboot, incoming, kernelrecord, leasetable, nvram, staging
from pkramfs.kernel import cmdline as words
from pkramfs.kernel.booting import BOOT_SECONDS
from pkramfs.kernel.image import BUILTIN, load_image
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.kernel.nvram import ImageInfo, Pending
from pkramfs.machine.directory import Machine
from pkramfs.machine.leases import FREE, KERNEL
from pkramfs.machine.locks import held
from pkramfs.machine.ram import Ram
from pkramfs.mounting import patience
from pkramfs.pkram import superblock
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE, format_pfn, format_size, plural

COLD_CMDLINE = "BOOT_IMAGE=builtin ro"
BOOT_LOCK = "lock.boot"
"""Held by a boot process as long as it lives: it may outlive the one that started it."""
_OF_ONE_KERNEL = ("cmdline", "pkram", "iomem")


def bring_up(machine: Machine, *, force: bool = False) -> KernelInfo:
    """Do whatever is undone between power-on and a running kernel, and return its record."""
    with held(machine.path(BOOT_LOCK), timeout=BOOT_SECONDS, what=f"{machine.path()}, which boots,"):
        pass  # a boot whose parent was killed has ended
    info, pending = kernelrecord.read(machine, any_layout=True), nvram.pending(machine)
    if info is None:
        if hostboot.is_noticed(machine, pending):
            hostboot.decide(machine)
        elif pending is None:
            _refuse_data(machine)
            decide_cold(machine)
        resume(machine, force=force)
        info = kernelrecord.read(machine)
        if info is None:
            raise MachineError("boot said that it succeeded but wrote no kernel.json")
        pending = nvram.pending(machine)
    if pending is not None and pending.generation == info.generation:
        take_over(machine, info)
    elif pending is not None:
        machine.log("kexec: died before the point of no return; this kernel goes on")
        nvram.cancel(machine)
    take_back_regions(machine.ram(), info)
    return info


def take_back_regions(ram: Ram, info: KernelInfo) -> None:
    """Forget the region list of a kexec that failed or died: it would lack nodes that are preserved later.

    The machine lock may be held shared here: no kexec is on its way.
    """
    if info.pkram and superblock.has_regions(ram, info.super_pfn):
        superblock.set_regions(ram, info.super_pfn, 0)


def _refuse_data(machine: Machine) -> None:
    """Raise MachineError if there are data in RAM: a machine that never booted has none."""
    data = machine.ram().data_spans()
    if data:
        raise MachineError(
            f"{machine.path()} is damaged: no kernel.json and no pending boot, but "
            f"{format_size(data.total * PAGE_SIZE)} of data in RAM; to start empty, remove the machine "
            "(pkramctl machine destroy --force)"
        )


def decide_cold(machine: Machine, cmdline: str = COLD_CMDLINE) -> None:
    """Make a boot that finds nothing the pending one."""
    if machine.elsewhere() is not None:
        hostboot.cold(machine)
        return
    words.validate(cmdline)
    image = ImageInfo.of(load_image(BUILTIN))
    nvram.set_pending(machine, Pending(nvram.COLD, nvram.next_generation(machine), cmdline, image))


def power_cycle(machine: Machine, cmdline: str = COLD_CMDLINE) -> KernelInfo:
    """Forget all memory and boot cold. The caller has stopped the mounts."""
    decide_cold(machine, cmdline)
    retire(machine)
    return bring_up(machine)


def retire(machine: Machine) -> None:
    """End the running kernel: the point of no return. May be repeated."""
    refuse_planted(machine)
    history.note_end(machine)
    for name in (kernelrecord.NAME, *_OF_ONE_KERNEL):
        machine.remove(name)
    machine.drop_log()


def refuse_planted(machine: Machine) -> None:
    """Raise MachineError if a directory lies where a kernel writes a file: it cannot be removed, nor renamed over."""
    for name in (kernelrecord.NAME, *_OF_ONE_KERNEL):
        path = machine.path(name)
        if os.path.isdir(path) and not os.path.islink(path):
            raise MachineError(f"{path} is a directory, and the next kernel writes a file there: remove it")


def resume(machine: Machine, *, force: bool = False) -> None:
    """Go from the point of no return to kernel.json, from wherever this was interrupted."""
    pending = nvram.pending(machine)
    if pending is None:
        raise MachineError("no boot is pending")
    retire(machine)
    staging.remove(machine, staging.CRASH_JSON)
    if staging.read(machine) is not None:
        if pending.kind == nvram.KEXEC:
            staging.copy_into_ram(machine, machine.ram(), pending.segments, lambda part: patience.tell(part / 2))
        staging.remove(machine)
    start_boot(machine, force=force)


def start_boot(machine: Machine, *, force: bool = False) -> None:
    """Run the boot in a process that is given nothing but the machine's directory, and wait for it."""
    booting.run(machine, force=force)


def take_over(machine: Machine, info: KernelInfo) -> None:
    """Consume the old super block, free pages that only boot needed, and only then count the kernel as booted."""
    ram = machine.ram()
    machine.keep_copy()
    unneeded = Spans(info.stale) | Spans(info.initmem)
    _refuse_needed(ram, info, unneeded)
    hostboot.note(machine, ram, info)
    if info.old_super_pfn:
        superblock.consume(ram, info.old_super_pfn)
    ram.punch(unneeded)
    if info.layout == kernelrecord.LAYOUT:  # else the table is not for us, and the blocks stay taken until a kexec
        _free_blocks(machine, ram, info, unneeded.outward(BLOCK_PAGES) - info.own_pages.outward(BLOCK_PAGES))
    if unneeded:
        machine.log(f"Freeing {plural(unneeded.total, 'page')} that only boot needed")
    if info.old_super_pfn:
        machine.log(f"pkram: super block at pfn {format_pfn(info.old_super_pfn)} consumed")
    nvram.finished(machine, info.generation)


def _free_blocks(machine: Machine, ram: Ram, info: KernelInfo, blocks: Spans) -> None:
    """Free those of `blocks` that are the kernel's; a block that holds a tree's pages, too, stays the tree's."""
    with machine.tables():
        view = leasetable.lease_view(ram, info.lease_table_pfn, info.blocks)
        for start, end in blocks:
            view[start:end][view[start:end] == KERNEL] = FREE


def _refuse_needed(ram: Ram, info: KernelInfo, unneeded: Spans) -> None:
    """Raise FormatError if pages about to be punched are preserved, or this kernel's own."""
    nodes = incoming.nodes(ram, info.super_pfn) if info.pkram else []
    if needed := unneeded & (Spans.union(node.spans for node in nodes) | info.own_pages):
        pages = f"pfn {format_pfn(int(needed.starts[0]))}, which is in use"
        raise FormatError("kernel.json", "stale", found=pages, expected="pages that only boot needed")
