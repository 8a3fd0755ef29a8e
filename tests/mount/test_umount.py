# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends at awkward moments: umount during a save, a daemon that does not end, signals, places in use."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.daemon import claim, serving
from tests.support.waiting import until

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[2]
UMOUNT = ["umount"] if ROOT else ["fusermount3", "-u"]
LAZY = ["umount", "-l"] if ROOT else ["fusermount3", "-uz"]

SLOW = """
import os, sys, time
import pkramfs.control.keeper as keeper
from pkramfs.daemon import claim
from pkramfs.daemon import mount as daemon
from pkramfs.daemon import serving

preserve, go = keeper.preserve, sys.argv.pop(1)

def slowly(*args, **named):
    work = preserve(*args, **named)
    yield next(work)
    open(go + ".begun", "w").close()
    while not os.path.exists(go):
        yield time.sleep(0.001)
    return (yield from work)

keeper.preserve = slowly
sys.exit(serving.main())
"""
"""A daemon whose saves wait, half-way, for a file to appear."""

TELLING = """
import json, sys
from pkramfs.daemon import claim
from pkramfs.daemon import mount as daemon
from pkramfs.daemon import serving
from pkramfs.machine.frames import Frames

release, where = Frames.release_all, sys.argv.pop(1)

def telling(self):
    tree = TREES[0]
    tree.wake()
    files = {i.ino: bytes(tree.read(i.ino, 0, i.size)).decode() for i in tree.inodes.values() if i.is_file}
    with open(where, "w") as file:
        json.dump(sorted(files.values()), file)
    release(self)

TREES = []
build = daemon.Daemon._build

async def noted(self):
    TREES.append(await build(self))
    return TREES[0]

daemon.Daemon._build, Frames.release_all = noted, telling
sys.exit(serving.main())
"""
"""A daemon that tells what its files held when it gave them back."""

DYING = """
import os, signal, sys
from pkramfs.daemon import serving
from pkramfs.machine.leases import Leases
from pkramfs.machine.ram import Ram

punch, release, _ = Ram.punch, Leases.release, sys.argv.pop(1)

def dying(self, *args):
    Ram.punch = lambda *args: (punch(*args), os.kill(os.getpid(), signal.SIGKILL))
    release(self, *args)

Leases.release = dying
sys.exit(serving.main())
"""
"""A daemon that is killed while it frees its tree: the memory has gone back, and its page blocks are still leased."""


