# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that POSIX does not know: handles, watches, flags of single reads and writes, advice, seals, statx."""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import KINDS, make, write
from tests.conformance.record import Record
from tests.conformance.system import NOREPLACE, renameat2

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
FS_IOC_GETFSUUID = 0x80111500
THINGS = [kind for kind in KINDS if kind != "none"]


@pytest.mark.skipif(not ROOT, reason="open_by_handle_at needs root")
@pytest.mark.parametrize("kind", THINGS)
def test_handles(both: Any, kind: str) -> None:
    """A handle finds its file under another name, with cold caches, and not after it was deleted."""
    handle = b""

    def attributes(top: int) -> os.stat_result:
        fd = system.open_by_handle_at(top, handle, os.O_PATH)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def case(t: Any) -> None:
        nonlocal handle
        make(kind, "a")
        top = os.open(".", os.O_RDONLY)
        handle = system.name_to_handle_at("a")
        for _ in range(2):
            t(attributes, top)
            os.rename("a", "b")
            with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as caches:
                caches.write("2")
            os.rename("b", "a")
        if kind not in ("dir", "full"):
            os.unlink("a")
            write("a", b"another file")
            t(attributes, top)

    both(case)


def attributes_by(top: int, handle: bytes) -> list[int]:
    """Inode type, size and links of what a handle names."""
    fd = system.open_by_handle_at(top, handle, os.O_PATH)
    try:
        found = os.fstat(fd)
        return [stat.S_IFMT(found.st_mode), 0 if stat.S_ISDIR(found.st_mode) else found.st_size, found.st_nlink]
    finally:
        os.close(fd)


def forget() -> None:
    """Have the kernel forget names and inodes, of which then only handles are left."""
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as caches:
        caches.write("2")


@pytest.mark.skipif(not ROOT, reason="open_by_handle_at needs root")
@pytest.mark.parametrize("kind", THINGS)
def test_handles_of_what_is_forgotten(both: Any, kind: str) -> None:
    """Nobody has looked at the name since the kernel forgot it: a handle alone finds the file."""

    def case(t: Any) -> None:
        os.makedirs("d/e")
        make(kind, "d/e/a")
        top = os.open(".", os.O_RDONLY)
        handle = system.name_to_handle_at("d/e/a")
        os.link("d/e/a", "b", follow_symlinks=False) if kind not in ("dir", "full") else None
        forget()
        t(lambda: attributes_by(top, handle))
        os.rename("d/e", "f")
        forget()
        t(lambda: attributes_by(top, handle))

    both(case)


@pytest.mark.skipif(not ROOT, reason="open_by_handle_at needs root")
def test_a_handle_finds_the_way_up(both: Any) -> None:
    """A directory that was found by its handle knows its parents, and so does a file its content."""

    def case(t: Any) -> None:
        os.makedirs("p/q/r")
        write("p/q/r/file", b"content")
        here, top = os.getcwd(), os.open(".", os.O_RDONLY)
        folder, file = system.name_to_handle_at("p/q/r"), system.name_to_handle_at("p/q/r/file")
        forget()

        def way(handle: bytes) -> str:
            fd = system.open_by_handle_at(top, handle, os.O_RDONLY)
            try:
                return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), here)
            finally:
                os.close(fd)

        def content(handle: bytes) -> bytes:
            fd = system.open_by_handle_at(top, handle, os.O_RDONLY)
            try:
                return os.read(fd, 100)
            finally:
                os.close(fd)

        t(lambda: way(folder))
        forget()
        t(lambda: content(file))
        forget()
        up = system.open_by_handle_at(top, folder, os.O_RDONLY)
        t(lambda: os.listdir(up))
        t(lambda: sorted(os.listdir(os.open("..", os.O_RDONLY, dir_fd=up))))

    both(case)


@pytest.mark.skipif(not ROOT, reason="open_by_handle_at needs root")
def test_handles_of_deleted_files(both: Any) -> None:
    """A handle finds a deleted file while somebody has it open, and is stale from then on (FUSE closes later)."""

    def until_stale(top: int, handle: bytes) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            forget()
            attributes_by(top, handle)

    def case(t: Any) -> None:
        top = os.open(".", os.O_RDONLY)
        for kind in ("file", "dir"):
            make(kind, "a")
            handle, fd = system.name_to_handle_at("a"), os.open("a", os.O_RDONLY)
            os.unlink("a") if kind == "file" else os.rmdir("a")
            forget()
            t(lambda handle=handle: attributes_by(top, handle))
            os.close(fd)
            t(lambda handle=handle: until_stale(top, handle))

    both(case)


