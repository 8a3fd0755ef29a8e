# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec: load a kernel, let the running one die, boot the next; with kexec(8)'s spelling.

    -u                      unload ┐
    -l IMAGE, -p IMAGE      load   ├ in this order, as far as they are given
    -e                      execute┘

The work of `-e` and its kin is in executing.py.

Kernel: kexec-tools kexec/kexec.c, kernel/kexec_core.c (kernel_kexec)
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, executing, hostkexec, progress, render
from pkramfs.cli.arguments import need
from pkramfs.cli.executing import PROGRAM
from pkramfs.errors import MachineError, PkramfsError
from pkramfs.units import format_size

if TYPE_CHECKING:
    from pkramfs.kernel.staging import Loaded
    from pkramfs.machine.directory import Machine

_DESCRIPTION = "Load the next kernel of a pkramfs machine, and boot it over the running one; see pkram-kexec(8)."
_EPILOG = """examples:
  pkram-kexec -s -l /boot/vmlinuz --initrd=/boot/initrd.img --append="root=/dev/sda1 pkram=$(cat /run/pkram/pkram)"
  pkram-kexec -e
  pkram-kexec -le builtin --reuse-cmdline
"""
_OFTEN = (
    *("--load", "--exec", "--unload", "--resume", "--initrd", "--append", "--reuse-cmdline"),
    *("--dry-run", "--force", "--keep-mounts", "--verbose"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return arguments.run(parser(), _noted, argv)


def _noted(args: argparse.Namespace) -> int:
    """Run the actions, and write a refusal to the kernel log as well, unless nothing was meant to be done."""
    try:
        return _act(args)
    except PkramfsError as error:
        if not args.dry_run:
            arguments.note(arguments.machine(args), f"kexec: {error}")
        raise


def parser() -> arguments.Parser:
    """Build the parser of kexec(8)'s command line."""
    usage = "%(prog)s [-l|-p|-u|-e|-S|--panic|--resume|--cold] [OPTIONS] [IMAGE]"
    made = arguments.Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, usage=usage, often=_OFTEN)
    made.add_argument("image", nargs="?", metavar="IMAGE", help="a bzImage, an ELF kernel, builtin or builtin:SIZE")
    _add_actions(made)
    _add_loading(made)
    _add_executing(made)
    arguments.add_common(made, debug=("-d", "--debug"))
    return made


def _add_actions(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("actions")
    flag = partial(group.add_argument, action="store_true")
    flag("-l", "--load", help="load IMAGE for the next -e")
    flag("-p", "--load-panic", help="load IMAGE as crash kernel, into the memory of crashkernel=")
    flag("-u", "--unload", help="unload what was loaded (with -p: the crash kernel)")
    flag("-e", "--exec", help="execute the loaded kernel")
    flag("--panic", help="crash: boot the crash kernel, with PKRAM off")
    flag("--resume", help="finish a kexec that died after the point of no return")
    flag("--cold", help="power off and on: boot with empty memory")
    flag("-S", "--status", help="print what is loaded")


def _add_loading(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("loading")
    how = group.add_mutually_exclusive_group()
    syscall = partial(how.add_argument, action="store_const", dest="syscall")
    syscall("-s", "--kexec-file-syscall", const="file", help="let pkramfs choose addresses, clear of preserved pages")
    syscall(
        "-c", "--kexec-syscall", const="load", help="choose addresses yourself; a conflict with preserved pages fails"
    )
    syscall("-a", "--kexec-syscall-auto", const=None, help="-c if --segment is given, else -s (default)")
    group.add_argument("--initrd", "--ramdisk", metavar="FILE", help="initial RAM disk")
    group.add_argument("--append", "--command-line", metavar="TEXT", help="the new kernel's command line")
    group.add_argument(
        "--reuse-cmdline", action="store_true", help="reuse the running command line, with pkram= updated"
    )
    group.add_argument("--mem-min", metavar="ADDRESS", type=arguments.size, help="place nothing below this address")
    group.add_argument(
        "--mem-max", metavar="ADDRESS", type=arguments.size, help="place nothing at or above this address"
    )
    group.add_argument(
        "--segment", metavar="FILE@ADDRESS", type=segment, action="append", default=[], help="load one more file"
    )


def _add_executing(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("executing")
    flag = partial(group.add_argument, action="store_true")
    flag("-n", "--dry-run", help="print the plan and change nothing")
    flag("-v", "--verbose", help="print each step as it is done")
    flag("--force", help="go on although trees or nodes will be lost")
    flag("--keep-mounts", help="keep the mounts, with all files that are open there")
    flag("--no-remount", help="do not mount the preserved trees again")
    flag("--poison", help="fill memory that was not reserved with a pattern (for tests)")
    flag("-x", "--no-ifdown", help=argparse.SUPPRESS)
    flag("-y", "--no-sync", help=argparse.SUPPRESS)
    group.add_argument("-t", "--type", help=argparse.SUPPRESS)
    progress.add_option(made)


def segment(text: str) -> tuple[str, int]:
    """Parse `FILE@ADDRESS`."""
    path, at, address = text.rpartition("@")
    if not at or not path:
        raise argparse.ArgumentTypeError(f"invalid segment {text!r}: write FILE@ADDRESS")
    return path, arguments.size(address)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for options that contradict each other."""
    loads = args.load or args.load_panic
    ways = [name for name in ("exec", "panic", "resume", "cold") if getattr(args, name)]
    acts = loads or args.unload or ways or args.status
    need(acts, "nothing to do: give -l IMAGE, -p IMAGE, -u, -e, --panic, --resume, --cold or --status")
    need(not (args.load and args.load_panic), "-l and -p exclude each other: give one of them")
    need(len(ways) < 2, f"--{' and --'.join(ways)} exclude each other: give one of them")
    need(not args.status or not (loads or args.unload or ways), "--status excludes the other actions: give it alone")
    wants_image = args.load or (args.load_panic and not args.unload)
    need(args.image or not wants_image, "no IMAGE given: a bzImage, an ELF kernel, or builtin")
    need(not args.image or loads, f"no action given for {args.image}: -l loads it, -p loads it as crash kernel")
    need(args.exec or not args.keep_mounts, "--keep-mounts is for -e")
    need(
        not (args.keep_mounts and args.no_remount),
        "--keep-mounts and --no-remount exclude each other: give one of them",
    )
    need(args.syscall != "file" or not args.segment, "--segment chooses an address: use -c, not -s")
    crossed = None not in (args.mem_min, args.mem_max) and args.mem_min >= args.mem_max
    need(not crossed, "--mem-min is not below --mem-max: no address is left")


def _act(args: argparse.Namespace) -> int:
    """Do the actions in order; the first that fails ends it."""
    check(args)
    machine = arguments.machine(args)
    if hostkexec.is_for(machine):
        return _act_for_real(args, machine)
    if args.status:
        return _status(machine)
    _put_off_limits(machine)
    _notice_oops(args, machine)
    if args.unload:
        _unload(args, machine)
    if args.image:
        _load(args, machine)
    if args.exec and args.image and args.dry_run:
        render.say("execute it: load it without --dry-run to see that plan")
        return 0
    if args.exec:
        arguments.existing(args)  # a kexec makes no machine
        return executing.dry_run(args, machine) if args.dry_run else executing.execute(args, machine)
    for way, go in (("panic", executing.panic), ("resume", executing.resume), ("cold", executing.cold)):
        if getattr(args, way):
            return go(args, machine)
    return 0


def _act_for_real(args: argparse.Namespace, machine: "Machine") -> int:
    """Do the actions on a machine whose memory is the host's."""
    hostkexec.check(args)
    if args.status:
        return hostkexec.status(machine)
    _put_off_limits(machine)
    if args.unload:
        hostkexec.unload(args, machine)
    if args.image and (status := hostkexec.load(args, machine)):
        return status
    if args.exec and args.image and args.dry_run:
        render.say("execute it: load it without --dry-run to see that plan")
        return 0
    for way, go in (("exec", hostkexec.execute), ("resume", executing.resume), ("cold", executing.cold)):
        if getattr(args, way):
            return go(args, machine)
    return 0


def _put_off_limits(machine: "Machine") -> None:
    """Put off the limits and priorities of the shell, so that they cannot end a kexec half-way."""
    from pkramfs.machine import process

    process.shed()
    if machine.exists():
        process.require(machine.hardware().size)


def _notice_oops(args: argparse.Namespace, machine: "Machine") -> None:
    """Raise MachineError if panic_on_oops is set and a daemon has aborted: its kernel died with it."""
    if args.dry_run or args.panic or args.cold:
        return
    from pkramfs.kernel import crash

    if crash.notice(machine) is not None:
        raise MachineError("panic_on_oops: a mount daemon had aborted, the crash kernel runs now: pkramctl report")


def _status(machine: "Machine") -> int:
    """Print the loaded kernels."""
    from pkramfs.kernel import staging

    for title, loaded in (
        ("kernel", staging.read(machine)),
        ("crash kernel", staging.read(machine, staging.CRASH_JSON)),
    ):
        if loaded is None:
            render.say(f"{title}: none is loaded")
        else:
            render.say(f"{title}: {_line(loaded)}")
            render.say(f"  command line: {loaded.cmdline}")
    return 0


def _line(loaded: "Loaded") -> str:
    size = format_size(sum(segment.size for segment in loaded.segments))
    image = loaded.image
    version = f" {image.version}" if image.version else ""
    how = "into crashkernel=" if loaded.mode == "crash" else f"by {loaded.mode}"
    return f"{image.name}{version} ({image.kind}), {size}, {how}"


def _unload(args: argparse.Namespace, machine: "Machine") -> None:
    """Unload. As with kexec(8) it is not an error if nothing was loaded."""
    from pkramfs.kernel import loading

    if args.dry_run:
        render.say("unload what is loaded")
    elif not (machine.exists() and loading.unload(machine, panic=args.load_panic)) and args.verbose:
        render.tell("nothing was loaded")


def _load(args: argparse.Namespace, machine: "Machine") -> None:
    """Load IMAGE and print its warnings."""
    from pkramfs.kernel import loading
    from pkramfs.kernel.image import load_image

    if args.dry_run:
        image = load_image(args.image)
        render.say(f"load {image.name} {image.version} ({image.kind}), which needs {format_size(image.init_size)}")
        return
    done = loading.load(machine, _request(args), panic=args.load_panic)
    for warning in done.warnings:
        arguments.warn(PROGRAM, warning)
    if args.verbose:
        render.tell(f"loaded {_line(done.loaded)}")
        for segment in done.loaded.segments:
            render.tell(f"  {segment.describe()}")


def _request(args: argparse.Namespace) -> Any:
    from pkramfs.kernel.loading import Request

    return Request(
        image=args.image,
        initrd=args.initrd,
        append=args.append,
        reuse_cmdline=args.reuse_cmdline,
        syscall=args.syscall or ("load" if args.segment else "file"),
        mem_min=args.mem_min or 0,
        mem_max=args.mem_max,
        segments=args.segment,
    )
