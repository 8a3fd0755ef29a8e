# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for what other processes do, with a deadline that a machine under load keeps."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str = "it never comes to that", seconds: float = 60) -> None:
    """Wait until a condition is true; fail with `what` if it does not come to that."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
