# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec: load a kernel, let the running one die, boot the next; with kexec(8)'s spelling.

    -u                      unload ┐
    -l IMAGE, -p IMAGE      load   ├ in this order, as far as they are given
    -e                      execute┘

`-e` is composed here, because the planner (kernel/kexec.py) knows no daemons and the daemons no
planner:

    machine lock, exclusive
      ├ freeze every mount, flushed ──── one does not answer ──→ thaw, status 7
      ├ plan, with what the mounts said ─ trees or nodes lost ─→ thaw, name them, status 6
      ├ start the daemons of the next kernel, which wait to be told
      ├ stop the daemons, wait for their locks ─ one stays ────→ status 7
      ├ ═══ point of no return (inside the plan) ═══
      └ boot in a fresh process
    machine lock released
    mount again what was preserved (mounting takes the lock shared)

Before the point of no return a failure, or a signal (SIGINT, SIGTERM, SIGHUP), leaves the machine as it was. After
it a signal waits until all is mounted again, and whoever comes next after a failure resumes the boot. A command that
is killed takes nothing back: the daemons thaw by themselves, and what was stopped already waits for --resume.

Kernel: kexec-tools kexec/kexec.c, kernel/kexec_core.c (kernel_kexec)
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, render, report, signals
from pkramfs.cli.arguments import complain, need
from pkramfs.cli.freezer import Freezer
from pkramfs.errors import MachineError, NotPreservedError, PkramfsError
from pkramfs.units import format_size, plural

if TYPE_CHECKING:
    from pkramfs.cli import again
    from pkramfs.cli.daemons import Seen
    from pkramfs.control.replies import Status
    from pkramfs.kernel.staging import Loaded
    from pkramfs.kernel.steps import Operation, Plan
    from pkramfs.machine.directory import Machine
    from pkramfs.mounting.starting import PrestartedDaemons

PROGRAM = "pkram-kexec"
LOCK_SECONDS = 30.0
_NAMED = 10
"""How many of the programs that use a mount are named."""
_DESCRIPTION = "Load the next kernel of a pkramfs machine, and boot it over the running one; see pkram-kexec(8)."
_EPILOG = """examples:
  pkram-kexec -s -l /boot/vmlinuz --initrd=/boot/initrd.img --append="root=/dev/sda1 pkram=$(cat /run/pkram/pkram)"
  pkram-kexec -e
  pkram-kexec -le builtin --reuse-cmdline
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return arguments.run(parser(), _noted, argv)


def _noted(args: argparse.Namespace) -> int:
    """Run the actions, and write a refusal to the kernel log as well."""
    try:
        return _act(args)
    except PkramfsError as error:
        arguments.note(arguments.machine(args), f"kexec: {error}")
        raise


def parser() -> arguments.Parser:
    """Build the parser of kexec(8)'s command line."""
    usage = "%(prog)s [-l|-p|-u|-e|-S|--panic|--resume|--cold] [OPTIONS] [IMAGE]"
    made = arguments.Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, usage=usage)
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
    flag("-p", "--load-panic", help="load IMAGE as crash kernel into crashkernel=")
    flag("-u", "--unload", help="unload what was loaded (with -p: the crash kernel)")
    flag("-e", "--exec", help="execute the loaded kernel")
    flag("--panic", help="crash: boot the crash kernel, with PKRAM off")
    flag("--resume", help="finish a kexec that died after the point of no return")
    flag("--cold", help="power off and on: boot with empty memory")
    flag("-S", "--status", help="say what is loaded")


