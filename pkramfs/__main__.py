# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m pkramfs VERB …`: one entry for all commands, each imported only when it is called.

    mount, kexec, ctl       the commands mount.pkramfs, pkram-kexec and pkramctl
    boot DIR                the boot of a machine
    mount-daemon            one mount; started by mount.pkramfs
    mount-daemons           forks mounts; started by pkram-kexec
    checkpoint              a checkpoint of a tree; started by its daemon
    hold                    a mount whose daemon is being replaced; started by its holder

The commands' own scripts come in here, too (pyproject.toml), so that Ctrl-C ends one that has not read its arguments
yet without a word, as it ends a program in C.

pkramfs itself starts the last five, in a fresh interpreter: they know only their command line and what RAM holds, and
first reset the limits and priorities that they inherited from a shell.
"""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from pkramfs import stdio

_VERBS = {
    "mount": "pkramfs.cli.mount",
    "kexec": "pkramfs.cli.kexec",
    "ctl": "pkramfs.cli.ctl",
    "boot": "pkramfs.cli.boot",
    "mount-daemon": "pkramfs.daemon.holder",
    "mount-daemons": "pkramfs.daemon.forking",
    "checkpoint": "pkramfs.daemon.shadow",
    "hold": "pkramfs.daemon.handover",
}


_SERVICES = ("boot", "mount-daemon", "mount-daemons", "checkpoint", "hold")


def main(argv: Sequence[str] | None = None) -> int:
    """Run VERB with the arguments after it; return its exit status."""
    stdio.hold()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("--version", "-V"):
        from pkramfs import __version__

        return stdio.answer("pkramfs", f"pkramfs {__version__}")
    if not words or words[0] not in _VERBS:
        return _usage(words)
    if words[0] in _SERVICES:
        import_module("pkramfs.machine.process").shed()
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads, and a process that has some cannot fork
    status = import_module(_VERBS[words[0]]).main(words[1:])
    return 0 if status is None else int(status)


def pkramctl() -> int:
    """Run pkramctl as a program."""
    return _program("ctl")


def pkram_kexec() -> int:
    """Run pkram-kexec as a program."""
    return _program("kexec")


def mount_pkramfs() -> int:
    """Run mount.pkramfs as a program."""
    return _program("mount")


def _program(*verb: str) -> int:
    words = [*verb, *sys.argv[1:]]
    if not {*words[:1]} & {*_SERVICES} and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command hears signals itself
    return main(words)


def _usage(words: list[str]) -> int:
    """Print the usage: on stdout for --help, as an error otherwise."""
    text = f"usage: python -m pkramfs {{{','.join(_VERBS)}}} ARGUMENTS…"
    if words[:1] in (["-h"], ["--help"]):
        return stdio.answer("pkramfs", text)
    stdio.say(f"pkramfs: unknown verb {words[0]!r}; {text}" if words else text)
    return 2


if __name__ == "__main__":
    sys.exit(_program())
