# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests beyond pyfuse3 on a real mount: what crosses an unmount, and clients that are killed."""

import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pkramfs.fuse import counters
from pkramfs.fuse.wire import Op

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.environ.get("PKRAM_TEST_FUSE") == "pyfuse3", reason="pyfuse3 does not know these"),
]
GETFLAGS, SETFLAGS, NODUMP = 0x80086601, 0x40086602, 0x40
PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def _seen(path: Path) -> tuple[int, int, list[tuple[int, int]], int]:
    """Birth, flags, data and blocks of a file."""
    buffer = ctypes.create_string_buffer(256)
    assert _libc.statx(-100, os.fsencode(path), 0, 0x800, buffer) == 0
    assert struct.unpack_from("<I", buffer)[0] & 0x800
    seconds, nanoseconds = struct.unpack_from("<qI", buffer, 80)
    fd, found, at = os.open(path, os.O_RDONLY), [], 0
    try:
        flags = struct.unpack("i", fcntl.ioctl(fd, GETFLAGS, bytes(4)))[0]
        size = os.fstat(fd).st_size
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, at))
        return seconds * 10**9 + nanoseconds, flags, found, os.fstat(fd).st_blocks
    finally:
        os.close(fd)


def test_births_flags_and_allocations_are_preserved(lab: Any) -> None:
    mnt = lab.mount("one")
    file = mnt / "d" / "file"
    file.parent.mkdir()
    with open(file, "wb") as opened:
        opened.write(b"x" * 2 * PAGE)
        opened.flush()
        assert _libc.fallocate(opened.fileno(), 0, ctypes.c_long(0), ctypes.c_long(20 * PAGE)) == 0
        os.pwrite(opened.fileno(), b"y", 10 * PAGE)
        assert _libc.fallocate(opened.fileno(), 3, ctypes.c_long(15 * PAGE), ctypes.c_long(PAGE)) == 0
        fcntl.ioctl(opened.fileno(), SETFLAGS, struct.pack("i", NODUMP))
    before = _seen(file)
    assert before[1:] == (NODUMP, [(0, 2 * PAGE), (10 * PAGE, 11 * PAGE)], 19 * 8)
    for _ in range(2):
        lab.remount(mnt, "preserve,ro")
        lab.umount(mnt)
        mnt = lab.mount("one")
        assert _seen(file) == before


_CLIENT = """
import ctypes, os, sys
libc, number = ctypes.CDLL(None), int(sys.argv[1])
fd = os.open(f"{sys.argv[2]}/file{number % 3}", os.O_RDWR | os.O_CREAT)
other = os.open(f"{sys.argv[2]}/other{number}", os.O_RDWR | os.O_CREAT)
page = os.urandom(4096)
print("begun", flush=True)
while True:
    for at in range(0, 400, 7):
        os.pwrite(fd, page, at * 4096 + 5)
        os.lseek(fd, 0, os.SEEK_HOLE)
        libc.fallocate(fd, 3, ctypes.c_long(at * 4096), ctypes.c_long(9000))
        os.copy_file_range(fd, other, 50_000, at * 2000, at * 1000)
        os.close(os.open(sys.argv[2], os.O_TMPFILE | os.O_RDWR))
        try:
            os.lseek(fd, at * 4096, os.SEEK_DATA)
        except OSError:
            pass
"""


def test_a_second_listing_asks_for_no_acl_again(lab: Any) -> None:
    """READDIRPLUS that repeats what the kernel knows would make it forget that there is none."""
    mnt = lab.mount("one")
    names = [mnt / f"file{number}" for number in range(20)]
    for name in names:
        name.touch()

    def asked() -> int:
        found = counters.read(lab.entry(mnt).pid)
        assert found is not None
        return found.requests.get(Op.GETXATTR, 0)

    def look() -> int:
        before = asked()
        with os.scandir(mnt) as entries:
            assert sum(entry.stat().st_size for entry in entries) == 0
        for name in names:
            with pytest.raises(OSError, match="No data"):
                os.getxattr(name, "system.posix_acl_access")
        return asked() - before

    assert (look(), look()) == (20, 0)


def test_clients_that_are_killed_leave_a_mount_that_answers(lab: Any) -> None:
    mnt = lab.mount("one")
    for _ in range(3):
        clients = [
            subprocess.Popen([sys.executable, "-c", _CLIENT, str(number), str(mnt)], stdout=subprocess.PIPE)
            for number in range(9)
        ]
        try:
            for client in clients:
                assert client.stdout is not None and client.stdout.readline() == b"begun\n"
        finally:
            for client in clients:
                client.send_signal(signal.SIGKILL)
            for client in clients:
                client.communicate(timeout=60)
    assert sorted(os.listdir(mnt))[:3] == ["file0", "file1", "file2"]
    (mnt / "file0").read_bytes()
    os.sync()
    assert lab.status(mnt)["state"] in ("live", "rw")
