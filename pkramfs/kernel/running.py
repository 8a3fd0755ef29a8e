# SPDX-License-Identifier: GPL-2.0-or-later
"""The running kernel, as everybody who works under it finds it.

    attach(machine)        the kernel, booted on first use; a pending boot is resumed
    look(machine)          the kernel if one is up; changes nothing                          (pkramctl)
    shared(machine)        the kernel, and no kexec while the block lasts       (starting a mount)
    exclusively(machine)   the kernel, and nobody else                          (loading, -e)

These four take the machine lock themselves: never call them while holding it. `bring_up` and
`look` are for callers who hold it.

`bring_up` reads two files and knows how far things are (the table in nvram.py): it cancels a kexec
that died early, resumes one that died late, boots an untouched machine, and finishes a take-over.
Taking over is the kernel's first act and may be repeated: consume the old super block, so that its
pfn restores nothing twice; give back what was needed to boot only; clear the pending boot. Nothing
is leased before it is done, because nobody gets a Running earlier.

RAM with data but no kernel and no pending boot is refused: it was damaged, or is not ours.

Kernel: init/main.c (kernel_init, free_initmem), mm/pkram.c (pkram_cleanup, patches 13 and 14)
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from pkramfs.errors import FormatError, MachineError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import kernelrecord, leasetable, nvram, staging
from pkramfs.kernel.image import BUILTIN, load_image
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.kernel.nvram import ImageInfo, Pending
from pkramfs.kernel.ownership import Ownership
from pkramfs.kernel.segments import destinations
from pkramfs.machine.claims import FileClaims
from pkramfs.machine.directory import Machine
from pkramfs.machine.leases import FREE, KERNEL, Leases
from pkramfs.machine.locks import held
from pkramfs.machine.mounts import last_words
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.pkram.rescue import Survey
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, format_pfn, format_size, plural

COLD_CMDLINE = "BOOT_IMAGE=builtin ro"
LOCK_SECONDS = 30.0
BOOT_SECONDS = 600.0
"""How long a boot may take: copying and summing what was loaded are most of it."""
BOOT_LOCK = "lock.boot"
"""Held by a boot process as long as it lives: it may outlive the one that started it."""
_OF_ONE_KERNEL = ("cmdline", "pkram", "iomem")


@dataclass
class Running:
    """A kernel that is up: its record, its RAM, its leases, its super block."""

    machine: Machine
    info: KernelInfo

    @cached_property
    def ram(self) -> Ram:
        return self.machine.ram()

    @cached_property
    def leases(self) -> Leases:
        table, guarded = self.info.lease_table_pfn, self.ownership.guarded
        return Leases(self.ram, table, self.info.blocks, self.machine.tables, guarded)

    @cached_property
    def ownership(self) -> Ownership:
        return Ownership(self)

    @cached_property
    def store(self) -> Store:
        claims = FileClaims(self.machine.path("claims"))
        return Store(self.ram, self.info.super_pfn or None, self.machine.tables, claims)

    @property
    def generation(self) -> int:
        return self.info.generation

    @property
    def cmdline(self) -> str:
        return (self.machine.read_text("cmdline") or "").rstrip("\n")

    def sweep(self) -> int:
        """Give back what dead daemons had leased; how many blocks. FormatError if it is not sure whose they were.

        Their files go, too, but of those whose blocks were not swept yet, and of one that oopsed under a kernel
        which is to panic then: whoever comes next has to find it (crash.py).
        """
        swept = self.leases.sweep(self.ownership.kept)
        preserved = self.store.preserved_ids() if self.info.pkram else set[int]()
        self.machine.clear_away((self.leases.tree_ids() - preserved) | self._oopsed())
        return swept

    def _oopsed(self) -> set[int]:
        if not words.panics_on_oops(self.cmdline):
            return set()
        directory = self.machine.path("mounts")
        return {entry.tree_id for entry in self.machine.mounts() if last_words(directory, entry) is not None}

    def refuse_doubt(self) -> None:
        """FormatError, naming the block, if it is not sure whose page blocks are: before anything is given up."""
        with self.machine.tables():
            self.ownership.kept()

    def survey(self) -> Survey:
        """What the list of nodes leads to and what it should; changes nothing."""
        return self.store.survey(self.leases.trees().scale(BLOCK_PAGES), self.owner)

    def mend(self, before: Callable[[Survey], None]) -> Survey:
        """Make the list of nodes whole again, and the super block; `before` is told what was found, and what not."""
        pages, generation = self.leases.trees().scale(BLOCK_PAGES), self.generation
        return self.store.mend(pages, self.owner, generation=generation, before=before)

    def owner(self, pfn: int) -> int:
        """The lease word of the page block that a page lies in."""
        return int(self.leases.ids[pfn // BLOCK_PAGES])

    def banned(self) -> Spans:
        """Pages that must not hold preserved data: a loaded kernel will be copied there."""
        loaded = staging.read(self.machine)
        return destinations(loaded.segments) if loaded else Spans()


def attach(machine: Machine, *, boot: bool = True, timeout: float = LOCK_SECONDS) -> Running:
    """The running kernel. With `boot`, a machine that is not up is brought up first."""
    if not boot:
        return look(machine)
    with shared(machine, timeout) as kernel:
        return kernel


def look(machine: Machine, *, any_layout: bool = False) -> Running:
    """The running kernel, without changing anything; MachineError where there is none."""
    if not machine.exists():
        raise MachineError(machine.missing())
    info = kernelrecord.read(machine, any_layout=any_layout)
    if info is None:
        waits = nvram.pending(machine) is not None
        raise MachineError(
            f"no kernel is running in {machine.path()}"
            + (": a boot is pending, the next mount resumes it" if waits else ": the first mount boots it")
        )
    return Running(machine, info)


@contextmanager
def shared(machine: Machine, timeout: float = LOCK_SECONDS) -> Iterator[Running]:
    """The running kernel, brought up if need be; no kexec happens while the block lasts."""
    if not machine.exists():
        machine.create()
    while True:
        with machine.lifecycle(shared=True, timeout=timeout):
            info = kernelrecord.read(machine)
            if info is not None and nvram.pending(machine) is None:
                kernel = Running(machine, info)
                take_back_regions(kernel)
                yield kernel
                return
        with exclusively(machine, timeout):
            pass  # brought up; somebody may kexec before we have the lock again, so look again


@contextmanager
def exclusively(machine: Machine, timeout: float = LOCK_SECONDS) -> Iterator[Running]:
    """The running kernel, brought up if need be, with nobody else starting anything.

    It may be another version's (then its lease table is not for us): kexec is the upgrade.
    """
    if not machine.exists():
        machine.create()
    with machine.lifecycle(shared=False, timeout=timeout):
        yield bring_up(machine)


def bring_up(machine: Machine, *, force: bool = False) -> Running:
    """Whatever is undone between power-on and a running kernel. The caller holds the lock exclusively."""
    with held(machine.path(BOOT_LOCK), timeout=BOOT_SECONDS, what=f"{machine.path()}, which boots,"):
        pass  # a boot whose parent was killed has ended
    info, pending = kernelrecord.read(machine, any_layout=True), nvram.pending(machine)
    if info is None:
        if pending is None:
            _refuse_data(machine)
            decide_cold(machine)
        resume(machine, force=force)
        info = kernelrecord.read(machine)
        if info is None:
            raise MachineError("boot said that it succeeded but wrote no kernel.json")
        pending = nvram.pending(machine)
    kernel = Running(machine, info)
    if pending is not None and pending.generation == info.generation:
        take_over(kernel)
    elif pending is not None:
        machine.log("kexec: died before the point of no return; this kernel goes on")
        nvram.cancel(machine)
    take_back_regions(kernel)
    return kernel


def take_back_regions(kernel: Running) -> None:
    """A region list is for the next kernel: one that a kexec published which then failed, or died, says nothing.

    The caller holds the machine lock, so no kexec is on its way.
    """
    if kernel.info.pkram and superblock.has_regions(kernel.ram, kernel.info.super_pfn):
        superblock.set_regions(kernel.ram, kernel.info.super_pfn, 0)


def _refuse_data(machine: Machine) -> None:
    """A machine that never booted has no data in RAM."""
    data = machine.ram().data_spans()
    if data:
        raise MachineError(
            f"{machine.path()} is damaged: no kernel.json and no pending boot, but "
            f"{format_size(data.total * 4096)} of data in RAM; to start empty, remove the machine "
            "(pkramctl machine destroy --force)"
        )


def decide_cold(machine: Machine, cmdline: str = COLD_CMDLINE) -> None:
    """Make a boot that finds nothing the pending one."""
    words.validate(cmdline)
    image = ImageInfo.of(load_image(BUILTIN))
    nvram.set_pending(machine, Pending(nvram.COLD, nvram.next_generation(machine), cmdline, image))


def power_cycle(machine: Machine, cmdline: str = COLD_CMDLINE) -> Running:
    """Forget all memory and boot cold. The caller holds the lock exclusively and has stopped the mounts."""
    decide_cold(machine, cmdline)
    retire(machine)
    return bring_up(machine)


def retire(machine: Machine) -> None:
    """The point of no return: the running kernel is no more. Repeating it is harmless."""
    for name in (kernelrecord.NAME, *_OF_ONE_KERNEL):
        machine.remove(name)
    machine.drop_log()


def resume(machine: Machine, *, force: bool = False) -> None:
    """From the point of no return to kernel.json, from wherever it was interrupted."""
    pending = nvram.pending(machine)
    if pending is None:
        raise MachineError("no boot is pending")
    retire(machine)
    staging.remove(machine, staging.CRASH_JSON)
    if staging.read(machine) is not None:
        if pending.kind == nvram.KEXEC:
            staging.copy_into_ram(machine, machine.ram(), pending.segments)
        staging.remove(machine)
    start_boot(machine, force=force)


def start_boot(machine: Machine, *, force: bool = False) -> None:
    """Run the boot in a process that is given nothing but the machine's directory, and wait for it."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    words = [sys.executable, "-P", "-m", "pkramfs", "boot", machine.path(), "--parent", str(os.getpid())]
    try:
        done = subprocess.run(
            [*words, *(["--force"] * force)],
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": package},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            start_new_session=True,  # Ctrl-C and a terminal that goes are not for a kernel that boots
            timeout=BOOT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"boot did not end within {BOOT_SECONDS:g} s: pkram-kexec --resume tries again") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        remedy = ""
        if done.returncode == FormatError.exit_status:
            remedy = "; nothing was freed: pkram-kexec --resume --force goes on and loses what is preserved"
        raise MachineError(f"boot failed: {reason.removeprefix('boot: ')}{remedy}")


