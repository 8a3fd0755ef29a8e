# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m pkramfs VERB …`: every command under one roof, each imported only when asked for.

    mount, kexec, ctl       what mount.pkramfs, pkram-kexec and pkramctl run
    boot DIR                the boot of a machine, in a process that was given nothing else
    mount-daemon            one mount; started by mount.pkramfs

The last two are started by pkramfs itself, in a fresh interpreter: what they know, they were told
on their command line or find in RAM, and what they inherited of a shell's limits and priorities they put off first.

busybox has the same door.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from pkramfs import stdio

_VERBS = {
    "mount": "pkramfs.cli.mount",
    "kexec": "pkramfs.cli.kexec",
    "ctl": "pkramfs.cli.ctl",
    "boot": "pkramfs.cli.boot",
    "mount-daemon": "pkramfs.daemon",
}


_SERVICES = ("boot", "mount-daemon")


def main(argv: Sequence[str] | None = None) -> int:
    """Run VERB with the arguments after it; its exit status."""
    stdio.hold()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("--version", "-V"):
        from pkramfs import __version__

        return stdio.answer("pkramfs", f"pkramfs {__version__}")
    if not words or words[0] not in _VERBS:
        return _usage(words)
    if words[0] in _SERVICES:
        import_module("pkramfs.machine.process").shed()
    status = import_module(_VERBS[words[0]]).main(words[1:])
    return 0 if status is None else int(status)


def _usage(words: list[str]) -> int:
    """How it is called: on stdout for --help, as an error otherwise."""
    text = f"usage: python -m pkramfs {{{','.join(_VERBS)}}} ARGUMENTS…"
    if words[:1] in (["-h"], ["--help"]):
        return stdio.answer("pkramfs", text)
    stdio.say(f"pkramfs: unknown verb {words[0]!r}; {text}" if words else text)
    return 2


if __name__ == "__main__":
    sys.exit(main())
