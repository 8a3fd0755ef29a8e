# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands whose standard descriptors are closed, full or broken: the right status, one line, nothing harmed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkramfs.machine.directory import Machine
from tests.support.preserved import Trees, write

pytestmark = pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="no shell to close descriptors")

CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"]
LOOKS = [
    *("ctl status", "ctl --json nodes", "ctl dmesg", "ctl format", "ctl --version"),
    *("kexec -e -n", "mount --help", "--help"),
]


def shell(command: str, closed: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """`pkramfs COMMAND` with descriptors as the shell's words say."""
    line = f"{sys.executable} -m pkramfs {command} {closed}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60, env=env)


@pytest.fixture
def machine(root, ctl, kexec):
    assert ctl("machine", "create", "--ram", "128M", "--seed", "3")[0] == 0
    assert kexec("-l", "builtin:1M", "--reuse-cmdline")[0] == 0
    return Path(root) / "default"


def test_what_looks_works_with_closed_descriptors_and_says_a_full_stdout(machine, some):
    for command in (LOOKS[0], *some(LOOKS[1:], 2)):
        for closed in CLOSED[-1:] if command != "ctl status" else CLOSED:
            done = shell(command, closed)
            assert (done.returncode, done.stderr) == (0, ""), (command, closed)
        done = shell(command, ">/dev/full")
        assert done.returncode == 1, (command, done)
        assert done.stderr.endswith(": write error: No space left on device\n") and done.stderr.count("\n") == 1, (
            command
        )
        assert shell(command, ">/dev/full", "1").stderr == done.stderr, command
        done = shell(command, ">/dev/full 2>/dev/full")
        assert (done.returncode, done.stderr) == (1, ""), command


def test_an_error_keeps_its_status_whatever_can_be_printed(machine, some):
    for words, status in (
        ("ctl free nothing", 9),
        ("ctl dance", 2),
        ("kexec --resume --cold", 2),
        ("mount x", 1),
        ("dance", 2),
    ):
        for streams in some(("", CLOSED[-1], "2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"), 2):
            done = shell(words, streams)
            assert done.returncode == status, (words, streams, done)
            assert done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr


def test_contents_that_nobody_gets_are_an_error(machine):
    Trees(Machine.locate()).plant("x", lambda tree: write(tree, b"f", b"x"))
    for command in ("ctl cat x f", "ctl export x -"):
        done = shell(command, ">&-")
        assert (done.returncode, done.stderr) == (1, "pkramctl: write error: Bad file descriptor\n")


def test_whose_reader_has_had_enough_ends_silently(machine):
    done = shell("ctl format", "| head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 141) and done.stderr == ""
    done = shell("ctl format", "| true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 141) and done.stderr == ""


@pytest.mark.few(2)
@pytest.mark.parametrize("streams", ["<&-", "<&- >&- 2>&-", ">/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_a_kexec_is_done_whatever_can_be_printed(machine, streams):
    """The boot process, too, starts without the descriptors; and nothing of RAM gets into a file, or the reverse."""
    before = (machine / "kernel.json").read_text()
    done = shell("kexec -v -l builtin:1M --reuse-cmdline -e", streams)
    assert done.returncode == 0, done
    assert done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr
    assert (machine / "kernel.json").read_text() != before
    assert shell("ctl verify", "").returncode == 0
    assert b"nodes checked" not in (machine / "ram").read_bytes()
