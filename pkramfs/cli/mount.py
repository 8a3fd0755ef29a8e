# SPDX-License-Identifier: GPL-2.0-or-later
"""mount.pkramfs: the helper that mount(8) calls, and the way to mount without root.

    mount.pkramfs none DIR -o pkram=NAME,…          start a daemon, return when it serves
    mount.pkramfs none DIR -o remount,…             cli/remount.py: talk to the daemon that is there

mount(8) calls us as `mount.pkramfs SOURCE DIR [-sfnvN] [-o OPTIONS] [-t TYPE]`, and for a remount, by
the kernel's name of the type, as mount.fuse.pkramfs. Exit statuses are mount(8)'s: 1 wrong usage, 2
the system, 32 the mount failed; the reason is one line.

Everything but the standard library is imported by the daemon only, so that a mount pays for one heavy
start, not two; and most of the standard library where it is used, so that `--help` costs nothing.

Kernel: util-linux, libmount/src/context_mount.c (exec_helper); mount(8), EXTERNAL HELPERS
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pkramfs.cli import arguments, render
from pkramfs.errors import PkramfsError, UsageError, explain

if TYPE_CHECKING:
    from pkramfs.mounting.options import Options

PROGRAM = "mount.pkramfs"
USAGE, SYSTEM, FAILURE = 1, 2, 32
_ANSWER_MOST = 1 << 20
"""Bytes of a daemon's answer."""
GO = b"go "
"""What a daemon that was started is told when it shall mount, followed by what it is to find, as JSON."""
SERVE_SECONDS = 600.0
"""How long a daemon may take until it serves: it may boot, and read the description of a large tree."""
_END_SECONDS = 10.0
_DESCRIPTION = "Mount a tmpfs whose tree survives a kexec, or change such a mount; see mount.pkramfs(8)."
_EPILOG = """examples:
  mount -t pkramfs -o pkram=mytmpfs none /mnt
  mount -o remount,preserve,ro /mnt
  mount.pkramfs none ~/mnt -o pkram=mine,size=1G        (without root)
"""


class MountError(PkramfsError):
    """The mount failed; mount(8)'s status for it."""

    exit_status = FAILURE


class AnsweredError(MountError):
    """The daemon has said why it did not start."""


