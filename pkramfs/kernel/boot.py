# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot: from RAM, a firmware map and a command line to a running kernel, in the order of a real boot.

    purgatory    do the loaded segments match their checksums?                ┐
    params       command line out of RAM                                       │ reads only
    find         pkram= → super block → region list → nodes, all checked       │
    place        KASLR, tables, reserve: everything has room                   ┘
    release      every page that is not reserved is punched (or poisoned)      ┐ repeatable: nothing that
    move         the kernel to its place                                       │ was handed over is changed
    tables       lease table, from holes, kernel and nodes                     │
    super        a new super block that names the old nodes                    │
    files        cmdline, pkram, iomem                                         ┘
    publish      kernel.json, by rename: the kernel is up

Boot runs in a fresh process which is given RAM, machine.json, nvram.json and the command line, and
nothing else. It may die after any step and be started again: it finds the same state, makes the same
decisions (from the machine's seed and the generation), and writes everything again. Taking over (consuming
the old super block, freeing what is stale) is the running kernel's first act, in succession.py:
only a kernel that is up can repeat it.

Unreadable metadata stop the boot at `find`, before anything is punched. A forced boot gives them up
and logs one line for each lost node.

Kernel: arch/x86/boot/compressed, arch/x86/kernel/setup.c (setup_arch), init/main.c (start_kernel)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pkramfs import __version__
from pkramfs.errors import FormatError, MachineError, PkramfsError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import incoming, iomem, kernelrecord, leasetable, nvram, placement, staging
from pkramfs.kernel.incoming import Incoming
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.kernel.nvram import NodePages, Pending
from pkramfs.kernel.placement import Placement
from pkramfs.kernel.segments import destinations
from pkramfs.machine.directory import Machine
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.memblock import Flag, Memblock
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, format_pfn, pages, plural

AfterStep = Callable[[str], None]


def nothing(_step: str) -> None:
    """Do nothing between two steps of a boot; tests do something else."""


def boot(machine: Machine, *, force: bool = False, after_step: AfterStep = nothing) -> KernelInfo:
    """Boot the pending boot of nvram.json. The caller holds the machine lock exclusively."""
    pending = nvram.pending(machine)
    if pending is None:
        raise MachineError(f"{machine.path(nvram.NAME)}: no boot is pending")
    started = BootProgress(machine, machine.hardware(), machine.ram(), pending, force or pending.force)
    machine.begin_log()
    for step in STEPS:
        begun = time.perf_counter()
        try:
            step(started)
        except PkramfsError as error:
            machine.log(f"kernel panic - not syncing: {step.__name__}: {error}")
            raise
        started.phases[step.__name__] = time.perf_counter() - begun
        after_step(step.__name__)
    return started.info


@dataclass
class BootProgress:
    """A boot under way: the results of its steps so far. Each step adds to them."""

    machine: Machine
    hardware: FirmwareMap
    ram: Ram
    pending: Pending
    force: bool
    phases: dict[str, float] = field(default_factory=dict)
    cmdline: str = ""
    found: Incoming | None = None
    lost: list[NodePages] = field(default_factory=list)
    placed: Placement = field(init=False)
    early: Memblock = field(init=False)
    super_pfn: int = 0
    info: KernelInfo = field(init=False)

    @property
    def usable(self) -> Spans:
        """Return the pages that the new kernel may use."""
        return placement.usable_memory(self.hardware, self.pending)

    @property
    def shown(self) -> str:
        """Return the command line as people see it: the host's, if it is the host's kernel."""
        return str(boot_of_host["cmdline"]) if (boot_of_host := self.pending.host) else self.cmdline

    @property
    def preserved(self) -> Spans:
        """Return the pages that the last kernel handed over."""
        return self.found.preserved if self.found else Spans()

    def log(self, message: str) -> None:
        """Append a line to the machine's log."""
        self.machine.log(message)


def purgatory(boot: BootProgress) -> None:
    """Check that the segments in RAM are the loaded ones."""
    image = boot.pending.image
    staging.verify_in_ram(boot.ram, boot.pending.segments)
    version = f" {image.version}" if image.version else ""
    if boot.pending.host:
        boot.log(f"{boot.pending.kind} boot of {image.name}, {boot.pending.host['boot_id']}")
    boot.log(f"pkramfs {__version__} boots {image.name}{version} ({image.kind}), generation {boot.pending.generation}")


def params(boot: BootProgress) -> None:
    """Read the command line from where boot parameters say; a cold boot takes nvram.json's."""
    segments = {s.name: s for s in boot.pending.segments}
    boot.cmdline = boot.pending.cmdline
    if "params" in segments:
        address = staging.cmdline_address(boot.ram.peek(segments["params"].pfn))
        text = boot.ram.peek(address >> PAGE_SHIFT)[address % PAGE_SIZE :][: words.MAX_LENGTH + 1]
        boot.cmdline = text.split(b"\0")[0].decode("utf-8", "surrogateescape")
    words.validate(boot.cmdline)
    boot.log(f"Command line: {boot.shown}")
    boot.log("Firmware-provided physical RAM map:")
    for start, end, kind in boot.hardware.entries:
        boot.log(f"firmware: [mem {start:#018x}-{end - 1:#018x}] {kind}")


