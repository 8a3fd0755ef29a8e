# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec on a machine whose memory is the host's: check, then hand over to kexec(8) and systemd.

    -l    compare memmap= and pkram=   ─▶ kexec -l IMAGE --initrd=… --command-line=…
    -e    everything is preserved      ─▶ systemctl kexec, where systemd runs: it unmounts and stops what runs
                                       ─▶ else stop the mounts, sync, kexec -e
    -u    ─▶ kexec -u

kexec(8) and systemctl kexec work without pkramfs, as in the announcement; but they do not check whether the next kernel
will find anything. All machines of the host end at once, so all of them are looked at, whichever was named. A refusal
names what would be lost, and `--force` goes on. `--dry-run` prints the checks and the commands. After the boot the
first mount, or --resume, brings a machine up (kernel/hostboot.py).

Counterparts: kexec-tools kexec/kexec.c; systemd src/systemctl/systemctl-start-special.c
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, render, signals
from pkramfs.cli.arguments import complain, need
from pkramfs.cli.freezer import Freezer
from pkramfs.errors import MachineError, NotPreservedError, PkramfsError, UsageError, explain
from pkramfs.units import plural

if TYPE_CHECKING:
    from pkramfs.cli.daemons import Seen
    from pkramfs.cli.freezer import Warn
    from pkramfs.kernel.hostload import Wanted
    from pkramfs.kernel.kernelrecord import KernelInfo
    from pkramfs.machine.directory import Machine

PROGRAM = "pkram-kexec"
LOCK_SECONDS = 30.0
_HOW = {"file": "-s", "load": "-c", None: "-a"}


def is_for(machine: "Machine") -> bool:
    """Return True if the machine ends with the host's kernel."""
    return machine.elsewhere() is not None if machine.exists() else machine.configuration() is not None


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for options that only the simulation supports."""
    need(not args.load_panic, "this machine is on memory of the host: load a crash kernel with kexec -p")
    need(not args.panic, "this machine is on memory of the host: --panic is for the simulation")
    need(not args.keep_mounts, "--keep-mounts is for the simulation: a kexec of the host ends all programs")
    need(not args.poison, "--poison is for a machine of the simulation")
    need(
        not args.segment and args.mem_min is None and args.mem_max is None,
        "kexec(8) chooses the addresses on memory of the host: leave --segment, --mem-min and --mem-max out",
    )
    if args.image:
        simulated = args.image.startswith("builtin")
        need(
            not simulated,
            f"{args.image} is for the simulation, this machine is on memory of the host: give a kernel file",
        )
        if not os.path.isfile(args.image):
            raise UsageError(f"cannot load {args.image}: no such file")


def status(machine: "Machine") -> int:
    """Print the loaded kernel."""
    from pkramfs.kernel import hostload

    if not machine.host.kexec_loaded:
        render.say("kernel: none is loaded")
        return 0
    loaded = hostload.read(_machines(machine))
    if loaded is None:
        render.say("kernel: one that kexec(8) was given by somebody else; its command line is unknown")
    else:
        render.say(f"kernel: {loaded.image}")
        render.say(f"  command line: {loaded.cmdline}")
    return 0


def _machines(machine: "Machine") -> "list[Machine]":
    """Return the machines that end with the host's kernel, the one that was named first; all of them are up or were."""
    others = [one for one in type(machine).on_host() if one.exists() and one.name != machine.name]
    return [machine, *others] if machine.exists() else others


def load(args: argparse.Namespace, machine: "Machine") -> int:
    """Check the new command line, and have kexec(8) load the kernel; return the exit status."""
    from pkramfs.kernel import hostload, running

    needs = _needs(machine, running.look(machine).info)
    said = hostload.compose(machine, needs, args.append, reuse=args.reuse_cmdline)
    problems = list(hostload.problems(machine, needs, said))
    command = ["kexec", _HOW[args.syscall], "-l", args.image]
    command += [f"--initrd={args.initrd}"] if args.initrd else []
    command.append(f"--command-line={said}")
    if args.dry_run:
        for line in [*hostload.kept(machine, needs, said), *map(str, problems), _shown(command)]:
            render.say(line)
        return problems[0].exit_status if problems else 0
    if status := _refused(args, machine, problems, "nothing was loaded"):
        return status
    _run(command)
    for one in _machines(machine):
        hostload.forget(one)
    hostload.note(machine, args.image, said)
    if args.verbose:
        render.tell(f"loaded {args.image} by kexec(8), with {said}")
    return 0


