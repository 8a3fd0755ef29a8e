# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec -e --keep-mounts: programs go on over a kexec, with all that they have open."""

import ctypes
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.cli import keeping, kexec
from pkramfs.errors import MachineError
from pkramfs.kernel import transition
from pkramfs.kernel.running import look
from pkramfs.mounting import syscalls
from pkramfs.mounting.options import MS_RDONLY
from tests.support.lab import User
from tests.support.places import ROOT

pytestmark = pytest.mark.mount
KEEP = ("-e", "--keep-mounts")
AT_SYMLINK_FOLLOW = 0x400


class Writer(threading.Thread):
    """Appends numbers to a file and reads them back, until it is told to stop or sees something wrong."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.done, self.steps, self.wrong = path, False, 0, ""

    def run(self) -> None:
        with open(self.path, "wb+", buffering=0) as file:
            while not self.done and not self.wrong:
                try:
                    os.pwrite(file.fileno(), b"%07d\n" % self.steps, 8 * self.steps)
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    if os.pread(file.fileno(), 8, 8 * self.steps) != b"%07d\n" % self.steps:
                        self.wrong = f"step {self.steps}"
                except OSError as error:
                    self.wrong = str(error)
                self.steps += 1

    def stop(self) -> bytes:
        self.done = True
        self.join(60)
        assert self.wrong == ""
        return b"".join(b"%07d\n" % number for number in range(self.steps))


@pytest.fixture
def writer() -> Iterator[Any]:
    """Start writers, which end with the test."""
    started: list[Writer] = []

    def start(path: Path) -> Writer:
        started.append(Writer(path))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.done = True
        one.join(60)


def deadline(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def generation(user: User) -> int:
    return look(user.machine).generation


def files(at: Path) -> dict[str, bytes]:
    return {str(path.relative_to(at)): path.read_bytes() for path in at.rglob("*") if path.is_file()}


def test_programs_keep_what_they_have(user: User, writer: Any) -> None:
    """Files open, deleted, without a name, mapped, locked; a working directory that is gone; a writer that goes on."""
    at, other = user.mount("one"), user.mount("other")
    (other / "file").write_bytes(b"other")
    (at / "gone").mkdir()
    with (
        open(at / "deleted", "wb+", buffering=0) as deleted,
        open(at / "mapped", "wb+", buffering=0) as mapped,
        open(at / "locked", "wb") as locked,
        subprocess.Popen(["sleep", "60"], cwd=at / "gone") as inside,
    ):
        try:
            deleted.write(b"x" * 100_000)
            (at / "deleted").unlink()
            unnamed = os.open(at, os.O_TMPFILE | os.O_RDWR, 0o600)
            os.write(unnamed, b"unnamed")
            mapped.truncate(40_000)
            view = mmap.mmap(mapped.fileno(), 40_000)
            view[:6] = b"before"
            fcntl.flock(locked, fcntl.LOCK_EX)
            (at / "gone").rmdir()
            going, before = writer(at / "going"), user.machine.mounts()
            deadline(lambda: going.steps > 10)
            user.load()
            plan = user.ok("pkram-kexec", *KEEP, "-n")
            assert f"keep 2 mounts: {at}, {other}\n" in plan and "will wait a moment" in plan
            assert "ENOTCONN" not in plan and generation(user) == 1
            said = user.ok("pkram-kexec", *KEEP, "--poison")
            assert "kernel 2 (builtin) is up in" in said and f"kept: {at}, {other}" in said
            steps = going.steps
            deadline(lambda: going.steps > steps)
            assert os.pread(deleted.fileno(), 200_000, 0) == b"x" * 100_000
            assert os.fstat(deleted.fileno()).st_nlink == 0
            assert view[:6] == b"before"
            view[:6] = b"behind"
            view.flush()
            view.close()
            assert os.listdir(f"/proc/{inside.pid}/cwd") == []
            with open(at / "locked", "rb") as again, pytest.raises(BlockingIOError):
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            place = f"/proc/self/fd/{unnamed}".encode()
            assert not ctypes.CDLL(None).linkat(-100, place, -100, bytes(at / "linked"), AT_SYMLINK_FOLLOW)
            os.close(unnamed)
            expected = {"going": going.stop(), "mapped": b"behind" + bytes(39_994), "locked": b"", "linked": b"unnamed"}
            assert files(at) == expected and files(other) == {"file": b"other"}
            after = user.machine.mounts()
            assert [e.dev for e in after] == [e.dev for e in before] and {e.pid for e in after}.isdisjoint(
                e.pid for e in before
            )
        finally:
            inside.kill()
    os.sync()
    (after,) = [e for e in user.machine.mounts() if e.name == "one"]
    os.kill(after.pid, signal.SIGKILL)  # a death is survived, as before the kexec
    assert files(at) == expected
    assert user.run("pkramctl", "verify").returncode == 0


def find(path: Path, what: bytes) -> int:
    """Where some bytes lie in a sparse file."""
    with open(path, "rb") as file:
        end = 0
        while True:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)  # OSError if there is no more
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            at = os.pread(file.fileno(), end - start, start).find(what)
            if at >= 0:
                return start + at


@pytest.mark.skipif(not ROOT, reason="only root can remount read-only")
def test_what_is_read_afterwards_comes_from_the_frames(user: User) -> None:
    """Not from the host's caches: bytes that were changed in the frame itself are seen, by read and in a map.

    A mount that only preserving has made read-only is writable again.
    """
    at, own = user.mount("one"), user.mount("own")
    user.ok("mount.pkramfs", "none", own, "-o", "remount,ro")
    (at / "file").write_bytes(b"old" * 2000)
    user.preserve(at)
    with open(at / "file", "rb", buffering=0) as file, mmap.mmap(file.fileno(), 6000, prot=mmap.PROT_READ) as view:
        assert (file.read(3), view[:3]) == (b"old", b"old")
        with open(user.files / "ram", "rb+", buffering=0) as ram:
            os.pwrite(ram.fileno(), b"new", find(user.files / "ram", b"old" * 2000))
        assert (os.pread(file.fileno(), 3, 0), view[:3]) == (b"old", b"old")  # the control: the host's cache
        user.load()
        user.ok("pkram-kexec", *KEEP)
        assert (os.pread(file.fileno(), 3, 0), view[:3]) == (b"new", b"new")
    assert not syscalls.mounted_at(str(at)).flags & MS_RDONLY
    assert syscalls.mounted_at(str(own)).flags & MS_RDONLY
    assert user.ok("pkramctl", "nodes").count("mounted") == 2  # until the first change
    (at / "file").write_bytes(b"y")
    assert user.ok("pkramctl", "nodes").count("mounted") == 1


def test_who_cannot_be_kept_is_named_and_nothing_changes(user: User, tmp_path: Path) -> None:
    at, plain, old = user.mount("one"), user.directory("plain"), user.mount("old", "fuse=pyfuse3")
    (at / "file").write_bytes(b"x")
    user.ok("mount.pkramfs", "none", plain)
    user.load()
    for dry in ("-n", "-v"):
        said = user.run("pkram-kexec", *KEEP, dry)
        assert said.returncode == 6
        told = said.stdout + said.stderr
        assert f"{plain} cannot be kept: it is mounted without pkram=NAME" in told
        assert f"{old} cannot be kept: fuse=pyfuse3 has no holder" in told
        assert f"{at} cannot" not in told and "Traceback" not in told
    (at / "file").write_bytes(b"y")
    user.unmount(plain)
    user.unmount(old)
    with open(at / "said", "wb") as output:
        words = user.command("pkram-kexec", *KEEP)
        refused = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    assert refused.returncode == 6 and "our output lies on it" in refused.stderr
    user.load("ro")
    plan = user.run("pkram-kexec", *KEEP, "-n")
    assert plan.returncode == 6 and f"{at}: cannot be kept: the new command line lacks" in plan.stdout
    assert "shmem-one" in user.refused(6, "pkram-kexec", *KEEP)
    (at / ".pkramfs-deleted").touch()
    with open(at / "gone", "wb") as gone:
        gone.write(b"x")
        gone.flush()
        (at / "gone").unlink()
        user.load()
        assert "rename it" in user.refused(1, "pkram-kexec", *KEEP)
    assert generation(user) == 1
    assert files(at) == {"file": b"y", "said": b"", ".pkramfs-deleted": b""}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, user: User) -> Any:
    """Run pkram-kexec in this process, which then can be made to fail; its exit status."""
    monkeypatch.chdir("/")
    return lambda *words: kexec.main([*words])


def test_a_kexec_that_fails_late_leaves_all_as_it_was(
    user: User, here: Any, writer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The daemons have ended already: others take over, under the old kernel."""

    def fail(_: object) -> None:
        raise MachineError("as the test wants it")

    at = user.mount("one")
    going = writer(at / "going")
    deadline(lambda: going.steps > 10)
    with open(at / "gone", "wb+", buffering=0) as gone:
        gone.write(b"gone")
        (at / "gone").unlink()
        user.load()
        monkeypatch.setattr(transition.LastLook, "execute", fail)
        assert here(*KEEP) == 8
        assert "as the test wants it" in capsys.readouterr().err
        steps = going.steps
        deadline(lambda: going.steps > steps + 10)
        assert os.pread(gone.fileno(), 9, 0) == b"gone" and os.fstat(gone.fileno()).st_nlink == 0
    assert {"going": going.stop()} == files(at)
    assert generation(user) == 1


