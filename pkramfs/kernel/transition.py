# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of a kexec: how each one is done, described, and undone.

The planner (kexec.py) decides which of them a kexec needs, and in which order; its essay has the list, with the
numbers that the operations carry here. All of them share a Transition: the facts about the dying kernel and
the loaded one. A step changes nothing before it is executed, so that a dry run can print it.

Kernel: kernel/kexec_core.c (kernel_kexec), mm/pkram.c (pkram_reboot), patches 7, 10 and 15 to 18
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from pkramfs.errors import ExhaustedError, NotPreservedError
from pkramfs.kernel import incoming, loading, memorymap, nvram, placement, succession
from pkramfs.kernel.incoming import IncomingNode
from pkramfs.kernel.kernelrecord import LAYOUT
from pkramfs.kernel.nvram import NodePages, Pending
from pkramfs.kernel.running import Running
from pkramfs.kernel.segments import destinations, page_count
from pkramfs.kernel.staging import Loaded
from pkramfs.kernel.steps import Operation
from pkramfs.machine.directory import Machine
from pkramfs.pkram import regions, superblock
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE, format_pfn, format_size, plural


@dataclass(frozen=True)
class MountReport:
    """A mount's account of what it would lose, by way of the command that composes the kexec."""

    mountpoint: str
    name: str | None
    preserved: bool
    files: int | None
    reason: str = ""
    tree_id: int = 0
    """The owner of the page blocks that hold its pages; 0 where nobody knows."""
    kept: bool = False
    """Whether the mount stays, and is preserved when the time has come."""
    lost: str = ""
    """The data that were written and are not preserved, in words."""

    @property
    def content(self) -> str:
        """Describe the contents of the mount; a dead daemon's tree was not counted."""
        return "its tree" if self.files is None else plural(self.files, "file")


@dataclass
class Transition:
    """The facts that the operations of one plan share: the dying kernel, the loaded one, and the nodes that cross."""

    kernel: Running
    loaded: Loaded
    force: bool
    poison: bool
    remount: Sequence[dict[str, Any]]
    keeps: bool = True
    nodes: list[IncomingNode] = field(default_factory=list)
    lost: list[NodePages] = field(default_factory=list)
    mends: bool = False

    @property
    def machine(self) -> Machine:
        """Return the machine that both kernels run on."""
        return self.kernel.machine

    @property
    def preserved(self) -> Spans:
        """Return the pages that must cross: those of all nodes, and the reserve that will hold the region list."""
        if not self.keeps:
            return Spans()
        return Spans.union(node.spans for node in self.nodes) | self.kernel.info.reserve_pages

    @property
    def pending(self) -> Pending:
        """Return the boot as nvram.json will have it."""
        scratch = self.kernel.info.reserved.get("Scratch")
        return Pending(
            nvram.KEXEC,
            self.kernel.generation + 1,
            self.loaded.cmdline,
            self.loaded.image,
            self.loaded.segments,
            self.force,
            self.poison,
            tuple((n.name, n.spans.total) for n in self.nodes) if self.keeps else (),
            tuple(self.lost),
            scratch,
        )


@dataclass
class StopMounts(Operation):
    """6: the daemons detach and end; those of mounts that stay only end, and others take over under the next kernel."""

    mounts: Sequence[MountReport]
    stop: Callable[[], None]

    def describe(self) -> str:
        kept = [mount.mountpoint for mount in self.mounts if mount.kept]
        stopped = [mount.mountpoint for mount in self.mounts if not mount.kept]
        said = [f"stop {plural(len(stopped), 'mount')}: {', '.join(stopped)}"] if stopped else []
        return "; ".join(said + ([f"keep {plural(len(kept), 'mount')}: {', '.join(kept)}"] if kept else []))

    def execute(self) -> None:
        self.stop()


