# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl machine: make, show and remove machines.

    create --ram 64G --nodes 2      a default firmware map of that size
    create --map FILE               any firmware map, as machine.json has it
    show                            the map
    destroy [--force]               the directory and all that is in its memory

A machine that is used before it was made gets the host's size; `create` is for another size.
Destroying refuses while daemons live, and while trees are preserved unless forced: their only copy
is in the RAM file that would go.

Kernel: arch/x86/kernel/e820.c prints the same map at boot
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, nodes, render
from pkramfs.cli.arguments import need
from pkramfs.errors import MachineError, UsageError, explain
from pkramfs.units import PAGE_SIZE, format_size, plural

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.firmware import FirmwareMap

LOCK_SECONDS = 30.0
RUN_LINK = "/run/pkram"


def create(args: argparse.Namespace) -> None:
    """Make a machine of the hardware that the options describe."""
    machine = arguments.machine(args)
    if machine.exists():
        raise MachineError(f"{machine.path()} is there already: `pkramctl machine destroy` removes it")
    try:
        hardware = _hardware(args)
    except MachineError as error:  # the options are wrong
        raise UsageError(f"{args.map}: {error}" if args.map else str(error)) from None
    machine.create(hardware)
    _show_machine(args, machine)


def _hardware(args: argparse.Namespace) -> "FirmwareMap | None":
    """Return the hardware that the options describe, or None for the host's size."""
    import secrets

    from pkramfs.machine.directory import host_memory
    from pkramfs.machine.firmware import FirmwareMap

    if args.map:
        need(args.ram is None and args.nodes is None, "--map describes all of RAM: leave --ram and --nodes out")
        data = _read_map(args.map)
        return FirmwareMap.from_json(data if args.seed is None else data | {"seed": args.seed})
    if args.ram is None and args.nodes is None and args.seed is None:
        return None
    seed = secrets.randbits(63) if args.seed is None else args.seed
    return FirmwareMap.default(args.ram or host_memory(), nodes=args.nodes or 1, seed=seed)


def _read_map(path: str) -> dict[str, Any]:
    from pkramfs import schema
    from pkramfs.machine.files import read_file

    try:
        data = read_file(path, follow=True)
    except OSError as error:
        raise UsageError(f"cannot read the map: {explain(error)}") from None
    if data is None:
        raise UsageError(f"cannot read the map: {path}: No such file or directory")
    try:
        found: dict[str, Any] = schema.Object({}, others=schema.Anything()).read(schema.parse(data))
    except schema.Invalid as error:
        raise UsageError(f"{path}: {error}: a firmware map is an object, as machine.json has it") from None
    return found


def show(args: argparse.Namespace) -> None:
    """Print the hardware."""
    _show_machine(args, arguments.existing(args))


def _show_machine(args: argparse.Namespace, machine: "Machine") -> None:
    """Print the firmware map, and the NUMA nodes if there are several."""
    hardware = machine.hardware()
    if arguments.wants_json(args):
        render.emit_json({"directory": machine.path(), **hardware.to_json()})
        return
    usable = hardware.usable.total * PAGE_SIZE
    render.fields(
        [
            ("machine", machine.path()),
            ("RAM", f"{format_size(usable)} usable, addresses up to {format_size(hardware.size)}"),
            ("NUMA nodes", len({node for _, _, node in hardware.nodes}) or 1),
            ("seed", hardware.seed),
        ]
    )
    rows = [(f"{start:#014x}-{end - 1:#014x}", format_size(end - start), kind) for start, end, kind in hardware.entries]
    render.table([render.Column("ADDRESSES"), render.Column("SIZE", figures=True), render.Column("KIND")], rows)
    if hardware.nodes:
        _show_nodes(hardware)


def _show_nodes(hardware: "FirmwareMap") -> None:
    columns = [render.Column("ADDRESSES"), render.Column("USABLE", figures=True), render.Column("NUMA NODE", True)]
    render.say()
    nodes = hardware.nodes
    render.table(columns, [(f"{s:#014x}-{e - 1:#014x}", _usable_in(hardware, s, e), node) for s, e, node in nodes])


def _usable_in(hardware: "FirmwareMap", start: int, end: int) -> str:
    from pkramfs.spans import Spans

    pages = hardware.usable & Spans([(start // PAGE_SIZE, end // PAGE_SIZE)])
    return format_size(pages.total * PAGE_SIZE)


def destroy(args: argparse.Namespace) -> None:
    """Remove the machine, unless a living mount or a preserved tree would go with it."""
    import shutil

    machine = arguments.existing(args)
    with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
        _refuse_live(machine)
        if not args.force:
            nodes.refuse_loss(machine)
        _unlink_run(machine)
        shutil.rmtree(machine.path())
    if not arguments.wants_json(args):
        render.say(f"{machine.path()} is gone")


def _refuse_live(machine: "Machine") -> None:
    """Raise MachineError while a daemon maps the RAM that would go, forced or not."""
    living = [entry for entry in machine.mounts() if entry.alive]
    if living:
        places = ", ".join(entry.mountpoint for entry in living)
        raise MachineError(f"{plural(len(living), 'mount')} on this machine ({places}): umount first")


def _unlink_run(machine: "Machine") -> None:
    """Remove the link /run/pkram if it leads here."""
    if os.path.islink(RUN_LINK) and os.path.realpath(RUN_LINK) == os.path.realpath(machine.path()):
        os.unlink(RUN_LINK)
