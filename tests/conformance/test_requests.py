# SPDX-License-Identifier: GPL-2.0-or-later
"""What FUSE's protocol has and pyfuse3 has not: allocation, holes, copies, files without a name, births, flags."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import make, write
from tests.conformance.system import KEEP_SIZE, PUNCH_HOLE, fallocate

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
PAGE = 4096
GETFLAGS, SETFLAGS, FSGETXATTR, FSSETXATTR = 0x80086601, 0x40086602, 0x801C581F, 0x401C5820
IMMUTABLE, APPEND, NODUMP, NOATIME = 0x10, 0x20, 0x40, 0x80


def holes(fd: int) -> list[tuple[int, int]]:
    """Where data are, as SEEK_DATA and SEEK_HOLE say."""
    found, at = [], 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            return found
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))


def get_flags(name: str) -> int:
    with _opened(name) as fd:
        return int(struct.unpack("i", fcntl.ioctl(fd, GETFLAGS, bytes(4)))[0])


def set_flags(name: str, flags: int) -> None:
    with _opened(name) as fd:
        fcntl.ioctl(fd, SETFLAGS, struct.pack("i", flags))


@contextlib.contextmanager
def _opened(name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(name, flags | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


# -- fallocate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE], ids=["plain", "keep", "punch"])
@pytest.mark.parametrize("offset", [0, 1, 4000, 2 * PAGE, 100_000])
@pytest.mark.parametrize("size", [1, 100, PAGE, 3 * PAGE, 50_000])
def test_fallocate_anywhere(both: Any, mode: int, offset: int, size: int) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * 10_000)
        fd = os.open("a", os.O_RDWR)
        os.pwrite(fd, b"y" * 5000, 40_000)
        t(fallocate, fd, mode, offset, size)
        t(holes, fd)
        t(os.fstat, fd)
        t(os.pread, fd, 200_000, 0)
        os.pwrite(fd, b"z" * 10, offset + size // 2)
        t(holes, fd)

    both(case)


@pytest.mark.parametrize("mode", [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE], ids=["plain", "keep", "punch"])
def test_times_of_fallocate(both: Any, mode: int) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * 10_000)
        fd = os.open("a", os.O_RDWR)
        t.touched(fallocate, fd, mode, 0, PAGE, watch=("a",))
        t.touched(fallocate, fd, mode, 20_000, PAGE, watch=("a",))

    both(case)


@pytest.mark.skipif(not ROOT, reason="the tmpfs beside ours is /dev/shm, which has another size")
@pytest.mark.parametrize("mode", [0, KEEP_SIZE], ids=["plain", "keep"])
def test_no_room_is_all_or_nothing(both: Any, mode: int) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * PAGE)
        fd = os.open("a", os.O_RDWR)
        t(fallocate, fd, mode, 0, 5 << 30)
        t(os.fstat, fd)
        t.note(os.fstat(fd).st_blocks)
        t(fallocate, fd, mode, (1 << 63) - 5, 10)
        t(fallocate, fd, mode, 0, 0)

    both(case)


def test_the_limit_of_file_size(both: Any) -> None:
    def case(t: Any) -> None:
        def limited(u: Any) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            fd = os.open("a", os.O_RDWR)
            u(fallocate, fd, 0, 0, 50_000)
            u(fallocate, fd, 0, 0, 50_001)
            u(fallocate, fd, KEEP_SIZE, 0, 60_000)
            u(os.fstat, fd)

        write("a", b"x")
        os.chmod("a", 0o666)
        t.other(limited)

    both(case)


def test_set_id_bits_go_with_fallocate(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * PAGE)
        os.chmod("a", 0o6777)
        t.other(lambda u: u(fallocate, os.open("a", os.O_RDWR), 0, 0, 3 * PAGE))
        t(os.stat, "a")

    both(case)


# -- holes that the kernel has not written back -----------------------------------------------------


@pytest.mark.parametrize("places", [(0,), (5,), (3, 4, 9), tuple(range(20)), (1, 700), (0, 300, 301, 900)], ids=str)
@pytest.mark.parametrize("how", ["write", "map", "both"])
def test_dirty_pages_are_data(both: Any, places: tuple[int, ...], how: str) -> None:
    """Nothing is flushed before it is asked for; who looks must not miss it."""

    def case(t: Any) -> None:
        fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(fd, 1000 * PAGE)
        with mmap.mmap(fd, 1000 * PAGE) as memory:
            for number, place in enumerate(places):
                if how == "map" or (how == "both" and number % 2):
                    memory[place * PAGE + 7] = 65
                else:
                    os.pwrite(fd, b"x", place * PAGE + 7)
                t(holes, fd)
            for offset in (0, PAGE, 5 * PAGE + 3, 999 * PAGE):
                for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                    t(os.lseek, fd, offset, whence)

    both(case)


@pytest.mark.parametrize("sizes", [(1,), (PAGE,), (PAGE + 1,), (100, 20_000, 300_000)], ids=str)
def test_a_file_that_grows_is_seen_whole(both: Any, sizes: tuple[int, ...]) -> None:
    def case(t: Any) -> None:
        fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o644)
        for size in sizes:
            os.pwrite(fd, b"x" * (size // 2 + 1), size - size // 2 - 1)
            t(os.lseek, fd, 0, os.SEEK_HOLE)
            t(os.lseek, fd, 0, os.SEEK_DATA)
            t(os.lseek, fd, size - 1, os.SEEK_DATA)
            t(os.lseek, fd, size, os.SEEK_DATA)
            t(holes, fd)

    both(case)


# -- copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5000, 3 * PAGE, 1 << 20])
@pytest.mark.parametrize("place", [0, 100, 10 * PAGE, 700_000])
@pytest.mark.parametrize("offset", [0, 77, 2 * PAGE])
def test_copies(both: Any, offset: int, place: int, size: int) -> None:
    def case(t: Any) -> None:
        source, target = (os.open(name, os.O_RDWR | os.O_CREAT, 0o644) for name in "ab")
        os.pwrite(source, bytes(range(251)) * 400, 0)
        os.pwrite(source, b"end", 900_000)
        os.pwrite(target, b"z" * 30_000, 5000)
        left, at = size, 0
        while left > 0 and (done := os.copy_file_range(source, target, left, offset + at, place + at)):
            left, at = left - done, at + done
        t.note(at)
        t.note(os.fstat(target).st_size)
        t(os.pread, target, 2 << 20, 0)

    both_contents(both, case)


def both_contents(both: Any, case: Callable[[Any], None]) -> None:
    """Compare without blocks: a copy leaves holes here, where tmpfs reads and writes zeros."""

    def without_blocks(t: Any) -> None:
        case(t)
        for name in ("a", "b"):
            os.unlink(name)

    both(without_blocks)


def test_times_and_bits_of_copies(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * PAGE)
        write("b", b"y" * PAGE)
        os.chmod("b", 0o6777)
        source, target = os.open("a", os.O_RDWR), os.open("b", os.O_RDWR)
        t.touched(os.copy_file_range, source, target, 100, 0, 0, watch=("b",))
        t.other(lambda u: u(os.copy_file_range, os.open("a", os.O_RDONLY), os.open("b", os.O_RDWR), 100, 0, 0))
        t(os.stat, "b")

    both(case)


@pytest.mark.skipif(not ROOT, reason="only root has two kernel tmpfs")
def test_a_copy_to_another_mount(both: Any, pair: tuple[Path, Path], laboratory: Any) -> None:
    others = dict(zip(pair, laboratory.pair("another", "size=1M"), strict=True))

    def case(t: Any) -> None:
        write("a", b"content")
        source = os.open("a", os.O_RDONLY)
        target = os.open(others[Path.cwd().parent] / "b", os.O_CREAT | os.O_RDWR)
        t(os.copy_file_range, source, target, 5)
        t(os.pread, target, 10, 0)

    both(case)


# -- files without a name ---------------------------------------------------------------------------


def _unnamed(flags: int = 0, folder: str = ".") -> int:
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | flags, 0o666)


def _name(fd: int, name: str) -> None:
    system.linkat(system.AT_FDCWD, f"/proc/self/fd/{fd}", name, system.AT_SYMLINK_FOLLOW)


@pytest.mark.parametrize("kind", ["plain", "setgid", "acl"])
@pytest.mark.parametrize("flags", [0, os.O_EXCL], ids=["linkable", "exclusive"])
def test_files_without_a_name(both: Any, kind: str, flags: int) -> None:
    def case(t: Any) -> None:
        os.mkdir("d", 0o777)
        os.chmod("d", 0o2777 if kind == "setgid" else 0o777)
        if kind == "acl":
            value = system.acl(
                (1, 6, 0xFFFFFFFF), (2, 4, 7), (4, 4, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)
            )
            os.setxattr("d", "system.posix_acl_default", value)

        def use(u: Any) -> None:
            fd = _unnamed(flags, "d")
            os.write(fd, b"content" * 1000)
            u(os.fstat, fd)
            u(os.listxattr, fd)
            u(os.listdir, "d")
            u(_name, fd, "d/name")
            u(_name, fd, "d/more")
            u(_name, fd, "d/name")
            u(os.fstat, fd)

        t.touched(use, t, watch=("d",))
        t.other(use)

    both(case)


def test_a_file_without_a_name_is_gone_with_its_last_user(both: Any) -> None:
    def case(t: Any) -> None:
        before = os.statvfs(".")
        fds = [_unnamed() for _ in range(10)]
        for fd in fds:
            os.write(fd, b"x" * 50_000)
        t.note(before.f_ffree - os.statvfs(".").f_ffree)
        _name(fds[0], "kept")
        for fd in fds:
            os.close(fd)
        os.sync()
        t(os.listdir, ".")
        t(os.stat, "kept")

    both(case)


# -- births -----------------------------------------------------------------------------------------


def birth(name: str) -> int | None:
    """The birth time in nanoseconds, None if the file system knows none."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.statx(system.AT_FDCWD, os.fsencode(name), system.AT_SYMLINK_NOFOLLOW, 0x800, buffer) == 0
    if not struct.unpack_from("<I", buffer)[0] & 0x800:
        return None
    seconds, nanoseconds = struct.unpack_from("<qI", buffer, 80)
    return int(seconds * 10**9 + nanoseconds)


