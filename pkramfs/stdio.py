# SPDX-License-Identifier: GPL-2.0-or-later
"""The three standard descriptors, which whoever starts a program may have closed, filled or broken.

    hold()     first thing in every program: /dev/null for those that are closed
    tell()     a line of news on stdout while something is done
    say()      a line on stderr
    answer()   a line on stdout that is what was asked for
    finish()   last thing in every program: has all of stdout been written?

A descriptor below 3 that is closed would be given to the next file that is opened: a lock, RAM, a
pipe; and what is meant for stderr would be written there. And news never decide: a line that cannot
be printed stops nothing that was begun, and fails nothing that was done.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

WRITE_ERROR, BROKEN_PIPE = 1, 141
_NAMES = ((0, "stdin", os.O_RDONLY, "r"), (1, "stdout", os.O_WRONLY, "w"), (2, "stderr", os.O_WRONLY, "w"))


class PrintError(OSError):
    """Stdout cannot be written."""


class _Watched:
    """A stream whose failures can be told from those of files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise PrintError(error.errno, error.strerror) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise PrintError(error.errno, error.strerror) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside the block a failure of stdout is a PrintError."""
    stdout = sys.stdout
    sys.stdout = _Watched(stdout)
    try:
        yield
    finally:
        sys.stdout = stdout


def hold() -> None:
    """Open /dev/null for each standard descriptor that is closed, so that no other file gets its number."""
    for number, name, flags, mode in _NAMES:
        try:
            os.fstat(number)
            continue
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
        fd = os.open(os.devnull, flags)  # the lowest that is free: those below are open by now
        if fd != number:
            os.dup2(fd, number)
            os.close(fd)
        os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            file = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, file)


def tell(line: str) -> None:
    """Print a line of news now. If it cannot be printed, that is a warning, once, and the work goes on."""
    try:
        print(line, flush=True)
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        if getattr(error, "errno", None) != errno.EPIPE:  # a reader that had enough knows
            say(f"pkramfs: warning: cannot print what was done: {reason(error)}")


def answer(program: str, line: str) -> int:
    """Print what was asked for; the exit status."""
    try:
        print(line)
    except (OSError, ValueError) as error:
        return broken(program, error)
    return finish(program, 0)


def finish(program: str, status: int) -> int:
    """Write what stdout still holds; `status`, or that of a failure of this."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        return status or broken(program, error)
    return status


def broken(program: str, error: Exception) -> int:
    """The exit status of a stdout that cannot be written, and one line unless its reader just had enough."""
    discard(sys.stdout)
    if getattr(error, "errno", None) == errno.EPIPE:
        return BROKEN_PIPE
    say(f"{program}: write error: {reason(error)}")
    return WRITE_ERROR


def say(line: str) -> None:
    """Print a line on stderr, if anybody can have it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Point a stream that cannot be written at /dev/null, so that the interpreter's last flush does not fail."""
    # what a test has put in the place of the stream has no descriptor of its own, and nothing to fail
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
        stream.flush()


def reason(error: Exception) -> str:
    """The system's words for an error of a stream."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
