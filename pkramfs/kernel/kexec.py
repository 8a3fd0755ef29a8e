# SPDX-License-Identifier: GPL-2.0-or-later
"""kexec: plan the end of the running kernel and the birth of the loaded one.

A loaded kernel (loading.py) waits in kexec/ with its destinations decided; until `-e` nothing in RAM
changes. Pages that are preserved later must keep out of the destinations (`banned`). If they do not,
a kernel loaded with -s is loaded elsewhere when it is executed, and one loaded with -c is refused.

A Plan is a list of operations, each with describe(), details() and execute(), and all there is to know
before: refusals, losses, and the pages that were or will be relocated, with their owners. A dry run
prints the same object that `-e` executes. The order of a kexec:

     caller   lock the machine exclusively; freeze every mount, flushed; ask each for its preserved tree
     plan     refuse: mounts not preserved, nodes that pkram= would lose, no room for the next kernel
     1        load again elsewhere, if preserved pages have come to lie in a destination
     2        allocate memory of the host for the destinations: a check alone reserves nothing
     3        write the region list into the reserve, and name it in the super block
     4        read all of it back as boot will, and place the next kernel
     5        nvram.json: the pending boot, and the mounts to make again
     6        stop the mounts: their daemons detach and end
     7        see that the planned nodes are still there: the last chance to refuse
     ──────── remove kernel.json: the point of no return (and cmdline, pkram, iomem, dmesg) ─────────
     8        copy the segments into RAM, remove the staging directory's files
     9        boot in a fresh process; it publishes kernel.json
     10       take over: consume the old super block, free stale memory, clear the pending boot
     caller   unlock; mount again

A step that fails before the line is undone with all before it, so that everything is as it was. All
that a full host can prevent comes before the mounts are stopped. Dying before the line leaves a kernel
that goes on: the next command takes back the region list and the pending boot, and the mounts have to
be mounted again. Dying after it leaves a boot that the next command resumes. A forced kexec goes on
without what would be lost, and the new kernel's log names it.

Kernel: kernel/kexec_core.c (kernel_kexec), kernel/kexec_file.c, kernel/kexec.c, mm/pkram.c
        (pkram_reboot), patches 7, 10 and 15 to 18
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pkramfs.errors import ExhaustedError, FormatError, MachineError, NotPreservedError, PkramfsError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import history, loading, nvram, placement, running, staging, succession
from pkramfs.kernel.kernelrecord import LAYOUT
from pkramfs.kernel.salvage import MendList, look
from pkramfs.kernel.segments import conflicts, destinations
from pkramfs.kernel.staging import FILE_MODE
from pkramfs.kernel.steps import Operation, Plan
from pkramfs.kernel.transition import (
    Boot,
    DecideBoot,
    LastLook,
    LoadElsewhere,
    MountReport,
    PointOfNoReturn,
    StopMounts,
    TakeOver,
    TakeRoom,
    Transition,
    Verify,
    WriteRegions,
)
from pkramfs.machine.directory import Machine
from pkramfs.pkram import regions
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE, plural

_SMALL = 1 << 20
"""Bytes behind RAM for all else that a kexec writes: super block, nvram.json, logs, what boot exports."""
_BOOT_SECONDS, _COPY_RATE = 0.5, 4e8
"""What a machine's first kexec takes without segments (a fresh interpreter, mostly), and bytes copied and
summed a second. Measured: 0.51 s, and 1.1 s for 419 MB; later kexecs go by the machine's own last one."""


def plan(
    machine: Machine,
    mounts: Sequence[MountReport],
    *,
    force: bool = False,
    poison: bool = False,
    stop: Callable[[], None] = lambda: None,
    remount: Sequence[dict[str, Any]] = (),
    notes: Sequence[str] = (),
) -> Plan:
    """Decide everything that `-e` will do, and change nothing.

    The caller holds the machine lock exclusively; a dry run needs no lock. `stop` ends all mount
    daemons; `remount` becomes nvram.json's list of mounts; `notes` are further warnings about them.
    """
    kernel = running.look(machine, any_layout=True)
    loading.refuse_crash(kernel)
    loaded = staging.read(machine)
    if loaded is None:
        raise MachineError("no kernel is loaded: pkram-kexec -l IMAGE")
    going = Transition(kernel, loaded, force, poison, remount)
    problems: list[PkramfsError] = []
    warnings = list(notes)
    for refusal in _losses(going, mounts):
        if force:
            warnings.append(str(refusal))
        else:
            problems.append(refusal)
    problems += _impossible(going)
    size = sum(s.size for s in loaded.segments)
    last, copying = nvram.pause(machine), size / _COPY_RATE
    pause = copying + (_BOOT_SECONDS if last is None else last)
    foreseen = {"pause": round(pause, 3)} | _crossing(going)
    operations = _operations(going, mounts, stop)
    return Plan(problems, warnings, _relocations(going, mounts), operations, pause, copying, foreseen)


def _crossing(going: Transition) -> dict[str, Any]:
    """Return the figures of all that crosses and of all losses, as the report of the boot will count them."""
    nodes = going.nodes if going.keeps else []
    trees = {node.tree_id for node in nodes}
    return {
        "mounts": sum(int(mount.get("tree", "0"), 16) in trees for mount in going.remount),
        "nodes": len(nodes),
        "pages": sum(node.spans.total for node in nodes),
        "moved": sum(node.relocated for node in nodes),
        "lost": len(going.lost),
        "names": [node.name for node in nodes][: history.MOST_NODES],
    }


