# SPDX-License-Identifier: GPL-2.0-or-later
"""Random writes on a small mount that is nearly full, beside a tmpfs and a model that knows which pages each needs.

A write that fits succeeds whole, one that does not is ENOSPC and changes nothing (a tmpfs writes a part of it: this is
a listed difference), and no data are lost later.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.lab import Pairs

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs a tmpfs of its own"),
    pytest.mark.skipif(os.environ.get("PKRAM_TEST_FUSE") == "pyfuse3", reason="pyfuse3 does not say who asks"),
]
PAGES, END = 64, 300_000
_RWF_APPEND, _KEEP_SIZE, _PUNCH_HOLE = 0x10, 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, start: int, size: int) -> int:
    if _libc.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(size)):
        raise OSError(error := ctypes.get_errno(), os.strerror(error))
    return 0


def spanned(start: int, size: int) -> set[int]:
    return set(range(start >> 12, (start + size + 4095) >> 12)) if size else set()


class File:
    """A file on both sides, with the pages that it has in a tmpfs."""

    def __init__(self, sides: tuple[Path, Path], name: str) -> None:
        self.fds = [os.open(side / name, os.O_RDWR | os.O_CREAT) for side in sides]
        self.pages: set[int] = set()
        self.size = self.at = 0
        self.append = False

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Case:
    """Some files, and steps on a random one of them."""

    def __init__(self, sides: tuple[Path, Path], rng: random.Random) -> None:
        self.sides, self.rng, self.steps = sides, rng, list[str]()
        self.files = [File(sides, name) for name in "abc"]
        self.refused = 0

    @property
    def room(self) -> int:
        return PAGES - sum(len(file.pages) for file in self.files)

    def step(self) -> None:
        rng, file = self.rng, self.rng.choice(self.files)
        size = rng.choice([0, 1, 100, 4096, rng.randrange(20_000), rng.randrange(80_000), rng.randrange(END)])
        start = rng.choice([0, rng.randrange(END), file.size, rng.randrange(PAGES) * 4096, max(file.size - 3000, 0)])
        act = rng.choice([self.write] * 12 + [self.truncate, self.punch, self.allocate, self.flag, self.sync])
        self.steps.append(f"{act.__name__} {self.files.index(file)} {start} {size}, {self.room} pages left")
        act(file, start, size)

    def write(self, file: File, start: int, size: int) -> None:
        how = self.rng.choice(["write", "writev", "pwrite", "pwritev", "append"])
        append, data = file.append or how == "append", self.rng.randbytes(7) * (size // 7 + 1)
        parts = [data[: size // 3], b"", data[size // 3 : size]]
        calls: dict[str, Callable[[int], int]] = {
            "write": lambda fd: os.write(fd, data[:size]),
            "writev": lambda fd: os.writev(fd, parts),
            "pwrite": lambda fd: os.pwrite(fd, data[:size], start),
            "pwritev": lambda fd: os.pwritev(fd, parts, start),
            "append": lambda fd: os.pwritev(fd, parts, start, _RWF_APPEND),
        }
        stands = how in ("write", "writev")
        place = file.size if append else file.at if stands else start
        needed = spanned(place, size) - file.pages
        self.steps[-1] += f", by {how} at {place}: {len(needed)} needed"
        if self.fits(file, needed, calls[how], size) and size:
            file.size = max(file.size, place + size)
            file.at = place + size if stands else file.at

    def fits(self, file: File, needed: set[int], call: Callable[[int], int], result: int) -> bool:
        """Return True if a call fits, and succeeded on both sides; it must fail on ours if it does not."""
        if len(needed) > self.room:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                call(file.fds[1])
            self.refused += 1
            return False
        assert [call(fd) for fd in file.fds] == [result] * 2
        file.pages |= needed
        return True

    def truncate(self, file: File, start: int, _: int) -> None:
        for fd in file.fds:
            os.fsync(fd)  # a daemon does not know the end of what is on its way
            os.ftruncate(fd, start)
        if start <= file.size:
            file.pages = {page for page in file.pages if page << 12 < start}
        file.size = start

    def punch(self, file: File, start: int, size: int) -> None:
        for fd in file.fds:
            fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, start, size + 1)
        file.pages -= set(range((start + 4095) >> 12, (start + size + 1) >> 12))

    def allocate(self, file: File, start: int, size: int) -> None:
        needed = spanned(start, size + 1) - file.pages
        self.fits(file, needed, lambda fd: fallocate(fd, _KEEP_SIZE, start, size + 1), 0)

    def flag(self, file: File, *_: int) -> None:
        file.append = not file.append
        for fd in file.fds:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND if file.append else 0)

    def sync(self, file: File, *_: int) -> None:
        os.fsync(file.fds[1])

    def end(self) -> None:
        """Compare, and remove the files."""
        for file in self.files:
            os.fsync(file.fds[1])
            os.posix_fadvise(file.fds[1], 0, 0, os.POSIX_FADV_DONTNEED)
        for name, file in zip("abc", self.files, strict=True):
            theirs, ours = (os.pread(fd, 2 * END, 0) for fd in file.fds)
            assert theirs == ours
            file.close()
            assert os.stat(self.sides[0] / name).st_blocks == len(file.pages) * 8
            deadline = time.monotonic() + 10
            while os.stat(self.sides[1] / name).st_blocks != len(file.pages) * 8:
                assert time.monotonic() < deadline
            for side in self.sides:
                (side / name).unlink()


def test_random_writes_where_it_is_nearly_full(laboratory: Pairs, seed: int, request: pytest.FixtureRequest) -> None:
    sides, refused = laboratory.pair("nearly", f"nr_blocks={PAGES}"), 0
    for number in range(500 if request.config.getoption("--long") else 4):
        case = Case(sides, random.Random(f"{seed} {number}"))
        try:
            for _ in range(40):
                case.step()
            case.end()
        except BaseException:
            print(f"case {number}:", *case.steps, sep="\n")
            for file in case.files:
                with contextlib.suppress(OSError):
                    file.close()
            raise
        refused += case.refused
    assert refused > 5