@pytest.fixture
def start(lab: Any) -> Iterator[Callable[[str, Path, Path], None]]:
    """Mounts as pkram=one with a daemon of our own, which must serve, and end by itself before the test does."""
    daemons = []

    def begin(code: str, argument: Path, directory: Path) -> None:
        ours, theirs = os.pipe()
        words = [sys.executable, "-c", code, str(argument), str(theirs), str(directory), "pkram=one"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with open(lab.root / "daemon.log", "ab") as log:
            daemons.append(subprocess.Popen(words, pass_fds=[theirs], env=environment, stderr=log, cwd="/"))
        os.close(theirs)
        with open(ours) as pipe:
            assert json.loads(pipe.readline()) == {"ok": ""}

    yield begin
    for process in daemons:
        process.wait(60)


@pytest.mark.parametrize("how", [UMOUNT, LAZY], ids=["umount", "lazy"])
def test_umount_during_a_save_completes_it(lab: Any, start: Any, how: list[str]) -> None:
    mnt, go = lab.dir("one"), lab.root / "go"
    start(SLOW, go, mnt)
    (mnt / "file").write_text("kept")
    entry = lab.entry(mnt)
    words = [sys.executable, "-m", "pkramfs", "mount", "none", str(mnt), "-o", "remount,preserve,ro,"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as preserving:
        until((lab.root / "go.begun").exists)
        assert lab.status(mnt)["busy"]
        subprocess.run([*how, str(mnt)], check=True)
        assert not os.path.ismount(mnt)
        again = lab.start(mnt, "pkram=one")  # waits for the name
        assert entry.tree_id in lab.machine.live_ids()
        assert lab.nodes() == []  # all or nothing: nothing yet
        go.touch()
        assert preserving.wait(60) == 0
        assert preserving.stderr is not None and preserving.stderr.read() == ""
    assert again.wait(60) == 0
    assert (mnt / "file").read_text() == "kept"
    assert lab.status(mnt)["state"] == "preserved"


def test_a_daemon_that_does_not_end_is_named(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is 30 s; a shorter one says the same."""
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    with open(mnt / "file", "w"):
        subprocess.run([*LAZY, str(mnt)], check=True)
        assert claim.GOING_SECONDS == 30
        monkeypatch.setattr(claim, "GOING_SECONDS", 0.2)
        ours, theirs = os.pipe()
        assert serving.main([str(theirs), str(mnt), "pkram=one"]) == 1
        with open(ours) as pipe:
            answer = json.loads(pipe.readline())
        assert answer["error"] == (
            f"one was mounted on {mnt} and its daemon (pid {entry.pid}) has not ended yet: "
            "end the programs that use it, or the daemon"
        )
        assert not os.path.ismount(mnt)
    lab.gone(entry)
    lab.mount("one")


@pytest.mark.parametrize("held", [False, True], ids=["idle", "held open"])
def test_sigterm_flushes(lab: Any, start: Any, held: bool) -> None:
    """What the kernel had not sent yet reaches the tree before it ends, even where somebody has a file open."""
    mnt, told = lab.dir("one"), lab.root / "told"
    start(TELLING, told, mnt)
    entry = lab.entry(mnt)
    descriptors = []
    for number in range(20):
        descriptors.append(os.open(mnt / str(number), os.O_CREAT | os.O_RDWR))
        os.write(descriptors[-1], f"{number:02}".encode())
    for fd in [] if held else descriptors:
        os.close(fd)
    os.kill(entry.pid, signal.SIGTERM)
    lab.gone(entry)
    assert not os.path.ismount(mnt)
    assert json.loads(told.read_text()) == [f"{number:02}" for number in range(20)]
    for fd in descriptors if held else []:
        with contextlib.suppress(OSError):  # ENOTCONN
            os.close(fd)


@pytest.mark.parametrize("process", ["serving", "holder"])
def test_sigkill_while_a_tree_is_freed(lab: Any, start: Any, process: str) -> None:
    """It was unmounted: the NAME is free, and nobody looks for a log where there is none any more."""
    mnt = lab.dir("one")
    start(DYING.replace("serving", process), lab.root, mnt)
    (mnt / "file").write_text("lost")
    lab.umount(mnt)
    assert os.listdir(lab.mount("one")) == []


def test_sigterm_during_a_save_completes_it(lab: Any, start: Any) -> None:
    mnt, go = lab.dir("one"), lab.root / "go"
    start(SLOW, go, mnt)
    (mnt / "file").write_text("kept")
    entry = lab.entry(mnt)
    words = [sys.executable, "-m", "pkramfs", "mount", "none", str(mnt), "-o", "remount,preserve,ro"]
    with subprocess.Popen(words) as preserving:
        until((lab.root / "go.begun").exists)
        os.kill(entry.pid, signal.SIGTERM)
        until(lambda: not os.path.ismount(mnt))
        go.touch()
        assert preserving.wait(60) == 0
    lab.gone(entry)
    assert (lab.mount("one") / "file").read_text() == "kept"


def test_sigkill_during_a_save_publishes_nothing(lab: Any, start: Any) -> None:
    mnt, go = lab.dir("one"), lab.root / "go"
    start(SLOW, go, mnt)
    (mnt / "file").write_text("kept")
    entry = lab.entry(mnt)
    words = [sys.executable, "-m", "pkramfs", "mount", "none", str(mnt), "-o", "remount,preserve,ro"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as preserving:
        until((lab.root / "go.begun").exists)
        os.kill(entry.pid, signal.SIGKILL)
        assert preserving.wait(60) != 0
        assert preserving.stderr is not None and preserving.stderr.read().count("\n") == 1
    with pytest.raises(OSError) as caught:
        os.listdir(mnt)
    assert caught.value.errno == errno.ENOTCONN
    lab.gone(entry)
    assert lab.nodes() == []
    assert (lab.mount("one") / "file").read_text() == "kept"


def test_a_preserved_tree_outlives_sigkill(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("kept")
    lab.remount(mnt, "preserve,ro")
    entry = lab.entry(mnt)
    lab.kill(entry)
    assert (lab.mount("one") / "file").read_text() == "kept"  # over the dead mount


def test_a_dead_mount_in_which_somebody_stands_is_mounted_over(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "directory").mkdir()
    with subprocess.Popen(["sleep", "60"], cwd=mnt / "directory") as inside:
        try:
            entry = lab.entry(mnt)
            lab.kill(entry)
            lab.mount("one")
            assert os.listdir(mnt) == ["directory"]
            assert inside.poll() is None
        finally:
            inside.kill()
    lab.umount(mnt)
    assert not os.path.ismount(mnt)


@pytest.mark.skipif(not ROOT, reason="fusermount3 mounts only where its user may write")
def test_a_place_in_use_is_mounted_over_as_by_mount_8(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "below").touch()
    with subprocess.Popen(["sleep", "60"], cwd=mnt) as inside:
        try:
            done = lab.helper(mnt, "pkram=two")
            assert (done.returncode, done.stderr) == (0, "")
            (mnt / "above").touch()
            assert os.listdir(mnt) == ["above"]
            assert os.listdir(f"/proc/{inside.pid}/cwd") == ["below"]
            assert "busy" in subprocess.run(["umount", mnt, mnt], capture_output=True, text=True).stderr
            assert os.listdir(mnt) == ["below"]
        finally:
            inside.kill()
    until(lambda: lab.helper(mnt, "pkram=one").stdout == f"one is already mounted on {mnt}\n")
