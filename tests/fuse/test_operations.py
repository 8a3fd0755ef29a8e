# SPDX-License-Identifier: GPL-2.0-or-later
"""Handlers without a kernel: what becomes of exceptions, references, answers."""

import errno
import os
from typing import Any

import pytest
import trio
import trio.testing

pyfuse3 = pytest.importorskip("pyfuse3")

from pkramfs.fs.inode import Credentials  # noqa: E402
from pkramfs.fs.limits import Limits  # noqa: E402
from pkramfs.fs.rules import DIRECT, WRITING  # noqa: E402
from pkramfs.fs.tree import Tree  # noqa: E402
from pkramfs.fuse.operations import Operations  # noqa: E402

ME = Credentials(uid=5, gid=6)


class NoFrames:
    """Frames of a machine whose memory nobody touches."""

    def allocate(self, count: int, order: int = 0) -> list[tuple[int, int]]:
        raise OSError(errno.ENOSPC, "no frames here")


@pytest.fixture
def ops() -> Operations:
    return Operations(Tree(None, NoFrames(), Limits()))  # type: ignore[arg-type]


def ask(handler: Any, *args: Any) -> Any:
    return trio.run(lambda: handler(*args))


def test_references_are_counted(ops: Operations) -> None:
    entry = ask(ops.mkdir, 1, b"dir", 0o755, ME)
    assert (entry.st_ino, entry.st_uid, entry.st_gid) == (2, 5, 6)
    inode = ops.tree.inode(2)
    assert inode.lookups == 1
    ask(ops.lookup, 1, b"dir", ME)
    ask(ops.getattr, 2, ME)
    assert inode.lookups == 2
    ask(ops.rmdir, 1, b"dir", ME)
    ask(ops.forget, [(2, 2), (99, 1)])
    assert 2 not in ops.tree.inodes


def test_absent_names_may_be_remembered(ops: Operations) -> None:
    entry = ask(ops.lookup, 1, b"no", ME)
    assert entry.st_ino == 0 and entry.entry_timeout > 1e6


def test_the_generation_is_the_trees_but_the_roots_is_none(ops: Operations) -> None:
    """The kernel has made the root itself, of generation 0, and takes it for stale if it hears of another."""
    ops = Operations(ops.tree, 1234)
    assert ask(ops.mkdir, 1, b"dir", 0o755, ME).generation == 1234
    assert ask(ops.lookup, 1, b"dir", ME).generation == 1234
    root = ask(ops.lookup, 2, b"..", ME)
    assert (root.st_ino, root.generation) == (1, 0)


def test_an_os_error_is_its_errno(ops: Operations) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        ask(ops.unlink, 1, b"no", ME)
    assert caught.value.errno == errno.ENOENT


def test_anything_else_is_eio_and_a_line_in_the_log(ops: Operations, caplog: pytest.LogCaptureFixture) -> None:
    ops.tree.unlink = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(pyfuse3.FUSEError) as caught:
        ask(ops.unlink, 1, b"no", ME)
    assert caught.value.errno == errno.EIO
    assert "ZeroDivisionError" in caplog.text and "unlink" in caplog.text


def test_forget_survives_anything(ops: Operations, caplog: pytest.LogCaptureFixture) -> None:
    ops.tree.forget = lambda *_, **__: 1 / 0  # type: ignore[method-assign, assignment]
    ask(ops.forget, [(2, 1), (3, 1)])
    assert caplog.text.count("ZeroDivisionError") == 2


def test_handles_are_inode_numbers(ops: Operations) -> None:
    info, entry = ask(ops.create, 1, b"file", 0o644, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, ME)
    assert info.fh == entry.st_ino | WRITING and info.keep_cache
    gone = []
    ops.writer_gone = lambda: gone.append(1)
    ask(ops.release, info.fh)
    assert gone == [1]
    info = ask(ops.open, entry.st_ino, os.O_RDONLY, ME)
    assert info.fh == entry.st_ino
    ask(ops.release, info.fh)
    assert gone == [1]


@pytest.mark.parametrize("handler", ["flush", "fsync", "fsyncdir"])
def test_what_the_kernel_need_not_ask(ops: Operations, handler: str) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        ask(getattr(ops, handler), *([1] if handler == "flush" else [1, False]))
    assert caught.value.errno == errno.ENOSYS


def test_no_room_without_orphans_is_said_at_once(ops: Operations) -> None:
    info, _ = ask(ops.create, 1, b"file", 0o644, os.O_WRONLY, ME)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        ask(ops.write, info.fh, 0, b"x")
    assert caught.value.errno == errno.ENOSPC