def take_over(kernel: Running) -> None:
    """The first act of a kernel that is up: consume, give back, and only then count as booted."""
    info, ram = kernel.info, kernel.ram
    kernel.machine.keep_copy()
    unneeded = Spans(info.stale) | Spans(info.initmem)
    _refuse_needed(kernel, unneeded)
    if info.old_super_pfn:
        superblock.consume(ram, info.old_super_pfn)
    ram.punch(unneeded)
    freed = unneeded.outward(BLOCK_PAGES) - info.own_pages.outward(BLOCK_PAGES)
    if info.layout == kernelrecord.LAYOUT:  # else its table is not for us: the blocks stay taken until the next kexec
        with kernel.machine.tables():
            view = leasetable.lease_view(ram, info.lease_table_pfn, info.blocks)
            for start, end in freed:
                view[start:end][view[start:end] == KERNEL] = FREE
    if unneeded:
        kernel.machine.log(f"Freeing {plural(unneeded.total, 'page')} that only boot needed")
    if info.old_super_pfn:
        kernel.machine.log(f"pkram: super block at pfn {format_pfn(info.old_super_pfn)} consumed")
    nvram.finished(kernel.machine, info.generation)


def _refuse_needed(kernel: Running, unneeded: Spans) -> None:
    """FormatError if what is about to be punched is preserved, or this kernel's own."""
    preserved = kernel.store.preserved() if kernel.info.pkram else Spans()
    if needed := unneeded & (preserved | kernel.info.own_pages):
        pages = f"pfn {format_pfn(int(needed.starts[0]))}, which is in use"
        raise FormatError("kernel.json", "stale", found=pages, expected="pages that only boot needed")