def _add_loading(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("loading")
    how = group.add_mutually_exclusive_group()
    syscall = partial(how.add_argument, action="store_const", dest="syscall")
    syscall("-s", "--kexec-file-syscall", const="file", help="pkramfs chooses where, clear of preserved pages")
    syscall("-c", "--kexec-syscall", const="load", help="you choose where; a conflict fails and is listed")
    syscall("-a", "--kexec-syscall-auto", const=None, help="-c if --segment is given, else -s (default)")
    group.add_argument("--initrd", "--ramdisk", metavar="FILE", help="initial RAM disk")
    group.add_argument("--append", "--command-line", metavar="TEXT", help="the new kernel's command line")
    group.add_argument("--reuse-cmdline", action="store_true", help="the running one, pkram= made current")
    group.add_argument("--mem-min", metavar="ADDRESS", type=arguments.size, help="place nothing below this")
    group.add_argument("--mem-max", metavar="ADDRESS", type=arguments.size, help="place nothing at or above this")
    group.add_argument(
        "--segment", metavar="FILE@ADDRESS", type=segment, action="append", default=[], help="load one more file"
    )


def _add_executing(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("executing")
    flag = partial(group.add_argument, action="store_true")
    flag("-n", "--dry-run", help="print the plan and change nothing")
    flag("-v", "--verbose", help="print each step as it is done")
    flag("--force", help="go on although trees or nodes will be lost")
    flag("--no-remount", help="do not mount again what was preserved")
    flag("--poison", help="fill what was not reserved with a pattern (for tests)")
    flag("-x", "--no-ifdown", help=argparse.SUPPRESS)
    flag("-y", "--no-sync", help=argparse.SUPPRESS)
    group.add_argument("-t", "--type", help=argparse.SUPPRESS)


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
    need(not args.status or not (loads or args.unload or ways), "--status stands alone")
    wants_image = args.load or (args.load_panic and not args.unload)
    need(args.image or not wants_image, "no IMAGE given: a bzImage, an ELF kernel, or builtin")
    need(not args.image or loads, f"what to do with {args.image}? -l loads it, -p loads it as crash kernel")
    need(args.syscall != "file" or not args.segment, "--segment chooses an address: use -c, not -s")


def _act(args: argparse.Namespace) -> int:
    """Do the actions in order; the first that fails ends it."""
    check(args)
    machine = arguments.machine(args)
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
        return _dry_run(args, machine) if args.dry_run else _execute(args, machine)
    for way, go in (("panic", _panic), ("resume", _resume), ("cold", _cold)):
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
    """Print what is loaded."""
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
    elif not loading.unload(machine, panic=args.load_panic) and args.verbose:
        render.tell("nothing was loaded")


def _load(args: argparse.Namespace, machine: "Machine") -> None:
    """Load IMAGE and print its warnings."""
    from pkramfs.kernel import loading
    from pkramfs.kernel.image import load_image

    if args.dry_run:
        image = load_image(args.image)
        render.say(f"load {image.name} {image.version} ({image.kind}), which wants {format_size(image.init_size)}")
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


def _dry_run(args: argparse.Namespace, machine: "Machine") -> int:
    """Print what -e would do, and return the exit status that it would have, as far as can be known."""
    from pkramfs.kernel import kexec

    seen = daemons.look(machine) if machine.exists() else []
    reports = [one.report for one in seen] + (daemons.left(machine) if machine.exists() else [])
    back = _to_remount(args, machine, seen)
    plan = kexec.plan(machine, reports, force=args.force, poison=args.poison, remount=back.mounts, notes=back.notes)
    for line in plan.describe():
        render.say(line)
    costs = report.costs(machine) if args.verbose else None
    for line in [*_noticed(seen), *(costs.describe() if costs else [])]:
        render.say(line)
    return plan.problems[0].exit_status if plan.problems else 0


def _noticed(seen: "Sequence[Seen]") -> list[str]:
    """Return a line for each file that cannot survive, and for each program that will lose a mount."""
    from pkramfs.cli.users import processes
    from pkramfs.cli.users import users as users_of

    found = []
    programs = processes() if seen else {}
    for one in seen:
        place = one.entry.mountpoint
        found += _not_surviving(place, one.status) if one.status else []
        users = {user.pid: (at, user) for at in one.places or (place,) for user in users_of(at, programs)}
        for at, user in list(users.values())[:_NAMED]:
            found.append(f"{at}: {user.name} (pid {user.pid}) uses it and will get ENOTCONN")
        if (more := len(users) - _NAMED) > 0:
            found.append(f"{place}: {plural(more, 'more program')} that {'uses' if more == 1 else 'use'} it")
    return found


def _not_surviving(place: str, status: "Status") -> list[str]:
    """Return a line for each file that is open for writing or deleted."""
    from pkramfs.control.replies import unnamed

    found = [f"{place}: {path} is open for writing" for path in status["writers"]]
    if more := unnamed(status, "writers"):
        found.append(f"{place}: {plural(more, 'more file')} open for writing")
    found += [f"{place}: {path} will be lost" for path in status["open_deleted"]]
    if more := unnamed(status, "open_deleted"):
        found.append(f"{place}: {plural(more, 'more deleted file')} will be lost")
    return found


def _to_remount(args: argparse.Namespace, machine: "Machine", seen: "Sequence[Seen]") -> "again.Plan":
    """Plan which mounts come back after the kexec; none if --no-remount is given.

    Those that an earlier command stopped, or could not mount again, come back, too, if their trees are still preserved.
    """
    from pkramfs.cli import again

    if args.no_remount:
        return again.Plan([], [])
    waiting = again.still_there(machine, again.waiting(machine), lambda _: None) if machine.exists() else []
    found = again.plan(seen)
    return again.Plan([*waiting, *found.mounts], found.notes)


def _execute(args: argparse.Namespace, machine: "Machine") -> int:
    """Let the running kernel die and the loaded one be born."""
    from pkramfs.mounting.starting import PrestartedDaemons

    with PrestartedDaemons() as prestarted, signals.Deferral() as waiting:
        return _execute_with(args, machine, prestarted, waiting)


def _execute_with(
    args: argparse.Namespace, machine: "Machine", prestarted: "PrestartedDaemons", waiting: signals.Deferral
) -> int:
    from pkramfs.cli import again
    from pkramfs.kernel import kexec, nvram, running

    going = Freezer(machine, force=args.force, warn=partial(arguments.warn, PROGRAM))
    remount: list[dict[str, Any]] = []
    back: list[dict[str, Any]] = []
    try:
        with running.exclusively(machine, LOCK_SECONDS):
            _need_loaded(machine)
            began = time.monotonic()
            seen = going.freeze()
            remount, notes = _to_remount(args, machine, seen)
            back = again.plan(seen).mounts
            plan = kexec.plan(
                machine,
                [one.report for one in seen] + daemons.left(machine),
                force=args.force,
                poison=args.poison,
                stop=going.stop,
                remount=remount,
                notes=notes,
            )
            if plan.problems:
                going.thaw()
                return _refuse(machine, plan)
            for line in notes:
                arguments.note(machine, f"kexec: {line}")
            prestarted.start(remount)
            _perform(args, plan, waiting)
            pause = time.monotonic() - began
            nvram.set_pause(machine, pause - plan.copying)
    except BaseException:
        with signals.deferred():
            _undo(machine, going, back, prestarted)
        raise
    return _mount_again(machine, remount, f"in {pause:.2f} s", prestarted)


def _need_loaded(machine: "Machine") -> None:
    """Raise MachineError if no kernel is loaded, before any mount is frozen."""
    from pkramfs.kernel import staging

    if staging.read(machine) is None:
        raise MachineError("no kernel is loaded: pkram-kexec -l IMAGE")


def _refuse(machine: "Machine", plan: "Plan") -> int:
    """Print every reason not to go, one line each, and return the exit status."""
    for problem in plan.problems:
        complain(PROGRAM, str(problem))
        arguments.note(machine, f"kexec: refused: {problem}")
    if any(isinstance(problem, NotPreservedError) for problem in plan.problems):
        complain(PROGRAM, "nothing was changed: --force goes on and loses what is named above")
    return plan.problems[0].exit_status


def _perform(args: argparse.Namespace, plan: "Plan", waiting: signals.Deferral) -> None:
    for warning in plan.warnings:
        arguments.warn(PROGRAM, warning)
    for line in plan.relocations if args.verbose else []:
        render.tell(line)
    plan.execute(partial(_before, waiting, args.verbose))


def _before(waiting: signals.Deferral, verbose: bool, step: "Operation") -> None:
    """Print a step before it is done; from the point of no return on, let signals wait."""
    from pkramfs.kernel.kexec import PointOfNoReturn

    if isinstance(step, PointOfNoReturn):
        waiting.begin()
    for line in step.lines() if verbose else []:
        render.tell(line)


def _undo(machine: "Machine", going: Freezer, back: list[dict[str, Any]], prestarted: "PrestartedDaemons") -> None:
    """Take back after a failure: while the old kernel lives, put every mount back as it was."""
    from pkramfs.cli import again
    from pkramfs.kernel import kernelrecord, nvram

    going.thaw()
    if not machine.exists() or not going.stopped:
        return
    if kernelrecord.read(machine, any_layout=True) is None:
        complain(PROGRAM, "the old kernel is gone and the new one is not up: pkram-kexec --resume goes on from there")
        return
    if not again.restart(machine, back, partial(arguments.warn, PROGRAM), prestarted):
        with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
            nvram.mounted_again(machine, back)


def _mount_again(
    machine: "Machine", remount: Sequence[dict[str, Any]], how: str, prestarted: "PrestartedDaemons | None" = None
) -> int:
    """Mount again what was preserved, and report that the new kernel is up."""
    from pkramfs.cli import again
    from pkramfs.kernel import nvram, running
    from pkramfs.mounting.starting import PrestartedDaemons

    info = running.look(machine).info
    warn = partial(arguments.warn, PROGRAM)
    remount = again.still_there(machine, remount, warn)
    failed = again.restart(machine, remount, warn, prestarted or PrestartedDaemons())
    if not failed:
        with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
            nvram.clear_mounts(machine)
    back = ", ".join(place for mount in remount for place in again.places(mount))
    mounted = f"; mounted again: {back}" if back and not failed else ""
    render.tell(f"kernel {info.generation} ({info.image}) is up {how}{mounted}")
    return 1 if failed else 0


def _resume(args: argparse.Namespace, machine: "Machine") -> int:
    """Finish a boot that was interrupted, and what comes after it."""
    from pkramfs.kernel import nvram, succession

    if not machine.exists() or (nvram.pending(machine) is None and not nvram.mounts(machine)):
        render.say("nothing to resume")
        return 0
    with signals.Deferral() as waiting:
        with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
            waiting.begin()
            succession.bring_up(machine, force=args.force)
            back = nvram.mounts(machine)
        return _mount_again(machine, [] if args.no_remount else back, "again")


def _cold(args: argparse.Namespace, machine: "Machine") -> int:
    """Power off and on: memory is lost. With --force this also works on a damaged machine."""
    from pkramfs.cli import nodes
    from pkramfs.kernel import succession

    going = Freezer(machine, force=args.force, warn=partial(arguments.warn, PROGRAM))
    with arguments.existing(args).lifecycle(shared=False, timeout=LOCK_SECONDS):
        if not args.force:
            nodes.refuse_loss(machine)
        if args.dry_run:
            render.say("end the running kernel, forget all memory, boot cold")
            return 0
        with signals.deferred():
            going.stop()
            succession.power_cycle(machine)
    return _mount_again(machine, [], "with empty memory")


def _panic(args: argparse.Namespace, machine: "Machine") -> int:
    """Let the kernel crash: ask no mount, save nothing."""
    from pkramfs.kernel import crash, staging

    with arguments.existing(args).lifecycle(shared=False, timeout=LOCK_SECONDS):
        if staging.read(machine, staging.CRASH_JSON) is None:
            raise MachineError("no crash kernel is loaded: boot with crashkernel=SIZE, then pkram-kexec -p IMAGE")
        if args.dry_run:
            render.say("kill the mounts and boot the crash kernel, with PKRAM off")
            return 0
        with signals.deferred():
            Freezer(machine, force=True).kill()
            crash.panic(machine)
    return _mount_again(machine, [], "with PKRAM off; pkram-kexec --cold leaves it")