@pytest.mark.skipif(not ROOT, reason="open_by_handle_at needs root")
def test_a_handle_is_of_one_tree(laboratory: Any) -> None:
    """The same inode number in another mount of the same place is another file: no handle of the old one finds it."""
    found = []
    for side, mount, umount in (
        ("theirs", ["mount", "-t", "tmpfs", "none"], ["umount"]),
        ("ours", [sys.executable, "-m", "pkramfs", "mount", "none"], ["umount"]),
    ):
        place = laboratory.root / f"handles-{side}"
        place.mkdir()
        stale = []
        handles: list[bytes] = []
        for _ in range(2):
            subprocess.run([*mount, str(place)], check=True, env=laboratory.environment)
            try:
                (place / "a").write_bytes(b"x")
                top = os.open(place, os.O_RDONLY)
                try:
                    for handle in handles:
                        with pytest.raises(OSError) as caught:
                            attributes_by(top, handle)
                        stale.append(caught.value.errno)
                    handles.append(system.name_to_handle_at(str(place / "a")))
                finally:
                    os.close(top)
            finally:
                subprocess.run([*umount, str(place)], check=True)
        found.append(stale)
    assert found == [[errno.ESTALE], [errno.ESTALE]]


EVENTS = {
    0x1: "access", 0x2: "modify", 0x4: "attrib", 0x8: "close-write", 0x10: "close", 0x20: "open", 0x40: "from",
    0x80: "to", 0x100: "create", 0x200: "delete", 0x400: "delete-self", 0x800: "move-self", 0x8000: "ignored",
}  # fmt: skip


def test_watches(both: Any) -> None:
    """inotify tells what is done through the mount."""

    def happened(fd: int) -> list[str]:
        data, words = os.read(fd, 1 << 16), []
        while data:
            watch, mask, _, size = struct.unpack_from("iIII", data)
            names = [name for bit, name in EVENTS.items() if mask & bit]
            words.append(f"{watch} {' '.join(names)} {data[16 : 16 + size].rstrip(bytes(1)).decode()}")
            data = data[16 + size :]
        return words

    def case(t: Any) -> None:
        os.mkdir("d")
        fd = system.inotify_init()
        system.inotify_add_watch(fd, "d", 0xFFF)
        write("d/a", b"content")
        system.inotify_add_watch(fd, "d/a", 0xFFF)
        with open("d/a", "r+b") as file:
            file.read()
            file.write(b"more")
        os.chmod("d/a", 0o600)
        os.link("d/a", "d/b")
        renameat2("d/b", "d/c", NOREPLACE)
        os.truncate("d/a", 1)
        os.setxattr("d/a", "user.x", b"1")
        os.listdir("d")
        os.unlink("d/a")
        os.unlink("d/c")
        os.rmdir("d")
        for line in happened(fd):
            t.note(line)

    both(case)


FLAGS = {"hipri": 1, "dsync": 2, "sync": 4, "nowait": 8, "append": 16, "unknown": 1 << 20}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_a_write(both: Any, flag: str) -> None:
    def case(t: Any) -> None:
        write("a", b"content" * 1000)
        fd = t(os.open, "a", os.O_RDWR)
        t(os.pwritev, fd, [b"new", b"er"], 5, FLAGS[flag])
        t(os.fstat, fd)
        t(os.pread, fd, 10_000, 0)

    both(case)


@pytest.mark.parametrize("flag", ["hipri", "unknown"])
def test_flags_of_a_read(both: Any, flag: str) -> None:
    def case(t: Any) -> None:
        write("a", b"content" * 1000)
        fd, buffer = t(os.open, "a", os.O_RDONLY), bytearray(5000)
        t(lambda: os.preadv(fd, [buffer], 3000, FLAGS[flag]))
        t.note(t.show(buffer))

    both(case)


@pytest.mark.parametrize("advice", range(-1, 8))
@pytest.mark.parametrize("kind", ["file", "dir"])
def test_advice(both: Any, kind: str, advice: int) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        fd = t(os.open, "a", os.O_RDONLY)
        t(os.posix_fadvise, fd, 0, 0, advice)
        t(os.posix_fadvise, fd, -1, -5, advice)
        if kind == "file":
            t(os.pread, fd, 100, 0)

    both(case)


