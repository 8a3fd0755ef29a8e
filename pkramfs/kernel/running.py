# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the running kernel, for all processes that work under it.

    attach(machine)        the kernel, booted on first use; a pending boot is resumed
    look(machine)          the kernel if one is up; changes nothing                          (pkramctl)
    shared(machine)        the kernel, and no kexec while the block lasts       (starting a mount)
    exclusively(machine)   the kernel, without other processes                  (loading, -e)

All but `look` take the machine lock themselves: never call them while holding it. Callers who hold it
call `look`, or succession.bring_up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from pkramfs.errors import MachineError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import kernelrecord, nvram, staging
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.kernel.ownership import Ownership
from pkramfs.kernel.segments import destinations
from pkramfs.kernel.succession import bring_up, take_back_regions
from pkramfs.machine.claims import FileClaims
from pkramfs.machine.directory import Machine
from pkramfs.machine.leases import Leases
from pkramfs.machine.mounts import last_words
from pkramfs.machine.ram import Ram
from pkramfs.pkram.rescue import Survey
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

LOCK_SECONDS = 30.0


@dataclass
class Running:
    """A kernel that is up: its record, its RAM, its leases, its super block."""

    machine: Machine
    info: KernelInfo

    @cached_property
    def ram(self) -> Ram:
        """Return the machine's RAM, opened once."""
        return self.machine.ram()

    @property
    def leases(self) -> Leases:
        """Return the lease table."""
        return self.ownership.leases

    @cached_property
    def ownership(self) -> Ownership:
        """Return the witnesses for the owners of page blocks."""
        return Ownership(self.machine, self.info, self.store)

    @cached_property
    def store(self) -> Store:
        """Return the nodes below the super block."""
        claims = FileClaims(self.machine.path("claims"))
        return Store(self.ram, self.info.super_pfn or None, self.machine.tables, claims)

    @property
    def generation(self) -> int:
        """Return how many kernels this machine has had, this one included."""
        return self.info.generation

    @property
    def cmdline(self) -> str:
        """Return the kernel's command line."""
        return kernelrecord.cmdline(self.machine)

    def sweep(self) -> int:
        """Free the blocks that dead daemons had leased; return how many. FormatError if an owner is in doubt.

        Their files go, too, except those of daemons whose blocks are not swept yet, and those of an oopsed
        daemon if the kernel panics on oops: the next command has to find them (crash.py).
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
        """Raise FormatError, naming the block, if an owner is in doubt: asked before anything is given up."""
        with self.machine.tables():
            self.ownership.kept()

    def survey(self) -> Survey:
        """Look for nodes, those in the list and those that should be in it; change nothing."""
        return self.store.survey(self.leases.trees().scale(BLOCK_PAGES), self.owner)

    def mend(self, before: Callable[[Survey], None]) -> Survey:
        """Make the list of nodes and the super block whole again; `before` gets the survey first."""
        pages, generation = self.leases.trees().scale(BLOCK_PAGES), self.generation
        return self.store.mend(pages, self.owner, generation=generation, before=before)

    def owner(self, pfn: int) -> int:
        """Return the lease word of a page's block."""
        return int(self.leases.ids[pfn // BLOCK_PAGES])

    def banned(self) -> Spans:
        """Return the pages that must not hold preserved data, because a loaded kernel will be copied there."""
        loaded = staging.read(self.machine)
        return destinations(loaded.segments) if loaded else Spans()


def attach(machine: Machine, *, boot: bool = True, timeout: float = LOCK_SECONDS) -> Running:
    """Return the running kernel; with `boot`, bring the machine up first if need be."""
    if not boot:
        return look(machine)
    with shared(machine, timeout) as kernel:
        return kernel


def look(machine: Machine, *, any_layout: bool = False) -> Running:
    """Return the running kernel and change nothing; raise MachineError if there is none."""
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
    """Yield the running kernel, booted if need be; no kexec happens while the block lasts."""
    if not machine.exists():
        machine.create()
    while True:
        with machine.lifecycle(shared=True, timeout=timeout):
            info = kernelrecord.read(machine)
            if info is not None and nvram.pending(machine) is None:
                kernel = Running(machine, info)
                take_back_regions(kernel.ram, info)
                yield kernel
                return
        with exclusively(machine, timeout):
            pass  # brought up, but a kexec may come before the lock is taken again: look again


@contextmanager
def exclusively(machine: Machine, timeout: float = LOCK_SECONDS) -> Iterator[Running]:
    """Yield the running kernel, booted if need be; no other process starts anything while the block lasts.

    It may be another version's, whose lease table is not for us: kexec is the upgrade.
    """
    if not machine.exists():
        machine.create()
    with machine.lifecycle(shared=False, timeout=timeout):
        yield Running(machine, bring_up(machine))
