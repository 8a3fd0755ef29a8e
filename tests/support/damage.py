# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON files of a machine, and where each may be damaged."""

from collections.abc import Iterator
from typing import Any

FILES = [
    "machine.json",
    "kernel.json",
    "nvram.json",
    "kexec/kexec.json",
    "kexec/crash.json",
    "mounts/00000000000000ff.json",
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(inner, (*at, key))
