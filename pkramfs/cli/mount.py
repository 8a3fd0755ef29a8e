# SPDX-License-Identifier: GPL-2.0-or-later
"""mount.pkramfs: the helper that mount(8) calls, and the way to mount without root.

    mount.pkramfs none DIR -o pkram=NAME,…          start a daemon, return when it serves
    mount.pkramfs none DIR -o remount,…             cli/remount.py: talk to the daemon that is there

mount(8) calls us as `mount.pkramfs SOURCE DIR [-sfnvN] [-o OPTIONS] [-t TYPE]`, and for a remount, by
the kernel's name of the type, as mount.fuse.pkramfs. Exit statuses are mount(8)'s: 1 wrong usage, 2
the system, 32 the mount failed; the reason is one line.

Only the daemon imports more than the standard library, so that a mount pays for one heavy start, not two. Most
of what a mount needs (mounting/) is imported where it is used, so that `--help` costs nothing.

Kernel: util-linux, libmount/src/context_mount.c (exec_helper); mount(8), EXTERNAL HELPERS
"""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from pkramfs.cli import arguments, progress, render
from pkramfs.errors import PkramfsError, UsageError
from pkramfs.mounting.helper import PROGRAM, USAGE, AnsweredError, failure

if TYPE_CHECKING:
    from pkramfs.mounting.options import Options

_DESCRIPTION = "Mount a tmpfs whose tree survives a kexec, or change such a mount; see mount.pkramfs(8)."
_EPILOG = """examples:
  mount -t pkramfs -o pkram=mytmpfs none /mnt
  mount -o remount,preserve,ro /mnt
  mount.pkramfs none ~/mnt -o pkram=mine,size=1G        (without root)
"""
_OFTEN = ("-o", "-f", "--read-only", "--verbose", "--machine", "--root")


class _Parser(arguments.Parser):
    """A parser with mount(8)'s status for wrong usage."""

    def error(self, message: str) -> NoReturn:
        self.leave(USAGE, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the helper and return its exit status."""
    return arguments.run(parser(), _act, argv)


def parser() -> arguments.Parser:
    """Build the parser of the command line that mount(8) uses."""
    made = _Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, often=_OFTEN)
    made.add_argument("source", metavar="SOURCE", help="the source shown in the mount table, usually `none`")
    made.add_argument("directory", metavar="DIR", help="the mount point, or the mount to change")
    made.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[], help="mount options")
    made.add_argument("-t", dest="type", metavar="TYPE", help="the type: pkramfs or fuse.pkramfs")
    made.add_argument("-f", dest="fake", action="store_true", help="check the options, and do nothing else")
    made.add_argument("-s", dest="sloppy", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("-n", dest="no_mtab", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("-N", dest="namespace", metavar="NS", help=argparse.SUPPRESS)
    made.add_argument("-r", "--read-only", dest="read_only", action="store_true", help="the same as -o ro")
    made.add_argument("-w", "--rw", dest="read_write", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("-v", "--verbose", dest="verbose", action="store_true", help="print what is done")
    progress.add_option(made)
    arguments.add_common(made)
    return made


def _act(args: argparse.Namespace) -> int:
    from pkramfs.control.protocol import RefusedError

    try:
        return _mount(args)
    except (PkramfsError, OSError) as error:
        failed = failure(error)
        if not isinstance(error, AnsweredError | RefusedError):
            _log(args, str(failed))
        raise failed from error


def _log(args: argparse.Namespace, message: str) -> None:
    """Write a refusal to the kernel log as well, if the machine exists. (The daemon writes its own.)"""
    from pkramfs.machine.directory import Machine

    words = [word for word in ",".join(args.options).split(",") if word.startswith("machine=")]
    try:
        machine = Machine.locate(words[-1].partition("=")[2] if words else getattr(args, "machine", None))
    except PkramfsError:
        return  # a machine that cannot be named has no log
    arguments.note(machine, f"{PROGRAM}: {args.directory}: {message}")


def _mount(args: argparse.Namespace) -> int:
    from pkramfs.mounting.mountpoints import prepare, resolve
    from pkramfs.mounting.options import parse
    from pkramfs.mounting.starting import Starting, absolute_root

    if args.type not in (None, "pkramfs", "fuse.pkramfs", "fuse"):
        raise UsageError(f"unknown type {args.type!r}: write -t pkramfs")
    text = ",".join([*_source_words(args), *args.options, *(["ro"] * args.read_only), *_machine_words(args)])
    options = parse(text)
    if root := getattr(args, "root", None):
        os.environ["PKRAM_ROOT"] = root
    absolute_root()
    directory = resolve(args.directory)
    if options.remount:
        from pkramfs.cli import remount

        if args.fake:
            return 0
        with progress.waiting(args, "preserve" if options.preserve else "remount"):
            return remount.remount(directory, options, args.verbose)
    _check_first(options)
    if args.fake:
        return 0
    prepare(directory)
    with progress.waiting(args, "mount"):
        message = Starting(directory, text).serve()
    if message:
        render.tell(message)
    elif args.verbose:
        render.tell(f"{PROGRAM}: {options.name or 'none'} mounted on {directory}")
    return 0


def _source_words(args: argparse.Namespace) -> list[str]:
    """Return the source as an option, so that a kexec keeps it; fsname= in -o comes after it."""
    from pkramfs.mounting.options import NO_SOURCE, source_word

    return [] if args.source in ("", NO_SOURCE) else [source_word(args.source)]


def _machine_words(args: argparse.Namespace) -> list[str]:
    machine = getattr(args, "machine", None)
    return [] if machine is None else [f"machine={machine}"]


def _check_first(options: "Options") -> None:
    """Raise UsageError for options of a remount."""
    if options.preserve is not None:
        word = "preserve" if options.preserve else "nopreserve"
        raise UsageError(f"{word} is for a mounted tree: mount first, then mount -o remount,preserve,ro DIR")
