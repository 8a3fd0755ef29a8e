# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl: a window into the machine, its kernel, its nodes and its memory.

    status nodes                 mounts and nodes, their state and size
    verify inspect               check what would cross a kexec; show a record field by field
    ls tree stat cat export      look into a preserved tree (trees.py)
    doctor                       what this host lacks, and the remedy
    map timeline                 pictures: who has which memory; the kernels, the oldest first
    metrics                      figures for Prometheus
    dmesg iomem report           the kernel's log, its resource map, the report of the last boot
    import cp rename             make nodes, name them                 ┐
    free                         give preserved memory back (freeing)  │
    punch allocate sparsify      make and fill holes in files on a     │ the only ones
                                 mount (extents lists the rest)        │ that change anything
    boot                         boot the machine without a mount      │
    install                      links, pages, completions             │
    machine create|destroy       make and remove machines              ┘

Looking never boots: a machine without a running kernel says so. Everything works where FUSE is
absent, because nodes and their pages are found through RAM, not through a mount.

`free` takes the node's tree id the way a mount does (its lock file), so that it cannot free what a
mount is loading, saving or using; then it withdraws the node by one store, and what the tree had
leased is free memory.

Kernel: mm/pkram.c (pkram_store, patch 19), fs/proc/iomem, kernel/printk (dmesg)
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pkramfs.cli import (
    arguments,
    booting,
    doctor,
    files,
    freeing,
    hardware,
    inspect,
    installing,
    maps,
    metrics,
    nodes,
    overview,
    progress,
    render,
    report,
    status,
    timeline,
    trees,
    upgrade,
    verify,
)
from pkramfs.errors import FormatError, MachineError

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine

PROGRAM = "pkramctl"
_DESCRIPTION = "Look into a pkramfs machine and keep it in order; see pkramctl(8)."

Act = Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return arguments.run(parser(), lambda args: args.act(args), argv)


def parser() -> arguments.Parser:
    """Build the parser: common options, then a command with its own."""
    made = overview.Parser(prog=PROGRAM, description=_DESCRIPTION)
    _add_shared(made)
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=arguments.Parser)
    _command(commands, "status", status.act, "show the machine, its kernel, mounts and nodes")
    look = _command(commands, "doctor", doctor.act, "check what this host lacks, and name the remedy")
    look.add_argument(
        "--reserve",
        type=arguments.size,
        metavar="SIZE",
        help="print how to set SIZE of memory aside that survives a kexec of the host",
    )
    _command(commands, "nodes", nodes.act_nodes, "list the preserved nodes, by name")
    free = _command(commands, "free", freeing.act, "give the memory of preserved nodes back")
    free.add_argument("names", nargs="*", metavar="NAME", help="a mount's NAME, or a node's name")
    free.add_argument("--all", action="store_true", help="free every node that no mount uses")
    free.add_argument("--damaged", action="store_true", help="give up unreadable nodes, which hide the others")
    free.add_argument(
        "-n", "--dry-run", action="store_true", help="only print what would be freed, and what is refused"
    )
    check = _command(commands, "verify", verify.act, "check all that would cross a kexec")
    check.add_argument("names", nargs="*", metavar="NAME", help="check only these nodes")
    check.add_argument("--data", action="store_true", help="also compare all data with their checksums (verify=data)")
    progress.add_option(check)
    trees.add(commands, _command)
    _add_files(commands)
    maps.add(_command(commands, "map", maps.act, "draw who has which memory"))
    timeline.add(_command(commands, "timeline", timeline.act, "list the kernels of the machine, the oldest first"))
    metrics.add(_command(commands, "metrics", metrics.act, "print figures for Prometheus, or serve them"))
    upgrade.add(_command(commands, "upgrade", upgrade.act, "replace the daemons of mounts in use by the code on disk"))
    _command(commands, "dmesg", _dmesg, "print the kernel log")
    _command(commands, "iomem", _iomem, "print the kernel's resource map")
    _command(commands, "report", report.show, "show what the last boot found, reserved and relocated")
    look = _command(commands, "inspect", inspect.act, "show a record that crosses a kexec, field by field")
    look.add_argument("what", metavar="WHAT", choices=inspect.KINDS, help=", ".join(inspect.KINDS))
    look.add_argument("pfn", nargs="?", type=arguments.pfn, metavar="PFN", help="its page frame number, in hexadecimal")
    _command(commands, "format", inspect.act_format, "print the records of pkramfs-format(5), as Markdown")
    made_by = _command(commands, "install", installing.act, "put helper links, manual pages and completions in place")
    installing.add(made_by, _parsers)
    _command(commands, "boot", booting.act, "boot the machine, if no kernel is running")
    overview.add(_command(commands, "help", overview.act, "list all commands, a line for each"), made)
    _add_machine(_command(commands, "machine", None, "make, show and remove machines"))
    return made


