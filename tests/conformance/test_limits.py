# SPDX-License-Identifier: GPL-2.0-or-later
"""size= and nr_inodes=: the same moments of ENOSPC, the same figures in between."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.conftest import compare
from tests.conformance.kinds import write
from tests.conformance.record import TICK
from tests.conformance.system import acl
from tests.support.lab import FUSE_PATH, Pairs

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="needs a tmpfs of its own")]
PAGES, INODES = 64, 40


@pytest.fixture(scope="module")
def small(laboratory: Pairs) -> tuple[Path, Path]:
    return laboratory.pair("small", f"nr_blocks={PAGES},nr_inodes={INODES},mode=777")


@pytest.fixture
def full(small: tuple[Path, Path], request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Run a case on both small file systems, and clear them afterwards."""

    def run(case: Any) -> None:
        for side in small:
            assert os.listdir(side) == []
        try:
            compare(request.node.name, small, case)
        finally:
            for side in small:
                os.system(f"rm -rf {side}/*")

    return run


def figures(t: Any) -> None:
    time.sleep(TICK)  # what is deleted goes when the kernel forgets it, a moment later
    info = os.statvfs(".")
    t.note("df", info.f_blocks, info.f_bfree, info.f_bavail, info.f_files, info.f_ffree, info.f_favail)


@pytest.mark.parametrize("what", ["file", "dir", "symlink", "long symlink", "fifo", "link", "xattr", "long names"])
def test_inodes(full: Any, what: str) -> None:
    def case(t: Any) -> None:
        write("base", b"x")
        for number in range(INODES + 5):
            match what:
                case "file":
                    t(os.mknod, f"{number}", 0o100644)
                case "dir":
                    t(os.mkdir, f"{number}")
                case "symlink":
                    t(os.symlink, "x", f"{number}")
                case "long symlink":
                    t(os.symlink, "x" * 300, f"{number}")
                case "fifo":
                    t(os.mkfifo, f"{number}")
                case "link":
                    t(os.link, "base", f"{number}")
                case "xattr":
                    t(os.setxattr, "base", f"user.{number}", b"v" * 900)
                case "long names":
                    t(os.mknod, f"{number}" + "n" * 250, 0o100644)
            figures(t)
        t(os.listdir, ".")

    full(case)


@pytest.mark.parametrize("size", [1, 4096, 5000, 40_000, 300_000])
def test_pages(full: Any, size: int) -> None:
    """What is written, synced and then refused; a write that does not fit whole is a listed difference."""

    def case(t: Any) -> None:
        for number in range(20):
            fd = t(os.open, f"{number}", os.O_CREAT | os.O_WRONLY)
            room = os.statvfs(".").f_bfree << 12
            if room >= size:
                t(os.write, fd, b"x" * size)
            t(os.fsync, fd)
            t(os.close, fd)
            figures(t)
        t(os.unlink, "0")
        figures(t)
        t(os.truncate, "1", 0)
        figures(t)

    full(case)


@pytest.mark.skipif(os.environ.get("PKRAM_TEST_FUSE") == "pyfuse3", reason="pyfuse3 does not say who asks")
@pytest.mark.parametrize("size", [4096, 16384])
def test_written_until_it_is_full(full: Any, size: int) -> None:
    """write(2) says so, nothing is lost, and all the room is used."""

    def case(t: Any) -> None:
        for name in ("a", "b"):
            fd, written = t(os.open, name, os.O_CREAT | os.O_RDWR), 0
            try:
                while written < 2 * (PAGES << 12):
                    written += os.write(fd, b"x" * size)
            except OSError as error:
                t.note("write", error.errno)
            t.note("written", written, os.fstat(fd).st_size)
            t(os.read, fd, 5)
            t(os.lseek, fd, 0, os.SEEK_END)
            if written:
                t(os.pwrite, fd, b"again", 10)
            t(os.fsync, fd)
            t(os.close, fd)
            figures(t)
        t(os.unlink, "a")
        figures(t)
        fd = t(os.open, "b", os.O_WRONLY)
        t(os.write, fd, b"x" * size)
        t(os.close, fd)

    full(case)


def test_a_write_too_large(full: Any) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_CREAT | os.O_WRONLY)
        t(os.write, fd, b"x" * (PAGES << 12) + b"more")
        t(os.fsync, fd)
        t(os.write, fd, b"x" * 8192)
        t(os.fsync, fd)

    full(case)


def test_holes_take_no_room(full: Any) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_CREAT | os.O_RDWR)
        t(os.ftruncate, fd, 1 << 40)
        figures(t)
        for number in range(10):
            t(os.pwrite, fd, b"x", number << 30)
        t(os.fsync, fd)
        figures(t)
        t(os.pread, fd, 1 << 20, 5)
        figures(t)
        t(os.ftruncate, fd, 3 << 30)
        figures(t)

    full(case)


def test_deleted_but_open_takes_room(full: Any) -> None:
    def case(t: Any) -> None:
        fd = t(os.open, "a", os.O_CREAT | os.O_RDWR)
        t(os.write, fd, b"x" * 100_000)
        t(os.fsync, fd)
        t(os.unlink, "a")
        figures(t)
        os.close(fd)
        write("b", b"y" * (50 << 12))
        t(os.stat, "b")

    full(case)


@pytest.mark.parametrize("size", [10, 500, 1024, 5000, 60_000])
def test_xattrs_take_inodes(full: Any, size: int) -> None:
    def case(t: Any) -> None:
        write("a")
        figures(t)
        for number in range(8):
            t(os.setxattr, "a", f"user.{number}", b"v" * size)
            figures(t)
        if FUSE_PATH != "pyfuse3":  # which looks at the flags itself, before it asks
            t(os.setxattr, "a", "user.none", b"v" * size, os.XATTR_REPLACE)
            t(os.setxattr, "a", "user.0", b"v" * size, os.XATTR_CREATE)
        t(os.setxattr, "a", "user.0", b"v" * (size // 2))
        figures(t)
        t(os.removexattr, "a", "user.1")
        figures(t)
        t(os.unlink, "a")
        figures(t)

    full(case)


def test_acls_take_none(full: Any) -> None:
    none = 0xFFFFFFFF

    def case(t: Any) -> None:
        os.mkdir("d")
        t(os.setxattr, "d", "system.posix_acl_default", acl((1, 7, none), (4, 5, none), (32, 0, none)))
        figures(t)
        os.mkdir("d/e")
        figures(t)

    full(case)


def test_room_comes_back(full: Any) -> None:
    def case(t: Any) -> None:
        for _ in range(5):
            write("a", b"x" * ((PAGES - 4) << 12))
            figures(t)
            os.unlink("a")
            os.mkdir("d")
            for number in range(INODES - 10):
                t(os.mknod, f"d/{number}", 0o100644)
            for number in range(INODES - 10):
                os.unlink(f"d/{number}")
            os.rmdir("d")
            figures(t)

    full(case)
