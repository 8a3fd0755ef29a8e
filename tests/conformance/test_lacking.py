# SPDX-License-Identifier: GPL-2.0-or-later
"""What FUSE or pyfuse3 has no request for: it may be refused or done in another way, never done wrongly."""

import array
import errno
import fcntl
import os
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import make, write
from tests.conformance.system import COLLAPSE, INSERT, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate

pytestmark = pytest.mark.mount
FIONREAD, FS_IOC_GETFLAGS, FS_IOC_GETVERSION, TCGETS = 0x541B, 0x80086601, 0x80087601, 0x5401


@pytest.mark.parametrize("size", [1, 4096, 10_000])
@pytest.mark.parametrize("offset", [0, 100, 4096, 50_000])
def test_posix_fallocate(both: Any, offset: int, size: int) -> None:
    def case(t: Any) -> None:
        write("a", b"content")
        fd = t(os.open, "a", os.O_RDWR)
        t(os.posix_fallocate, fd, offset, size)
        t(os.fstat, fd)
        t(os.pread, fd, 100_000, 0)

    both(case)


@pytest.mark.parametrize(
    "mode", [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE, INSERT], ids=hex
)
def test_fallocate(both: Any, mode: int) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * 20_000)
        fd = t(os.open, "a", os.O_RDWR)
        t(fallocate, fd, mode, 4096, 8192)
        t(os.fstat, fd)
        t(os.pread, fd, 30_000, 0)
        t(fallocate, fd, mode, -1, 8192)
        t(fallocate, os.open("a", os.O_RDONLY), mode, 0, 8192)

    both(case)


@pytest.mark.parametrize("content", ["empty", "data", "hole", "sparse"])
def test_seek(both: Any, content: str) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_RDWR | os.O_CREAT)
        if content != "empty":
            os.ftruncate(fd, 40_000)
        if content in ("data", "sparse"):
            os.pwrite(fd, b"x" * (40_000 if content == "data" else 4096), 0 if content == "data" else 20_480)
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for offset in (0, 30_000, 39_999, 40_000, 50_000, -1):
                t(os.lseek, fd, offset, whence)
        for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, 9):
            for offset in (0, 10, -10, 1 << 62):
                t(os.lseek, fd, offset, whence)

    both(case)


@pytest.mark.parametrize("flags", [0, os.O_EXCL], ids=["linkable", "exclusive"])
def test_tmpfile(both: Any, flags: int) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, ".", os.O_TMPFILE | os.O_RDWR | flags, 0o640)
        t(os.write, fd, b"content")
        t(os.fstat, fd)
        t(system.linkat, system.AT_FDCWD, f"/proc/self/fd/{fd}", "name", system.AT_SYMLINK_FOLLOW)

    both(case)


def test_temporary_file_of_python(both: Any) -> None:
    """Falls back to a named file that is deleted at once."""
    import tempfile

    def case(t: Any) -> None:
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"x" * 10_000)
            file.seek(5)
            t(file.read)
            t.note(os.fstat(file.fileno()).st_nlink)

    both(case)


@pytest.mark.parametrize("request_", [FIONREAD, FS_IOC_GETFLAGS, FS_IOC_GETVERSION, TCGETS], ids=hex)
@pytest.mark.parametrize("kind", ["file", "dir"])
def test_ioctl(both: Any, kind: str, request_: int) -> None:
    def control(fd: int) -> list[int]:
        buffer = array.array("l", [0] * 16)
        fcntl.ioctl(fd, request_, buffer)
        return list(buffer[:1])

    def case(t: Any) -> None:
        make(kind, "a")
        t(control, os.open("a", os.O_RDONLY))

    both(case)


@pytest.mark.parametrize("size", [0, 5, 4096, 100_000])
@pytest.mark.parametrize("kind", ["other", "same", "overlap"])
def test_copy_file_range(both: Any, kind: str, size: int) -> None:
    def case(t: Any) -> None:
        write("a", bytes(range(251)) * 200)
        source = t(os.open, "a", os.O_RDWR)
        target = source if kind != "other" else t(os.open, "b", os.O_RDWR | os.O_CREAT)
        t(os.copy_file_range, source, target, size, 100, 60_000 if kind != "overlap" else 102)
        t(os.sendfile, target, source, 0, size)
        t(os.fstat, target)
        t(os.pread, target, 200_000, 0)

    both(case)


def test_splice(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", bytes(range(251)) * 200)
        fd = t(os.open, "a", os.O_RDONLY)
        out = t(os.open, "b", os.O_WRONLY | os.O_CREAT)
        reader, writer = os.pipe()
        moved = 0
        for _ in range(10):
            size = os.splice(fd, writer, 30_000)
            while size:
                done = os.splice(reader, out, size)
                size, moved = size - done, moved + done
        t.note(moved)

    both(case)


def test_sockets_and_fifos_work(both: Any) -> None:
    import socket

    def case(t: Any) -> None:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("s")
            server.listen()
            t(client.connect, "s")
            client.send(b"hello")
            with server.accept()[0] as accepted:
                t.note(accepted.recv(10))
        os.mkfifo("f")
        reader = os.open("f", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open("f", os.O_WRONLY)
        os.write(writer, b"through")
        t(os.read, reader, 10)
        t(os.lseek, reader, 0, os.SEEK_SET)

    both(case)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_devices_work(both: Any) -> None:
    def case(t: Any) -> None:
        os.mknod("null", 0o020666, os.makedev(1, 3))
        os.mknod("zero", 0o020666, os.makedev(1, 5))
        os.mknod("none", 0o060666, os.makedev(240, 9))
        t(os.read, os.open("null", os.O_RDWR), 5)
        t(os.read, os.open("zero", os.O_RDONLY), 5)
        t(os.open, "none", os.O_RDONLY)
        t.other(lambda u: u(os.open, "zero", os.O_RDONLY))

    both(case)


@pytest.mark.skipif(os.geteuid() != 0, reason="the tmpfs beside ours is /dev/shm, which has another size")
def test_statvfs(both: Any) -> None:
    def case(t: Any) -> None:
        info = os.statvfs(".")
        t.note(info.f_bsize, info.f_frsize, info.f_namemax, info.f_blocks, info.f_files)
        t.note(info.f_bavail <= info.f_bfree, info.f_favail == info.f_ffree)
        t.note(info.f_flag & ~(os.ST_RELATIME | 0x20))
        for name in ("PC_LINK_MAX", "PC_NAME_MAX", "PC_PATH_MAX"):
            t(os.pathconf, ".", name)

    both(case)


def test_closed_and_wrong_descriptors(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * 100)
        os.mkdir("d")
        reading, writing, directory = (os.open(n, f) for n, f in (("a", 0), ("a", os.O_WRONLY), ("d", 0)))
        for fd in (reading, writing, directory):
            t(os.pread, fd, 5, 0)
            t(os.pwrite, fd, b"y", 0)
            t(os.ftruncate, fd, 3)
            t(os.fsync, fd)
            t(os.listdir, fd)
            t(os.fchdir, fd)
            os.chdir("..") if fd == directory else None
            t(os.lseek, fd, 1, os.SEEK_SET)
            t(system.syncfs, fd)
        t(os.read, 999, 1)
        t.note(errno.errorcode[errno.EBADF])

    both(case)
