# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests are counted by kind, and read by whoever may look."""

import gc
import os

import pytest

from pkramfs.fuse import counters
from pkramfs.fuse.wire import HEADER, Op
from tests.fuse.test_filter import Kernel, kernel  # noqa: F401 - a fixture


def mine() -> counters.Snapshot:
    """What this process has counted, if it has one set of counters."""
    found = counters.read(os.getpid())
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def alone():
    gc.collect()  # counters of other tests' filters
    if counters.read(os.getpid()) is not None:
        pytest.skip("another test's filter still counts")


def test_each_kind_is_counted(kernel: Kernel) -> None:  # noqa: F811
    for _ in range(3):
        kernel.ask(Op.GETATTR, 1, bytes(16))
    kernel.ask(Op.LOOKUP, 1, b"nothing\0")
    found = mine()
    assert found.requests == {Op.GETATTR: 3, Op.LOOKUP: 1}
    assert all(not any(counts) for _, counts in found.times.values())  # nothing was timed
    assert (found.received, found.sent) == (0, 0)


def test_the_first_of_a_turn_is_timed(kernel: Kernel) -> None:  # noqa: F811
    kernel.send(Op.GETATTR, 1, bytes(16))
    assert kernel.filter.serve_timed() and len(kernel.replies()) == 1
    assert kernel.filter.serve_timed()  # there is nothing to read
    nanoseconds, counts = mine().times[Op.GETATTR]
    assert nanoseconds > 0 and sum(counts) == 1
    assert counts[nanoseconds.bit_length() - 1] == 1


def test_bytes_of_a_page_or_more_are_counted(kernel: Kernel) -> None:  # noqa: F811
    from pkramfs.fuse import wire
    from tests.fuse.test_filter import _create

    _, body = kernel.ask(Op.CREATE, 1, _create(b"f"))
    node, handle = wire.ENTRY.unpack_from(body)[0], wire.OPENED.unpack_from(body, wire.ENTRY.size)[0]
    kernel.ask(Op.WRITE, node, wire.WRITE.pack(handle, 0, 10_000, 0, 0, 0, 0) + bytes(10_000))
    kernel.ask(Op.READ, node, wire.READ.pack(handle, 0, 1 << 20, 0, 0, 0, 0))
    found = mine()
    assert found.received == HEADER.size + wire.WRITE.size + 10_000
    assert found.sent == 16 + 10_000


@pytest.mark.parametrize("op", [63, 64, 100, 4096, (1 << 32) - 1])
def test_an_opcode_that_nobody_knows_changes_no_other_count(kernel: Kernel, op: int) -> None:  # noqa: F811
    kernel.send(op, 1, bytes(16))
    assert kernel.filter.serve_timed()
    kernel.replies()
    found = mine()
    assert found.requests == ({op: 1} if op < counters.KINDS else {})
    assert set(found.times) == set(found.requests)


def test_buckets_are_powers_of_two() -> None:
    words = counters.make()
    for nanoseconds in (0, 1, 2, 1023, 1024, 1 << 40):
        counters.note(words, 3, nanoseconds)
    words[counters.COUNTS + 3] = 6
    _, counts = mine().times[3]
    assert {bit + 1: count for bit, count in enumerate(counts) if count} == {1: 2, 2: 1, 10: 1, 11: 1, 31: 1}
    words.release()


def test_who_counts_nothing_has_no_answer() -> None:
    assert counters.read(os.getppid()) is None
    assert counters.read(1 << 22) is None  # no such process


def test_a_host_that_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    words = counters.make()
    counters.note(words, 3, 5)
    assert counters.read(os.getpid()) is None
