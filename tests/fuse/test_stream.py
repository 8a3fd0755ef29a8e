# SPDX-License-Identifier: GPL-2.0-or-later
"""Large WRITEs by way of a pipe: the same bytes as through the buffer, whatever comes between them or fails."""

import errno
import os
import random
from collections.abc import Iterator

import pytest

pytest.importorskip("pyfuse3")

from pkramfs.fs.limits import Limits
from pkramfs.fs.tree import Tree
from pkramfs.fuse import wire
from pkramfs.fuse.handshake import MAX_WRITE
from pkramfs.fuse.stream import LARGE
from pkramfs.fuse.wire import Op
from tests.fs.conftest import SmallFrames, audit, small_ram
from tests.fuse.test_filter import Kernel

CACHED = wire.WRITE_CACHE


class Writer(Kernel):
    """A kernel that writes to one file, and knows what must be in it."""

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree)
        inode = tree.create(1, b"file", 0o644)
        self.node, self.handle = inode.ino, tree.open(inode.ino, os.O_RDWR)
        self.model = bytearray()
        self.stream = self.filter._stream

    def write(self, offset: int, data: bytes, flags: int = CACHED) -> int:
        """Write; return the error."""
        body = wire.WRITE.pack(self.handle, offset, len(data), flags, 0, 0, 0) + data
        error, found = self.ask(Op.WRITE, self.node, body)
        if not error:
            assert found == wire.COUNT.pack(len(data), 0)
            self.model.extend(bytes(max(offset + len(data) - len(self.model), 0)))
            self.model[offset : offset + len(data)] = data
        return error

    def check(self) -> None:
        assert bytes(self.operations.tree.read(self.handle, 0, 1 << 30)) == self.model


@pytest.fixture
def kernel() -> Iterator[Writer]:
    with small_ram(4096) as ram:
        tree = Tree(ram, SmallFrames(ram), Limits())  # type: ignore[arg-type]
        made = Writer(tree)
        try:
            yield made
        finally:
            made.close()
        audit(tree)


@pytest.fixture
def spliced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each piece that has gone from a pipe to RAM."""
    found, splice = [], os.splice

    def count(source: int, target: int, size: int, **places: int) -> int:
        moved = splice(source, target, size, **places)
        if places:
            found.append(moved)
        return moved

    monkeypatch.setattr(os, "splice", count)
    return found


def test_the_second_large_write_comes_through_the_pipe(kernel: Writer, spliced: list[int]) -> None:
    for number in range(4):
        assert not kernel.write(number * MAX_WRITE, os.urandom(MAX_WRITE))
    assert sum(spliced) == 3 * MAX_WRITE
    kernel.check()


def test_small_requests_end_it_and_direct_writes_do_not_begin_it(kernel: Writer, spliced: list[int]) -> None:
    for number in range(2):
        kernel.write(number * MAX_WRITE, os.urandom(MAX_WRITE))
    for _ in range(4):
        assert not kernel.ask(Op.GETATTR, 1, bytes(16))[0] and not kernel.write(5000, b"small")
    assert not kernel.stream.left and len(spliced) == 1
    for number in range(3):
        kernel.write(number * LARGE, os.urandom(2 * LARGE), flags=0)
        assert not kernel.stream.left
    kernel.check()


@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_stores_what_was_written(kernel: Writer, spliced: list[int], seed: int) -> None:
    """Into holes and over data, aligned or not, with holes and other requests between."""
    any_ = random.Random(seed)
    for _ in range(60):
        offset = any_.choice((0, 4096 * any_.randrange(512), any_.randrange(1 << 21)))
        size = any_.choice(
            (1, 4096, LARGE, LARGE + 1, LARGE + 4096 * any_.randrange(64), any_.randrange(LARGE, MAX_WRITE))
        )
        assert not kernel.write(offset, any_.randbytes(size), any_.choice((CACHED, CACHED, CACHED, 0)))
        if any_.random() < 0.2:
            start, length = 4096 * any_.randrange(512), 4096 * any_.randrange(1, 64)
            kernel.operations.tree.punch(kernel.node, start, length)
            kernel.model[start : start + length] = bytes(max(min(length, len(kernel.model) - start), 0))
    assert spliced
    kernel.check()


@pytest.mark.parametrize("fails", [0, 1])
def test_a_host_that_is_full_half_way_loses_no_byte(
    kernel: Writer, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """What was moved is in frames that are freed, the rest in the pipe; then it is written the usual way."""
    for number in range(2):
        kernel.write(number * MAX_WRITE, os.urandom(MAX_WRITE))
    calls, splice = [], os.splice

    def full(source: int, target: int, size: int, **places: int) -> int:
        if not places:
            return splice(source, target, size)
        calls.append(size)
        if len(calls) > fails:
            raise OSError(errno.ENOSPC, "full")
        return splice(source, target, 123_456, **places)

    monkeypatch.setattr(os, "splice", full)
    assert not kernel.write(2 * MAX_WRITE, os.urandom(MAX_WRITE)) and calls
    kernel.check()


def test_no_room_is_told_as_ever(kernel: Writer) -> None:
    tree = kernel.operations.tree
    for number in range(2):
        kernel.write(number * MAX_WRITE, os.urandom(MAX_WRITE))
    tree.limits.max_pages = tree.limits.pages + 20
    data = os.urandom(LARGE + 1)
    assert kernel.write(2 * MAX_WRITE, data) == -errno.ENOSPC
    kernel.model += data[: 20 * 4096]
    kernel.check()
    assert kernel.node in tree.losses.files


def test_a_cut_write_is_refused_and_what_follows_is_served(kernel: Writer) -> None:
    kernel.write(0, os.urandom(MAX_WRITE))
    body = wire.WRITE.pack(kernel.handle, 0, MAX_WRITE, CACHED, 0, 0, 0) + bytes(MAX_WRITE - 1)
    assert kernel.ask(Op.WRITE, kernel.node, body)[0] == -errno.EINVAL
    assert not kernel.write(100, os.urandom(MAX_WRITE))
    kernel.check()


def test_a_kernel_that_allows_larger_requests_refuses_and_they_are_read(
    kernel: Writer, spliced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount that an older daemon has made."""

    def refuse(*_: int, **__: int) -> int:
        raise OSError(errno.EINVAL, "too small")

    kernel.write(0, os.urandom(MAX_WRITE))
    monkeypatch.setattr(os, "splice", refuse)
    body = wire.WRITE.pack(kernel.handle, 0, 1 << 20, CACHED, 0, 0, 0) + bytes(1 << 20)
    number = kernel.send(Op.WRITE, kernel.node, body)
    assert kernel.filter.serve() and not kernel.replies() and kernel.filter.serve()
    assert kernel.replies() == [(0, number, wire.COUNT.pack(1 << 20, 0))]
    assert not kernel.write(0, os.urandom(1 << 20)) and not kernel.stream.left


def test_a_dead_device_ends_it(kernel: Writer) -> None:
    kernel.write(0, os.urandom(MAX_WRITE))
    kernel.socket.close()
    assert not kernel.filter.serve()


def test_without_a_descriptor_for_the_pipe_data_come_the_usual_way(
    kernel: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is refused for that would be lost. Later there may be one."""

    def refuse(_: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pipe2", refuse)
    for offset in (0, MAX_WRITE):
        assert not kernel.write(offset, os.urandom(MAX_WRITE)) and not kernel.stream.left
    monkeypatch.undo()
    assert not kernel.write(0, os.urandom(MAX_WRITE)) and kernel.stream.left
    kernel.check()
