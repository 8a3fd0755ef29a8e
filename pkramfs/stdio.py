# SPDX-License-Identifier: GPL-2.0-or-later
"""The three standard descriptors, which may be closed, full or broken when a program starts.

    hold()     first call of every program: open /dev/null for each closed descriptor
    tell()     print a line of news on stdout while work goes on
    say()      print a line on stderr
    answer()   print the result of a command on stdout
    pour()     write bytes to stdout as they are
    finish()   last call of every program: write what stdout still holds, and check that it was written

The next file that is opened gets the number of a closed descriptor: a lock, RAM or a pipe would
receive what is meant for stderr. And printing never decides: a line that cannot be printed neither
stops work that has begun nor fails work that is done.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

WRITE_ERROR, BROKEN_PIPE = 1, 141
_closed = set[int]()
_NAMES = ((0, "stdin", os.O_RDONLY, "r"), (1, "stdout", os.O_WRONLY, "w"), (2, "stderr", os.O_WRONLY, "w"))


class PrintError(OSError):
    """A write to stdout failed."""


class _Watched:
    """A stream whose errors differ from those of files."""

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
    """Make failures of stdout PrintErrors inside the block."""
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
        fd = os.open(os.devnull, flags)  # the lowest free number: those below are open by now
        if fd != number:
            os.dup2(fd, number)
            os.close(fd)
        os.set_inheritable(number, True)
        _closed.add(number)
        if getattr(sys, name) is None:
            file = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, file)


def tell(line: str) -> None:
    """Print a line of news at once. If that fails, warn on stderr, once, and go on."""
    try:
        print(line, flush=True)
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        if getattr(error, "errno", None) != errno.EPIPE:  # the reader has closed the pipe on purpose
            say(f"pkramfs: warning: cannot print what was done: {reason(error)}")


def answer(program: str, line: str) -> int:
    """Print the result of a command; return the exit status."""
    try:
        print(line)
    except (OSError, ValueError) as error:
        return broken(program, error)
    return finish(program, 0)


def pour(data: bytes | memoryview) -> None:
    """Write bytes to stdout as they are, behind all that was printed; raise PrintError if stdout is closed or full."""
    if 1 in _closed:
        raise PrintError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
    except PrintError:
        raise
    except OSError as error:
        raise PrintError(error.errno, error.strerror) from None


def finish(program: str, status: int) -> int:
    """Flush stdout; return `status`, or the exit status of a failure to write."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        return status or broken(program, error)
    return status


def broken(program: str, error: Exception) -> int:
    """Report a stdout that cannot be written, unless its reader closed the pipe; return the exit status."""
    discard(sys.stdout)
    if getattr(error, "errno", None) == errno.EPIPE:
        return BROKEN_PIPE
    say(f"{program}: write error: {reason(error)}")
    return WRITE_ERROR


def say(line: str) -> None:
    """Print a line on stderr, if that is possible."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Point a stream that cannot be written at /dev/null, so that the interpreter's last flush does not fail."""
    # a stream that a test has replaced has no descriptor of its own
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
        stream.flush()


def reason(error: Exception) -> str:
    """Return the system's message for an error of a stream."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
