# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons, and those who make their checkpoints, are killed at random under programs that check every byte.

The long form (--long) kills a thousand.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.lab import REPOSITORY
from tests.support.mortal import Held, held, shadows

pytestmark = pytest.mark.mount

OFTEN = "journal.REQUESTS = 300"
"""Makes checkpoints due often."""


@pytest.fixture(scope="module")
def kills(request: pytest.FixtureRequest) -> int:
    return 1000 if request.config.getoption("--long") else 15


def serving(mount: Held, dead: int) -> int:
    """The daemon, once another serves than the one that was killed last; numbers of earlier ones come again."""
    deadline = time.monotonic() + 60
    while (pid := mount.pid) == dead:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return pid


def started(daemon: int, seconds: float = 2) -> list[int]:
    """Wait until a daemon has a checkpoint made, if it does before long; return who makes it."""
    deadline = time.monotonic() + seconds
    while not (found := shadows(daemon)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


def ended(pids: list[int], seconds: float = 3) -> None:
    """Wait until processes have ended, if they do before long."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", ["pkram=one", "pkram=one,standby"])
def test_kills_at_random(lab: Any, seed: int, kills: int, options: str) -> None:
    """No writer sees an error or a wrong byte; what is there at last is preserved, and the same after another mount."""
    choice, stop = random.Random(seed), lab.root / "stop"
    with held(lab, extra=OFTEN, options=options) as mount:
        at = mount.directory
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        words = [sys.executable, "-m", "tests.support.writers", str(stop), str(seed)]
        programs = {}
        for kind in ("names", "appends", "maps", "random", "locks", "deleted"):
            (at / kind).mkdir()
            programs[kind] = subprocess.Popen(
                [*words, kind, str(at / kind)], env=environment, stdout=subprocess.PIPE, text=True, cwd="/"
            )
        try:
            died, dead = {"daemon": 0, "shadow": 0}, 0
            for _ in range(kills):
                pid = serving(mount, dead)
                time.sleep(choice.choice([0.02, 0.1, 0.2, 0.6]))
                making = shadows(pid) or (started(pid) if choice.random() < 0.2 else [])
                if making and choice.random() < 0.3:
                    ended(making)  # some become checkpoints
                    making = []
                who, victim = choice.choice([*(("shadow", one) for one in making), ("daemon", pid)])
                with contextlib.suppress(ProcessLookupError):  # a checkpoint is ready
                    os.kill(victim, signal.SIGKILL)
                    died[who] += 1
                dead = pid if victim == pid else 0
                assert mount.process.poll() is None
            stop.touch()
            said = {kind: program.communicate(timeout=60)[0] for kind, program in programs.items()}
        finally:
            stop.touch()
            for program in programs.values():
                program.kill()
                program.communicate()
        assert {kind: program.returncode for kind, program in programs.items()} == dict.fromkeys(programs, 0), said
        steps = {kind: int(text) for kind, text in said.items()}
        print(f"\nkilled {died}, steps: {json.dumps(steps)}")
        assert all(steps.values()), steps
        before = tree(at)
        lab.remount(at, "preserve,ro")
        assert lab.run("ctl", "verify").returncode == 0
    again = lab.mount("one")
    assert tree(again) == before
    assert lab.run("ctl", "verify").returncode == 0


def tree(at: Path) -> dict[str, Any]:
    """Names, attributes and contents."""
    found: dict[str, Any] = {}
    for path in sorted(at.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path.relative_to(at))] = (status.st_mode, status.st_nlink, status.st_mtime_ns, content)
    return found
