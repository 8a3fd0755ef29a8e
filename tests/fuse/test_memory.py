# SPDX-License-Identifier: GPL-2.0-or-later
"""No more memory: who asks is told, what is lost is remembered, and nobody waits for an answer that cannot come."""

import errno
import os
import sys
import types
from typing import Any

import pytest
import trio

pyfuse3 = pytest.importorskip("pyfuse3")

from pkramfs.errors import of_memory  # noqa: E402
from pkramfs.fs.core import WRITING  # noqa: E402
from pkramfs.fs.inode import Credentials  # noqa: E402
from pkramfs.fs.limits import Limits  # noqa: E402
from pkramfs.fs.tree import Tree  # noqa: E402
from pkramfs.fuse import memory  # noqa: E402
from pkramfs.fuse.operations import Operations  # noqa: E402
from pkramfs.fuse.session import Session  # noqa: E402

ME = Credentials(uid=5, gid=6)


@pytest.fixture
def ops() -> Operations:
    return Operations(Tree(None, None, Limits()))  # type: ignore[arg-type]


@pytest.fixture
def none_left(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing can be had until `undo`."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(memory, "mmap", types.SimpleNamespace(mmap=refuse))
    return monkeypatch


def ask(handler: Any, *args: Any) -> Any:
    return trio.run(lambda: handler(*args))


def out_of_memory(*_: object, **__: object) -> None:
    raise MemoryError


def test_what_makes_the_tree_larger_is_refused_until_there_is_memory(ops: Operations, none_left: Any) -> None:
    made = 0
    with pytest.raises(pyfuse3.FUSEError) as caught:
        for made in range(100):
            ask(ops.mkdir, 1, b"%d" % made, 0o755, ME)
    assert caught.value.errno == errno.ENOMEM and made < 16
    for _ in range(20):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            ask(ops.mkdir, 1, b"more", 0o755, ME)
        assert caught.value.errno == errno.ENOMEM
    assert ask(ops.lookup, 1, b"0", ME).st_ino == 2
    none_left.undo()
    ask(ops.mkdir, 1, b"more", 0o755, ME)


def test_a_handler_that_gets_no_memory_tells_and_lets_go(ops: Operations, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(ops.tree, "lookup", out_of_memory)
    monkeypatch.setattr(ops.tree, "getxattr", out_of_memory)
    for handler, args in ((ops.lookup, (1, b"x", ME)), (ops.getxattr, (1, b"user.x", ME))):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            ask(handler, *args)
        assert caught.value.errno == errno.ENOMEM
    assert caplog.text.count("out of memory") == 1


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a fault of ours")])
def test_a_write_back_that_fails_in_any_way_is_lost(ops: Operations, monkeypatch: Any, error: Exception) -> None:
    inode = ops.tree.create(1, b"file", 0o644, ME)
    handle = inode.ino | WRITING

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ops.tree, "write", fail)
    with pytest.raises(pyfuse3.FUSEError):
        ask(ops.write, handle, 0, b"x" * 4096, True)
    assert ops.tree.lost() == [b"/file"]


def test_a_request_that_is_lost_on_its_way_ends_the_session(ops: Operations, monkeypatch: Any) -> None:
    """What pyfuse3 cannot raise would be waited for without end."""
    ended = []
    session = Session(ops, "/nowhere")
    monkeypatch.setattr(session, "terminate", lambda: ended.append(True))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    session.answer_all()
    failure = {"exc_type": MemoryError, "exc_traceback": None, "err_msg": None, "object": "pyfuse3.fuse_lookup"}
    sys.unraisablehook(types.SimpleNamespace(**failure, exc_value=MemoryError()))  # type: ignore[arg-type]
    assert ended == [True]


def test_memory_is_found_among_what_went_wrong_besides() -> None:
    short = BaseExceptionGroup("", [KeyError(), ExceptionGroup("", [MemoryError()])])
    assert of_memory(short) and of_memory(OSError(errno.ENOMEM, ""))
    assert not of_memory(ExceptionGroup("", [OSError(errno.EIO, "")]))
