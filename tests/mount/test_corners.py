# SPDX-License-Identifier: GPL-2.0-or-later
"""Corners of real mounts in which something once was lost or ignored."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0


def test_a_dead_mount_is_recognized_although_the_kernel_knows_its_attributes(lab: Any) -> None:
    """stat of a dead mount may still be answered from the cache; the next mount must not believe it."""
    mnt = lab.mount("one")
    os.stat(mnt)
    entry = lab.entry(mnt)
    lab.kill(entry)
    os.stat(mnt)  # answered by nobody
    lab.mount("one")
    lab.umount(mnt)
    assert not os.path.ismount(mnt)


def test_strict_said_at_the_remount(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "directory").mkdir()
    done = lab.helper(mnt, "remount,preserve,ro,pkram_strict")
    assert done.returncode == 32
    assert "/directory is not a regular file" in done.stderr
    assert lab.nodes() == []
    (mnt / "directory").rmdir()
    lab.remount(mnt, "preserve,ro,pkram_strict")
    assert lab.nodes() == ["shmem-one"]


def test_a_name_whose_daemon_is_going_is_waited_for(lab: Any) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    fd = os.open(mnt / "file", os.O_RDWR | os.O_CREAT)
    subprocess.run(["umount", "-l", str(mnt)] if ROOT else ["fusermount3", "-uz", str(mnt)], check=True)
    again = lab.start(mnt, "pkram=one")
    os.write(fd, b"x")
    os.close(fd)
    assert again.wait(60) == 0
    assert lab.entry(mnt).pid != entry.pid


def test_room_comes_back_at_once(lab: Any) -> None:
    """A file system that is full takes a new file as soon as another is deleted."""
    mnt = lab.mount("one", "pkram=one,size=4M,nr_inodes=4")
    for number in range(30):
        (mnt / f"full{number}").write_bytes(bytes(4 << 20))
        (mnt / f"full{number}").unlink()
    for number in range(3):
        (mnt / f"inode{number}").touch()
    with pytest.raises(OSError) as caught:
        (mnt / "more").touch()
    assert caught.value.errno == errno.ENOSPC


def test_killed_clients(lab: Any) -> None:
    mnt = lab.mount("one")
    code = "while true; do echo x > $0/$$; cat $0/$$; ls $0; rm $0/$$; done"
    for _ in range(3):
        clients = [subprocess.Popen(["sh", "-c", code, str(mnt)], stdout=subprocess.PIPE) for _ in range(8)]
        for client in clients:
            assert client.stdout is not None and client.stdout.read(1)
            client.kill()
        for client in clients:
            client.communicate()
    assert lab.status(mnt)["state"] == "live"
    lab.remount(mnt, "preserve,ro")


OPENER = """
import os, resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
count = min(10_000, hard - 20)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
files = [os.open(f"{sys.argv[1]}/{number}", os.O_RDWR | os.O_CREAT) for number in range(count)]
os.write(files[-1], b"last")
print(count, flush=True)
sys.stdin.read()
"""


def test_ten_thousand_open_files(lab: Any) -> None:
    mnt = lab.mount("one")
    words = [sys.executable, "-c", OPENER, str(mnt)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as opener:
        assert opener.stdout is not None
        count = int(opener.stdout.readline())
        found = lab.status(mnt)
        assert (found["writers_count"], len(found["writers"])) == (count, 10)
    assert (mnt / str(count - 1)).read_bytes() == b"last"
    lab.remount(mnt, "preserve,ro")


DIGGER = """
import os, sys
os.chdir(sys.argv[1])
for _ in range(2000):
    os.mkdir("d" * 250)
    os.chdir("d" * 250)
held = [open(f"f{number}", "w") for number in range(200)]
gone = [open(f"gone{number}") for number in range(20) if not open(f"gone{number}", "w").close()]
for number in range(20):
    os.unlink(f"gone{number}")
