# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mount bears: many files, many clients, clients that die half-way, faults of its own."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import until

pytestmark = pytest.mark.mount
PAGE, MIB = 4096, 1 << 20
SECONDS = 60


def private(lab: Any, mnt: Path) -> int:
    """Bytes that the daemon has for itself: neither the mapped RAM nor shared libraries."""
    lines = Path(f"/proc/{lab.entry(mnt).pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def fill(directory: Path, names: Iterator[str]) -> None:
    for name in names:
        os.mknod(directory / name, 0o100644)


@contextmanager
def running(script: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A Python program, killed at the end if it has not ended by itself."""
    command = [sys.executable, "-c", script, *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        try:
            yield program
        finally:
            program.kill()


# -- memory -------------------------------------------------------------------------------------


def test_what_files_and_runs_cost_the_daemon(lab: Any) -> None:
    """At most 1 KiB for an empty file, 64 bytes for a run of pages, in a daemon that grew and in one that restored."""
    mnt, files, runs = lab.mount("one"), 3000, 10_000
    fresh = private(lab, mnt)
    fill(mnt, (f"file{number}" for number in range(files)))
    filled = private(lab, mnt)
    assert (filled - fresh) / files < 1024
    with open(mnt / "fragmented", "wb") as file:
        for page in range(0, 2 * runs, 2):
            os.pwrite(file.fileno(), b"x", page * PAGE)
    assert os.stat(mnt / "fragmented").st_blocks == runs * PAGE // 512
    assert (private(lab, mnt) - filled) / runs < 64
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    lab.mount("one")
    assert private(lab, mnt) - fresh < files * 1024 + runs * 64


def test_what_files_give_up_goes_back_to_the_host(lab: Any) -> None:
    """Seen in `du` of the RAM file: by truncate, unlink, a rename over it, and the last close of a deleted file."""
    mnt, slack = lab.mount("one"), 4 * MIB  # tables, and what is kept to be handed out again

    def backed() -> int:
        return int(lab.machine.ram().backed)

    for number in range(5):
        (mnt / str(number)).write_bytes(b"x" * 16 * MIB)
    os.sync()
    left = backed()
    assert left >= 80 * MIB
    os.truncate(mnt / "0", MIB)
    os.unlink(mnt / "1")
    (mnt / "empty").touch()
    os.rename(mnt / "empty", mnt / "2")
    until(lambda: left - backed() >= 47 * MIB - slack, "memory of truncated and removed files")
    with open(mnt / "3", "rb") as file:
        os.unlink(mnt / "3")
        assert file.read(5) == b"xxxxx" and left - backed() < 63 * MIB - slack
    until(lambda: left - backed() >= 63 * MIB - slack, "memory of a deleted file that was open")
    os.unlink(mnt / "4")
    os.unlink(mnt / "0")
    until(lambda: left - backed() >= 80 * MIB - slack, "memory of all files")
    until(lambda: os.statvfs(mnt).f_bfree == os.statvfs(mnt).f_blocks, "room as it was")


def test_what_comes_and_goes_leaves_no_memory_behind(lab: Any) -> None:
    mnt, used = lab.mount("one"), []
    for _ in range(4):
        fill(mnt, (f"file{number}" for number in range(500)))
        used.append(private(lab, mnt))
        for entry in os.scandir(mnt):
            os.unlink(entry)
    assert used[-1] - used[0] < 256 << 10, "what 1,500 files took in between"


# -- many ---------------------------------------------------------------------------------------

CHURN = """
import itertools, os, sys
os.chdir(sys.argv[1])
print("ready", flush=True)
for number in itertools.count():
    os.mknod(f"new{number}")
    os.rename(f"new{number}", f"moved{number}")
    os.unlink(f"moved{number}")
"""


@pytest.mark.parametrize("count", [5000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_entries_in_one_directory(lab: Any, count: int) -> None:
    """Listed while others come and go, kept over a remount, and removed again."""
    mnt = lab.mount("one", "pkram=one,nr_inodes=2m")
    directory = mnt / "d"
    directory.mkdir()
    before = private(lab, mnt)
    fill(directory, (f"{number:07}" for number in range(count)))
    assert (private(lab, mnt) - before) / count < 1024
    stable = {f"{number:07}" for number in range(count)}
    with running(CHURN, directory) as churn:
        assert churn.stdout is not None and churn.stdout.readline()
        for _ in range(3):
            seen = os.listdir(directory)
            assert len(seen) == len(set(seen)), "an entry was shown twice"
            assert stable <= set(seen), "an entry was skipped"
        assert churn.poll() is None
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    lab.mount("one", "pkram=one,nr_inodes=2m")
    listed = os.listdir(directory)
    assert len(listed) == len(set(listed)) and stable <= set(listed)
    with pytest.raises(OSError) as caught:
        directory.rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    for name in listed:
        os.unlink(directory / name)
    directory.rmdir()
    assert lab.status(mnt)["files"] == 0


CLIENTS = """
import hashlib, os, sys
top, count = sys.argv[1], int(sys.argv[2])
reader, writer = os.pipe()
for number in range(count):
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # all begin when the pipe is closed
        os.mkdir(f"{top}/{number}")
        os.chdir(f"{top}/{number}")
        data = hashlib.sha256(b"%d" % number).digest() * 8192
        for turn in range(4):
            with open("new", "wb") as file:
                file.write(data[turn:])
                os.fsync(file.fileno())
            os.rename("new", "file")
            with open("file", "rb") as file:
                if file.read() != data[turn:] or os.listdir(".") != ["file"]:
                    os._exit(1)
        os.link("file", f"../link{number}")
        os._exit(0)
os.close(reader)
os.close(writer)
print(sum(os.wait()[1] == 0 for _ in range(count)))
"""


def test_sixty_four_clients_at_once(lab: Any) -> None:
    mnt = lab.mount("one")
    with running(CLIENTS, mnt, 64) as clients:
        assert clients.communicate(timeout=SECONDS)[0] == "64\n"
    assert {os.stat(mnt / str(number) / "file").st_nlink for number in range(64)} == {2}
    lab.remount(mnt, "preserve,ro")


# -- clients that die ---------------------------------------------------------------------------

WRITER = """
import mmap, os, sys
size = 64 << 20
data = mmap.mmap(-1, size)
data[:] = bytes(range(256)) * (size // 256)
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | int(sys.argv[2]), 0o644)
while True:
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, 0)
"""


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_client_killed_in_mid_write(lab: Any, flags: int) -> None:
    """What it had written is there, as far as it came; nothing else is, and nobody holds the file."""
    mnt = lab.mount("one")
    path = mnt / "file"
    for _ in range(2):
        with running(WRITER, path, flags) as writer:
            until(lambda: path.exists() and path.stat().st_size > 0, "the writer has begun")
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(SECONDS) == -signal.SIGKILL
        content = path.read_bytes()
        assert content == (bytes(range(256)) * (64 * MIB // 256))[: len(content)]
        until(lambda: lab.status(mnt)["writers"] == [], "the kernel's RELEASE")
        path.unlink()
    lab.remount(mnt, "preserve,ro")


# -- faults of its own --------------------------------------------------------------------------

FAULTY = """
import sys
from pkramfs.daemon import serving
from pkramfs.fs.tree import Tree

def fault(*_, **__):
    raise ZeroDivisionError("made by a test")

Tree.symlink = Tree.read = Tree.readdir = Tree.removexattr = Tree.punch = fault
sys.exit(serving.main(sys.argv[1:]))
"""


def test_a_fault_in_a_handler_is_eio_and_a_traceback_in_the_log(lab: Any) -> None:
    """Never the end of the mount, nor of any other request."""
    mnt = lab.dir("one")
    reader, writer = os.pipe()
    words = [sys.executable, "-c", FAULTY, str(writer), str(mnt), "pkram=one"]
    with subprocess.Popen(words, pass_fds=[writer]) as daemon, os.fdopen(reader) as status:
        os.close(writer)
        assert json.loads(status.readline()) == {"ok": ""}
        (mnt / "file").write_bytes(b"content")
        for call in (
            lambda: os.symlink("target", mnt / "link"),
            lambda: os.listdir(mnt),
            lambda: os.removexattr(mnt / "file", "user.x"),
            lambda: os.setxattr(mnt / "file", "user.pkramfs.punch", b"0:4096"),
            lambda: (mnt / "file").read_bytes(),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EIO
        assert os.stat(mnt / "file").st_size == 7
        log = Path(lab.machine.path("mounts")) / Path(lab.entry(mnt).socket).with_suffix(".log").name
        text = log.read_text()
        for handler in ("symlink", "readdir", "removexattr", "_punch", "read"):
            assert f"{handler}(" in text
        assert text.count("ZeroDivisionError: made by a test") >= 5
        log.write_text("")
        lab.umount(mnt)
        assert daemon.wait(SECONDS) == 0


PUNCH = """
import os, sys
os.chdir(sys.argv[1])
fd = os.open(str(os.getpid()), os.O_RDWR | os.O_CREAT)
data = bytes(8 << 20)
print("ready", flush=True)
while True:
    os.pwrite(fd, data, 0)
    os.setxattr(fd, "user.pkramfs.punch", b"0:8M")
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("turn", range(3))
def test_the_end_while_clients_punch(lab: Any, turn: int) -> None:
    """Who waits for the kernel's writing back is answered before the daemon goes."""
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    clients = [
        subprocess.Popen([sys.executable, "-c", PUNCH, str(mnt)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    try:
        for client in clients:
            assert client.stdout is not None and client.stdout.readline()
        os.kill(entry.pid, signal.SIGTERM)
        lab.gone(entry)
        for client in clients:
            assert client.wait(60) == 1, "not answered"
    finally:
        for client in clients:
            client.kill()
            client.communicate()
