# SPDX-License-Identifier: GPL-2.0-or-later
"""Handle SIGINT, SIGTERM and SIGHUP in a command: undo its work and exit, but never half-way.

    with heard():                        a signal is an Ended exception, wherever the command is
        with Deferral() as waiting:
            …                            what can be undone
            waiting.begin()
            …                            what cannot: a signal waits until the block is over

Only the first signal counts: a second one would interrupt the taking back. A signal that was ignored when we
started (nohup) stays ignored.

Kernel: signal(7); include/linux/sched/signal.h (uninterruptible system calls)
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NUMBERS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal asks the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class _State:
    """The state of the process: how many blocks defer, which signal came meanwhile, and whether we are leaving."""

    def __init__(self) -> None:
        self.deferring = 0
        self.came = 0
        self.leaving = 0


_state = _State()


def _hear(number: int, _frame: FrameType | None) -> None:
    if _state.deferring:
        _state.came = _state.came or number
    elif not _state.leaving:
        _state.leaving = number
        raise Ended(number)


def status() -> int:
    """Return the exit status of a command that a signal ends, 0 if none does."""
    return 128 + _state.leaving if _state.leaving else 0


@contextmanager
def heard() -> Iterator[None]:
    """Have signals raise Ended inside the block; in a thread that is not the main one nothing changes."""
    before: dict[int, Any] = {}
    _state.leaving = 0
    try:
        for number in _NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, _hear)
    except ValueError:
        pass  # another thread than the main one, which hears no signals
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Deferral:
    """From `begin` to the end of the block signals wait; then the first of them is raised, if nothing else is."""

    def __init__(self) -> None:
        self._begun = False

    def begin(self) -> None:
        """Let signals wait from here on."""
        if not self._begun:
            self._begun = True
            _state.deferring += 1

    def __enter__(self) -> "Deferral":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._begun:
            return
        self._begun = False
        _state.deferring -= 1
        if _state.came and not _state.deferring:
            number, _state.came = _state.came, 0
            if kind is None:
                _hear(number, None)


@contextmanager
def deferred() -> Iterator[None]:
    """Let signals wait until the block is over."""
    with Deferral() as waiting:
        waiting.begin()
        yield