print(flush=True)
sys.stdin.read()
"""


def test_files_at_the_end_of_a_very_long_path(lab: Any) -> None:
    """Whoever may write can make it: half a megabyte of path for each file, which nobody collects."""
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    with subprocess.Popen(
        [sys.executable, "-c", DIGGER, str(mnt)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as digger:
        assert digger.stdout is not None
        digger.stdout.readline()
        before = _peak(entry.pid)
        found = lab.status(mnt)
        assert (found["writers_count"], found["open_deleted_count"]) == (200, 20)
        assert [path.rpartition("/")[2] for path in found["writers"]] == [f"f{number}" for number in range(10)]
        assert found["open_deleted"][0].endswith("d/gone0 (deleted)")
        assert all(path.startswith(".../") and len(path) < 4200 for path in found["writers"] + found["open_deleted"])
        done = lab.run("ctl", "--json", "status")
        assert done.returncode == 0 and json.loads(done.stdout)["mounts"][0]["writers_count"] == 200
        assert lab.run("kexec", "-l", "builtin:2M", "--reuse-cmdline").returncode == 0
        done = lab.run("kexec", "-e", "-n")
        assert done.returncode == 6 and f"{mnt}: 190 more files open for writing" in done.stdout
        assert f"{mnt}: 10 more deleted files will be lost" in done.stdout
        done = lab.helper(mnt, "remount,preserve,ro")
        assert done.returncode == 32
        assert " more; close" in done.stderr or "more are open for writing" in done.stderr  # the kernel's word, or ours
        assert len(done.stderr) < 30_000
        assert _peak(entry.pid) - before < 16 << 10, "KiB for a few names"


def _peak(pid: int) -> int:
    """The most memory that a process has had, in KiB."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_set_id_bits_go_when_a_stranger_writes(lab: Any) -> None:
    mnt = lab.mount("one")
    lab.admit_others()
    for change in (f"echo x >> {mnt}/f", f"echo x > {mnt}/f", f"truncate -s 3 {mnt}/f"):
        (mnt / "f").write_text("program")
        os.chmod(mnt / "f", 0o6777)
        (mnt / "f").open("a").close()
        assert os.stat(mnt / "f").st_mode & 0o7777 == 0o6777
        subprocess.run(["sh", "-c", change], user=1000, group=1000, extra_groups=[], check=True)
        assert os.stat(mnt / "f").st_mode & 0o7777 == 0o777, change
        os.unlink(mnt / "f")


def test_sparse_files_add_up_to_more_than_64_bits(lab: Any) -> None:
    mnt = lab.mount("one")
    for number in range(3):
        with (mnt / f"f{number}").open("w") as file:
            file.truncate(2**63 - 1)
    assert lab.status(mnt)["bytes"] == 3 * (2**63 - 1)
    assert lab.helper(mnt, "remount,preserve,ro").returncode == 0
    assert "24.0 EiB" in lab.run("ctl", "status").stdout


def test_the_umask_is_not_for_default_acls(lab: Any) -> None:
    if shutil.which("setfacl") is None:
        pytest.skip("setfacl is missing")
    mnt = lab.mount("one")
    (mnt / "dir").mkdir()
    subprocess.run(["setfacl", "-d", "-m", "u::rwx,g::rwx,o::---", str(mnt / "dir")], check=True)
    subprocess.run(["sh", "-c", f"umask 077; touch {mnt}/dir/file {mnt}/plain"], check=True)
    assert os.stat(mnt / "dir" / "file").st_mode & 0o777 == 0o660
    assert os.stat(mnt / "plain").st_mode & 0o777 == 0o600


def test_small_cached_writes_are_not_asked_about(lab: Any) -> None:
    """Without HANDLE_KILLPRIV_V2 each write is a request. The daemon reads each request by one read(2)."""
    mnt = lab.mount("one")
    counts = Path(f"/proc/{lab.entry(mnt).pid}/io")
    if not counts.exists():
        pytest.skip("the kernel does not count system calls")

    def reads() -> int:
        return int(re.search(r"syscr: (\d+)", counts.read_text())[1])  # type: ignore[index]

    fd = os.open(mnt / "file", os.O_RDWR | os.O_CREAT)
    before = reads()
    for _ in range(100):
        os.statvfs(mnt)
    asked = reads()
    for _ in range(10_000):
        os.pwrite(fd, b"x", 0)
    cached = reads()
    os.close(fd)
    assert asked - before >= 100, "requests are counted"
    assert cached - asked < 1000


@pytest.mark.skipif(not ROOT, reason="only root may tell the kernel")
def test_a_whole_request_is_read_ahead_and_a_burst_is_kept(lab: Any) -> None:
    dev = lab.mount("one").stat().st_dev
    place = Path(f"/sys/class/bdi/{os.major(dev)}:{os.minor(dev)}")
    if not os.access(place / "max_bytes", os.W_OK):
        pytest.skip("/sys is not writable here, or the kernel is older than 6.2")
    assert int((place / "read_ahead_kb").read_text()) == 1020
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 8 << 30:  # else the kernel may grant less
        # kept as a part of what may be dirty in all, so it is read back rounded
        assert int((place / "max_bytes").read_text()) > 200 << 20


def test_verbs_are_heard_while_requests_never_cease(lab: Any) -> None:
    """Requests follow each other without the scheduler; whoever else wants something has his turn all the same."""
    mnt = lab.mount("one")
    loop = "import itertools, os, sys\nfor n in itertools.count(): os.close(os.open(f'{sys.argv[1]}/{n % 9}', 65))"
    clients = [subprocess.Popen([sys.executable, "-c", loop, str(mnt)]) for _ in range(3)]
    try:
        deadline = time.monotonic() + 60
        while len(os.listdir(mnt)) < 9:
            assert time.monotonic() < deadline
        for _ in range(20):
            assert lab.status(mnt)["name"] == "one"
        assert all(client.poll() is None for client in clients)
    finally:
        for client in clients:
            client.kill()
            client.wait()
