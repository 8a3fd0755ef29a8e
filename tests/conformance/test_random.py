# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences: of calls on both file systems, and of reads, writes, truncates and maps on ours."""

import mmap
import os
import random
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.conformance.conftest import inside
from tests.conformance.differences import judge
from tests.conformance.record import Record, picture
from tests.conformance.system import renameat2

pytestmark = pytest.mark.mount
SECONDS = 20.0

paths = st.sampled_from([f"{a}{b}" for a in ("", "a/", "b/", "a/b/") for b in "abcd"])
modes = st.sampled_from([0o700, 0o644, 0o2755, 0o6711, 0])
sizes = st.sampled_from([0, 1, 100, 4095, 4096, 4097, 20_000])
open_flags = st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_CREAT | os.O_TRUNC, os.O_APPEND])
names = st.sampled_from(["user.a", "user.b", "security.c"])


def written(path: str, flags: int, offset: int, size: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | flags, 0o666)
    try:
        return os.pwrite(fd, b"%d" % size * size, offset)
    finally:
        os.close(fd)


def read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, 100_000)
    finally:
        os.close(fd)


class Both(RuleBasedStateMachine):
    """Each rule is one call on both sides; after each the lines must be equal, at the end the trees."""

    sides: tuple[Path, Path]
    deadline = 0.0
    count = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).count += 1
        self.records = Record(), Record()
        self.tops = [side / f"{self.count}" for side in self.sides]
        for top in self.tops:
            top.mkdir()

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        if time.monotonic() < self.deadline:
            for top, record in zip(self.tops, self.records, strict=True):
                with inside(top):
                    record(function, *args)

    @rule(path=paths, mode=modes)
    def mkdir(self, path: str, mode: int) -> None:
        self.call(os.mkdir, path, mode)

    @rule(path=paths, mode=modes, kind=st.sampled_from([stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK]))
    def mknod(self, path: str, mode: int, kind: int) -> None:
        self.call(os.mknod, path, mode | kind)

    @rule(path=paths)
    def unlink(self, path: str) -> None:
        self.call(os.unlink, path)

    @rule(path=paths)
    def rmdir(self, path: str) -> None:
        self.call(os.rmdir, path)

    @rule(old=paths, new=paths, flags=st.sampled_from([0, 0, 0, 1, 2, 4]))
    def rename(self, old: str, new: str, flags: int) -> None:
        self.call(renameat2, old, new, flags)

    @rule(old=paths, new=paths)
    def link(self, old: str, new: str) -> None:
        self.call(os.link, old, new)

    @rule(to=paths, path=paths)
    def symlink(self, to: str, path: str) -> None:
        self.call(os.symlink, to, path)

    @rule(path=paths, flags=open_flags, offset=sizes, size=sizes)
    def write(self, path: str, flags: int, offset: int, size: int) -> None:
        self.call(written, path, flags, offset, size)

    @rule(path=paths)
    def read(self, path: str) -> None:
        self.call(read, path)

    @rule(path=paths, size=sizes)
    def truncate(self, path: str, size: int) -> None:
        self.call(os.truncate, path, size)

    @rule(path=paths, mode=modes)
    def chmod(self, path: str, mode: int) -> None:
        self.call(os.chmod, path, mode)

    @rule(path=paths, name=names, size=sizes)
    def setxattr(self, path: str, name: str, size: int) -> None:
        self.call(os.setxattr, path, name, b"v" * (size // 8))

    @rule(path=paths, name=names)
    def removexattr(self, path: str, name: str) -> None:
        self.call(os.removexattr, path, name)

    @rule(path=paths)
    def look(self, path: str) -> None:
        self.call(os.lstat, path)
        self.call(os.listdir, path)

    @invariant()
    def answers_are_equal(self) -> None:
        judge("random", self.records[0].lines[-2:], self.records[1].lines[-2:])

    def teardown(self) -> None:
        trees = []
        for top in self.tops:
            with inside(top):
                trees.append(picture("."))
        judge("random", *trees)


@pytest.mark.skipif(os.geteuid() != 0, reason="modes without permission need root")
def test_sequences_of_calls(pair: tuple[Path, Path], seed: int, request: pytest.FixtureRequest) -> None:
    tops = tuple(side / "random" for side in pair)
    for top in tops:
        top.mkdir()
    Both.sides = tops[0], tops[1]
    Both.deadline = time.monotonic() + SECONDS * (20 if request.config.getoption("--long") else 1)
    examples = 2000 if request.config.getoption("--long") else 30
    run_state_machine_as_test(Both, settings=settings(max_examples=examples, stateful_step_count=60, deadline=None))  # type: ignore[no-untyped-call]


# -- one file -----------------------------------------------------------------------------------

LENGTH = 300_000


class File:
    """A file on the mount and what it must contain. In the manner of fsx."""

    def __init__(self, path: str, rng: random.Random) -> None:
        self.path, self.rng, self.content = path, rng, bytearray()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def step(self) -> str:
        act = self.rng.choice([self.write, self.write, self.read, self.truncate, self.map, self.append, self.reopen,
                               self.sync, self.vector, self.punch])  # fmt: skip
        act()
        return act.__name__

    def _range(self) -> tuple[int, int]:
        start = self.rng.choice([0, 4096, 8192, self.rng.randrange(LENGTH), self.rng.randrange(LENGTH)])
        return start, self.rng.choice([1, 17, 4096, self.rng.randrange(1, 70_000)])

    def _put(self, start: int, data: bytes) -> None:
        if start > len(self.content):
            self.content += bytes(start - len(self.content))
        self.content[start : start + len(data)] = data

    def write(self) -> None:
        start, size = self._range()
        data = self.rng.randbytes(size)
        assert os.pwrite(self.fd, data, start) == size
        self._put(start, data)

    def vector(self) -> None:
        start, size = self._range()
        data = self.rng.randbytes(size)
        cut = self.rng.randrange(size)
        os.pwritev(self.fd, [data[:cut], data[cut:]], start)
        self._put(start, data)

    def append(self) -> None:
        data = self.rng.randbytes(self.rng.randrange(1, 5000))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, data)
        os.close(fd)
        self.content += data

    def read(self) -> None:
        start, size = self._range()
        assert os.pread(self.fd, size, start) == self.content[start : start + size]

    def truncate(self) -> None:
        size = self.rng.choice([0, self.rng.randrange(LENGTH), self.rng.randrange(LENGTH), len(self.content) // 2])
        if self.rng.random() < 0.5:
            os.ftruncate(self.fd, size)
        else:
            os.truncate(self.path, size)
        del self.content[size:]
        self.content += bytes(size - len(self.content))

    def map(self) -> None:
        if not self.content:
            return
        start, size = self._range()
        start = min(start, len(self.content) - 1)
        data = self.rng.randbytes(min(size, len(self.content) - start))
        with mmap.mmap(self.fd, len(self.content)) as memory:
            assert memory[start : start + len(data)] == self.content[start : start + len(data)]
            memory[start : start + len(data)] = data
        self._put(start, data)

    def reopen(self) -> None:
        os.close(self.fd)
        self.fd = os.open(self.path, self.rng.choice([os.O_RDWR, os.O_RDWR | os.O_SYNC]))
        if self.rng.random() < 0.5:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def punch(self) -> None:
        """Zeros, as cp --sparse and databases write them."""
        start, size = self._range()
        os.pwrite(self.fd, bytes(size), start)
        self._put(start, bytes(size))

    def check(self) -> None:
        assert os.fstat(self.fd).st_size == len(self.content)
        assert os.pread(self.fd, len(self.content) + 100, 0) == self.content


@pytest.mark.few(4)
@pytest.mark.parametrize("number", range(8))
def test_one_file(pair: tuple[Path, Path], seed: int, number: int, request: pytest.FixtureRequest) -> None:
    rng = random.Random(f"{seed} {number}")
    file = File(str(pair[1] / f"fsx{number}"), rng)
    steps = [file.step() for _ in range(20_000 if request.config.getoption("--long") else 400)]
    file.check()
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    file.check()
    os.close(file.fd)
    assert Path(file.path).read_bytes() == file.content, steps


def test_several_files_at_once(pair: tuple[Path, Path], seed: int) -> None:
    """What belongs to one file never shows in another, while frames go from hand to hand."""
    rng = random.Random(seed)
    files = [File(str(pair[1] / f"many{number}"), rng) for number in range(6)]
    for _ in range(1200):
        rng.choice(files).step()
    for file in files:
        file.sync()
        file.check()
        os.close(file.fd)