def find(boot: BootProgress) -> None:
    """Find the data of the last kernel, or decide that none are expected."""
    for name, count in boot.pending.lost:
        _lose(boot, name, count, "given up by a forced kexec")
    pfn = words.pkram_pfn(boot.cmdline)
    if boot.pending.kind != nvram.KEXEC or pfn is None:
        off = words.pkram_off(boot.cmdline)
        _expect_nothing(boot, "the command line says pkram=off" if off else "no pkram= on the command line")
        return
    boot.log("pkram: examining preserved memory")
    try:
        boot.found = incoming.examine(boot.ram, pfn, boot.usable, listed=not boot.pending.host)
        _expect_nodes(boot, len(boot.found.nodes))
        if not boot.found.nodes:
            boot.log(f"pkram: super block at pfn {format_pfn(pfn)} is empty")
            boot.found = None
    except FormatError as error:
        boot.found = None
        boot.log(f"pkram: invalid super block or metadata at pfn {format_pfn(pfn)}: {error}")
        if (boot.pending.nodes or boot.pending.host) and not boot.force:
            raise
        _expect_nothing(boot, "metadata cannot be read")


def _expect_nodes(boot: BootProgress, found: int) -> None:
    if found < len(boot.pending.nodes):
        raise FormatError("SuperBlock", "nodes", found=found, expected=len(boot.pending.nodes))


def _expect_nothing(boot: BootProgress, reason: str) -> None:
    """Go on without preserved nodes if there were none or the boot is forced; raise FormatError otherwise."""
    expected = boot.pending.nodes
    if expected and not boot.force:
        raise FormatError("Command line", "pkram", found=reason, expected=plural(len(expected), "preserved node"))
    for name, count in expected:
        _lose(boot, f"node {name}", count, reason)


def _lose(boot: BootProgress, name: str, count: int, reason: str) -> None:
    boot.lost.append((name, count))
    size = f" ({plural(count, 'page')})" if count else ""
    boot.log(f"pkram: {name} is lost{size}: {reason}")


def place(boot: BootProgress) -> None:
    """Find room for everything, before anything is changed."""
    boot.placed, boot.early = placement.arrange(boot.hardware, boot.pending, boot.preserved)
    start, end = boot.placed.kernel
    how = f"slot 1 of {boot.placed.slots}" if boot.placed.slots == 1 else f"one of {plural(boot.placed.slots, 'slot')}"
    if not boot.placed.slots:
        how = "KASLR disabled"
    boot.log(f"Kernel at [mem {start << PAGE_SHIFT:#018x}-{(end << PAGE_SHIFT) - 1:#018x}], {how}")
    if boot.found:
        nodes, ranges = boot.found.nodes, boot.found.preserved
        boot.log(
            f"pkram: found super block at pfn {format_pfn(boot.found.super_pfn)}, {plural(len(nodes), 'node')}, "
            f"{ranges.total} pages in {plural(len(ranges), 'range')} reserved"
        )


def release(boot: BootProgress) -> None:
    """Punch every page that is not reserved, whatever the last kernel had there."""
    if boot.pending.crash:
        return  # the dead kernel's memory stays as it is, to be looked at
    kept = boot.early.reserved.spans.outward(PAGE_SIZE)
    if boot.machine.elsewhere() is not None:
        kept = kept | Spans([(0, 1)])  # the header
    if boot.pending.poison:
        boot.ram.poison(boot.ram.data_spans() - kept)
    elif boot.ram.sparse:
        boot.ram.punch(Spans([(0, boot.ram.pages)]) - kept)
    # On memory without holes punching would be zeroing, and a lease of a page block zeroes it anyway.
    _log_memory(boot)


def _log_memory(boot: BootProgress) -> None:
    whole, reserved = boot.usable.total, (boot.placed.spans | boot.preserved).total
    boot.log(
        f"Memory: {(whole - reserved) * 4}K/{whole * 4}K available "
        f"({boot.placed.spans.total * 4}K reserved, {boot.preserved.total * 4}K preserved)"
    )


def move(boot: BootProgress) -> None:
    """Copy the loaded kernel to its place, unless it runs where it was loaded."""
    start, end = boot.placed.kernel
    source = next((s for s in boot.pending.segments if s.name == "kernel"), None)
    if source is not None and source.pfn != start:
        boot.ram.punch_run(start, end - start)
        boot.ram.copy(source.pfn, start, min(end - start, pages(source.size)))
        boot.log(f"Kernel moved from pfn {format_pfn(source.pfn)} to pfn {format_pfn(start)}")


