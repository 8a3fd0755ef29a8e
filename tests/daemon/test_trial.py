# SPDX-License-Identifier: GPL-2.0-or-later
"""The code before, which waits while new code is tried: when it takes back, what it ends first, and when it goes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SCENES = """
import json, os, signal, sys
from pkramfs.daemon import trial

trial.HELLO_SECONDS = PATIENCE = 0.3

def fork(*closed):
    # One that waits to be killed.
    if pid := os.fork():
        return pid
    for fd in closed:
        os.close(fd)
    signal.pause()

def play(scene, unreadable, said, lives):
    # Who is to end has `lives` open.
    say = lambda *words: os.write(said, json.dumps(words).encode())
    daemon = fork(said, lives)
    found = trial.keep(os.pidfd_open(daemon), PATIENCE, lambda: unreadable)
    if isinstance(found, trial.Failed):  # we are the reserve
        os.close(lives)
        say(*found, os.path.exists(f"/proc/{daemon}"))
        if found.serves:
            os.kill(daemon, signal.SIGKILL)
        return
    tried = trial.Trial(*found)
    if scene != "it knows of no trial":
        tried.hello()
    if scene == "its holder ends":
        return
    os.kill(daemon, signal.SIGKILL)
    os.waitpid(daemon, 0)
    if scene == "its daemon fails":
        other = fork(said)
        tried.failed("it is broken")
        say("it goes on", tried.runs)
        os.kill(other, signal.SIGKILL)
    elif scene == "its daemon hangs":
        fork(said)
        signal.pause()
    elif scene == "it knows of no trial":
        say("the reserve ended", os.waitpid(found[0], 0)[1])
    else:
        tried.over()
        say("the reserve ended", tried.runs, os.path.exists(f"/proc/{found[0]}"))

for line in sys.stdin:
    scene, unreadable = json.loads(line)
    said, theirs = os.pipe()
    living, lives = os.pipe()
    if not (pid := os.fork()):
        os.close(said)
        os.close(living)
        play(scene, unreadable, theirs, lives)
        os._exit(0)
    os.close(theirs)
    os.close(lives)
    with open(said) as file, open(living) as alive:
        print(file.read(), flush=True)
        alive.read()
    os.waitpid(pid, 0)
"""
"""A process that plays scenes of a holder that becomes new code; each prints what is said by who goes on."""


@pytest.fixture(scope="module")
def stage() -> Iterator["subprocess.Popen[str]"]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", SCENES]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment, **pipes) as process:
        yield process


@pytest.mark.parametrize(
    ("scene", "unreadable", "expected"),
    [
        ("its holder ends", "", ["its holder ended", True, True]),
        ("its daemon fails", "", ["it is broken", False, False]),
        ("its daemon hangs", "", ["its daemon did not serve within 0 s", False, False]),
        ("its daemon fails", "its log is of version 3", ["it goes on", False]),
        ("it knows of no trial", "", ["the reserve ended", 0]),
        ("it is proven", "", ["the reserve ended", False, False]),
    ],
)
def test_the_code_before(stage: Any, scene: str, unreadable: str, expected: list[object]) -> None:
    """It goes on when all others have ended, but for a daemon that had not left; or it ends."""
    stage.stdin.write(json.dumps([scene, unreadable]) + "\n")
    stage.stdin.flush()
    assert json.loads(stage.stdout.readline()) == expected
