# SPDX-License-Identifier: GPL-2.0-or-later
"""What another process asks is known in time, or its not being known is."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from pkramfs.errors import ErrnoError
from pkramfs.mounting.patience import StuckError, within


def test_what_comes_back():
    assert within(lambda: (1, "\udcff", None, True), 10, "it") == (1, "\udcff", None, True)
    assert within(lambda: "x" * 1_000_000, 10, "it") == "x" * 1_000_000
    assert within(os.getpid, 10, "it") != os.getpid()


def test_an_error_is_the_same_error():
    with pytest.raises(FileNotFoundError) as caught:
        within(lambda: os.listdir("/absent"), 10, "it")
    assert caught.value.filename == "/absent"


def test_a_fault_is_named() -> None:
    def work() -> None:
        raise RuntimeError("unexpected")

    with pytest.raises(OSError, match=r"internal error: RuntimeError\('unexpected'\)"):
        within(work, 20, "that")


def test_what_a_handler_of_signals_raises_is_named() -> None:
    """It runs in the process that waits, too, if the signal is sent to all of a group."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may have us ignore it
    try:
        with pytest.raises(OSError, match=r"internal error: KeyboardInterrupt\(\)"):
            within(lambda: os.kill(os.getpid(), signal.SIGINT), 20, "that")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_answer_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(OSError, match="internal error: ValueError"):
        within(object, 20, "that")
    with pytest.raises(FileNotFoundError) as caught:
        within(Path("/absent").stat, 20, "that")
    assert caught.value.filename == "/absent"


def test_what_is_late_is_named_and_killed():
    ours, theirs = os.pipe()
    with pytest.raises(StuckError, match=r"waited 0\.05 s for the moon, in vain"):
        within(signal.pause, 0.05, "the moon")
    os.close(theirs)
    assert os.read(ours, 1) == b"", "nobody has our pipe any more"
    os.close(ours)


def test_a_child_that_is_killed():
    with pytest.raises(ErrnoError, match=r"^the process that waited for it was killed by SIGKILL$"):
        within(lambda: os.kill(os.getpid(), signal.SIGKILL), 10, "it")


def test_a_caller_who_ignores_its_children_is_answered():
    """So a shell has us do, after `trap '' CHLD`."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert [within(partial(abs, number), 10, "nothing") for number in range(20)] == list(range(20))
        with pytest.raises(StuckError):
            within(lambda: time.sleep(60), 0.01, "nothing")
    finally:
        signal.signal(signal.SIGCHLD, before)
