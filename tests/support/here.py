# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of ours, and boots, in this process: without a new Python, which takes longer than most of them work."""

import contextlib
import io
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from unittest import mock

from pkramfs import __main__ as program
from pkramfs.errors import PkramfsError
from pkramfs.kernel import boot, booting, running, succession
from pkramfs.machine.directory import Machine
from tests.support.nursery import forking

_START_BOOT = succession.start_boot


def may_run_here(words: list[str]) -> bool:
    """Return whether these are a command of ours; whom it has to start is started by `forking`, or is a boot."""
    return words[0] in ("ctl", "mount", "kexec") and threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def starting_nothing(words: Sequence[str] = ()) -> Iterator[None]:
    """Have commands in this process boot here, and the nursery fork their daemons: no Python starts.

    A boot that must be ready before mounts stand still is a process, as it is for users.
    """
    with forking(), contextlib.ExitStack() as boots:
        if "--keep-mounts" not in words and succession.start_boot is _START_BOOT:  # or a test has put another there
            boots.enter_context(mock.patch.object(succession, "start_boot", boot_here))
        yield


def run_here(words: list[str], environment: Mapping[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Return the result of a command, whatever it is; raise TimeoutExpired after so many seconds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _bounded(words, seconds),
        starting_nothing(words),
    ):
        try:
            status = program.main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _bounded(words: list[str], seconds: float) -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise subprocess.TimeoutExpired(words, seconds)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def boot_here(machine: Machine, *, force: bool = False) -> None:
    """Stand for succession.start_boot, which starts a process: a boot sees no difference."""
    try:
        boot.boot(machine, force=force)
    except PkramfsError as error:
        raise booting.failure(str(error), error.exit_status) from error


def bring_up(machine: Machine) -> None:
    """Do what the first mount does before it mounts: make the machine if it is not there, and boot it."""
    if os.path.exists(machine.path("kernel.json")):
        return  # whatever else is to be done is the command's
    with mock.patch.object(succession, "start_boot", boot_here):
        running.attach(machine)