@pytest.mark.parametrize("who", ["the command", "a daemon"])
def test_a_death_before_the_daemons_end(user: User, here: Any, writer: Any, who: str, monkeypatch: Any) -> None:
    """While all stand still: nothing has happened yet."""
    at = user.mount("one")
    going = writer(at / "going")
    deadline(lambda: going.steps > 10)
    gone = os.open(at / "gone", os.O_CREAT | os.O_RDWR)
    os.write(gone, b"gone")
    (at / "gone").unlink()
    user.load()
    if who == "the command":
        code = (
            "import os, signal; from pkramfs.cli import keeping, kexec\n"
            "keeping.Keeping.stop = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
            "kexec.main(['-e', '--keep-mounts'])"
        )
        done = subprocess.run([sys.executable, "-c", code], env=user.environment, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL
    else:
        (entry,) = user.machine.mounts()
        stop = keeping.Keeping.stop

        def killing(self: keeping.Keeping) -> None:
            os.kill(entry.pid, signal.SIGKILL)
            stop(self)

        monkeypatch.setattr(keeping.Keeping, "stop", killing)
        assert here(*KEEP) == 7
    steps = going.steps
    deadline(lambda: going.steps > steps + 10)
    assert os.pread(gone, 9, 0) == b"gone" and os.fstat(gone).st_nlink == 0
    os.close(gone)
    assert {"going": going.stop()} == files(at)
    assert generation(user) == 1


def test_a_death_after_the_point_of_no_return(user: User, writer: Any) -> None:
    """Nobody is left to boot: the daemons that wait for the next kernel boot it themselves."""
    at = user.mount("one")
    going = writer(at / "going")
    deadline(lambda: going.steps > 10)
    user.load()
    code = (
        "import os, signal; from pkramfs.cli import kexec; from pkramfs.kernel import transition\n"
        "transition.Boot.execute = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "kexec.main(['-e', '--keep-mounts'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=user.environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    steps = going.steps
    deadline(lambda: going.steps > steps + 10)
    assert {"going": going.stop()} == files(at)
    assert generation(user) == 2
