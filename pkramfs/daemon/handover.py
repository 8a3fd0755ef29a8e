# SPDX-License-Identifier: GPL-2.0-or-later
"""The entry of a holder that has replaced itself by the code on disk: `python -m pkramfs hold`.

Kernel: execve(2), which keeps descriptors without close-on-exec
"""

from collections.abc import Sequence

from pkramfs.daemon import holder


def main(argv: Sequence[str]) -> int:
    """Run the holder of a mount whose daemon has made room for another."""
    return holder.again(argv)