class _Parser(arguments.Parser):
    """A parser with mount(8)'s status for wrong usage."""

    def error(self, message: str) -> NoReturn:
        self.leave(USAGE, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the helper; its exit status."""
    return arguments.run(parser(), _act, argv)


def parser() -> arguments.Parser:
    """The command line that mount(8) uses."""
    made = _Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG)
    made.add_argument("source", metavar="SOURCE", help="a name of your own for the mount table, by custom `none`")
    made.add_argument("directory", metavar="DIR", help="where to mount, or what to remount")
    made.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[], help="mount options")
    made.add_argument("-t", dest="type", metavar="TYPE", help="pkramfs or fuse.pkramfs")
    made.add_argument("-f", dest="fake", action="store_true", help="check the options, do nothing")
    made.add_argument("-s", dest="sloppy", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("-n", dest="no_mtab", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("-N", dest="namespace", metavar="NS", help=argparse.SUPPRESS)
    made.add_argument("-r", "--read-only", dest="read_only", action="store_true", help="as -o ro")
    made.add_argument("-w", "--rw", dest="read_write", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("-v", "--verbose", dest="verbose", action="store_true", help="say what is done")
    arguments.add_common(made)
    return made


def _act(args: argparse.Namespace) -> int:
    from pkramfs.control.protocol import RefusedError

    try:
        return _mount(args)
    except (PkramfsError, OSError) as error:
        failed = _failure(error)
        if not isinstance(error, AnsweredError | RefusedError):
            _log(args, str(failed))
        raise failed from error


def _failure(error: Exception) -> MountError:
    """An error with mount(8)'s status for it."""
    failed = MountError(explain(error) if isinstance(error, OSError) else str(error))
    if isinstance(error, UsageError):
        failed.exit_status = USAGE
    elif isinstance(error, OSError) and not isinstance(error, PkramfsError):
        failed.exit_status = SYSTEM
    elif isinstance(error, MountError):
        failed.exit_status = error.exit_status
    return failed


def _log(args: argparse.Namespace, message: str) -> None:
    """A refusal is a line in the kernel log, too, if the machine is there. (The daemon writes its own.)"""
    from pkramfs.machine.directory import Machine

    words = [word for word in ",".join(args.options).split(",") if word.startswith("machine=")]
    try:
        machine = Machine.locate(words[-1].partition("=")[2] if words else getattr(args, "machine", None))
    except PkramfsError:
        return  # a machine that cannot be named has no log
    arguments.note(machine, f"{PROGRAM}: {args.directory}: {message}")


def _mount(args: argparse.Namespace) -> int:
    from pkramfs.mounting.options import parse

    if args.type not in (None, "pkramfs", "fuse.pkramfs", "fuse"):
        raise UsageError(f"type {args.type!r} is not ours: pkramfs")
    text = ",".join([*_source_words(args), *args.options, *(["ro"] * args.read_only), *_machine_words(args)])
    options = parse(text)
    if root := getattr(args, "root", None):
        os.environ["PKRAM_ROOT"] = root
    absolute_root()
    directory = _resolve(args.directory)
    if options.remount:
        from pkramfs.cli import remount

        return 0 if args.fake else remount.remount(directory, options, _say(args))
    _check_first(options)
    if args.fake:
        return 0
    prepare(directory)
    message = start(directory, text)
    if message:
        render.tell(message)
    elif args.verbose:
        render.tell(f"{PROGRAM}: {options.name or 'none'} mounted on {directory}")
    return 0


def _resolve(directory: str) -> str:
    """The directory without links. A path at which something is mounted has none, so that nothing is asked there."""
    from pkramfs.mounting.patience import ANSWER_SECONDS, within
    from pkramfs.mounting.syscalls import mounted_at

    if os.pardir not in directory.split("/") and mounted_at(os.path.abspath(directory)):
        return os.path.abspath(directory)
    return within(lambda: os.path.realpath(directory), ANSWER_SECONDS, f"{directory} to answer")


def absolute_root() -> None:
    """Make $PKRAM_ROOT absolute: a daemon works in /."""
    if os.environ.get("PKRAM_ROOT"):
        os.environ["PKRAM_ROOT"] = os.path.abspath(os.environ["PKRAM_ROOT"])


def _source_words(args: argparse.Namespace) -> list[str]:
    """What is mounted, as an option, so that it stays with the mount over a kexec; fsname= in -o comes after it."""
    from pkramfs.mounting.options import NO_SOURCE, source_word

    return [] if args.source in ("", NO_SOURCE) else [source_word(args.source)]


def _machine_words(args: argparse.Namespace) -> list[str]:
    machine = getattr(args, "machine", None)
    return [f"machine={machine}"] if machine else []


def _say(args: argparse.Namespace) -> bool:
    return bool(args.verbose)


def _check_first(options: "Options") -> None:
    """What only a remount can ask for."""
    if options.preserve is not None:
        word = "preserve" if options.preserve else "nopreserve"
        raise UsageError(f"{word} is for a mounted tree: mount first, then mount -o remount,preserve,ro DIR")


def prepare(directory: str) -> None:
    """See that the mount point can be one; a dead mount of ours that lies over it is detached."""
    from pkramfs.mounting import syscalls
    from pkramfs.mounting.patience import ANSWER_SECONDS, within

    while syscalls.is_dead(directory):
        syscalls.detach(directory)
    exists, is_directory = within(
        lambda: (os.path.lexists(directory), os.path.isdir(directory)), ANSWER_SECONDS, f"{directory} to answer"
    )
    if not exists:
        raise MountError(f"mount point {directory} does not exist")
    if not is_directory:
        raise MountError(f"mount point {directory} is not a directory")


class Starting:
    """A daemon that is being started: it imports what it needs, then waits to be told. If we die, it ends."""

    def __init__(self, directory: str, text: str) -> None:
        import subprocess

        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self._answer, theirs = os.pipe()
        told, self._go = os.pipe()
        try:
            self._daemon = subprocess.Popen(
                [sys.executable, "-P", "-m", "pkramfs", "mount-daemon", str(theirs), directory, text, str(told)],
                env={**os.environ, "PYTHONPATH": package},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs, told],
                start_new_session=True,
            )
        except BaseException:
            os.close(self._answer)
            os.close(self._go)
            raise
        finally:
            os.close(theirs)
            os.close(told)

    def serve(self, expected: dict[str, Any] | None = None) -> str:
        """Let it mount, wait until it serves; returns what it has to say. MountError with its reason.

        `expected` are the tree and the directory that it must find, as daemon.Expected has them.
        """
        import json
        from contextlib import suppress

        with suppress(BrokenPipeError):  # it died already, and the line it does not send says so
            os.write(self._go, GO + json.dumps(expected or {}).encode())
        os.close(self._go)
        line = self._line()
        if not line:
            status = self._end()
            raise MountError(f"the mount daemon (pid {self._daemon.pid}) died with status {status} before it served")
        answer = self._understand(line)
        if "error" in answer:
            self._end()
            failed = AnsweredError(answer["error"])
            failed.exit_status = USAGE if answer.get("status") else FAILURE
            raise failed
        self._daemon.returncode = 0  # it lives on; no warning that it does
        return str(answer.get("ok", ""))

    def _understand(self, line: bytes) -> dict[str, Any]:
        """What the daemon says: that it serves, or why it does not."""
        from pkramfs.schema import Invalid, Object, Text, Whole, parse

        known = Object({}, optional={"ok": Text(), "error": Text(), "status": Whole(0, 255)})
        try:
            return known.read(parse(line))
        except Invalid as error:
            raise MountError(f"the mount daemon (pid {self._daemon.pid}) cannot be understood: {error}") from None

    def _line(self) -> bytes:
        """What it says; MountError if it says nothing for too long, and then it is killed."""
        import select
        import time

        deadline, line, ready = time.monotonic() + SERVE_SECONDS, b"", select.poll()
        ready.register(self._answer, select.POLLIN)
        try:
            while not line.endswith(b"\n") and len(line) < _ANSWER_MOST:
                if not ready.poll(max(deadline - time.monotonic(), 0) * 1000):
                    self._daemon.kill()
                    raise MountError(
                        f"the mount daemon (pid {self._daemon.pid}) did not serve within {SERVE_SECONDS:g} s and was "
                        "killed; what is preserved stays so"
                    )
                part = os.read(self._answer, 1 << 16)
                if not part:
                    break
                line += part
        finally:
            os.close(self._answer)
        return line

    def _end(self) -> int:
        """Wait until it has ended, which it is about to do; its status. One that does not is killed."""
        import subprocess

        try:
            return self._daemon.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
        return self._daemon.wait(_END_SECONDS)

    def give_up(self) -> None:
        """Have it end without a trace."""
        os.close(self._go)
        os.close(self._answer)
        self._end()


def start(directory: str, text: str) -> str:
    """Start a daemon and wait until it serves; see `Starting.serve`."""
    return Starting(directory, text).serve()