@pytest.mark.parametrize("kind", ["file", "dir", "dangling", "fifo", "socket"])
def test_births(both: Any, kind: str) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        born = birth("a")
        assert born is not None
        t.note(os.lstat("a").st_mtime_ns - born < 10**9, os.lstat("a").st_ctime_ns >= born)
        if kind != "dangling":
            os.chmod("a", 0o700)
        os.rename("a", "b")
        os.utime("b", (1, 1), follow_symlinks=False)
        t.note(birth("b") == born)

    both(case)


# -- flags ------------------------------------------------------------------------------------------

TIMES = {"now": (0, system.UTIME_NOW), "none": (0, system.UTIME_OMIT), "given": (1, 2)}
_USES: dict[str, Callable[[], object]] = {
    # First, while mtime is an old one: within a tick after a change it is "now" already, and nobody can refuse that.
    **{
        f"{access}-{change}-{name}": partial(system.utimensat, name, TIMES[access], TIMES[change])
        for name in ("d", "d/a")
        for access in TIMES
        for change in TIMES
        if access != change
    },
    "read": lambda: Path("d/a").read_bytes(),
    "write": lambda: os.close(os.open("d/a", os.O_WRONLY)),
    "append": lambda: os.close(os.open("d/a", os.O_WRONLY | os.O_APPEND)),
    "cut": lambda: os.close(os.open("d/a", os.O_WRONLY | os.O_APPEND | os.O_TRUNC)),
    "truncate": lambda: os.truncate("d/a", 3),
    "chmod": lambda: os.chmod("d/a", 0o640),
    "chown": lambda: os.chown("d/a", 5, 5),
    "chown-none": lambda: os.chown("d/a", -1, -1),
    "utime": lambda: os.utime("d/a", (5, 5)),
    "touch": lambda: os.utime("d/a"),
    "touch-folder": lambda: os.utime("d"),
    "setxattr": lambda: os.setxattr("d/a", "user.x", b"1"),
    "removexattr": lambda: os.removexattr("d/a", "user.y"),
    "link": lambda: os.link("d/a", "d/l"),
    "rename": lambda: os.rename("d/a", "d/r"),
    "back": lambda: os.rename("d/r", "d/a"),
    "replace": lambda: os.rename("d/b", "d/a"),
    "create": lambda: os.close(os.open("d/new", os.O_CREAT | os.O_WRONLY, 0o644)),
    "mkdir": lambda: os.mkdir("d/sub"),
    "rmdir": lambda: os.rmdir("d/sub"),
    "rmdir-full": lambda: os.rmdir("d/full"),
    "replace-full": lambda: os.rename("d/empty", "d/full"),
    "unlink": lambda: os.unlink("d/a"),
    "list": lambda: sorted(os.listdir("d")),
}


