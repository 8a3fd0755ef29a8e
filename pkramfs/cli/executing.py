# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec -e, --resume, --cold and --panic: end the running kernel, and boot the next one.

`-e` is composed here, because the planner (kernel/kexec.py) knows no daemons and the daemons no
planner:

    machine lock, exclusive
      ├ freeze every mount, flushed ──── one does not answer ──→ thaw, status 7
      ├ plan, with the mounts' answers ── trees or nodes lost ─→ thaw, name them, status 6
      ├ start the daemons of the next kernel, which wait to be told
      ├ stop the daemons, wait for their locks ─ one stays ────→ status 7
      ├ ═══ point of no return (inside the plan) ═══
      └ boot in a fresh process
    machine lock released
    mount the preserved trees again (mounting takes the lock shared)

With --keep-mounts the daemons stand still, and end without detaching: see keeping.py.

Before the point of no return a failure, or a signal (SIGINT, SIGTERM, SIGHUP), leaves the machine as it was. After
it a signal waits until all is mounted again, and the next command after a failure resumes the boot. A command that
is killed takes nothing back: the daemons thaw by themselves, and mounts that were already stopped wait for --resume.

Kernel: kernel/kexec_core.c (kernel_kexec)
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, progress, render, report, signals
from pkramfs.cli.arguments import complain, need
from pkramfs.cli.freezer import Freezer
from pkramfs.errors import MachineError, NotPreservedError
from pkramfs.units import plural

if TYPE_CHECKING:
    from pkramfs.cli import again
    from pkramfs.cli.daemons import Seen
    from pkramfs.control.replies import Status
    from pkramfs.kernel.steps import Operation, Plan
    from pkramfs.machine.directory import Machine
    from pkramfs.mounting.forks import Forks

PROGRAM = "pkram-kexec"
LOCK_SECONDS = 30.0
_NAMED = 10
"""How many of the programs that use a mount are named."""


def dry_run(args: argparse.Namespace, machine: "Machine") -> int:
    """Print the plan of -e, and return its exit status, as far as it is known."""
    from pkramfs.cli import keeping
    from pkramfs.kernel import kexec

    seen = daemons.look(machine) if machine.exists() else []
    reports = keeping.reports(seen) if args.keep_mounts else [one.report for one in seen]
    reports += daemons.left(machine) if machine.exists() else []
    staying = [one for one in seen if args.keep_mounts and keeping.is_kept(one)]
    back = _to_remount(args, machine, [one for one in seen if one not in staying])
    plan = kexec.plan(machine, reports, force=args.force, poison=args.poison, remount=back.mounts, notes=back.notes)
    _refuse_to_keep(args, seen, plan)
    for line in plan.describe():
        render.say(line)
    costs = report.costs(machine) if args.verbose else None
    for line in [*_noticed(seen, staying), *(costs.describe() if costs else [])]:
        render.say(line)
    return plan.problems[0].exit_status if plan.problems else 0


def _refuse_to_keep(args: argparse.Namespace, seen: "list[Seen]", plan: "Plan") -> None:
    """Add to a plan that some mounts cannot be kept, if all are to be."""
    from pkramfs.cli import keeping

    refusals = keeping.refusals(seen) if args.keep_mounts else []
    if args.force:
        plan.warnings.extend(map(str, refusals))
    else:
        plan.problems.extend(refusals)


def _noticed(seen: "Sequence[Seen]", staying: "Sequence[Seen]") -> list[str]:
    """Return a line for each file that cannot survive, and for each program that loses a mount, or waits for it."""
    from pkramfs.cli.users import processes
    from pkramfs.cli.users import users as users_of

    found = []
    programs = processes() if seen else {}
    for one in seen:
        place = one.entry.mountpoint
        found += _not_surviving(place, one.status) if one.status and one not in staying else []
        fate = "will wait a moment" if one in staying else "will get ENOTCONN"
        users = {user.pid: (at, user) for at in one.places or (place,) for user in users_of(at, programs)}
        for at, user in list(users.values())[:_NAMED]:
            found.append(f"{at}: {user.name} (pid {user.pid}) uses it and {fate}")
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


def execute(args: argparse.Namespace, machine: "Machine") -> int:
    """Let the running kernel die and the loaded one be born."""
    from pkramfs.mounting.forks import Forks

    with (
        Forks() as forks,
        signals.Deferral() as waiting,
        progress.waiting(args, "kexec") as drawn,
    ):
        return _execute_with(args, machine, forks, _Steps(waiting, drawn, args.verbose))


def _execute_with(args: argparse.Namespace, machine: "Machine", forks: "Forks", steps: "_Steps") -> int:
    from pkramfs.cli import again
    from pkramfs.kernel import booting, history, kexec, nvram, running

    how = _keeping() if args.keep_mounts else Freezer
    going = how(machine, force=args.force, warn=partial(arguments.warn, PROGRAM))
    remount: list[dict[str, Any]] = []
    back: list[dict[str, Any]] = []
    try:
        with running.exclusively(machine, LOCK_SECONDS), ExitStack() as ahead:
            _need_loaded(machine)
            if args.keep_mounts:  # programs wait: not for an interpreter to start
                ahead.enter_context(booting.prepared(machine)).until_ready()
            began = time.monotonic()
            seen = going.freeze()
            remount, notes = _to_remount(args, machine, going.leaving(seen))
            back = again.plan(going.leaving(seen)).mounts
            seen = going.cross(seen)
            plan = kexec.plan(
                machine,
                going.reports(seen) + daemons.left(machine),
                force=args.force,
                poison=args.poison,
                stop=going.stop,
                remount=remount,
                notes=notes,
            )
            _refuse_to_keep(args, seen, plan)
            if plan.problems:
                going.thaw()
                return _refuse(machine, plan)
            for line in notes:
                arguments.note(machine, f"kexec: {line}")
            forks.begin(remount)
            history.note_foreseen(machine, nvram.next_generation(machine), plan.foreseen)
            _perform(args, plan, steps)
            pause = time.monotonic() - began
            nvram.set_pause(machine, pause - plan.copying)
            history.note_pause(machine, nvram.next_generation(machine) - 1, pause)
    except BaseException:
        with signals.deferred():
            _undo(machine, going, back, forks)
        raise
    kept, lost = going.arrive()
    return _mount_again(machine, remount, f"in {pause:.2f} s", forks, kept) or int(lost > 0)


