# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one daemon: its log, and its exit status.

    it serves, and ends in order    0
    it cannot mount                 1, and the waiting command gets the reason
    it cannot take over             FINAL: its holder need not try again

Kernel: kernel/exit.c (do_exit)
"""

import logging
import signal
import sys
from collections.abc import Sequence

from pkramfs import stdio
from pkramfs.daemon.claim import AlreadyMounted
from pkramfs.daemon.holding import Holding
from pkramfs.daemon.job import FINAL, Held, Job
from pkramfs.daemon.leash import Leash
from pkramfs.daemon.mount import Daemon
from pkramfs.daemon.mountlog import begin_log
from pkramfs.daemon.standby import stand_by
from pkramfs.errors import PkramfsError, UsageError, explain
from pkramfs.kernel import kernelrecord
from pkramfs.kernel.cmdline import panics_on_oops
from pkramfs.machine.directory import Machine
from pkramfs.mounting.options import parse
from pkramfs.mounting.starting import ANYTHING, Reporter, option_string, wait_for_go

log = logging.getLogger("pkramfs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon of one mount without a holder."""
    job = read_job(argv)
    return 0 if job is None else serve(job)


def read_job(argv: Sequence[str] | None = None) -> Job | None:
    """Read FD for the answer, mount point, options, FD to read GO from, and wait for that; None if it never comes."""
    stdio.hold()
    fd, mountpoint, text, *go = sys.argv[1:] if argv is None else argv
    expected = wait_for_go(int(go[0])) if go else ANYTHING
    return None if expected is None else Job(int(fd), mountpoint, text, expected)


def serve(job: Job, leash: Leash | None = None, held: Held | None = None, *, standby: bool = False) -> int:
    """Run the daemon of one mount, with a holder if there is a leash; `held` is a mount to be taken over, by a
    `standby` when the holder says so."""
    text, mountpoint = job.text, job.mountpoint
    reporter = Reporter(job.fd) if held is None else Reporter(-1)
    begin_log()
    standing = None
    try:
        if standby and leash is not None and held is not None:
            standing, held = stand_by(parse(_words(held, text)), held, leash)
        daemon = Daemon(parse(text if held is None else _words(held, text)), mountpoint, reporter, job.expected)
        daemon.held, daemon.standing = held, standing
        if leash is not None:
            daemon.holding = Holding(leash, job, daemon.machine.log, daemon.held_by_another)
        daemon.run()
        if daemon.holding is not None and daemon.holding.leash is not None:
            daemon.holding.leash.ends()
    except AlreadyMounted as found:
        reporter.serving(str(found))
    except (PkramfsError, OSError) as error:
        reason = explain(error) if isinstance(error, OSError) else str(error)
        log.error("%s", reason)
        done = "not mounted" if held is None else "not taken over"
        _say(text, f"pkramfs: {mountpoint} was {done}: {reason}")
        reporter.failed(reason, error.exit_status if isinstance(error, UsageError) else 0)
        return 1 if held is None else FINAL
    except BaseException as error:
        log.exception("the daemon ends")
        reporter.failed(f"internal error: {type(error).__name__}: {error}; please report it")
        return 1
    return 0


def _words(held: Held, text: str) -> str:
    """Return the present options of a mount: a remount may have changed them."""
    machine = Machine.locate(parse(text).machine)
    found = next((e for e in machine.mounts() if e.tree_id == held.facts["tree_id"]), None)
    return text if found is None else option_string(found.options)


def panics(job: Job, number: int) -> bool:
    """Return True if the kernel panics when a daemon dies of this signal: an oops (see kernel/crash)."""
    machine = Machine.locate(parse(job.text).machine)
    return number != signal.SIGKILL and panics_on_oops(kernelrecord.cmdline(machine))


def _say(options: str, message: str) -> None:
    """Write a line to the kernel log, if the options name a machine."""
    try:
        Machine.locate(parse(options).machine).log(message)
    except PkramfsError as error:
        log.warning("no line in the kernel log: %s", error)  # options that name no machine