@pytest.mark.skipif(not ROOT, reason="CAP_LINUX_IMMUTABLE is root's")
@pytest.mark.parametrize("flags", [IMMUTABLE, APPEND, NODUMP | NOATIME, IMMUTABLE | APPEND], ids=hex)
@pytest.mark.parametrize("what", ["d", "d/a"])
def test_what_flags_forbid(both: Any, what: str, flags: int) -> None:
    def case(t: Any) -> None:
        os.makedirs("d/full/one")
        os.mkdir("d/empty")
        write("d/a", b"content")
        write("d/b", b"other")
        os.setxattr("d/a", "user.y", b"1")
        fd = os.open("d/a", os.O_RDWR)
        for path in ("d/a", "d"):
            os.utime(path, (1, 1))
        t(set_flags, what, flags)
        t(get_flags, what)
        for name, use in _USES.items():
            use.__name__ = name
            t(use)
        t(os.pwrite, fd, b"still", 0)
        t(os.ftruncate, fd, 5)
        t(fallocate, fd, 0, 0, PAGE)
        t(fallocate, fd, KEEP_SIZE | PUNCH_HOLE, 0, PAGE)
        t(os.fstat, fd)
        if os.path.lexists(what):
            t(set_flags, what, 0)
            t(get_flags, what)

    both(case)


