# SPDX-License-Identifier: GPL-2.0-or-later
"""Arguments of a save as arrays: columns of one length, of 64-bit integers."""

import errno
from typing import Any

import numpy as np

from pkramfs.errors import PkramError
from pkramfs.spans import U64

Columns = tuple[U64, U64, U64]
"""First index, first pfn and number of pages of runs."""


def as_columns(index: Any, pfn: Any, count: Any) -> Columns:
    """Return three columns of one length as arrays; EINVAL if they are not."""
    first, second, third = map(as_numbers, (index, pfn, count))
    if not len(first) == len(second) == len(third):
        raise PkramError("index, pfn and count are not of one length", errno.EINVAL)
    return first, second, third


def as_numbers(column: Any) -> U64:
    """Return a column as an array; EINVAL unless it has integers.

    A number below zero becomes too large, which is refused later.
    """
    array = np.asarray(column)
    if array.dtype.kind not in "iu" and array.size:
        raise PkramError("index, pfn, count and order must be integers of up to 64 bits", errno.EINVAL)
    return array.astype(np.uint64, copy=False).reshape(-1)
