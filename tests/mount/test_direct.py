# SPDX-License-Identifier: GPL-2.0-or-later
"""O_DIRECT beside buffered reading: what is cached must be what was written."""

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkramfs.fuse.handshake import MAX_BACKGROUND, MAX_WRITE
from tests.conformance.system import Aio

pytestmark = pytest.mark.mount

PAGE = mmap.PAGESIZE
SIZE = (MAX_BACKGROUND + 2) * MAX_WRITE
"""More than the kernel sends to a daemon at once: the last of it waits until the first is answered."""


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _waits_in(task: str, call: int) -> bool:
    """Whether a task sleeps in a system call (-1: in a page fault)."""
    return (Path("/proc") / task / "syscall").read_text().split()[0] == str(call)


def _touch_last(memory: mmap.mmap) -> tuple[int, int]:
    """A process that reads the last page of a mapping, and the pipe on which it says that it will."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"!")
        memory[-1]
        os._exit(0)
    os.close(writer)
    return pid, reader


def test_what_is_read_during_an_asynchronous_write_is_not_stale_after_it(lab: Any) -> None:
    """A page that comes into the cache between the begin of a write and its end is dropped when it ends."""
    mnt = lab.mount("one")
    path, pid = mnt / "file", lab.entry(mnt).pid
    path.write_bytes(b"old " * (SIZE // 4))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    cached = mmap.mmap(fd, SIZE, prot=mmap.PROT_READ)
    cached.madvise(mmap.MADV_RANDOM)  # no read-ahead, which would come after the writes
    content = mmap.mmap(-1, SIZE)
    content[:] = b"new " * (SIZE // 4)
    aio = Aio()
    submit = threading.Thread(target=aio.submit, args=(fd, content), daemon=True)
    with memoryview(content) as view:
        os.pwrite(fd, view[:PAGE], 0)  # the first write asks for attributes, and would wait for them
    try:
        os.kill(pid, signal.SIGSTOP)
        submit.start()
        _until(lambda: not submit.is_alive() or _waits_in(f"self/task/{submit.native_id}", Aio.SUBMIT))
        child, announced = _touch_last(cached)
        assert os.read(announced, 1) == b"!"
        _until(lambda: _waits_in(str(child), -1))
    finally:
        os.kill(pid, signal.SIGCONT)
    submit.join()
    assert aio.wait() == SIZE
    assert os.waitpid(child, 0) == (child, 0)
    fresh = path.read_bytes() == content[:]
    assert fresh
    with open(path, "r+b") as file:  # nor is anything stale put back
        file.seek(-1, os.SEEK_END)
        file.write(b" ")
    assert os.preadv(fd, [content], 0) == SIZE
    kept = content[:] == b"new " * (SIZE // 4)
    assert kept
    cached.close()
    aio.close()
    os.close(announced)
    os.close(fd)