def _operations(going: Transition, mounts: Sequence[MountReport], stop: Callable[[], None]) -> list[Operation]:
    found: list[Operation] = [MendList(going.kernel, going.nodes)] if going.mends and going.keeps else []
    if going.keeps and loading.blocking(going.loaded, going.preserved):
        found.append(LoadElsewhere(going))
    found.append(TakeRoom(going))
    if going.keeps and going.nodes:
        found.append(WriteRegions(going))
    found += [Verify(going), DecideBoot(going)]
    if mounts:
        found += [StopMounts(mounts, stop), LastLook(going)]
    return [*found, PointOfNoReturn(going), Boot(going), TakeOver(going)]


def _losses(going: Transition, mounts: Sequence[MountReport]) -> list[PkramfsError]:
    """Return an error for each loss, and note in `going` which nodes cross and which do not."""
    found: list[PkramfsError] = []
    for mount in mounts:
        if not mount.preserved and not mount.kept:
            why = mount.reason or f"not preserved: mount -o remount,preserve,ro {mount.mountpoint}"
            found.append(NotPreservedError(f"{mount.mountpoint}: {mount.content} would be lost ({why})"))
            going.lost.append((f"{mount.mountpoint} ({mount.name or 'no name'}, not preserved)", 0))
        elif mount.lost:
            found.append(NotPreservedError(f"{mount.mountpoint}: {mount.lost}"))
    try:
        going.nodes = loading.preserved_nodes(going.kernel)
    except FormatError as error:
        if not going.force or going.kernel.info.layout != LAYOUT:
            going.keeps = False
            return [*found, error]
        going.mends, salvage = True, look(going.kernel)
        going.nodes, going.lost = salvage.nodes, going.lost + salvage.lost
        found += salvage.problems
    found += _lost_nodes(going, mounts)
    to_come = [mount for mount in mounts if mount.kept and not mount.preserved]
    if to_come and not _names_current(going):
        where = ", ".join(mount.mountpoint for mount in to_come)
        found.append(NotPreservedError(f"{where}: cannot be kept: the new command line lacks the right pkram="))
    if going.nodes and not _names_current(going):
        going.keeps = False
        going.lost += [(f"node {n.name}", n.spans.total) for n in going.nodes]
        found.append(NotPreservedError(loading.loss(going.nodes, going.loaded.cmdline, going.kernel.info.super_pfn)))
    return found


def _lost_nodes(going: Transition, mounts: Sequence[MountReport]) -> list[NotPreservedError]:
    """Return an error for each mount that says that it is preserved but whose node is not in the list."""
    there = {node.tree_id for node in going.nodes}
    return [
        NotPreservedError(
            f"{mount.mountpoint}: {mount.content} would be lost (its node is not in the list of nodes: "
            f"mount -o remount,rw {mount.mountpoint}, then preserve it again)"
        )
        for mount in mounts
        if mount.preserved and mount.tree_id and mount.tree_id not in there
    ]


def _names_current(going: Transition) -> bool:
    return words.pkram_pfn(going.loaded.cmdline) == going.kernel.info.super_pfn


def _relocations(going: Transition, mounts: Sequence[MountReport]) -> list[str]:
    """Name the owners of pages in a destination: relocated when they were preserved, or when they will be."""
    found = [
        f"relocated when it was preserved: {plural(node.relocated, 'page')} of node {node.name}"
        for node in going.nodes
        if node.relocated
    ]
    if going.force or going.kernel.info.layout != LAYOUT:
        return found
    banned = destinations(going.loaded.segments)
    for mount in mounts:
        if not mount.preserved and mount.name and mount.tree_id:
            leased = going.kernel.leases.blocks_of(mount.tree_id).scale(BLOCK_PAGES)
            if count := (leased & banned).total:
                found.append(
                    f"would be relocated by its preserve: up to {plural(count, 'page')} "
                    f"of {mount.mountpoint} ({mount.name})"
                )
    return found


def _impossible(going: Transition) -> list[PkramfsError]:
    """Return the problems that force does not solve.

    Those are destinations that would destroy what crosses, and no room for the next kernel in RAM or behind it.
    """
    blocking = loading.blocking(going.loaded, going.preserved)
    if blocking and going.loaded.mode != FILE_MODE:
        return [loading.conflict(conflicts(going.loaded.segments, loading.owners(going.kernel, going.nodes)))]
    try:
        loaded = loading.elsewhere(going.kernel, going.loaded, going.preserved) if blocking else going.loaded
        hardware = going.machine.hardware()
        placement.arrange(hardware, replace(going.pending, segments=loaded.segments), going.preserved)
        going.kernel.ram.check_room(_room(going))
        succession.refuse_planted(going.machine)
    except (ExhaustedError, MachineError) as error:
        return [error]
    return []


def _room(going: Transition) -> int:
    """Return how many bytes the host must have.

    They are for the kernel where it is loaded and where it runs, the region list, and the tables.
    """
    segments = 2 * sum(segment.size for segment in going.loaded.segments)
    table = placement.block_count(going.machine.hardware()) * 8
    ranges = sum(len(node.spans) for node in going.nodes) if going.keeps else 0
    return segments + table + regions.pages_needed(ranges) * PAGE_SIZE + _SMALL