def _keeping() -> type[Freezer]:
    from pkramfs.cli.keeping import Keeping

    return Keeping


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


def _perform(args: argparse.Namespace, plan: "Plan", steps: "_Steps") -> None:
    for warning in plan.warnings:
        arguments.warn(PROGRAM, warning)
    for line in plan.relocations if args.verbose else []:
        render.tell(line)
    steps.total = len(plan.operations)
    plan.execute(steps.before)


class _Steps:
    """The steps of a plan as they are done."""

    def __init__(self, waiting: signals.Deferral, drawn: progress.Bar, verbose: bool) -> None:
        self._waiting, self._drawn, self._verbose = waiting, drawn, verbose
        self.total = self._done = 0

    def before(self, step: "Operation") -> None:
        """Show a step before it is done; from the point of no return on, let signals wait."""
        from pkramfs.kernel.transition import PointOfNoReturn

        if isinstance(step, PointOfNoReturn):
            self._waiting.begin()
        for line in step.lines() if self._verbose else []:
            render.tell(line)
        self._done += 1
        self._drawn.begin("kexec", self._done, self.total)


def _undo(machine: "Machine", going: Freezer, back: list[dict[str, Any]], forks: "Forks") -> None:
    """Take back after a failure: while the old kernel lives, put every mount back as it was."""
    from pkramfs.cli import again
    from pkramfs.kernel import kernelrecord, nvram

    going.thaw()
    going.arrive()
    if not machine.exists() or not going.stopped:
        return
    if kernelrecord.read(machine, any_layout=True) is None:
        resume = f"pkram-kexec{machine.words} --resume"
        complain(PROGRAM, f"the old kernel is gone and the new one is not up: {resume} goes on from there")
        return
    if not again.restart(machine, back, partial(arguments.warn, PROGRAM), forks):
        with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
            nvram.mounted_again(machine, back)


def _mount_again(
    machine: "Machine",
    remount: Sequence[dict[str, Any]],
    how: str,
    forks: "Forks | None" = None,
    kept: Sequence[str] = (),
) -> int:
    """Mount the preserved trees again, and report that the new kernel is up."""
    from pkramfs.cli import again
    from pkramfs.kernel import nvram, running
    from pkramfs.mounting.forks import Forks

    info = running.look(machine).info
    warn = partial(arguments.warn, PROGRAM)
    remount = again.still_there(machine, remount, warn)
    with forks or Forks() as forking:
        forking.begin(remount)
        failed = again.restart(machine, remount, warn, forking)
    if not failed:
        with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
            nvram.clear_mounts(machine)
    back = ", ".join(place for mount in remount for place in again.places(mount))
    mounted = f"; mounted again: {back}" if back and not failed else ""
    stayed = f"; kept: {', '.join(kept)}" if kept else ""
    render.tell(f"kernel {info.generation} ({info.image}) is up {how}{stayed}{mounted}")
    return 1 if failed else 0


def resume(args: argparse.Namespace, machine: "Machine") -> int:
    """Finish a boot that was interrupted, and mount the trees again."""
    from pkramfs.kernel import nvram, succession

    boots = _boots_with_the_host(machine)
    need(boots or not args.append, "--append with --resume is for a machine on memory of the host that is not up yet")
    if not boots and (not machine.exists() or (nvram.pending(machine) is None and not nvram.mounts(machine))):
        render.say("nothing to resume")
        return 0
    with signals.Deferral() as waiting:
        with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
            waiting.begin()
            _decide(args, machine, boots)
            succession.bring_up(machine, force=args.force and not boots)
            back = nvram.mounts(machine)
        return _mount_again(machine, [] if args.no_remount else back, "again")


def _boots_with_the_host(machine: "Machine") -> bool:
    """Return True for a machine on memory of the host that is not up in this boot yet; make its directory."""
    from pkramfs.kernel import kernelrecord

    if not machine.exists() and machine.configuration() is not None:
        machine.create()
    if not machine.exists() or machine.elsewhere() is None:
        return False
    return kernelrecord.read(machine, any_layout=True) is None


def _decide(args: argparse.Namespace, machine: "Machine", boots: bool) -> None:
    """Restore after a boot of the host with a pkram= that its command line lacks, or whatever can be restored."""
    from pkramfs.kernel import hostboot

    if args.append or (boots and args.force):
        hostboot.decide(machine, append=args.append, force=args.force)


def cold(args: argparse.Namespace, machine: "Machine") -> int:
    """Power off and on: memory is lost. With --force this also works on a damaged machine."""
    from pkramfs.cli import nodes
    from pkramfs.kernel import succession

    _boots_with_the_host(machine)
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


def panic(args: argparse.Namespace, machine: "Machine") -> int:
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
