# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot process that is started before its time looks at nothing until it is told, and boots once."""

import os
from pathlib import Path

import pytest

from pkramfs.errors import MachineError
from pkramfs.kernel import booting, running, succession
from pkramfs.machine.directory import Machine


@pytest.fixture
def machine(pkram_root: Path) -> Machine:
    made = Machine(str(pkram_root / "default"))
    made.create()
    return made


def decide(machine: Machine) -> None:
    with machine.lifecycle(shared=False):
        succession.decide_cold(machine)


def test_it_waits_and_then_boots_what_is_pending_by_then(machine: Machine) -> None:
    with booting.prepared(machine) as waiting:
        waiting.until_ready()
        decide(machine)
        booting.run(machine, force=False)
        assert waiting.process.returncode == 0
        assert running.look(machine).generation == 1
        with pytest.raises(MachineError, match="no boot is pending"):
            machine.remove("nvram.json")
            booting.run(machine, force=False)  # another process


def test_one_that_is_not_needed_leaves_nothing(machine: Machine) -> None:
    decide(machine)
    with booting.prepared(machine) as waiting:
        waiting.until_ready()
    assert waiting.process.returncode != 0 and not machine.has("kernel.json")


def test_it_ends_with_who_has_started_it(machine: Machine) -> None:
    decide(machine)
    waiting = booting.Waiting(machine)
    waiting.until_ready()
    assert waiting.process.stdin is not None and waiting.process.stdout is not None
    waiting.process.stdin.close()
    assert waiting.process.wait(60) == 0 and not machine.has("kernel.json")
    waiting.process.stdout.close()


def test_one_that_has_died_is_an_error(machine: Machine) -> None:
    decide(machine)
    with booting.prepared(machine) as waiting:
        waiting.until_ready()
        os.kill(waiting.process.pid, 9)
        waiting.process.wait()
        with pytest.raises(MachineError, match="status -9"):
            booting.run(machine, force=False)
    succession.start_boot(machine)
    assert running.look(machine).generation == 1
