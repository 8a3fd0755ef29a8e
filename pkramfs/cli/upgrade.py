# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl upgrade: put the code on disk under mounts that are in use.

The holder becomes the new code while the daemon serves. Then that makes room between two requests, and the holder
starts another daemon, which recovers the tree and goes on. Programs wait for that only.

    this command      imports what a holder needs, and recovers each tree in its own memory: it is the code on disk
    the holder        becomes that code, and says so; if it ends instead, its daemon notices that at once
    the next daemon   takes over

What fails in the first two steps is told in one line, and the daemon that serves goes on.

Kernel: kernel/livepatch/, by other means
"""

import argparse
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, render
from pkramfs.cli.arguments import need
from pkramfs.errors import DaemonError, MachineError, PkramfsError

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

SECONDS = 60.0
"""How long the next daemon may take until it answers."""
_POLL = 0.01


def add(made: argparse.ArgumentParser) -> None:
    """Add the options of `upgrade` to its parser."""
    made.add_argument("mounts", nargs="*", metavar="DIR|NAME", help="which mounts")
    made.add_argument("--all", action="store_true", help="all mounts of the machine")


def act(args: argparse.Namespace) -> int:
    """Run `pkramctl upgrade DIR|NAME… | --all`."""
    need(bool(args.mounts) != args.all, "give the mounts to upgrade, or --all")
    machine = arguments.existing(args)
    chosen = _chosen(machine, args.mounts)
    _try_new_code()
    done, problems = [], []
    for entry in chosen:
        try:
            _rehearse(machine, entry)
            done.append(_upgrade(machine, entry))
        except PkramfsError as error:
            problems.append(error)
    if arguments.wants_json(args):
        render.emit_json(done)
    elif args.all and not chosen:
        render.say("no tree is mounted")
    else:
        for one in done:
            render.say(f"{one['mountpoint']}: daemon {one['before']} replaced by {one['pid']}, {one['seconds']:.2f} s")
    for problem in problems:
        arguments.complain("pkramctl", str(problem))
    return problems[0].exit_status if problems else 0


def _chosen(machine: "Machine", wanted: list[str]) -> "list[MountEntry]":
    """Return the living mounts that are meant, by name or directory; all without any."""
    living = daemons.alive(machine)
    found = []
    for one in wanted:
        entry = next((e for e in living if one == e.name or os.path.abspath(one) == e.mountpoint), None)
        if entry is None:
            raise MachineError(f"{one} is no mount of the machine {machine.path()}: pkramctl status lists them")
        found.append(entry)
    return found or living


def _try_new_code() -> None:
    """Raise MachineError if the code on disk, which is ours, cannot be imported: a holder that becomes it would end."""
    try:
        import pkramfs.daemon.handover  # noqa: F401
    except Exception as error:
        raise MachineError(f"the code on disk cannot be imported ({_told(error)}): nothing was changed") from error


def _rehearse(machine: "Machine", entry: "MountEntry") -> None:
    """Raise DaemonError if our code cannot recover the tree, as the next daemon will; nothing is changed."""
    from pkramfs.cli import nodes, verify
    from pkramfs.kernel.running import look

    if entry.journal is None:
        return  # it has no holder, as its daemon will say
    try:
        with machine.lifecycle(shared=True, timeout=nodes.LOCK_SECONDS):
            problem = verify.log_problem(look(machine), entry)
    except Exception as error:
        problem = _told(error)
    if problem:
        raise DaemonError(f"the code on disk cannot take over {entry.mountpoint} ({problem}): nothing was changed")


def _told(error: Exception) -> str:
    """Return what an error says, with its kind unless it is one of ours."""
    return str(error) if isinstance(error, PkramfsError) else f"{type(error).__name__}: {error}"


def _upgrade(machine: "Machine", entry: "MountEntry") -> dict[str, Any]:
    """Replace one daemon; return both pids and how long that took."""
    from pkramfs.control.commands import Commands

    began = time.monotonic()
    with contextlib.suppress(DaemonError):  # it died: then another takes over, or none
        Commands(entry.socket).upgrade()
    while True:
        now = next((e for e in machine.mounts() if e.tree_id == entry.tree_id), None)
        if now is None or not now.alive:
            raise DaemonError(
                f"no daemon took over {entry.mountpoint}: pkramctl dmesg says why; mount {entry.name} again"
            )
        if now.pid != entry.pid and daemons.ask(now).status is not None:
            break
        if time.monotonic() - began > SECONDS:
            raise DaemonError(f"no daemon took over {entry.mountpoint} within {SECONDS:g} s: pkramctl dmesg says why")
        time.sleep(_POLL)
    seconds = time.monotonic() - began
    return {"mountpoint": entry.mountpoint, "name": entry.name, "before": entry.pid, "pid": now.pid, "seconds": seconds}
