# SPDX-License-Identifier: GPL-2.0-or-later
"""python -m pkramfs boot DIR: the boot of a machine, in a process that was given nothing else.

Started by pkram-kexec and by the first mount with `--parent PID --wait`, and told on its stdin to boot while that
process holds the machine lock. It holds a lock of its own, so that a boot whose parent was killed is waited for, and
gives up if its parent was gone before it began. Signals that end commands do not end it: there is no kernel to go
back to. A user who types it (no --parent) has it take the machine lock itself, for instance to go on with `--force`
after a boot that stopped at damaged metadata.

Kernel: the entry that the bootloader calls; arch/x86/boot/compressed/head_64.S
"""

import itertools
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from functools import partial

from pkramfs import stdio
from pkramfs.errors import MachineError, PkramfsError
from pkramfs.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Boot the machine in DIR; return 0 when kernel.json is written."""
    stdio.hold()
    parser = ArgumentParser(prog="boot", description="Boot the machine in a directory.")
    parser.add_argument("directory", metavar="DIR", help="the machine's directory")
    parser.add_argument("--parent", type=int, metavar="PID", help="the process that holds the machine lock for us")
    parser.add_argument("--force", action="store_true", help="give up preserved memory that cannot be read")
    parser.add_argument("--wait", action="store_true", help="import all, and wait on stdin to be told")
    args = parser.parse_args(argv)
    if args.wait and not _is_told(args):
        return 0
    try:
        _check_limits(args.directory)
        if args.parent is None:
            _boot_by_hand(args.directory, args.force)
        else:
            _boot_for(args.parent, args.directory, args.force)
    except PkramfsError as error:
        stdio.say(printable(f"boot: {error}"))
        return error.exit_status
    return 0


def _is_told(args: Namespace) -> bool:
    """Wait until our parent says that we shall boot; return False if it ends, or needs no boot after all."""
    from pkramfs.kernel import boot, succession  # noqa: F401 - this is what takes the time
    from pkramfs.kernel.booting import FORCE, GO, READY

    stdio.tell(READY.decode().strip())
    said = os.read(0, 64)
    args.force = args.force or said == FORCE
    return said in (GO, FORCE)


def _check_limits(directory: str) -> None:
    """Refuse where a limit is left that RAM exceeds."""
    from pkramfs.machine import process
    from pkramfs.machine.directory import Machine

    process.require(Machine(directory).hardware().size)


def _boot_for(parent: int, directory: str, force: bool) -> None:
    from pkramfs.kernel.boot import STEPS, boot
    from pkramfs.kernel.booting import BOOT_SECONDS
    from pkramfs.kernel.succession import BOOT_LOCK
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.locks import held

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    machine = Machine(directory)
    with held(machine.path(BOOT_LOCK), timeout=BOOT_SECONDS, what=f"{directory}, which boots already,"):
        if os.getppid() != parent:
            raise MachineError(f"the process that started this boot (pid {parent}) is gone")
        boot(machine, force=force, after_step=partial(_tell, itertools.count(1), len(STEPS)))


def _tell(numbers: Iterator[int], total: int, _step: str) -> None:
    """Tell the waiting command that another step of the boot is done."""
    stdio.tell(f"step {next(numbers)} of {total}")


def _boot_by_hand(directory: str, force: bool) -> None:
    from pkramfs.kernel.running import LOCK_SECONDS
    from pkramfs.kernel.succession import bring_up
    from pkramfs.machine.directory import Machine

    machine = Machine(directory)
    machine.hardware()
    with machine.lifecycle(shared=False, timeout=LOCK_SECONDS):
        bring_up(machine, force=force)


if __name__ == "__main__":
    sys.exit(main())