@pytest.mark.parametrize("advice", ["REMOVE", "DONTNEED", "WILLNEED", "FREE", "DONTFORK", "HUGEPAGE"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_advice_for_maps(both: Any, shared: bool, advice: str) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * 20_000)
        fd = t(os.open, "a", os.O_RDWR)
        with mmap.mmap(fd, 20_000, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) as memory:
            memory[5000:5003] = b"new"
            t(memory.madvise, getattr(mmap, f"MADV_{advice}"), 4096, 4096)
            t.note(t.show(memory[:]))
        t(os.pread, fd, 20_000, 0)

    both(case)


def test_seals(both: Any) -> None:
    add, get, write_seal = 1033, 1034, 8

    def case(t: Any) -> None:
        write("a")
        fd = t(os.open, "a", os.O_RDWR)
        t(fcntl.fcntl, fd, get)
        t(fcntl.fcntl, fd, add, write_seal)
        t(os.write, fd, b"x")

    both(case)


@pytest.mark.parametrize("kind", THINGS)
def test_statx(both: Any, kind: str) -> None:
    """What statx has beyond stat: which fields are valid, and attributes."""

    def case(t: Any) -> None:
        make(kind, "a")
        for flags in (0, system.AT_SYMLINK_NOFOLLOW):
            t(system.statx, "a", flags)

    both(case)


@pytest.mark.parametrize("mode", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_access(both: Any, kind: str, mode: int) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        for follow in (True, False):
            t(os.access, "a", mode, follow_symlinks=follow)
        if kind in ("file", "dir"):
            os.chmod("a", 0o050)
            t.other(lambda u: u(os.access, "a", mode))

    both(case)


def test_a_map_that_two_processes_share(both: Any) -> None:
    """Each sees what the other wrote, at once, and so does read."""

    def child(t: Record) -> None:
        with open("a", "r+b") as file, mmap.mmap(file.fileno(), 8192) as memory:
            t.note(memory[:6])
            memory[4096:4101] = b"child"

    def case(t: Any) -> None:
        write("a", bytes(8192))
        fd = t(os.open, "a", os.O_RDWR)
        with mmap.mmap(fd, 8192) as memory:
            memory[:6] = b"parent"
            t.other(child, os.getuid(), os.getgid())
            t.note(memory[4096:4101])
            t(os.pread, fd, 5, 4096)

    both(case)


@pytest.mark.parametrize("where", ["last page", "beyond", "cut off"])
def test_a_map_beyond_the_end(both: Any, where: str) -> None:
    """SIGBUS on pages that the file does not have, zeros on the rest of the last one that it has."""

    def case(t: Any) -> None:
        write("a", b"x" * 5000)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            with open("a", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 121, 1)
                os.truncate("a", 100 if where == "cut off" else 5000)
                base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                at = {"last page": 5001, "beyond": 8192, "cut off": 4097}[where]
                os._exit(ctypes.string_at(base + at, 1)[0])
        t.note(os.waitpid(pid, 0)[1])

    both(case)


@pytest.mark.parametrize("hint", [0, 2, 5, 99])
def test_write_life_hint(both: Any, hint: int) -> None:
    get, set_ = 1035, 1036

    def case(t: Any) -> None:
        write("a")
        fd = t(os.open, "a", os.O_RDWR)
        t(fcntl.fcntl, fd, set_, struct.pack("Q", hint))
        t(fcntl.fcntl, fd, get, bytes(8))

    both(case)


def test_sync_of_every_kind(both: Any) -> None:
    def case(t: Any) -> None:
        write("a", b"x" * 10_000)
        os.mkdir("d")
        fd, directory = os.open("a", os.O_RDWR), os.open("d", os.O_RDONLY)
        for call in (os.fsync, os.fdatasync, system.syncfs):
            t(call, fd)
            t(call, directory)
        for flags in (0, 1, 2, 4, 7, 8):
            t(system.sync_file_range, fd, 0, 5000, flags)
        t(system.sync_file_range, fd, -1, 5000, 7)
        t(system.sync_file_range, directory, 0, 0, 7)
        t(system.readahead, fd, 0, 4096)
        t(system.readahead, directory, 0, 4096)

    both(case)


def unnamed() -> str:
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
    return re.sub(r"#\d+", "#0", os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2])


DECIDED: dict[str, Callable[[int, int], object]] = {
    "folder-end": lambda file, folder: os.lseek(folder, 0, os.SEEK_END),
    "folder-data": lambda file, folder: os.lseek(folder, 0, os.SEEK_DATA),
    "epoll": lambda file, folder: select.epoll().register(file),
    "uuid": lambda file, folder: len(fcntl.ioctl(file, FS_IOC_GETFSUUID, bytes(17))),
    "unnamed": lambda file, folder: unnamed(),
}


@pytest.mark.parametrize("what", DECIDED)
def test_what_a_file_system_in_the_kernel_decides(both: Any, what: str) -> None:
    def case(t: Any) -> None:
        write("a", b"content")
        file, folder = os.open("a", os.O_RDWR), os.open(".", os.O_RDONLY)
        t(DECIDED[what], file, folder)

    both(case)
