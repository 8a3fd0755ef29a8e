# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl upgrade: put the code on disk under mounts that are in use.

The holder becomes the new code while the daemon serves. Then that makes room between two requests, and the holder
starts another daemon, which recovers the tree and goes on. Programs wait for that only.

    this command      imports the modules of a holder, and recovers each tree in its own memory: it is the code on disk
    the holder        becomes that code, and says so; if it ends instead, the old code goes on
    the next daemon   takes over, and is on trial until it has served; if it dies before that, the old code goes on

A failure is reported in one line, and the remaining mounts are left alone, because the same code would fail there, too.
A daemon on trial must answer some requests, so this command sends some to each mount meanwhile.

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
    from collections.abc import Iterator

    from pkramfs.control.replies import Status
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

SECONDS = 60.0
"""How long the next daemon may take until it answers."""
_TRIAL_SECONDS = 600.0
"""How long it may be on trial: as long as the holder waits for a tree of ten million files."""
_POLL = 0.01


class LateError(DaemonError):
    """New code failed under a mount that it had taken over."""


def add(made: argparse.ArgumentParser) -> None:
    """Add the options of `upgrade` to its parser."""
    made.add_argument("mounts", nargs="*", metavar="DIR|NAME", help="the mounts, by directory or NAME")
    made.add_argument("--all", action="store_true", help="all mounts of the machine")


def act(args: argparse.Namespace) -> int:
    """Run `pkramctl upgrade DIR|NAME… | --all`."""
    need(bool(args.mounts) != args.all, "give the mounts to upgrade, or --all")
    machine = arguments.existing(args)
    chosen = _chosen(machine, args.mounts)
    _try_new_code()
    done, problems, left = [], list[PkramfsError](), list["MountEntry"]()
    for number, entry in enumerate(chosen):
        try:
            _rehearse(machine, entry)
            done.append(_upgrade(machine, entry))
        except LateError as error:
            problems.append(error)
            left = chosen[number + 1 :]
            break
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
    if left:
        arguments.complain("pkramctl", f"{', '.join(entry.mountpoint for entry in left)}: left alone for that reason")
    return problems[0].exit_status if problems else 0


def _chosen(machine: "Machine", wanted: list[str]) -> "list[MountEntry]":
    """Return the living mounts that are meant, by name or directory; all without any."""
    living = daemons.alive(machine)
    found = []
    for one in wanted:
        entry = next((e for e in living if one == e.name or os.path.abspath(one) == e.mountpoint), None)
        if entry is None:
            raise MachineError(f"{one} is not a mount of the machine {machine.path()}: pkramctl status lists them")
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
    """Return the text of an error, with its type unless it is one of ours."""
    return str(error) if isinstance(error, PkramfsError) else f"{type(error).__name__}: {error}"


def _upgrade(machine: "Machine", entry: "MountEntry") -> dict[str, Any]:
    """Replace one daemon; return both pids and how long that took."""
    from pkramfs.control.commands import Commands

    began = time.monotonic()
    with contextlib.suppress(DaemonError):  # it died: then another takes over, or none
        Commands(entry.socket).upgrade()
    pid = _taken_over(machine, entry, began)
    seconds = time.monotonic() - began
    pid = _proven(machine, entry, pid)
    return {"mountpoint": entry.mountpoint, "name": entry.name, "before": entry.pid, "pid": pid, "seconds": seconds}


def _taken_over(machine: "Machine", entry: "MountEntry", began: float) -> int:
    """Wait until another daemon answers; return its pid."""
    while time.monotonic() - began <= SECONDS:
        now, status = _look(machine, entry)
        if now.pid != entry.pid and status is not None:
            return now.pid
        time.sleep(_POLL)
    raise DaemonError(f"no daemon took over {entry.mountpoint} within {SECONDS:g} s: pkramctl dmesg says why")


def _proven(machine: "Machine", entry: "MountEntry", pid: int) -> int:
    """Wait until the new code has served; return its daemon's pid. Raise LateError if the code before serves again."""
    deadline = time.monotonic() + _TRIAL_SECONDS
    with _asking(entry):
        while time.monotonic() < deadline:
            _, status = _look(machine, entry)
            if status is not None and (why := status.get("went_back")) is not None:
                raise LateError(
                    f"the code on disk failed under {entry.mountpoint} ({why}): daemon {status['pid']} of the code "
                    "before goes on"
                )
            if status is not None and not status.get("on_trial"):
                return status["pid"]
            time.sleep(_POLL)
    raise DaemonError(f"daemon {pid} of {entry.mountpoint} does not answer: pkramctl dmesg says what becomes of it")


def _look(machine: "Machine", entry: "MountEntry") -> "tuple[MountEntry, Status | None]":
    """Return the entry of a mount as it is now, and its daemon's status, if that answers; DaemonError without one."""
    now = next((e for e in machine.mounts() if e.tree_id == entry.tree_id), None)
    if now is None or not now.alive:
        raise DaemonError(f"no daemon took over {entry.mountpoint}: pkramctl dmesg says why; mount {entry.name} again")
    return now, daemons.ask(now).status


@contextlib.contextmanager
def _asking(entry: "MountEntry") -> "Iterator[None]":
    """Have the kernel ask the daemon of a mount again and again, if it is in our mount namespace, and ours to use."""
    import threading

    over = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(_POLL) and os.stat(entry.mountpoint).st_dev == entry.dev:
                os.statvfs(entry.mountpoint)

    threading.Thread(target=ask, daemon=True).start()  # it may be held up for long, by a daemon that hangs
    try:
        yield
    finally:
        over.set()
