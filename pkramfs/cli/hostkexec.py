# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec on a machine whose memory is the host's: check, then hand over to kexec(8) and systemd.

    -l    compare memmap= and pkram=   ─▶ kexec -l IMAGE --initrd=… --command-line=…
    -e    everything is preserved      ─▶ systemctl kexec, where systemd runs: it unmounts and stops what runs
                                       ─▶ else stop the mounts, sync, kexec -e
    -u    ─▶ kexec -u

kexec(8) and systemctl kexec work without us, as in the announcement; what they do not do is ask whether the next kernel
will find anything. A refusal names what would be lost, and `--force` goes on. `--dry-run` prints the checks and the
commands. After the boot the first mount, or --resume, brings the machine up (kernel/hostboot.py).

Counterparts: kexec-tools kexec/kexec.c; systemd src/systemctl/systemctl-start-special.c
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, render, signals
from pkramfs.cli.arguments import complain, need
from pkramfs.cli.freezer import Freezer
from pkramfs.errors import MachineError, NotPreservedError, PkramfsError, UsageError, explain
from pkramfs.units import plural

if TYPE_CHECKING:
    from pkramfs.cli.daemons import Seen
    from pkramfs.kernel.kernelrecord import KernelInfo
    from pkramfs.machine.directory import Machine

PROGRAM = "pkram-kexec"
LOCK_SECONDS = 30.0
_HOW = {"file": "-s", "load": "-c", None: "-a"}


def is_for(machine: "Machine") -> bool:
    """Return True if the machine ends with the host's kernel."""
    return machine.elsewhere() is not None if machine.exists() else machine.configuration() is not None


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what only the simulation can do."""
    need(not args.load_panic, "its memory is the host's: load a crash kernel with kexec -p")
    need(not args.panic, "its memory is the host's: no crash of it is simulated")
    need(not args.keep_mounts, "--keep-mounts is for the simulation: a kexec of the host ends all programs")
    need(not args.poison, "--poison is for a machine of the simulation")
    need(not args.segment and args.mem_min is None and args.mem_max is None, "kexec(8) places the segments itself")
    if args.image:
        need(not args.image.startswith("builtin"), f"{args.image} is a kernel of the simulation: give a file")
        if not os.path.isfile(args.image):
            raise UsageError(f"cannot load {args.image}: no such file")


def status(machine: "Machine") -> int:
    """Print what is loaded."""
    from pkramfs.kernel import hostload

    if not machine.host.kexec_loaded:
        render.say("kernel: none is loaded")
        return 0
    loaded = hostload.read(machine) if machine.exists() else None
    if loaded is None:
        render.say("kernel: one that kexec(8) was given by somebody else; its command line is unknown")
    else:
        render.say(f"kernel: {loaded.image}")
        render.say(f"  command line: {loaded.cmdline}")
    return 0


def load(args: argparse.Namespace, machine: "Machine") -> int:
    """Check the new command line, and have kexec(8) load the kernel; return the exit status."""
    from pkramfs.kernel import hostload, running

    info = running.look(machine).info
    said = hostload.compose(machine, info, args.append, reuse=args.reuse_cmdline)
    problems = list(hostload.problems(machine, info, said))
    command = ["kexec", _HOW[args.syscall], "-l", args.image]
    command += [f"--initrd={args.initrd}"] if args.initrd else []
    command.append(f"--command-line={said}")
    if args.dry_run:
        for line in [*hostload.kept(machine, info, said), *map(str, problems), _shown(command)]:
            render.say(line)
        return problems[0].exit_status if problems else 0
    if status := _refused(args, machine, problems, "nothing was loaded"):
        return status
    _run(command)
    hostload.note(machine, args.image, said)
    if args.verbose:
        render.tell(f"loaded {args.image} by kexec(8), with {said}")
    return 0


def unload(args: argparse.Namespace, machine: "Machine") -> None:
    """Have kexec(8) unload."""
    from pkramfs.kernel import hostload

    if args.dry_run:
        render.say("kexec -u")
        return
    _run(["kexec", "-u"])
    hostload.forget(machine)


def execute(args: argparse.Namespace, machine: "Machine") -> int:
    """Check all that must survive, and boot the loaded kernel. Returns only if that is left to systemd, or refused."""
    from pkramfs.kernel import running

    info = running.look(machine).info
    if args.dry_run:
        return _describe(args, machine, info, daemons.look(machine))
    if not machine.host.kexec_loaded:
        raise MachineError("no kernel is loaded: pkram-kexec -l IMAGE")
    if machine.host.has_systemd:
        if status := _refused(args, machine, _problems(machine, info, daemons.look(machine)), "nothing was changed"):
            return status
        _run(["systemctl", "kexec"])
        render.tell("systemd stops what runs, and boots the loaded kernel")
        return 0
    return _execute_alone(args, machine, info)


def _execute_alone(args: argparse.Namespace, machine: "Machine", info: "KernelInfo") -> int:
    """Stop the mounts and boot, where there is no systemd. If that fails, mount again what was stopped."""
    from pkramfs.cli import again
    from pkramfs.mounting.forks import Forks

    warn = partial(arguments.warn, PROGRAM)
    going = Freezer(machine, force=args.force, warn=warn)
    back: list[dict[str, Any]] = []
    try:
        with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
            seen = going.freeze()
            if status := _refused(args, machine, _problems(machine, info, seen), "nothing was changed"):
                going.thaw()
                return status
            back = again.plan(seen).mounts
            going.stop()
            os.sync()
            _run(["kexec", "-e"])
    except BaseException:
        with signals.deferred():
            going.thaw()
            if going.stopped:
                with Forks() as forks:
                    forks.begin(back)
                    again.restart(machine, back, warn, forks)
        raise
    return 0


def _describe(args: argparse.Namespace, machine: "Machine", info: "KernelInfo", seen: "Sequence[Seen]") -> int:
    """Print what -e would do, and return the exit status that it would have."""
    from pkramfs.kernel import hostload

    loaded = hostload.read(machine)
    lines = hostload.kept(machine, info, loaded.cmdline) if loaded else []
    problems = _problems(machine, info, seen)
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


def _problems(machine: "Machine", info: "KernelInfo", seen: "Sequence[Seen]") -> list[PkramfsError]:
    """Return an error for each thing that would be lost."""
    from pkramfs.kernel import hostload

    found: list[PkramfsError] = []
    for report in [*(one.report for one in seen), *daemons.left(machine)]:
        if not report.preserved:
            if _unit_preserves(machine, report.mountpoint):
                continue
            lost = f"{report.mountpoint}: {report.content} would be lost ({report.reason})"
            found.append(NotPreservedError(lost))
        elif report.lost:
            found.append(NotPreservedError(f"{report.mountpoint}: {report.lost}"))
    loaded = hostload.read(machine)
    if loaded is not None:
        return [*found, *hostload.problems(machine, info, loaded.cmdline)]
    if machine.host.kexec_loaded:
        arguments.warn(
            PROGRAM, "the command line of the loaded kernel is unknown, because kexec(8) was given it by hand"
        )
    return found


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