def build_tables(boot: BootProgress) -> None:
    """Write the lease table: holes, the kernel's own blocks, blocks that were handed over, preserved trees."""
    handed_over = destinations(boot.pending.segments) | (boot.found.stale if boot.found else Spans())
    reserve = Spans([boot.placed.reserve]) if boot.placed.reserve else Spans()
    nodes = boot.found.nodes if boot.found else ()
    trees = Spans.union(node.spans for node in nodes)
    kernel = boot.placed.spans | (handed_over - placement.blocks_of(trees))
    blocks = placement.block_count(boot.hardware)
    leasetable.write(boot.ram, boot.placed.table, blocks, boot.usable, kernel, reserve, nodes)
    for node in nodes:
        relocated = f", {node.relocated:,} of them relocated when saved" if node.relocated else ""
        ranges = plural(len(node.spans), "range")
        boot.log(f"pkram: node {node.name}: {plural(node.spans.total, 'page')} in {ranges}{relocated}")


def super_block(boot: BootProgress) -> None:
    """Make this kernel's super block, naming the nodes that were found, unless PKRAM is off here."""
    if boot.placed.reserve is None:
        boot.log(f"pkram: disabled {'in a crash kernel' if boot.pending.crash else 'on the command line'}")
        return
    boot.ram.punch(Spans([boot.placed.reserve]))
    boot.super_pfn = boot.placed.reserve[0]
    first = boot.found.first_node_pfn if boot.found else 0
    superblock.create(boot.ram, boot.super_pfn, boot.pending.generation, first)
    boot.log(f"pkram: super block at pfn {format_pfn(boot.super_pfn)}")


def files(boot: BootProgress) -> None:
    """Write the files that /proc and /sys would show."""
    boot.machine.write_text("cmdline", boot.shown + "\n")
    if boot.super_pfn:
        boot.machine.write_text("pkram", format_pfn(boot.super_pfn) + "\n")
    owners = [(name, Spans([part])) for name, part in boot.placed.named.items()]
    if boot.found:
        owners += [(node.name, node.spans) for node in boot.found.nodes]
    boot.machine.write_text("iomem", iomem.render(boot.hardware, owners))


def publish(boot: BootProgress) -> None:
    """Rename kernel.json into place: from now on this is the running kernel."""
    placed, found = boot.placed, boot.found
    reserve = placed.reserve or (0, 0)
    initmem = Spans() if boot.pending.crash else destinations(boot.pending.segments) - placed.spans
    boot.info = KernelInfo(
        generation=boot.pending.generation,
        kind=boot.pending.kind,
        image=boot.pending.image.name,
        super_pfn=boot.super_pfn,
        lease_table_pfn=placed.table[0],
        blocks=placement.block_count(boot.hardware),
        reserve_blocks=tuple(range(reserve[0] // BLOCK_PAGES, reserve[1] // BLOCK_PAGES)),
        reserved=placed.named,
        old_super_pfn=found.super_pfn if found else 0,
        stale=tuple(found.stale) if found else (),
        initmem=tuple(initmem),
        booted=time.time(),
        report=_report(boot),
        boot_id=boot.pending.host.get("boot_id", ""),
    )
    kernelrecord.write(boot.machine, boot.info)


def _report(boot: BootProgress) -> dict[str, Any]:
    """Return the report for `pkramctl report`: nodes found and lost, pages reserved, and the time of each step."""
    nodes = boot.found.nodes if boot.found else ()
    return {
        "cmdline": boot.shown,
        "nodes": [
            {
                "name": n.name,
                "pages": n.spans.total,
                "ranges": len(n.spans),
                "moved": n.relocated,
                "unchecked": n.unchecked,
            }
            for n in nodes
        ],
        "lost": [{"name": name, "pages": count} for name, count in boot.lost],
        "preserved_pages": boot.preserved.total,
        "preserved_ranges": len(boot.preserved),
        "reserved_bytes": {name: (end - start) * PAGE_SIZE for name, (start, end) in boot.placed.named.items()},
        "numa": _numa(boot),
        "dead": boot.pending.dead,
        "kaslr_slots": boot.placed.slots,
        "segments": [s.describe() for s in boot.pending.segments],
        "phases": {name: round(seconds, 6) for name, seconds in boot.phases.items()},
    }


def _numa(boot: BootProgress) -> dict[str, dict[str, int]]:
    """Count the pages of each NUMA node: all, and preserved."""
    memory, reserved = boot.early.memory, boot.early.reserved
    return {
        str(node): {
            "pages": memory.on_node(node).total // PAGE_SIZE,
            "preserved": reserved.on_node(node, Flag.PRESERVED).total // PAGE_SIZE,
        }
        for node in boot.hardware.node_spans()
    }


STEPS = (purgatory, params, find, place, release, move, build_tables, super_block, files, publish)
