# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of a command through the standard logging module: -v prints what is done, --log-json makes each an object.

    {"time": "2026-11-29T13:40:05.120Z", "level": "error", "program": "pkramctl", "logger": "pkramfs.cli",
     "message": "no kernel is running in …"}

Without these options a message is a line of text, and logging is not even imported. With --log-json everything that a
command says on stderr is such a line, errors of the command line included; stdout is as ever. Texts in it are exact, as
in all JSON (render.py). Messages of modules below at level INFO, such as lines for the kernel log, show with -v.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pkramfs import stdio
from pkramfs.text import printable

if TYPE_CHECKING:
    import logging

OPTION = "--log-json"
_LOGGER = "pkramfs"
_began: "list[logging.Handler]" = []
"""The handler in use, if any."""


@contextlib.contextmanager
def kept(program: str, words: Sequence[str]) -> Iterator[None]:
    """Log as JSON inside the block if the command line asks for it, even one that is wrong otherwise."""
    try:
        if OPTION in words:
            _begin(program, as_json=True)
        yield
    finally:
        _end()


def verbose(program: str) -> None:
    """Print from now on what is done."""
    import logging

    if not _began:
        _begin(program, as_json=False)
    logging.getLogger(_LOGGER).setLevel(logging.INFO)


def info(message: str) -> None:
    """Print what is done, if -v asked for it."""
    if _began:
        import logging

        logging.getLogger(f"{_LOGGER}.cli").info("%s", message)


def message(level: str, program: str, text: str) -> bool:
    """Log a message as JSON; False, and nothing is done, if messages are lines of text."""
    if not _began or not getattr(_began[0], "as_json", False):
        return False
    import logging

    logging.getLogger(f"{_LOGGER}.cli").log(getattr(logging, level.upper()), "%s", text, extra={"program": program})
    return True


def _begin(program: str, *, as_json: bool) -> None:
    """Give the messages of this package a handler."""
    import json
    import logging
    import time

    class Handler(logging.Handler):
        """A handler that writes lines to stderr, if that is possible."""

        def __init__(self) -> None:
            super().__init__()
            self.as_json = as_json

        def emit(self, record: logging.LogRecord) -> None:
            stdio.say(_object(record) if as_json else printable(f"{program}: {record.getMessage()}"))

    def _object(record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        found: dict[str, Any] = {"time": moment, "level": record.levelname.lower()}
        found |= {"program": getattr(record, "program", program), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            found["exception"] = logging.Formatter().formatException(record.exc_info)
        return json.dumps(found).replace("\x7f", "\\u007f")

    handler, logger = Handler(), logging.getLogger(_LOGGER)
    _began.append(handler)
    logger.addHandler(handler)
    logger.propagate = False


def _end() -> None:
    """Leave logging as it was."""
    if not _began:
        return
    import logging

    logger = logging.getLogger(_LOGGER)
    logger.removeHandler(_began.pop())
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
