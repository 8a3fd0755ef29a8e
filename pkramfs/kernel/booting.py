# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that boots: started, perhaps before its time, told to go, listened to.

    with prepared(machine) as waiting:      it imports the modules of a boot, and reads nothing
        waiting.until_ready()
        …                                   the old kernel ends
        run(machine, force=…)               "go": it boots, in the process that is there, or in one that is started now
                                            at the end of the block one that was not used ends without a trace

A boot reads only the machine's directory. It makes no difference that its process has existed for a while, but
it takes the start of an interpreter off the time in which no kernel runs.

Kernel: kernel/kexec_core.c (kexec_load, long before kernel_kexec)
"""

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

from pkramfs.errors import FormatError, MachineError
from pkramfs.machine.directory import Machine
from pkramfs.machine.host import VARIABLE
from pkramfs.mounting import patience

BOOT_SECONDS = 600.0
"""How long a boot may take: copying and summing what was loaded are most of it."""
READY, GO, FORCE = b"ready\n", b"go\n", b"go, by force\n"
"""What a boot process says when it has imported all, and is told on its stdin."""
_STEPS = re.compile(rb"^step ([0-9]+) of ([1-9][0-9]*)$", re.MULTILINE)
"""What it says after each step."""


class Waiting:
    """A boot process that waits to be told."""

    def __init__(self, machine: Machine) -> None:
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self.directory = machine.path()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pkramfs", "boot", self.directory, "--parent", str(os.getpid()), "--wait"],
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": package, **_host()},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # neither Ctrl-C nor a closed terminal ends a booting kernel
        )
        self._said = b""

    def until_ready(self) -> None:
        """Wait until it has imported its modules, or has ended."""
        deadline = time.monotonic() + BOOT_SECONDS
        while READY not in self._said and self._hear(deadline):
            pass

    def go(self, *, force: bool) -> None:
        """Have it boot, and wait for that; raise MachineError with its reason if it fails."""
        assert self.process.stdin is not None
        with self.process:
            try:
                with contextlib.suppress(BrokenPipeError):  # it has died, and its last words say why
                    self.process.stdin.write(FORCE if force else GO)
                    self.process.stdin.close()
                said = self._listen()
            except BaseException:
                self.process.kill()
                raise
        if status := self.process.wait():
            reason = (said or [f"it ended with status {status}"])[-1]
            raise failure(reason.removeprefix("boot: "), status)

    def give_up(self) -> None:
        """Have it end without a trace."""
        with contextlib.suppress(BrokenPipeError), self.process:
            self.process.kill()

    def _hear(self, deadline: float) -> bool:
        """Read more of its output; return False at its end."""
        assert self.process.stdout is not None
        ready = select.poll()
        ready.register(self.process.stdout, select.POLLIN)
        if not patience.is_ready(ready, deadline):
            raise MachineError(f"boot did not end within {BOOT_SECONDS:g} s: pkram-kexec --resume tries again")
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        self._said += part
        return bool(part)

    def _listen(self) -> list[str]:
        """Return its output until it ends, without its steps, which go to the progress display."""
        deadline = time.monotonic() + BOOT_SECONDS
        while self._hear(deadline):
            if steps := _STEPS.findall(self._said):
                patience.tell((1 + int(steps[-1][0]) / int(steps[-1][1])) / 2)
        lines = self._said.replace(READY, b"").decode("utf-8", "surrogateescape").splitlines()
        return [line for line in lines if line.strip() and not _STEPS.match(os.fsencode(line))]


_prepared: list[Waiting] = []
"""The process that the next boot of its machine uses."""


@contextlib.contextmanager
def prepared(machine: Machine) -> Iterator[Waiting]:
    """Keep a process ready for the boot of a machine; an unused one ends with the block."""
    waiting = Waiting(machine)
    _prepared.append(waiting)
    try:
        yield waiting
    finally:
        if waiting in _prepared:
            _prepared.remove(waiting)
            waiting.give_up()


def run(machine: Machine, *, force: bool) -> None:
    """Boot in a process that is given nothing but the machine's directory, and wait for it."""
    found = next((one for one in _prepared if one.directory == machine.path()), None)
    if found is not None:
        _prepared.remove(found)
    (found or Waiting(machine)).go(force=force)


def failure(reason: str, status: int) -> MachineError:
    """Return the error of a boot that has ended with this exit status, with the remedy if there is one."""
    remedy = ""
    if status == FormatError.exit_status:
        remedy = "; nothing was freed: pkram-kexec --resume --force goes on and loses what is preserved"
    return MachineError(f"boot failed: {reason}{remedy}")


def _host() -> dict[str, str]:
    """Return the environment in which a boot sees the same host as we do: tests have one of their own."""
    return {VARIABLE: place} if (place := os.environ.get(VARIABLE)) else {}