def _parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each program."""
    from pkramfs.cli import kexec, mount

    return {PROGRAM: parser(), "pkram-kexec": kexec.parser(), "mount.pkramfs": mount.parser()}


def _add_shared(made: argparse.ArgumentParser) -> None:
    arguments.add_common(made)
    quiet, text = argparse.SUPPRESS, "print on stderr what is done"
    made.add_argument("-v", "--verbose", dest="log_verbose", action="store_true", default=quiet, help=text)
    made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _command(commands: Any, name: str, act: Act | None, text: str) -> argparse.ArgumentParser:
    """Add a subcommand with the shared options; `act` does its work."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    _add_shared(made)
    if act is not None:
        made.set_defaults(act=act)
    return made


def _add_files(commands: Any) -> None:
    """Add the commands for files on a mount."""
    for name, act, text in (
        ("punch", files.act_punch, "make a range of a file a hole, and give its memory back"),
        ("allocate", files.act_allocate, "allocate the memory of a range of a file now"),
    ):
        made = _command(commands, name, act, text)
        made.add_argument("file", metavar="FILE", help="a file on a pkramfs mount")
        made.add_argument("offset", type=arguments.size, metavar="OFFSET", help="where the range begins, in bytes")
        made.add_argument("length", type=arguments.size, metavar="LENGTH", help="how many bytes it has")
        if name == "allocate":
            made.add_argument(
                "--keep-size", action="store_true", help="do not extend the file where the range goes beyond its end"
            )
    made = _command(commands, "sparsify", files.act_sparsify, "turn pages that are all zeros into holes")
    made.add_argument("paths", nargs="+", metavar="PATH", help="files, or directories with all files below them")
    made = _command(commands, "extents", files.act_extents, "list the parts of a file that are not holes")
    made.add_argument("file", metavar="FILE", help="a file on a pkramfs mount")


def _add_machine(made: argparse.ArgumentParser) -> None:
    verbs = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = _command(verbs, "create", hardware.create, "make a machine")
    create.add_argument(
        "--ram", type=hardware.memory, metavar="SIZE|PATH", help="how much RAM (default: the host's), or which memory"
    )
    create.add_argument("--nodes", type=arguments.number, metavar="N", help="number of NUMA nodes (default: 1)")
    create.add_argument("--map", metavar="FILE", help="a firmware map in JSON, as in machine.json")
    create.add_argument("--seed", type=int, metavar="N", help="the seed of all random choices")
    create.add_argument("--force", action="store_true", help="take memory that others may use, or that is not empty")
    _command(verbs, "show", hardware.show, "show the hardware")
    destroy = _command(verbs, "destroy", hardware.destroy, "remove a machine and all its memory")
    destroy.add_argument("--force", action="store_true", help="remove it although trees are preserved in it")


def _dmesg(args: argparse.Namespace) -> None:
    text = arguments.existing(args).dmesg()
    if arguments.wants_json(args):
        render.emit_json(text.rstrip("\n").split("\n") if text else [])
    else:
        for line in text.rstrip("\n").split("\n") if text else []:
            render.say(line)


def _iomem(args: argparse.Namespace) -> None:
    text = _resources(arguments.existing(args))
    if arguments.wants_json(args):
        render.emit_json([_resource(line) for line in text.splitlines()])
    else:
        for line in text.splitlines():
            render.say(line)


def _resources(machine: "Machine") -> str:
    """Return the resource map of now; if the nodes cannot be read, warn and return the map of the boot."""
    as_booted = machine.read_text("iomem")
    if as_booted is None:
        raise MachineError("no kernel is running, so there is no resource map: mount a tree first")
    from pkramfs.kernel import iomem, running

    try:
        return iomem.current(running.look(machine, any_layout=True))
    except FormatError as error:
        arguments.warn(PROGRAM, f"the nodes cannot be read, so this is the map as booted: {error}")
        return as_booted


def _resource(line: str) -> dict[str, Any]:
    """Parse a line of iomem: `  00100000-bfffffff : System RAM`."""
    addresses, _, name = line.strip().partition(" : ")
    start, _, end = addresses.partition("-")
    depth = (len(line) - len(line.lstrip())) // 2
    return {"start": int(start, 16), "end": int(end, 16) + 1, "name": name, "depth": depth}
