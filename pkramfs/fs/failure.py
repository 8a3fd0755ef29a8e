# SPDX-License-Identifier: GPL-2.0-or-later
"""Refusals in the words of the kernel: an OSError with an errno and nothing else.

The tree refuses hundreds of thousands of times a second at worst, so a refusal is one small
exception with the kernel's own text. Absent names are no refusal: `lookup` returns None.

Kernel: include/uapi/asm-generic/errno.h
"""

import os


def fail(code: int) -> OSError:
    """Return the exception to raise for an errno (Python picks FileExistsError and the like itself)."""
    return OSError(code, os.strerror(code))
