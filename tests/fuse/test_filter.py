# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests over a socket pair: what is answered, and that nothing ends the filter or leaves a caller waiting."""

import errno
import logging
import os
import random
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

pyfuse3 = pytest.importorskip("pyfuse3")

from pkramfs.fs.inode import ROOT  # noqa: E402
from pkramfs.fs.limits import Limits  # noqa: E402
from pkramfs.fs.recover import begin  # noqa: E402
from pkramfs.fs.tree import Tree  # noqa: E402
from pkramfs.fuse import filter as module  # noqa: E402
from pkramfs.fuse import turns, wire  # noqa: E402
from pkramfs.fuse.brake import Brake  # noqa: E402
from pkramfs.fuse.filter import RESENT, Filter  # noqa: E402
from pkramfs.fuse.operations import Operations  # noqa: E402
from pkramfs.fuse.requests import Requests  # noqa: E402
from pkramfs.fuse.translate import capable, status_fields, supplementary_groups  # noqa: E402
from pkramfs.fuse.wire import HEADER, REPLY, Op  # noqa: E402
from tests.fs.conftest import SmallFrames, audit, small_ram  # noqa: E402


class Kernel:
    """The other end of the socket pair."""

    def __init__(self, tree: Tree) -> None:
        self.socket, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device.setblocking(False)
        self._device = device
        for end in (self.socket, device):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.later: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.operations = Operations(tree)
        self.filter = Filter(Requests(self.operations), device.fileno(), lambda work, *a: self.later.append((work, a)))
        self._number = 0

    def close(self) -> None:
        self.socket.close()
        self._device.close()

    def send(self, op: int, node: int, body: bytes, uid: int = 0) -> int:
        self._number += 2
        header = HEADER.pack(HEADER.size + len(body), op, self._number, node, uid, uid, os.getpid(), 0, 0)
        self.socket.send(header + body)
        return self._number

    def replies(self) -> list[tuple[int, int, bytes]]:
        """(error, number, body) of everything that has come back."""
        found, ready = [], select.poll()  # select(2) knows no descriptor above 1023
        ready.register(self.socket, select.POLLIN)
        while ready.poll(0):
            data = self.socket.recv(1 << 21)
            length, error, number = REPLY.unpack_from(data)
            assert length == len(data)
            found.append((error, number, data[REPLY.size :]))
        return found

    def ask(self, op: int, node: int, body: bytes, uid: int = 0) -> tuple[int, bytes]:
        """The error and the body of the reply to one request."""
        number = self.send(op, node, body, uid)
        assert self.filter.serve()
        ((error, answered, found),) = self.replies()
        assert answered == number
        return error, found


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with small_ram(4096) as ram:
        tree = Tree(ram, SmallFrames(ram), Limits())  # type: ignore[arg-type]
        made = Kernel(tree)
        try:
            yield made
        finally:
            made.close()
        audit(tree)


def _create(name: bytes, flags: int = os.O_RDWR | os.O_CREAT) -> bytes:
    return wire.CREATE.pack(flags, 0o644, 0o022, 0) + name + b"\0"


def test_a_file_is_made_written_read_and_removed(kernel: Kernel) -> None:
    error, body = kernel.ask(Op.CREATE, 1, _create(b"file"), uid=7)
    assert not error
    entry, (handle, flags, _) = wire.ENTRY.unpack_from(body), wire.OPENED.unpack_from(body, wire.ENTRY.size)
    assert entry[0] == entry[6] and flags == wire.KEEP_CACHE and entry[17:19] == (7, 7)
    data = os.urandom(10_000)
    assert kernel.ask(Op.WRITE, entry[0], wire.WRITE.pack(handle, 5, len(data), 0, 0, 0, 0) + data) == (
        0,
        wire.COUNT.pack(len(data), 0),
    )
    assert kernel.ask(Op.READ, entry[0], wire.READ.pack(handle, 0, 1 << 20, 0, 0, 0, 0)) == (0, bytes(5) + data)
    error, body = kernel.ask(Op.GETATTR, entry[0], bytes(16))
    assert wire.ATTRIBUTES.unpack_from(body)[4] == 10_005
    assert kernel.ask(Op.RELEASE, entry[0], wire.HANDLE.pack(handle) + bytes(16)) == (0, b"")
    assert kernel.ask(Op.UNLINK, 1, b"file\0") == (0, b"")
    assert kernel.ask(Op.LOOKUP, 1, b"file\0")[1][:8] == bytes(8)
    assert entry[0] in kernel.operations.tree.inodes
    kernel.send(Op.FORGET, entry[0], wire.NUMBER.pack(1))
    assert kernel.filter.serve() and not kernel.replies()
    assert entry[0] not in kernel.operations.tree.inodes


