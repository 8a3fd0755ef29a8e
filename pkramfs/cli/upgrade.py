# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl upgrade: put the code on disk under mounts that are in use.

The holder becomes the new code while the daemon serves. Then that makes room between two requests, and the holder
starts another daemon, which recovers the tree and goes on. Programs wait for that only. Before all this a process of
ours imports the new code once.

Kernel: kernel/livepatch/, by other means
"""

import argparse
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
    """Raise MachineError if the code on disk cannot be imported: a holder that becomes it would end."""
    import subprocess
    import sys

    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import pkramfs.daemon.handover"],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise MachineError(f"the code on disk cannot be imported ({last}): nothing was changed")


def _upgrade(machine: "Machine", entry: "MountEntry") -> dict[str, Any]:
    """Replace one daemon; return both pids and how long that took."""
    from pkramfs.control.commands import Commands

    began = time.monotonic()
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
