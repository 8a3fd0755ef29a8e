# SPDX-License-Identifier: GPL-2.0-or-later
"""Long work, driven to its end."""

from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def drive(work: Generator[Any, None, T]) -> T:
    """Run a long work to its end and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            value: T = done.value
            return value


def shown(work: Iterator[T]) -> Iterator[T]:
    """Yield what a long work yields."""
    yield from work