def test_who_opens_a_file_is_asked_only_if_privileges_go(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not say it where mounts may be idmapped, and to read /proc takes longer than all the rest."""
    asked: list[int] = []
    monkeypatch.setattr("pkramfs.fuse.requests._ids", lambda pid: asked.append(pid) or (7, 7))  # type: ignore[func-returns-value]
    monkeypatch.setattr("pkramfs.fuse.translate.capable", lambda pid, capability: asked.append(pid))
    tree = kernel.operations.tree
    inode = tree.create(1, b"file", 0o755)
    for mode, flags, looks, after in (
        (0o755, os.O_RDWR, 0, 0o755),
        (0o755, os.O_WRONLY | os.O_TRUNC, 0, 0o755),
        (0o6755, os.O_RDONLY, 0, 0o6755),
        (0o6755, os.O_WRONLY, 0, 0o6755),
        (0o6755, os.O_WRONLY | os.O_TRUNC, 1, 0o755),
    ):
        tree.setattr(inode.ino, mode=mode)
        kernel.send(Op.OPEN, inode.ino, wire.OPEN.pack(flags, 0), uid=0xFFFFFFFF)
        kernel.filter.serve()
        *_, (error, _, body) = kernel.replies()  # of writers the kernel is told to ask for attributes first
        assert (error, len(asked) > 0, inode.mode & 0o7777) == (0, looks > 0, after)
        kernel.send(Op.RELEASE, inode.ino, wire.HANDLE.pack(wire.OPENED.unpack_from(body)[0]) + bytes(16))
        kernel.filter.serve()
        kernel.replies()


@pytest.mark.parametrize("others", [0, wire.FATTR_ATIME, wire.FATTR_MODE])
@pytest.mark.parametrize("handle", [0, wire.FATTR_FH])
def test_times_are_set_by_themselves_and_with_others(kernel: Kernel, others: int, handle: int) -> None:
    """Those of a write-back, which are the most frequent, have a path of their own."""
    inode = kernel.operations.tree.create(1, b"file", 0o644)
    before = inode.atime
    valid = wire.FATTR_MTIME | wire.FATTR_CTIME | handle | others
    body = wire.SETATTR.pack(valid, 0, inode.ino, 0, 0, 9, -2, 4, 11, 22, 33, 0o600, 0, 0, 0, 0)
    error, answer = kernel.ask(Op.SETATTR, inode.ino, body)
    assert not error and (inode.mtime, inode.ctime) == (-2 * 10**9 + 22, 4 * 10**9 + 33)
    assert inode.atime == (9 * 10**9 + 11 if others == wire.FATTR_ATIME else before)
    assert inode.mode & 0o777 == (0o600 if others == wire.FATTR_MODE else 0o644)
    assert answer == kernel.ask(Op.GETATTR, inode.ino, bytes(16))[1]


def test_what_the_kernel_has_forgotten_nobody_has_open(kernel: Kernel) -> None:
    """Whatever a daemon that died has told: its successor frees what is deleted."""
    tree = kernel.operations.tree
    inode = tree.create(1, b"file", 0o644)
    inode.lookups, inode.opens = 1, 3
    tree.unlink(1, b"file")
    kernel.send(Op.FORGET, inode.ino, wire.NUMBER.pack(1))
    assert kernel.filter.serve() and inode.ino not in tree.inodes and not tree.orphans


def test_a_listing_counts_references_of_what_fits(kernel: Kernel) -> None:
    for number in range(30):
        kernel.ask(Op.MKDIR, 1, wire.MKDIR.pack(0o755, 0) + b"%d\0" % number)
    lookups = [inode.lookups for inode in kernel.operations.tree.inodes.values()]
    error, body = kernel.ask(Op.READDIRPLUS, 1, wire.READ.pack(1, 0, 2000, 0, 0, 0, 0))
    assert not error and 1800 < len(body) <= 2000
    names, at = [], 0
    while at < len(body):
        ino, _, size, kind = wire.DIRENT.unpack_from(body, at + wire.ENTRY.size)
        node = wire.ENTRY.unpack_from(body, at)[0]
        names.append(body[at + 152 : at + 152 + size])
        assert kind == 4 and node == (0 if names[-1] in (b".", b"..") else ino)
        at += 152 + size + -size % 8
    assert names[:3] == [b".", b"..", b"29"]
    assert sum(i.lookups for i in kernel.operations.tree.inodes.values()) - sum(lookups) == len(names) - 2


def test_a_listing_says_nothing_of_what_the_kernel_knows(kernel: Kernel) -> None:
    """Until somebody opens it for writing, or the kernel forgets it; of directories, which others change, always."""
    tree = kernel.operations.tree
    made = [tree.create(1, name, 0o644) for name in (b"new", b"known", b"written", b"forgotten", b"looked up")]
    tree.mkdir(1, b"directory", 0o755)
    ask = wire.READ.pack(1, 0, 4096, 0, 0, 0, 0)

    def told() -> set[bytes]:
        body, at, found = kernel.ask(Op.READDIRPLUS, 1, ask)[1], 0, set()
        while at < len(body):
            node, (ino, _, size, kind) = body[at : at + 8], wire.DIRENT.unpack_from(body, at + wire.ENTRY.size)
            assert ino and kind and (any(node) or not any(body[at : at + wire.ENTRY.size]))
            found |= {bytes(body[at + 152 : at + 152 + size])} if any(node) else set()
            at += 152 + size + -size % 8
        return found

    for inode in made[1:]:
        kernel.ask(Op.LOOKUP, 1, inode.name + b"\0")
    opened = kernel.operations.tree.open_inode(made[2], os.O_WRONLY, ROOT)
    made[2].sent = False  # as Operations.open has it
    kernel.operations.tree.forget(made[3].ino)
    assert told() == {b"new", b"written", b"forgotten", b"directory"}
    assert told() == {b"written", b"directory"}
    tree.release(opened)
    assert told() == {b"written", b"directory"}
    assert told() == {b"directory"}
    assert [inode.lookups for inode in made] == [1, 1, 4, 1, 1]


@pytest.mark.parametrize(
    ("op", "node", "body", "code"),
    [
        (Op.LOOKUP, 99, b"x\0", errno.ESTALE),
        (Op.LOOKUP, 1, b"no end", errno.EINVAL),
        (Op.MKDIR, 1, b"abc", errno.EINVAL),
        (Op.RENAME2, 1, bytes(16) + b"one name\0", errno.EINVAL),
        (Op.WRITE, 1, wire.WRITE.pack(1, 0, 100, 0, 0, 0, 0) + b"too few", errno.EINVAL),
        (Op.SETXATTR, 1, wire.SETXATTR.pack(100, 0) + b"user.x\0few", errno.EINVAL),
        (Op.INTERRUPT, 0, bytes(8), errno.ENOSYS),
        (4711, 1, b"", errno.ENOSYS),
        (Op.INIT, 0, bytes(16), errno.ENOSYS),
        (Op.UNLINK, 1, b"no\0", errno.ENOENT),
        (Op.FLUSH, 1, bytes(24), errno.ENOSYS),
        (Op.GETXATTR, 1, wire.GETXATTR.pack(100, 0) + b"security.selinux\0", errno.EOPNOTSUPP),
        (Op.GETXATTR, 1, wire.GETXATTR.pack(100, 0) + b"user.none\0", errno.ENODATA),
        (Op.GETXATTR, 99, wire.GETXATTR.pack(100, 0) + b"security.selinux\0", errno.ESTALE),
        (Op.GETXATTR, 1, wire.GETXATTR.pack(100, 0) + b"none\0", errno.EOPNOTSUPP),
    ],
)
def test_what_goes_wrong_is_an_errno(kernel: Kernel, op: int, node: int, body: bytes, code: int) -> None:
    assert kernel.ask(op, node, body) == (-code, b"")


def test_no_room_is_answered_when_something_is_forgotten(kernel: Kernel) -> None:
    tree = kernel.operations.tree
    tree.limits.max_inodes = 2
    _, body = kernel.ask(Op.MKDIR, 1, wire.MKDIR.pack(0o755, 0) + b"a\0")
    gone = wire.ENTRY.unpack_from(body)[0]
    kernel.ask(Op.RMDIR, 1, b"a\0")
    number = kernel.send(Op.MKDIR, 1, wire.MKDIR.pack(0o755, 0) + b"b\0")
    assert kernel.filter.serve() and not kernel.replies() and kernel.filter.waiting == 1
    ((work, args),) = kernel.later

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, *args)
            await trio.testing.wait_all_tasks_blocked()
            kernel.send(Op.FORGET, gone, wire.NUMBER.pack(1))
            kernel.filter.serve()

    trio.run(both)
    ((error, answered, _),) = kernel.replies()
    assert (error, answered, kernel.filter.waiting) == (0, number, 0)


def test_an_order_is_answered_when_it_is_done(kernel: Kernel) -> None:
    _, body = kernel.ask(Op.CREATE, 1, _create(b"file"))
    node = wire.ENTRY.unpack_from(body)[0]
    order = b"0:4096"
    kernel.send(Op.SETXATTR, node, wire.SETXATTR.pack(len(order), 0) + b"user.pkramfs.allocate\0" + order)
    assert kernel.filter.serve()
    ((work, args),) = kernel.later
    trio.run(work, *args)
    notified, (error, _, _) = kernel.replies()
    assert notified[:2] == (wire.NOTIFY_INVAL_INODE, 0) and wire.INVAL_INODE.unpack(notified[2]) == (node, -1, 0)
    assert error == 0 and kernel.operations.tree.inode(node).blocks == 8


def test_an_order_to_allocate_waits_for_data_on_its_way(kernel: Kernel) -> None:
    """As fallocate(2) does: its pages may not be those of a write that the kernel has taken already."""
    _, body = kernel.ask(Op.CREATE, 1, _create(b"file"))
    node = wire.ENTRY.unpack_from(body)[0]
    come, asked = trio.Event(), list[int]()

    def taking(count: int, act: Callable[[], object]) -> object:
        async def wait() -> object:
            await come.wait()
            return act()

        asked.append(count)
        return wait()

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            ((work, args),) = kernel.later
            nursery.start_soon(work, *args)
            await trio.testing.wait_all_tasks_blocked()
            assert not kernel.operations.tree.inode(node).blocks and not kernel.replies()
            come.set()

    assert getattr(kernel.operations.taking, "__func__", None) is Brake.taking
    kernel.operations.taking = taking
    order = b"4096:8192"
    kernel.send(Op.SETXATTR, node, wire.SETXATTR.pack(len(order), 0) + b"user.pkramfs.allocate\0" + order)
    assert kernel.filter.serve()
    trio.run(both)
    assert asked == [3] and kernel.replies()[-1][0] == 0 and kernel.operations.tree.inode(node).blocks == 16


def test_anything_else_is_eio_and_a_line_in_the_log(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    kernel.operations.tree.rmdir = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    assert kernel.ask(Op.RMDIR, 1, b"a\0") == (-errno.EIO, b"")
    assert "ZeroDivisionError" in caplog.text


def test_the_end_of_the_device_is_left_to_pyfuse3(kernel: Kernel) -> None:
    assert kernel.filter.serve()  # nothing there
    kernel.socket.close()
    assert not kernel.filter.serve()


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(4))
def test_no_request_ends_it_or_stays_without_an_answer(
    kernel: Kernel, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Random requests, sensible ones of which something was changed, cut ones: 25,000 each, bounded in time."""
    caplog.set_level(logging.WARNING)
    random_ = random.Random(seed)
    began = time.monotonic()
    for _ in range(25_000):
        op, body = _random_request(random_)
        number = kernel.send(op, random_.choice((0, 1, 1, 2, 3, 4, 5, 1 << 63)), body, random_.choice((0, 1000)))
        assert kernel.filter.serve()
        answered = [found for _, found, _ in kernel.replies() if found]  # the others are notifications
        expected = [] if op in (Op.FORGET, Op.BATCH_FORGET) or kernel.later else [number]
        assert answered == expected, (Op(op).name if op in set(Op) else op, body)
        if kernel.later:
            _finish(kernel, number)
    assert not caplog.records, caplog.text
    assert time.monotonic() - began < 120
    error, _ = kernel.ask(Op.GETATTR, 1, bytes(16))
    assert not error


def _finish(kernel: Kernel, number: int) -> None:
    for work, args in kernel.later:
        trio.run(work, *args)
    kernel.later.clear()
    assert [found for _, found, _ in kernel.replies() if found] == [number]


_SIZES = (
    0,
    1,
    4095,
    4096,
    8192,
    100_000,
    1 << 20,
    1 << 31,
    1 << 40,
    (1 << 62) + 5,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
_WORDS = (b"", b"a", b"b", b"c", b".", b"..", b"a/b", b"x" * 255, b"x" * 256, b"user.a", b"user.pkramfs.sparsify")


def _random_request(random_: random.Random) -> tuple[int, bytes]:
    """A request whose numbers and names are now and then sensible."""
    op = random_.choice((*Op, *Op, random_.randrange(1 << 32)))
    kind = random_.random()
    if kind < 0.2:
        body = random_.randbytes(random_.choice((0, 1, 7, 8, 16, 40, 100, 5000)))
    else:
        numbers = random_.choices((1, 2, 3, 4, 5, 2 | 1 << 62, 3 | 1 << 62, *_SIZES), k=random_.randrange(12))
        words = b"".join(word + b"\0" for word in random_.choices(_WORDS, k=random_.randrange(3)))
        body = struct.pack(f"<{len(numbers)}Q", *numbers)[: random_.choice((8, 12, 16, 24, 40, 56, 88, 96))] + words
        if op == Op.WRITE and kind < 0.8:
            data = bytes(random_.randrange(20_000))
            body = wire.WRITE.pack(
                random_.choice((2, 3, 4)) | 1 << 62, random_.choice(_SIZES[:7]), len(data), 0, 0, 0, 0
            )
            body += data
        elif op in (Op.CREATE, Op.MKDIR) and kind < 0.8:
            body = bytes(wire.CREATE.size if op == Op.CREATE else wire.MKDIR.size) + random_.choice(_WORDS) + b"\0"
    if kind > 0.95:
        body = body[: random_.randrange(len(body) + 1)]
    return op, body


def test_a_request_of_another_length_than_it_says_is_answered(kernel: Kernel) -> None:
    kernel.socket.send(HEADER.pack(1000, Op.GETATTR, 8, 1, 0, 0, 0, 0, 0))
    kernel.filter.serve()
    assert kernel.replies() == [(-errno.EINVAL, 8, b"")]
    kernel.socket.send(b"short")
    assert kernel.filter.serve() and not kernel.replies()


def test_a_reply_that_is_refused_becomes_an_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []
    write = os.write

    def once(fd: int, data: bytes) -> int:
        if fd == kernel.filter.fd and not refused:
            refused.append(data)
            raise OSError(errno.EINVAL, "no")
        return write(fd, data)

    monkeypatch.setattr(module, "_write", once)
    assert kernel.ask(Op.GETATTR, 1, bytes(16)) == (-errno.EIO, b"")


def test_requests_follow_each_other_without_the_scheduler(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of wait_readable answers all that come, and comes back at the end. Between turns it rests."""
    rested: list[int] = []
    monkeypatch.setattr(kernel.filter, "rest", lambda: rested.append(1))
    device = turns.Device()
    device.filter = kernel.filter
    for _ in range(100):
        kernel.send(Op.GETATTR, 1, bytes(16))
    answered = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.wait_readable, kernel.filter.fd)
            with trio.fail_after(10):
                while len(answered) < 100:
                    await trio.lowlevel.checkpoint()
                    answered.extend(kernel.replies())
            kernel.socket.close()

    trio.run(main)
    assert all(not error for error, _, _ in answered) and len(rested) > 1


@pytest.mark.parametrize("name", ["\\rGroups:\\t0", "\\rUid:\\t5", "\\377\\302\\205"])
def test_the_name_of_a_command_is_no_field_of_its_status(name):
    """The name comes first in /proc/PID/status, and its user chooses it."""
    script = f"printf '{name}' > /proc/$$/comm && echo ready && read line"
    pipe = subprocess.PIPE
    ids = {"user": 1000, "group": 1001, "extra_groups": [7, 8]} if os.geteuid() == 0 else {}
    with subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe, **ids) as child:
        assert child.stdout.readline() == b"ready\n"
        uid, gid, groups = (1000, 1001, [7, 8]) if ids else (os.getuid(), os.getgid(), os.getgroups())
        assert [numbers[3] for numbers in status_fields(child.pid, b"Uid", b"Gid")] == [uid, gid]
        assert sorted(supplementary_groups(child.pid)) == sorted(groups)
        child.communicate(b"\n")
    assert supplementary_groups(child.pid) == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
def test_capabilities_are_those_that_a_thread_has_here():
    """Nobody has any who is gone, or who has them in another user namespace."""
    pipe = subprocess.PIPE
    inside = "unshare --user --map-root-user true 2>/dev/null && exec unshare --user --map-root-user "
    script = {"root": "", "nobody": "exec setpriv --bounding-set -all --inh-caps -all ", "elsewhere": inside}
    for name, prefix in script.items():
        with subprocess.Popen(["sh", "-c", f"{prefix}sh -c 'echo ready; read line'"], stdin=pipe, stdout=pipe) as child:
            if child.stdout.readline():  # else this host has no user namespaces
                assert capable(child.pid, 4) == (name == "root"), name
            child.communicate(b"\n")
        assert not capable(child.pid, 4)


def test_what_a_write_gave_back_is_cleared_before_others_write_there(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write for which the host has no memory waits for room, and another comes to the same page."""
    tree = kernel.operations.tree
    begin(tree, b"x", 1)
    ino = tree.create(1, b"file", 0o644).ino
    tree.write(ino, 0, b"x" * 100)
    tree.commit()

    def full(at: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(tree.ram, "fill", full)
    monkeypatch.setattr(kernel.operations, "may_forget", lambda: True)
    kernel.send(Op.WRITE, ino, wire.WRITE.pack(ino, 50, 5000, 0, 0, 0, 0) + b"w" * 5000)
    assert kernel.filter.serve()
    assert kernel.later and not kernel.replies()
    error, _ = kernel.ask(Op.WRITE, ino, wire.WRITE.pack(ino, 200, 100, 0, 0, 0, 0) + b"y" * 100)
    assert not error
    assert bytes(tree.read(ino, 100, 200)) == bytes(100) + b"y" * 100
    kernel.later.clear()


@pytest.mark.parametrize(("failures", "errors"), [(1, [0]), (2, [-errno.ENOMEM, -errno.EEXIST])])
def test_a_commit_without_memory_is_tried_again_and_ends_nothing(
    kernel: Kernel, failures: int, errors: list[int]
) -> None:
    """What could not be committed stays noted, so the next request finds it done."""
    raised = [MemoryError() for _ in range(failures)]

    def commit(asker: int = 0) -> None:
        if raised:
            raise raised.pop()

    kernel.operations.tree.commit = kernel.filter._commit = commit  # type: ignore[method-assign]
    body = wire.MKDIR.pack(0o755, 0) + b"made\0"
    assert [kernel.ask(Op.MKDIR, 1, body)[0] for _ in errors] == errors


class TestAnotherDaemon:
    """What the kernel sends again after a takeover."""

    @pytest.fixture
    def wells(self) -> list[int]:
        return []

    @pytest.fixture
    def resumed(self, kernel: Kernel, wells: list[int]) -> Kernel:
        """Requests 100 and 104 were done: two files were made, one of them without a name."""
        tree = kernel.operations.tree
        self.named, self.unnamed = tree.create(1, b"made", 0o644).ino, tree.tmpfile(1, 0o600).ino
        tree.create(1, b"newest", 0o644)
        for ino in (self.named, self.unnamed):
            tree.open(ino, os.O_RDWR)
        done = {100: self.named, 102: 0, 104: self.unnamed}
        kernel.filter.resume(done, suspect=False, well=lambda: wells.append(1))
        assert kernel.socket.recv(100) == wire.RESEND
        return kernel

    def again(self, kernel: Kernel, number: int, op: int, node: int, body: bytes) -> tuple[int, bytes]:
        kernel._number = (number | RESENT) - 2
        return kernel.ask(op, node, body)

    def test_what_was_done_is_answered(self, resumed: Kernel, wells: list[int]) -> None:
        """Each, also after others that were not done, from what it has made."""
        made = {}
        for number, op, body in [
            (110, Op.MKDIR, wire.MKDIR.pack(0o755, 0) + b"other\0"),
            (104, Op.TMPFILE, wire.CREATE.pack(os.O_RDWR, 0o600, 0, 0) + b"\0"),
            (100, Op.CREATE, _create(b"made", os.O_RDWR | os.O_CREAT | os.O_EXCL)),
            (102, Op.UNLINK, b"gone\0"),
        ]:
            error, answer = self.again(resumed, number, op, 1, body)
            assert not error, number
            made[number] = wire.ENTRY.unpack_from(answer)[0] if answer else 0
        assert (made[100], made[104], made[102]) == (self.named, self.unnamed, 0)
        assert wells == []
        resumed._number = 200
        assert resumed.ask(Op.UNLINK, 1, b"gone\0")[0] == -errno.ENOENT
        assert wells == [1]
        for ino in (self.named, self.unnamed):
            resumed.operations.tree.release(ino)

    def test_what_was_not_done_is_done(self, resumed: Kernel) -> None:
        assert self.again(resumed, 106, Op.CREATE, 1, _create(b"made"))[0] == -errno.EEXIST
        assert self.again(resumed, 108, Op.UNLINK, 1, b"made\0")[0] == 0

    def test_what_is_suspect_is_refused(self, kernel: Kernel) -> None:
        kernel.filter.resume({100: 0}, suspect=True, well=lambda: None)
        assert kernel.socket.recv(100) == wire.RESEND
        assert self.again(kernel, 100, Op.UNLINK, 1, b"gone\0")[0] == 0
        assert self.again(kernel, 102, Op.MKDIR, 1, wire.MKDIR.pack(0o755, 0) + b"new\0")[0] == -errno.EIO
        kernel._number = 200
        assert kernel.ask(Op.MKDIR, 1, wire.MKDIR.pack(0o755, 0) + b"new\0")[0] == 0
