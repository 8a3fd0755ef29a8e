# SPDX-License-Identifier: GPL-2.0-or-later
"""Is all of an object there? Once a part of it is missing, no node may say that it was all.

Kernel: mm/pkram.c (pkram_discard_save), which leaves it to the caller to remember
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pkramfs.errors import PkramError


class Completeness:
    """Remembers the first failure after which an object lacks a part."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Mark the object incomplete; the first reason counts."""
        self._failure = self._failure or error

    @contextmanager
    def required(self) -> Iterator[None]:
        """Mark the object incomplete if the block fails, so that it can never be published."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def expect(self) -> None:
        """Raise PkramError, with the errno of the first failure, if the object is incomplete."""
        if self._failure is not None:
            code = getattr(self._failure, "errno", None) or errno.EINVAL
            raise PkramError(f"an object to preserve is incomplete: {self._failure}", code) from self._failure
