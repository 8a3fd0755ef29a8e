# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of one mount, mounts/ID.log: one line for each record, whatever it contains.

Kernel: kernel/printk/printk.c
"""

import contextlib
import logging
import os
from typing import Any

from pkramfs.errors import explain
from pkramfs.machine.files import open_regular
from pkramfs.text import printable

log = logging.getLogger("pkramfs")


class _OneLine(logging.Formatter):
    """A formatter that puts a record on one line, and indents a traceback so that it does not look like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


def begin_log() -> None:
    """Log to stderr, which `log_to` later redirects to a file."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def log_to(path: str) -> None:
    """Send the output of this process to a file, or nowhere if the file cannot be opened."""
    try:
        fd = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        log.warning("no log of this mount: %s", explain(error))
        return
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def drop_empty(path: str) -> None:
    """Remove an empty log."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            os.unlink(path)
