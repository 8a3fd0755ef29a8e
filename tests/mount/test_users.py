# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts of an ordinary user, whom fusermount3 gives the connection: what outlives daemons outlives them here, too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.lab import REPOSITORY
from tests.support.places import ROOT

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not ROOT, reason="only root can become another user"),
    pytest.mark.skipif(not all(map(shutil.which, ("fusermount3", "setpriv", "unshare"))), reason="util-linux, fuse3"),
]
USER = 1000
AS_USER = """
mknod "$1/fuse" c 10 229 && chmod 666 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse || exit 99
shift
exec setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search "$@"
"""
"""Becomes an ordinary user, who may read where our Python lies, with a /dev/fuse as udev makes it."""
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from pkramfs.control.commands import Commands
from pkramfs.errors import DaemonError
from pkramfs.machine.directory import Machine
at = Path(sys.argv[1])

def ours(*words):
    done = subprocess.run([sys.executable, "-m", "pkramfs", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

def entry():
    return next(e for e in Machine.locate().mounts() if e.alive)

def held():
    try:
        return Commands(entry().socket).status().get("holder")
    except DaemonError:
        return None

def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)

def replaced(what):
    before = entry()
    os.kill(getattr(before, what), signal.SIGKILL)
    os.statvfs(at)
    until(lambda: getattr(entry(), what) not in (0, getattr(before, what)))
    until(lambda: held())

ours("mount", "none", str(at), "-o", "pkram=mine")
with open(at / "gone", "wb+", buffering=0) as gone:
    gone.write(b"gone")
    os.unlink(at / "gone")
    for what in ("pid", "holder", "pid"):
        replaced(what)
    pfn = Path(Machine.locate().path("pkram")).read_text().strip()
    ours("kexec", "-s", "-l", "builtin", "--append=ro pkram=" + pfn)
    assert "kept: " + str(at) in ours("kexec", "-e", "--keep-mounts")
    assert (os.geteuid(), os.pread(gone.fileno(), 9, 0)) == (1000, b"gone")
subprocess.run(["fusermount3", "-u", at], check=True)
until(lambda: not Machine.locate().live_ids())
print("well")
"""


def test_takeovers_of_a_users_mount(pkram_root: Path, tmp_path: Path) -> None:
    root = pkram_root / "user"
    root.mkdir()
    at = tmp_path / "at"
    at.mkdir()
    for place in (root, at):
        os.chown(place, USER, USER)
    for above in (pkram_root, tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o755)
    environment: dict[str, Any] = {**os.environ, "PKRAM_ROOT": str(root), "PYTHONPATH": str(REPOSITORY)}
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", AS_USER, "sh", tmp_path]
    done = subprocess.run(
        [*words, sys.executable, "-c", PROGRAM, at],
        env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if done.returncode == 99:
        pytest.skip(f"no device can be made here: {done.stderr}")
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
