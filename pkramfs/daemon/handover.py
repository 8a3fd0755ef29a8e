# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a holder goes on that has become the code on disk: `python -m pkramfs hold`.

Kernel: execve(2), which keeps descriptors that are meant to be kept
"""

from collections.abc import Sequence

from pkramfs.daemon import holder


def main(argv: Sequence[str]) -> int:
    """Run the holder of a mount whose daemon has made room for another."""
    return holder.again(argv)