def _needs(machine: "Machine", info: "KernelInfo") -> "list[Wanted]":
    """Return the words for the next command line, and warn of machines whose words are unknown."""
    from pkramfs.kernel import hostload

    needs, unknown = hostload.wanted(machine, info)
    for line in unknown:
        arguments.warn(PROGRAM, line)
    return needs


def unload(args: argparse.Namespace, machine: "Machine") -> None:
    """Have kexec(8) unload."""
    from pkramfs.kernel import hostload

    if args.dry_run:
        render.say("kexec -u")
        return
    _run(["kexec", "-u"])
    for one in _machines(machine):
        hostload.forget(one)


def execute(args: argparse.Namespace, machine: "Machine") -> int:
    """Check all that must survive, and boot the loaded kernel. Returns only if that is left to systemd, or refused."""
    from pkramfs.kernel import running

    needs = _needs(machine, running.look(machine).info)
    if args.dry_run:
        return _describe(args, machine, needs)
    if not machine.host.kexec_loaded:
        raise MachineError("no kernel is loaded: pkram-kexec -l IMAGE")
    if machine.host.has_systemd:
        seen = [one for each in _machines(machine) for one in daemons.look(each)]
        if status := _refused(args, machine, _problems(machine, needs, seen), "nothing was changed"):
            return status
        _run(["systemctl", "kexec"])
        render.tell("systemd stops what runs, and boots the loaded kernel")
        return 0
    return _execute_alone(args, machine, needs)


def _execute_alone(args: argparse.Namespace, machine: "Machine", needs: "Sequence[Wanted]") -> int:
    """Stop the mounts and boot, without systemd. If that fails, mount the stopped trees again."""
    from pkramfs.cli import again

    warn = partial(arguments.warn, PROGRAM)
    going = [Freezer(one, force=args.force, warn=warn) for one in _machines(machine)]
    back: list[tuple[Machine, list[dict[str, Any]]]] = []
    try:
        with ExitStack() as locks:
            for one in sorted(going, key=lambda one: one.machine.name):  # in one order, or two commands wait for ever
                locks.enter_context(one.machine.lifecycle(shared=False, timeout=LOCK_SECONDS))
            seen = [(one.machine, one.freeze()) for one in going]
            problems = _problems(machine, needs, [mount for _, mounts in seen for mount in mounts])
            if status := _refused(args, machine, problems, "nothing was changed"):
                for one in going:
                    one.thaw()
                return status
            back = [(each, again.plan(mounts).mounts) for each, mounts in seen]
            for one in going:
                one.stop()
            os.sync()
            _run(["kexec", "-e"])
    except BaseException:
        with signals.deferred():
            _go_back(going, back, warn)
        raise
    return 0


def _go_back(going: "Sequence[Freezer]", back: "list[tuple[Machine, list[dict[str, Any]]]]", warn: "Warn") -> None:
    """Thaw frozen mounts, and mount stopped trees again."""
    from pkramfs.cli import again
    from pkramfs.mounting.forks import Forks

    for one in going:
        one.thaw()
    stopped = {one.machine.name for one in going if one.stopped}
    for machine, mounts in back:
        if machine.name in stopped:
            with Forks() as forks:
                forks.begin(mounts)
                again.restart(machine, mounts, warn, forks)


def _describe(args: argparse.Namespace, machine: "Machine", needs: "Sequence[Wanted]") -> int:
    """Print the plan of -e, and return its exit status."""
    from pkramfs.kernel import hostload

    seen = [one for each in _machines(machine) for one in daemons.look(each)]
    loaded = hostload.read(_machines(machine))
    lines = hostload.kept(machine, needs, loaded.cmdline) if loaded else []
    problems = _problems(machine, needs, seen)
    if not machine.host.kexec_loaded:
        problems.insert(0, MachineError("no kernel is loaded: pkram-kexec -l IMAGE"))
    for one in seen:
        place = f"{one.entry.mountpoint} ({one.entry.name})"
        if one.report.preserved:
            lines.append(f"{place} is preserved")
        elif _unit_preserves(machine, one.entry.mountpoint):
            lines.append(f"{place} will be preserved by its unit, before it is unmounted")
    lines += [str(problem) for problem in problems]
    if machine.host.has_systemd:
        lines.append("systemctl kexec: systemd unmounts, stops what runs, and boots the loaded kernel")
    else:
        lines += [f"stop {plural(len(seen), 'mount')}"] if seen else []
        lines += ["sync", "kexec -e"]
    for line in lines:
        render.say(line)
    fatal = [problem for problem in problems if not args.force or not isinstance(problem, NotPreservedError)]
    return fatal[0].exit_status if fatal else 0