def test_no_room_waits_for_what_was_deleted(ops: Operations) -> None:
    """Two inodes fit; the second is deleted but not forgotten when a third is made."""
    ops.tree.limits.max_inodes = 2
    gone = ask(ops.mkdir, 1, b"a", 0o755, ME).st_ino
    ask(ops.rmdir, 1, b"a", ME)

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ops.mkdir, 1, b"b", 0o755, ME)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ops.forget, [(gone, 1)])

    trio.run(both)
    assert ops.tree.lookup(1, b"b") is not None


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOTCONN, "gone"), errno.ENOTCONN), (RuntimeError("odd"), errno.EIO)]
)
def test_an_order_that_fails_is_an_errno(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, code: int
) -> None:
    """Whatever the kernel says when it is told to let go of a file, it is not the end of the mount."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(pyfuse3, "invalidate_inode", refuse)
    _, entry = ask(ops.create, 1, b"file", 0o644, os.O_RDONLY, ME)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        ask(ops.setxattr, entry.st_ino, b"user.pkramfs.punch", b"0:4096", ME)
    assert caught.value.errno == code
    assert ("RuntimeError" in caplog.text) == (code == errno.EIO)


def test_no_file_has_no_blocks_while_it_may_have_data(ops: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open for writing has a page at least; when it is not any more the kernel asks again."""
    asked: list[int] = []
    monkeypatch.setattr(ops.cache, "drop_attributes", asked.append)
    opened, entry = ask(ops.create, 1, b"a", 0o644, os.O_WRONLY, ME)
    handle, ino = opened.fh, entry.st_ino
    assert entry.st_blocks == 8
    ask(ops.release, handle)
    assert asked == []  # a close has invalidated what the answer to CREATE said
    assert ask(ops.getattr, ino, ME).st_blocks == 0
    first, second, reader = (ask(ops.open, ino, flags, ME).fh for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY))
    asked.clear()
    assert ask(ops.lookup, 1, b"a", ME).st_blocks == 8
    ask(ops.release, first)
    assert asked == [] and ask(ops.getattr, ino, ME).st_blocks == 8
    ask(ops.release, second)
    assert asked == [ino] and ask(ops.getattr, ino, ME).st_blocks == 0
    ask(ops.release, reader)
    assert asked == [ino]


def _opened(ops: Operations, name: bytes, *flags: int) -> list[int]:
    ops.cache.drop_attributes = lambda _: None  # type: ignore[method-assign]
    first, entry = ask(ops.create, 1, name, 0o644, flags[0], ME)
    return [first.fh, *(ask(ops.open, entry.st_ino, more, ME).fh for more in flags[1:])]


def test_a_refused_write_back_is_remembered(ops: Operations) -> None:
    told: list[None] = []
    ops.data_lost = lambda: told.append(None)
    (handle,) = _opened(ops, b"a", os.O_WRONLY)
    with pytest.raises(pyfuse3.FUSEError) as refused:
        ask(ops.write, handle, 0, b"x" * 4096)
    assert refused.value.errno == errno.ENOSPC
    assert ops.tree.lost() == [b"/a"] and told
    assert ops.tree.losses.files[handle & ~WRITING].error == errno.ENOSPC


@pytest.mark.parametrize(
    "flags, cached, lost",
    [
        ([os.O_WRONLY | os.O_DIRECT], None, False),
        ([os.O_WRONLY | os.O_DIRECT, os.O_RDWR | os.O_DIRECT], None, False),
        ([os.O_WRONLY | os.O_DIRECT, os.O_RDWR], None, True),  # it may be the other one's
        ([os.O_WRONLY | os.O_DIRECT], True, True),
        ([os.O_WRONLY], False, False),
    ],
)
def test_who_writes_directly_is_told_at_once(
    ops: Operations, flags: list[int], cached: bool | None, lost: bool
) -> None:
    handles = _opened(ops, b"a", *flags)
    with pytest.raises(pyfuse3.FUSEError):
        ask(ops.write, handles[0], 0, b"x" * 4096, *([] if cached is None else [cached]))
    assert ops.tree.lost_count == lost
    for handle in handles:
        assert bool(handle & DIRECT) == bool(flags[handles.index(handle)] & os.O_DIRECT)
        ask(ops.release, handle)
    assert not ops._direct


def test_what_did_fit_is_not_lost(ops: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    (handle,) = _opened(ops, b"a", os.O_WRONLY)
    monkeypatch.setattr(ops.tree, "write", lambda *_, **__: 4096)
    noted: list[tuple[int, ...]] = []
    monkeypatch.setattr(ops.tree, "lose", lambda *words: noted.append(words))
    with pytest.raises(pyfuse3.FUSEError):
        ask(ops.write, handle, 8192, b"x" * 12288)
    assert noted == [(handle, 12288, 20480, errno.ENOSPC)]
