# SPDX-License-Identifier: GPL-2.0-or-later
"""A file that a command makes: it appears whole, by rename, or not at all; `-` is standard output.

Devices and pipes are written as they are. An error names the file.
"""

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from typing import TYPE_CHECKING

from pkramfs import stdio
from pkramfs.cli.arguments import need

if TYPE_CHECKING:
    from pkramfs.archive.export import Out

STDIO = "-"


@contextmanager
def destination(path: str, *, text: bool = False) -> Iterator["Out"]:
    """Yield a writer to a file, which appears at the end of the block, or to stdout; no partial file is left behind."""
    need(path, "invalid FILE '': give its name, or - for standard output")
    if path == STDIO:
        need(text or not sys.stdout.isatty(), "an archive is not for a terminal: name a file, or pipe it")
        yield stdio.pour
        return
    try:
        special = not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        special = False
    if special:  # a device or a pipe is written as it is
        with open(path, "wb", buffering=0) as file:
            yield _named(file, path)
        return
    import tempfile

    path = os.path.realpath(path)
    with _naming(path):
        fd, temporary = tempfile.mkstemp(prefix=".pkramctl-", dir=os.path.dirname(path))
    try:
        with open(fd, "wb", buffering=0) as file:
            yield _named(file, path)
            with _naming(path):
                os.fsync(fd)
                os.fchmod(fd, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _named(file: RawIOBase, path: str) -> "Out":
    """Return a function that writes, whose errors name the file."""

    def write(data: bytes | memoryview) -> None:
        with _naming(path):
            left = memoryview(data)
            while left:
                left = left[file.write(left) or 0 :]

    return write


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise OSError(error.errno, error.strerror, path) from None


def _umask() -> int:
    """Return the umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