@pytest.mark.parametrize("flags", [IMMUTABLE, APPEND], ids=hex)
def test_what_flags_forbid_through_a_descriptor_of_before(both: Any, flags: int) -> None:
    def case(t: Any) -> None:
        for name, content in (("a", b"content"), ("empty", b""), ("source", b"abc")):
            write(name, content)
        with _opened("a", os.O_RDWR) as fd, _opened("empty") as empty, _opened("source") as source:

            def copy_of_nothing() -> int:
                return os.copy_file_range(empty, fd, 3, 0, 0)

            os.pwrite(fd, b"C", 0)
            set_flags("a", flags)
            for access, change in (("none", "now"), ("now", "none"), ("now", "now")):
                t(system.utimensat, "a", TIMES[access], TIMES[change])
            t(copy_of_nothing)
            t(os.copy_file_range, source, fd, 3, 0, 0)
            set_flags("a", 0)

    both(case)


@pytest.mark.parametrize("kind", ["file", "dir"])
@pytest.mark.parametrize("flags", [0, NODUMP, NOATIME, NODUMP | NOATIME, 0x1, 0x8, 0x100, IMMUTABLE, APPEND], ids=hex)
def test_setting_flags(both: Any, kind: str, flags: int) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        os.chmod("a", 0o777)

        def use(u: Any) -> None:
            u(set_flags, "a", flags)
            u(get_flags, "a")
            with _opened("a") as fd:
                u(fcntl.ioctl, fd, FSGETXATTR, bytes(28))
                u(fcntl.ioctl, fd, FSSETXATTR, struct.pack("<IIIII8x", 0x80, 0, 0, 0, 0))
                u(fcntl.ioctl, fd, FSSETXATTR, struct.pack("<IIIII8x", 0, 0, 0, 5, 0))
                u(fcntl.ioctl, fd, FSGETXATTR, bytes(28))

        use(t)
        if ROOT:
            os.chown("a", 1000, 1000)
        t.other(use)
        t.other(use, uid=2000)
        if ROOT:
            set_flags("a", 0)

    both(case)


def test_flags_are_inherited(both: Any) -> None:
    def case(t: Any) -> None:
        os.mkdir("d")
        set_flags("d", NODUMP | NOATIME)
        os.mkdir("d/e")
        write("d/f")
        for name in ("d/e", "d/f"):
            t(get_flags, name)

    both(case)


@pytest.mark.parametrize("kind", ["file", "dir"])
def test_times_of_flags(both: Any, kind: str) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        t.touched(set_flags, "a", NODUMP)

    both(case)


def test_what_has_no_flags(both: Any) -> None:
    def case(t: Any) -> None:
        os.mkfifo("a")
        t(get_flags, "a")
        t(set_flags, "a", NODUMP)

    both(case)


# -- idmapped mounts --------------------------------------------------------------------------------