def _problems(machine: "Machine", needs: "Sequence[Wanted]", seen: "Sequence[Seen]") -> list[PkramfsError]:
    """Return an error for each thing that would be lost."""
    from pkramfs.kernel import hostload

    found: list[PkramfsError] = []
    left = [report for one in _machines(machine) for report in daemons.left(one)]
    for report in [*(one.report for one in seen), *left]:
        if not report.preserved:
            if _unit_preserves(machine, report.mountpoint):
                continue
            lost = f"{report.mountpoint}: {report.content} would be lost ({report.reason})"
            found.append(NotPreservedError(lost))
        elif report.lost:
            found.append(NotPreservedError(f"{report.mountpoint}: {report.lost}"))
    found += _of_simulations(machine)
    loaded = hostload.read(_machines(machine))
    if loaded is not None:
        return [*found, *hostload.problems(machine, needs, loaded.cmdline)]
    if machine.host.kexec_loaded:
        arguments.warn(
            PROGRAM, "the command line of the loaded kernel is unknown, because kexec(8) was given it by hand"
        )
    return found


def _of_simulations(machine: "Machine") -> list[PkramfsError]:
    """Return an error for each machine of the simulation that holds trees: the file that is its RAM ends here."""
    from pkramfs.kernel import kernelrecord

    found: list[PkramfsError] = []
    for one in type(machine).all():
        if one.elsewhere() is not None or kernelrecord.read(one, any_layout=True) is None:
            continue
        if held := [*(entry.mountpoint for entry in one.mounts() if entry.alive), *_nodes(one)]:
            lost = (
                f"{', '.join(held)} would be lost: {one.path('ram')}, the RAM of machine {one.name}, ends with the host"
            )
            found.append(NotPreservedError(lost))
    return found


def _nodes(machine: "Machine") -> list[str]:
    """Describe what is preserved in a machine that is up."""
    from pkramfs.errors import FormatError
    from pkramfs.kernel import running
    from pkramfs.pkram.node import shown

    kernel = running.look(machine, any_layout=True)
    try:
        return [f"node {shown(node.name)}" for node in kernel.store.nodes()] if kernel.info.pkram else []
    except FormatError as error:
        return [f"what cannot be read ({error})"]


def _unit_preserves(machine: "Machine", mountpoint: str) -> bool:
    """Return True if systemd will preserve a tree when it stops its unit (pkramctl install)."""
    import subprocess

    if not machine.host.has_systemd:
        return False
    try:
        unit = subprocess.run(
            ["systemd-escape", "-p", "--template=pkramfs-preserve@.service", mountpoint],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        return subprocess.run(["systemctl", "is-active", "--quiet", unit], check=False).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return False  # then it is named as a tree that would be lost


def _refused(args: argparse.Namespace, machine: "Machine", problems: "Sequence[PkramfsError]", undone: str) -> int:
    """Print every reason not to go on and return the exit status; when forced, warn and return 0."""
    for problem in problems:
        if args.force:
            arguments.warn(PROGRAM, str(problem))
        else:
            complain(PROGRAM, str(problem))
            arguments.note(machine, f"kexec: refused: {problem}")
    if not problems or args.force:
        return 0
    complain(PROGRAM, f"{undone}: --force goes on and loses what is named above")
    return problems[0].exit_status


def _run(command: list[str]) -> None:
    """Run a command of the host; MachineError with its last line if it fails."""
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
    except FileNotFoundError:
        raise MachineError(f"{command[0]} is not installed (on Debian: apt-get install kexec-tools)") from None
    except OSError as error:
        raise MachineError(f"cannot run {explain(error)}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"status {done.returncode}"]
        raise MachineError(f"{command[0]} {command[1]} failed: {said[-1]}")


def _shown(command: "Sequence[str]") -> str:
    """Return a command as a shell takes it."""
    import shlex

    return shlex.join(command)
