# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that are full, small, or fenced in: writers get an error, nobody dies or hangs, df and mount tell."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pkramfs.machine import process
from tests.support.waiting import until

pytestmark = pytest.mark.mount

MIB = 1 << 20
LEGACY, UNIFIED = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@pytest.fixture
def small(host, monkeypatch, pkram_root):
    """Machines live on a host of 64 MiB."""
    monkeypatch.setenv("PKRAM_ROOT", str(host.directory / "root"))
    return host


@pytest.fixture
def fenced(small, lab):
    """A mount on it, taken down before it."""
    from pkramfs.machine.directory import Machine

    lab.machine = Machine.locate()
    yield lab
    entries = [entry for entry in lab.machine.mounts() if entry.alive]
    lab.clean()
    for entry in entries:
        lab.gone(entry)


def as_user(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python as an ordinary user."""
    command = ["python3", "-c", code, *map(str, words)]
    return subprocess.run(command, user=1000, group=1000, extra_groups=[], capture_output=True, text=True, timeout=60)


def test_a_user_cannot_kill_the_daemon(small, fenced):
    """Allocate, fill the world-writable file system behind RAM, store into what was allocated, and read it."""
    fenced.admit_others()
    mnt = fenced.mount("m", "pkram=m")
    (mnt / "roots").write_bytes(b"root's")
    attack = """if True:
        import os, sys
        path, filling = sys.argv[1:]
        with open(path, "w") as file:
            file.truncate(8 << 20)
        os.setxattr(path, "user.pkramfs.allocate", b"0:8M")
        with open(filling, "wb") as file:
            found = os.statvfs(filling)
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize)
        with open(path, "r+b") as file:
            assert os.pread(file.fileno(), 4096, 1 << 20) == bytes(4096)
            os.pwrite(file.fileno(), b"x" * 4096, 4 << 20)
            os.fsync(file.fileno())
    """
    done = as_user(attack, mnt / "mine", small.directory / "filling of 1000")
    assert (done.returncode, done.stderr) == (0, "")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert (mnt / "roots").read_bytes() == b"root's"
    assert (mnt / "mine").read_bytes() == bytes(4 * MIB) + b"x" * 4096 + bytes(4 * MIB - 4096)
    with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOSPC):
        (mnt / "more").write_bytes(bytes(MIB))
    assert fenced.status(mnt)["files"] == 3


@pytest.mark.parametrize("options", ["pkram=m", "pkram=m,huge=always"])
def test_a_full_host_is_an_error_and_goes_by(small, fenced, options):
    mnt = fenced.mount("m", options)
    (mnt / "data").write_bytes(b"data" * 5000)
    small.fill()
    for name in ("one", "two"):
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOSPC):
            (mnt / name).write_bytes(os.urandom(3 * MIB))
    assert (mnt / "data").read_bytes() == b"data" * 5000
    done = fenced.helper(mnt, "remount,preserve,ro")
    assert done.returncode and "Traceback" not in done.stderr
    small.empty()
    (mnt / "three").write_bytes(b"3" * MIB)
    assert (mnt / "three").read_bytes() == b"3" * MIB
    for name in ("one", "two"):
        (mnt / name).unlink()  # they lack data
    fenced.remount(mnt, "preserve,ro")


def test_daemons_die_on_a_full_host(small, fenced):
    """Others take over; even who mounts the name again needs no room for that. So, too, where nothing can be noted."""
    mnt = fenced.mount("m", "pkram=m")
    (mnt / "data").write_bytes(b"data" * 5000)
    os.sync()
    small.fill()
    with open(mnt / "data", "rb") as file:
        for unwritable in (False, True):
            entry = fenced.entry(mnt)
            if unwritable:
                (fenced.files / "mounts").rename(fenced.files / "elsewhere")
            os.kill(entry.pid, signal.SIGKILL)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 20_000, 0) == b"data" * 5000
            if unwritable:
                (fenced.files / "elsewhere").rename(fenced.files / "mounts")
            else:
                until(lambda entry=entry: fenced.entry(mnt).pid != entry.pid)
    os.kill(fenced.entry(mnt).holder, signal.SIGSTOP)
    daemon = next(pid for pid in process.children(fenced.entry(mnt).holder))
    os.kill(fenced.entry(mnt).holder, signal.SIGKILL)
    os.kill(daemon, signal.SIGKILL)
    fenced.gone(entry)
    done = fenced.helper(mnt, "pkram=m")
    assert done.returncode == 0, done
    assert (mnt / "data").read_bytes() == b"data" * 5000


def test_files_are_deleted_on_a_full_host_however_short_the_log_is(small, fenced):
    """That is how it stops to be full. What does not give memory back has had its ENOSPC before."""
    mnt = fenced.mount("m", "pkram=m")
    for number in range(400):
        (mnt / f"{number}").write_bytes(b"x")
    os.sync()
    small.fill()
    with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOSPC):
        for _ in range(20_000):
            os.rename(mnt / "0", mnt / "again")
            os.rename(mnt / "again", mnt / "0")
    for path in list(mnt.iterdir()):
        path.unlink()
    assert os.listdir(mnt) == []


def test_a_remount_that_cannot_be_noted_is_done(small, fenced):
    mnt = fenced.mount("m", "pkram=m,size=4M")
    small.fill()
    done = fenced.helper(mnt, "remount,size=8M")
    found = os.statvfs(mnt)
    small.empty()
    assert (done.returncode, found.f_blocks * found.f_frsize) == (0, 8 * MIB), done


def test_df_tells_what_can_be_had_on_a_small_host(small, fenced):
    """And mount says that size= is more; where nothing can be had it refuses."""
    directory = fenced.dir("m")
    done = fenced.helper(directory, "pkram=m,size=4G")
    assert done.returncode == 0
    assert done.stdout == (
        "m: size=4.0 GiB is more than the host has: the file system behind RAM, or the memory cgroup, has 64.0 MiB\n"
    )
    found = os.statvfs(directory)
    assert found.f_blocks * found.f_frsize == 4 << 30
    assert 40 * MIB < found.f_bavail * found.f_frsize < 64 * MIB
    (directory / "file").write_bytes(os.urandom(found.f_bavail * found.f_frsize - 2 * MIB))
    found = os.statvfs(directory)
    assert 0 < found.f_bavail * found.f_frsize < 4 * MIB
    other = fenced.helper(fenced.dir("n"), "pkram=n,size=16M")
    assert (other.returncode, other.stdout) == (0, "")
    default = fenced.helper(fenced.dir("p"), "pkram=p")
    assert (default.returncode, default.stdout) == (0, "")  # nobody asked for half of RAM
    small.fill(leave=MIB)
    refused = fenced.helper(fenced.dir("o"), "pkram=o,size=16M")
    assert refused.returncode == 32 and "no room behind RAM" in refused.stderr
    small.empty()


@pytest.fixture
def group():
    """A memory cgroup of 300 MiB, of whichever version has them here."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    top = LEGACY if (LEGACY / "memory.limit_in_bytes").exists() else UNIFIED
    limit = "memory.limit_in_bytes" if top == LEGACY else "memory.max"
    try:
        place = Path(tempfile.mkdtemp(prefix="pkramfs-test-", dir=top))
    except OSError:
        pytest.skip("no memory cgroup can be made here")
    if not (place / limit).exists():
        place.rmdir()
        pytest.skip("no memory cgroup can be made here")
    try:
        (place / limit).write_text(str(300 * MIB))
        yield place
    finally:
        deadline = time.monotonic() + 60
        while (place / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        place.rmdir()


def test_a_full_memory_cgroup_is_an_error(lab, group):
    """The mount and a writer of more than fits, in one group."""
    directory = lab.dir("m")
    helper = f"{sys.executable} -m pkramfs mount none {directory} -o pkram=m,size=4G"
    writer = f"dd if=/dev/urandom of={directory}/big bs=1M count=400"
    script = f"echo $$ > {group}/cgroup.procs && {helper} && exec {writer}"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2]
    )
    try:
        assert done.returncode == 1 and "No space left on device" in done.stderr, done
        assert "size=" in done.stdout and "memory cgroup, has 300 MiB" in done.stdout
        assert lab.status(directory)["pages"] * 4096 > 100 * MIB
        (directory / "big").unlink()
        (directory / "small").write_bytes(b"small" * 100)
        assert (directory / "small").read_bytes() == b"small" * 100
    finally:
        lab.umount(directory)
