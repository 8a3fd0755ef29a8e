# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl machine: make, show and remove machines.

    create --ram 64G --nodes 2      a default firmware map of that size
    create --map FILE               any firmware map, as machine.json has it
    create --ram /dev/dax0.0        on memory that survives the host's own kexec (machine/backing.py)
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
    from pkramfs.machine.backing import Spec
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.firmware import FirmwareMap

LOCK_SECONDS = 30.0
RUN_LINK = "/run/pkram"


def memory(text: str) -> "int | Spec":
    """Parse the value of --ram: a size, or memory of the host."""
    if "/" not in text:
        return arguments.size(text)
    from pkramfs.machine import backing

    try:
        return backing.parse(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def create(args: argparse.Namespace) -> None:
    """Make a machine of the hardware that the options describe."""
    machine = arguments.machine(args)
    if machine.exists():
        raise MachineError(f"{machine.path()} exists already: `pkramctl machine destroy` removes it")
    if args.ram is not None and not isinstance(args.ram, int):
        _take(args, machine)
        return
    try:
        hardware = _hardware(args)
    except MachineError as error:  # the options are wrong
        raise UsageError(f"{args.map}: {error}" if args.map else str(error)) from None
    machine.create(hardware)
    _show_machine(args, machine)


def _take(args: argparse.Namespace, machine: "Machine") -> None:
    """Make a machine on memory that the user named, and keep in NAME.conf which it is."""
    from pkramfs.machine import conf, named

    need(args.map is None and args.nodes is None, "--ram PATH is one range of memory: leave --map and --nodes out")
    need(args.seed is None or 0 <= args.seed < 1 << 63, f"--seed {args.seed}: give 0 to 2^63 - 1")
    spelled = machine.name.isprintable() and '"' not in machine.name
    need(spelled, f"invalid machine name {machine.name!r}: a kernel's command line cannot have this word in quotes")
    _refuse_overlap(machine, args.ram)
    found = named.take(machine.name, args.ram, machine.host, seed=args.seed, force=args.force)
    conf.write(machine.conf_path, conf.Conf(found.backing.spec, found.header.uuid))
    machine.create()
    _show_machine(args, machine)
    if found.header.generation and not arguments.wants_json(args):
        render.say(
            f"the machine was there: it has had {plural(found.header.generation, 'kernel')}, nothing was changed"
        )


def _refuse_overlap(machine: "Machine", spec: "Spec") -> None:
    """Raise MachineError for a range of /dev/mem of which another machine has a part: its header lies elsewhere."""
    from pkramfs.machine import backing

    for other in type(machine).on_host():
        said = other.configuration()
        if said is not None and other.name != machine.name and backing.overlap(spec, backing.parse(said.ram)):
            raise MachineError(
                f"{said.ram} is the memory of machine {other.name}: take another range, or "
                f"`pkramctl machine destroy{other.words}` first"
            )


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
    return FirmwareMap.default(host_memory() if args.ram is None else args.ram, nodes=args.nodes or 1, seed=seed)


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
    named = machine.elsewhere()
    if arguments.wants_json(args):
        said = {"backing": named.to_json()} if named else {}
        render.emit_json({"directory": machine.path(), **hardware.to_json(), **said})
        return
    usable = hardware.usable.total * PAGE_SIZE
    render.fields(
        [
            ("machine", machine.path()),
            ("memory", f"{named.spec} ({named.kind}), as {machine.conf_path} says" if named else None),
            ("survives", named.traits.survives if named else None),
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

    machine = arguments.machine(args)
    if not machine.exists() and machine.configuration() is not None:
        machine.create()  # the host was booted since
    machine = arguments.existing(args)
    with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
        _refuse_live(machine)
        if not args.force:
            nodes.refuse_loss(machine)
        _unlink_run(machine)
        _forget(machine)
        shutil.rmtree(machine.path())
    if arguments.wants_json(args):
        render.emit_json({"destroyed": machine.path()})
    else:
        render.say(f"{machine.path()} is gone")


def _forget(machine: "Machine") -> None:
    """Give back memory that the user named, by wiping its header."""
    from pkramfs.machine import header

    if machine.elsewhere() is None:
        return
    ram = machine.ram()
    header.wipe(ram)
    ram.close()
    if os.path.exists(machine.conf_path):
        os.unlink(machine.conf_path)


def _refuse_live(machine: "Machine") -> None:
    """Raise MachineError while a daemon maps the RAM that would go, forced or not."""
    from pkramfs.machine import backing

    living = [entry for entry in machine.mounts() if entry.alive]
    if living:
        places = ", ".join(entry.mountpoint for entry in living)
        raise MachineError(f"{plural(len(living), 'mount')} on this machine ({places}): umount first")
    if (found := machine.elsewhere()) is not None:  # its daemon may live although its directory was removed
        backing.refuse_used(found, machine.host)


def _unlink_run(machine: "Machine") -> None:
    """Remove the link /run/pkram if it leads here."""
    if os.path.islink(RUN_LINK) and os.path.realpath(RUN_LINK) == os.path.realpath(machine.path()):
        os.unlink(RUN_LINK)