@dataclass
class LoadElsewhere(Operation):
    """1: find other destinations, because pages are preserved there now; -s leaves the choice to us."""

    going: Transition

    def describe(self) -> str:
        blocked = loading.blocking(self.going.loaded, self.going.preserved)
        return f"load again elsewhere: {plural(blocked.total, 'preserved page')} in the way"

    def details(self) -> list[str]:
        going, banned = self.going, destinations(self.going.loaded.segments)
        counts = {who: (banned & pages).total for who, pages in loading.owners(going.kernel, going.nodes).items()}
        return [f"{plural(count, 'page')} of {who}" for who, count in counts.items() if count]

    def execute(self) -> None:
        going = self.going
        for line in [self.describe(), *self.details()]:
            going.machine.log(f"kexec: {line}")
        elsewhere = loading.elsewhere(going.kernel, going.loaded, going.preserved)
        going.loaded = loading.restage(going.machine, elsewhere)


@dataclass
class TakeRoom(Operation):
    """2: take the host's memory now, because others could take it between now and the boot."""

    going: Transition
    _given: Spans = field(default_factory=Spans)

    def describe(self) -> str:
        return f"take room for the kernel: {format_size(self._pages.total * PAGE_SIZE)} behind RAM"

    @property
    def _pages(self) -> Spans:
        return Spans((s.pfn, s.pfn + page_count(s.size)) for s in self.going.loaded.segments)

    def execute(self) -> None:
        ram = self.going.kernel.ram
        self._given = self._pages - Spans.union(ram.data_spans(*span) for span in self._pages)
        ram.back(self._given)

    def undo(self) -> None:
        """Give the memory back, except in leased page blocks: their owners may have begun to use it."""
        kernel = self.going.kernel
        if kernel.info.layout == LAYOUT:
            with kernel.machine.tables():
                free = kernel.leases.taken().gaps(0, kernel.info.blocks).scale(BLOCK_PAGES)
                kernel.ram.punch(self._given & free)


@dataclass
class WriteRegions(Operation):
    """3: the list of preserved ranges that the next kernel reads before it has any allocator."""

    going: Transition

    def describe(self) -> str:
        nodes = self.going.nodes
        return f"hand over {plural(len(nodes), 'node')}, {format_size(sum(n.spans.total for n in nodes) * PAGE_SIZE)}"

    def details(self) -> list[str]:
        return [
            f"{n.name}: {plural(n.spans.total, 'page')} ({format_size(n.spans.total * PAGE_SIZE)}) in "
            f"{plural(len(n.spans), 'range')}"
            for n in self.going.nodes
        ]

    def execute(self) -> None:
        going, info, ram = self.going, self.going.kernel.info, self.going.kernel.ram
        superblock.set_regions(ram, info.super_pfn, 0)
        spans = Spans.union(n.spans for n in going.nodes) | Spans([(info.super_pfn, info.super_pfn + 1)])
        reserve = info.reserve_pages - Spans([(info.super_pfn, info.super_pfn + 1)])
        if regions.pages_needed(len(spans) + 2 * len(reserve)) > reserve.total:
            spans = placement.blocks_of(spans)  # a shorter list: a whole page block belongs to one owner
        head = regions.build(ram, spans, _Reserve(reserve).take, generation=info.generation)
        superblock.set_regions(ram, info.super_pfn, head)

    def undo(self) -> None:
        """Forget the list: it would lack nodes that are preserved later."""
        kernel, info = self.going.kernel, self.going.kernel.info
        succession.take_back_regions(kernel.ram, info)
        kernel.ram.punch(info.reserve_pages - Spans([(info.super_pfn, info.super_pfn + 1)]))


class _Reserve:
    """Pages for the region list, in order. Nothing else uses them, so a new list overwrites an old one."""

    def __init__(self, pages: Spans) -> None:
        self._free = (pfn for start, end in pages for pfn in range(start, end))

    def take(self, count: int) -> U64:
        """Take `count` pages; raise ExhaustedError if there are fewer."""
        found = list(islice(self._free, count))
        if len(found) < count:
            raise ExhaustedError(f"PKRAM's reserve is {count - len(found)} pages short of what the region list needs")
        return np.array(found, dtype=np.uint64)


