"""The three standard descriptors, which whoever starts a program may have closed, filled or broken.

    hold()     first thing in every program: /dev/null for those that are closed
    tell()     a line of news on stdout while something is done
    say()      a line on stderr

A descriptor below 3 that is closed would be given to the next file that is opened: a lock, RAM, a
pipe; and what is meant for stderr would be written there. And news never decide: a line that cannot
be printed stops nothing that was begun, and fails nothing that was done.
"""

import contextlib
import errno
import os
import sys
from typing import TextIO

_NAMES = ((0, "stdin", os.O_RDONLY, "r"), (1, "stdout", os.O_WRONLY, "w"), (2, "stderr", os.O_WRONLY, "w"))


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
    except BrokenPipeError:
        discard(sys.stdout)
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        say(f"{os.path.basename(sys.argv[0])}: warning: cannot print what was done: {reason(error)}")


def say(line: str) -> None:
    """Print a line on stderr, if anybody can have it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Point a stream that cannot be written at /dev/null, so that the interpreter's last flush does not fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor has nothing to fail
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
        stream.flush()


def reason(error: Exception) -> str:
    """The system's words for an error of a stream."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
