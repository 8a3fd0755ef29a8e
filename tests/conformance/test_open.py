# SPDX-License-Identifier: GPL-2.0-or-later
"""open with every mix of flags, over every kind, and what the descriptor then can do."""

import os
from typing import Any

import pytest

from tests.conformance.kinds import DEVICES, KINDS, make, write

pytestmark = pytest.mark.mount

MODES = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}
FLAGS = {
    "plain": 0,
    "creat": os.O_CREAT,
    "excl": os.O_CREAT | os.O_EXCL,
    "trunc": os.O_TRUNC,
    "creat-trunc": os.O_CREAT | os.O_TRUNC,
    "append": os.O_APPEND,
    "append-trunc": os.O_APPEND | os.O_TRUNC,
    "directory": os.O_DIRECTORY,
    "creat-directory": os.O_CREAT | os.O_DIRECTORY,
    "nofollow": os.O_NOFOLLOW,
    "creat-nofollow": os.O_CREAT | os.O_NOFOLLOW,
    "path": os.O_PATH,
    "path-nofollow": os.O_PATH | os.O_NOFOLLOW,
    "direct": os.O_DIRECT,
    "sync": os.O_SYNC,
    "noatime": os.O_NOATIME,
}


@pytest.mark.parametrize("kind", (*KINDS, "loop", *DEVICES[1:]))
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("mode", MODES)
def test_flags(both: Any, mode: str, flags: str, kind: str) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        fd = t(os.open, "a", MODES[mode] | FLAGS[flags] | os.O_NONBLOCK, 0o666)
        if fd is not None and kind not in ("fifo", "socket") and FLAGS[flags] != os.O_DIRECT:
            t(os.write, fd, b"1234567")
            t(os.lseek, fd, 2, os.SEEK_SET)
            t(os.write, fd, b"X")
            t(os.pread, fd, 100, 0)
            t(os.fstat, fd)
        t(os.listdir, ".")

    both(case)


@pytest.mark.parametrize("umask", [0, 0o022, 0o027, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0, 0o600, 0o644, 0o666, 0o755, 0o777, 0o1777, 0o4755, 0o6777])
def test_mode_and_umask(both: Any, umask: int, mode: int) -> None:
    def case(t: Any) -> None:
        os.umask(umask)
        t(os.open, "file", os.O_CREAT | os.O_RDWR, mode)
        t(os.mkdir, "dir", mode)
        t(os.mkfifo, "fifo", mode)
        t(os.symlink, "x", "link")
        for name in ("file", "dir", "fifo", "link"):
            t(os.lstat, name)

    both(case)


def test_creat_for_others_with_no_permission_keeps_the_descriptor(both: Any) -> None:
    def user(t: Any) -> None:
        fd = t(os.open, "mine", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0)
        t(os.write, fd, b"content")
        t(os.pread, fd, 10, 0)
        t(os.open, "mine", os.O_RDONLY)
        t(os.open, "mine", os.O_CREAT | os.O_WRONLY)
        t(os.fstat, fd)

    both(lambda t: t.other(user))


@pytest.mark.parametrize("kind", ["file", "none"])
def test_append(both: Any, kind: str) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        one = t(os.open, "a", os.O_RDWR | os.O_APPEND | os.O_CREAT)
        two = t(os.open, "a", os.O_WRONLY | os.O_APPEND)
        three = t(os.open, "a", os.O_RDWR)
        for number in range(20):
            t(os.write, one, b"one%d" % number)
            t(os.write, two, b"two")
            t(os.lseek, one, 0, os.SEEK_CUR)
        t(os.pwrite, one, b"at the end all the same", 0)
        t(os.ftruncate, three, 30)
        t(os.write, two, b"after")
        t(os.write, three, b"HEAD")
        t(os.pread, one, 1000, 0)
        t(os.fstat, one)

    both(case)


@pytest.mark.parametrize("size", [512, 4096, 12288, 100, 4097])
@pytest.mark.parametrize("offset", [0, 4096, 512, 1])
def test_direct(both: Any, size: int, offset: int) -> None:
    import mmap

    def case(t: Any) -> None:
        write("a", bytes(range(256)) * 40)
        fd = t(os.open, "a", os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 16384) as memory:
            memory[:] = b"D" * 16384
            view = memoryview(memory)[:size]
            t(lambda: os.pwritev(fd, [view], offset))
            t(lambda: os.preadv(fd, [view], offset))
            t.note(t.show(bytes(view)))
            view.release()
        t(os.fstat, fd)
        other = t(os.open, "a", os.O_RDONLY)
        t(os.pread, other, 30000, 0)

    both(case)


def test_etxtbsy(both: Any) -> None:
    def case(t: Any) -> None:
        import shutil
        import subprocess

        shutil.copy("/bin/sleep", "program")
        running = subprocess.Popen(["./program", "30"])
        t(os.open, "program", os.O_WRONLY)
        t(os.truncate, "program", 0)
        t(os.unlink, "program")
        running.kill()
        running.wait()
        shutil.copy("/bin/true", "program")
        fd = t(os.open, "program", os.O_WRONLY)
        t(os.execv, "./program", ["program"])
        os.close(fd)
        t.note(subprocess.run(["./program"], check=False).returncode)

    both(case)


@pytest.mark.parametrize("kind", ["file", "dir"])
def test_reopen_through_proc(both: Any, kind: str) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        fd = t(os.open, "a", os.O_PATH)
        t(os.stat, f"/proc/self/fd/{fd}")
        t(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY)
        t(os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
        t(os.rename, "a", "b")
        t(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY)
        t(os.fchmod, fd, 0o600)
        t(os.chmod, f"/proc/self/fd/{fd}", 0o600)

    both(case)