@dataclass
class Verify(Operation):
    """4: read the nodes as boot will, and place the next kernel, before anything is stopped."""

    going: Transition

    def describe(self) -> str:
        return "verify what crosses, and that the next kernel has room"

    def execute(self) -> None:
        going, hardware = self.going, self.going.machine.hardware()
        usable = placement.usable_memory(hardware, going.pending)
        preserved = Spans()
        if going.keeps and going.nodes:
            preserved = incoming.examine(going.kernel.ram, going.kernel.info.super_pfn, usable).preserved
        if blocked := destinations(going.loaded.segments) & preserved:
            raise loading.conflict([f"{plural(blocked.total, 'preserved page')} from pfn {int(blocked.starts[0]):x}"])
        placement.arrange(hardware, going.pending, preserved)


@dataclass
class DecideBoot(Operation):
    """5: from now on a boot is pending, but this kernel still lives."""

    going: Transition
    _before: Sequence[dict[str, object]] = ()

    def describe(self) -> str:
        return (
            f"decide the boot of {self.going.loaded.image.name}: {self.going.loaded.cmdline or '(empty command line)'}"
        )

    def details(self) -> list[str]:
        return [line for mount in self.going.remount for line in _again(mount)] if self.going.keeps else []

    def execute(self) -> None:
        remount = list(self.going.remount) if self.going.keeps else []  # not an empty mount for a lost tree
        self._before = nvram.mounts(self.going.machine)
        nvram.set_pending(self.going.machine, self.going.pending, remount)
        memorymap.remember(self.going.kernel)

    def undo(self) -> None:
        if nvram.pending(self.going.machine) is not None:
            nvram.cancel(self.going.machine, self._before)


@dataclass
class LastLook(Operation):
    """7: look again, because a tree may have been changed, and its node withdrawn, until its daemon ended."""

    going: Transition

    def describe(self) -> str:
        return "see that what was preserved still is"

    def execute(self) -> None:
        if not self.going.keeps:
            return
        found = {(node.name, node.pfn) for node in loading.preserved_nodes(self.going.kernel)}
        if gone := [node.name for node in self.going.nodes if (node.name, node.pfn) not in found]:
            raise NotPreservedError(f"node {gone[0]} is gone: its tree was changed again meanwhile; preserve it anew")


def _again(mount: dict[str, Any]) -> list[str]:
    """Describe how a tree is mounted again, one line for each place."""
    said = [word if value is True else f"{word}={value}" for word, value in mount["options"].items() if value]
    binds = [(bind["mountpoint"], bind["root"], bind["options"]) for bind in mount.get("binds", ())]
    return [
        f"mount {mount['name']} again on {mount['mountpoint']} ({','.join(said)})",
        *(f"bind {root} of {mount['name']} again on {place} ({','.join(words)})" for place, root, words in binds),
    ]


@dataclass
class PointOfNoReturn(Operation):
    """End the running kernel."""

    going: Transition
    final = True

    def describe(self) -> str:
        info = self.going.kernel.info
        pkram = f"super block at pfn {format_pfn(info.super_pfn)}" if info.pkram else "PKRAM is off"
        return f"end kernel {info.generation} ({pkram}): the point of no return"

    def execute(self) -> None:
        succession.retire(self.going.machine)


@dataclass
class Boot(Operation):
    """8 and 9: copy the segments into RAM, then boot in a process that knows nothing else."""

    going: Transition

    def describe(self) -> str:
        return f"copy {plural(len(self.going.loaded.segments), 'segment')} and boot"

    def details(self) -> list[str]:
        return [segment.describe() for segment in self.going.loaded.segments]

    def execute(self) -> None:
        succession.resume(self.going.machine)


@dataclass
class TakeOver(Operation):
    """10: the new kernel's first act."""

    going: Transition

    def describe(self) -> str:
        return "take over: consume the old super block, free what only boot needed"

    def execute(self) -> None:
        succession.bring_up(self.going.machine)