@contextlib.contextmanager
def _user_namespace(inside: int, outside: int, count: int) -> Iterator[int]:
    """A descriptor of a user namespace with this mapping."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).unshare(0x10000000)
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        finally:
            os._exit(0)
    try:
        os.read(ready[0], 1)
        for what in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{what}").write_text(f"{inside} {outside} {count}")
        yield os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)
    finally:
        os.write(go[1], b"x")
        os.waitpid(pid, 0)
        for fd in (*ready, *go):
            os.close(fd)


def _idmapped(source: str, target: str, namespace: int) -> None:
    """Mount `source` on `target` with the mapping of a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    tree = libc.syscall(428, system.AT_FDCWD, os.fsencode(source), 1 | os.O_CLOEXEC)
    assert tree >= 0, os.strerror(ctypes.get_errno())
    try:
        attributes = struct.pack("<QQQQ", 0x100000, 0, 0, namespace)
        if libc.syscall(442, tree, b"", 0x1000, attributes, len(attributes)):
            raise OSError(ctypes.get_errno(), "mount_setattr")
        if libc.syscall(429, tree, b"", system.AT_FDCWD, os.fsencode(target), 4):
            raise OSError(ctypes.get_errno(), "move_mount")
    finally:
        os.close(tree)


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_idmapped_mounts(both: Any) -> None:
    """Owners are mapped on the way in and out: 1000 to 1999 are 101000 to 101999 underneath."""

    def case(t: Any) -> None:
        os.mkdir("below", 0o777)
        os.chmod("below", 0o777)
        os.mkdir("above")
        for name, owner in (("theirs", 101_005), ("roots", 0), ("same", 1005)):
            write(f"below/{name}", b"x")
            os.chmod(f"below/{name}", 0o6755)
            os.chown(f"below/{name}", owner, owner)
        with _user_namespace(101_000, 1000, 1000) as namespace:
            t(_idmapped, "below", "above", namespace)
        try:
            for name in ("theirs", "roots", "same"):
                t(os.stat, f"above/{name}")

            def use(u: Any) -> None:
                u(os.mkdir, "above/d")
                u(os.chmod, "above/theirs", 0o4700)
                u(os.chown, "above/theirs", -1, 1005)
                u(os.truncate, "above/theirs", 0)
                fd = u(os.open, "above/new", os.O_CREAT | os.O_RDWR, 0o644)
                if fd is not None:
                    u(os.write, fd, b"x")
                    u(os.setxattr, "above/new", "user.x", b"1")
                u(os.open, "above", os.O_TMPFILE | os.O_RDWR, 0o600)
                u(os.symlink, "x", "above/link")
                u(os.unlink, "above/link")
                u(os.chown, "above/new", 1007, -1)

            t.other(use, 1005, 1005)
            t.other(lambda u: u(os.mkdir, "above/other"), 3000, 3000)
            t(os.mkdir, "above/root")
            for name in sorted(os.listdir("below")):
                t(os.stat, f"below/{name}")
                t(os.stat, f"above/{name}")
        finally:
            system.umount("above")

    both(case)


@pytest.mark.skipif(not ROOT, reason="needs root")
@pytest.mark.parametrize("mode", [0o4755, 0o755], ids=oct)
def test_a_chown_of_nothing_through_an_idmapped_mount(both: Any, mode: int) -> None:
    """Its owner may do that."""

    def case(t: Any) -> None:
        os.mkdir("below", 0o777)
        os.chmod("below", 0o777)
        os.mkdir("above")
        write("below/a", b"x")
        os.chown("below/a", 101_005, 101_005)
        os.chmod("below/a", mode)
        with _user_namespace(101_000, 1000, 1000) as namespace:
            t(_idmapped, "below", "above", namespace)
        try:
            t.other(lambda u: u(os.chown, "above/a", -1, -1), 1005, 1005)
            t(os.stat, "below/a")
        finally:
            system.umount("above")

    both(case)


@pytest.mark.skipif(not ROOT, reason="needs root")
@pytest.mark.parametrize("mode", [0o4777, 0o2777, 0o2767, 0o6777], ids=oct)
def test_rules_that_ask_who_it_is(both: Any, mode: int) -> None:
    """Where requests do not say who asks, it is looked up."""

    def case(t: Any) -> None:
        for name in ("a", "b", "c", "d"):
            write(name, b"x" * 100)
            os.chown(name, 1000, 1000)
            os.chmod(name, mode)
        os.setxattr("a", "trusted.x", b"1")
        os.setxattr("a", "user.x", b"1")
        for uid, gid, groups in ((1000, 1000, ()), (3000, 3000, (1000,)), (3000, 3000, ())):
            t.other(lambda u: u(os.listxattr, "a"), uid, gid, groups)
            t.other(lambda u: u(os.truncate, "b", 50), uid, gid, groups)
            t.other(lambda u: u(os.write, os.open("c", os.O_WRONLY), b"y"), uid, gid, groups)
            t.other(lambda u: u(os.open, "d", os.O_WRONLY | os.O_TRUNC), uid, gid, groups)
            for name in ("b", "c", "d"):
                t(os.stat, name)
                os.chmod(name, mode)
        t(os.listxattr, "a")
        t(os.truncate, "b", 10)
        t(os.stat, "b")

    both(case)
