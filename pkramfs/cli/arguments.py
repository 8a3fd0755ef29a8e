# SPDX-License-Identifier: GPL-2.0-or-later
"""Options, exit statuses and one-line errors, which all commands share.

    def main(argv=None) -> int:
        return run(_parser(), _act, argv)

`run` is the only place where an exception becomes a message and a status:

    PkramfsError           its own one line and its class's exit status (errors.py)
    OSError                `path: reason`, status 1
    a signal               128 and its number (Ctrl-C: 130), as a shell shows a command that died of it
    BrokenPipeError        141, silently: the reader (`| head`) has had enough
    stdout cannot be written   `write error: reason`, status 1; progress that cannot be printed stops nothing (stdio.py)
    anything else          one line that asks for a report, status 70; with --debug the traceback

An argument that is wrong is status 2 and one line, not a page of usage.

The habits are those of util-linux.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pkramfs import stdio
from pkramfs.cli import logs, render, signals
from pkramfs.errors import MachineError, PkramfsError, UsageError, explain
from pkramfs.units import parse_size

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine

USAGE, BUG, INTERRUPTED = 2, 70, 130
_COLUMNS = 80
_TOO_FAR = 1 << 63

Action = Callable[[argparse.Namespace], int | None]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal. argparse would import shutil to ask, and does for every option that is added."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=columns() - 2)


def columns() -> int:
    """Return the width of the terminal: COLUMNS, else the terminal's own, else 80."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or _COLUMNS  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):  # closed, or no terminal
        return _COLUMNS


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose options are never guessed from a prefix.

    If its options fill more than a screen, `often` names those that --help shows; --help-all shows all.
    """

    def __init__(self, *, often: Sequence[str] = (), **settings: Any) -> None:
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **settings)
        self._often = often
        if often:
            self.add_argument(
                "--help-all", nargs=0, action=_HelpAll, default=argparse.SUPPRESS, help="show all options"
            )

    def format_help(self) -> str:
        """Return the help: of a parser with many options, those that are used often."""
        if not self._often:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [*map(self._named, self._often), *self._get_positional_actions()], [])
        formatter.add_text(self.description)
        formatter.start_section("used most")
        formatter.add_arguments([self._named(name) for name in (*self._often, "--help-all")])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def format_all(self) -> str:
        """Return the help with all options."""
        return super().format_help()

    def _named(self, name: str) -> argparse.Action:
        return self._option_string_actions[name]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name an unknown command and one that is spelled like it; argparse would list all commands in one line."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            import difflib

            near = difflib.get_close_matches(value, list(action.choices), n=1)
            self.error(f"unknown command {value!r}" + "".join(f" (similar: {name})" for name in near))
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, and exit with the status of a usage error."""
        self.leave(USAGE, message)

    def leave(self, status: int, message: str) -> NoReturn:
        """Print an error of the command line in one line, and exit."""
        complain(self.prog, f"{message}; see {self.prog} --help")
        self.exit(status)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or an error; argparse would not say that help could not be printed."""
        if file is None or file is sys.stderr:
            stdio.say(message.removesuffix("\n"))
        else:
            file.write(message)


class _HelpAll(argparse.Action):
    """--help-all."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        for line in parser.format_all().rstrip("\n").split("\n"):
            render.say(line)
        parser.exit()


class _Version(argparse.Action):
    """--version, without importing anything until it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from pkramfs import __version__

        render.say(f"{parser.prog.partition(' ')[0]} (pkramfs) {__version__}")
        parser.exit()


def add_common(parser: argparse.ArgumentParser, *, debug: Sequence[str] = ("--debug",)) -> None:
    """Add the options that every command and subcommand takes, before or after the subcommand's name.

    They have no default, so that a subcommand that was not given one does not undo the command's.
    """
    group = parser.add_argument_group("common options")
    quiet = argparse.SUPPRESS
    group.add_argument("--machine", metavar="NAME", default=quiet, help="the machine to use (default: default)")
    group.add_argument(
        "--root", metavar="DIR", default=quiet, help="the directory of the machines (default: $PKRAM_ROOT)"
    )
    group.add_argument(*debug, dest="debug", action="store_true", default=quiet, help="show tracebacks")
    group.add_argument(logs.OPTION, action="store_true", default=quiet, help="print messages on stderr as JSON")
    group.add_argument("-V", "--version", nargs=0, action=_Version, default=quiet, help="print the version and exit")


def machine(args: argparse.Namespace) -> "Machine":
    """Return the machine that --root and --machine name. Touches nothing."""
    from pkramfs.machine.directory import Machine

    if root := getattr(args, "root", None):
        # In the environment, so that boots and mounts started from here see the same machine.
        os.environ["PKRAM_ROOT"] = os.path.abspath(root)
    found = Machine.locate(getattr(args, "machine", None))
    logs.info(f"the machine is {found.path()}")
    return found


def existing(args: argparse.Namespace) -> "Machine":
    """Return the machine, which must be there: looking at it does not make it."""
    found = machine(args)
    if not found.exists():
        raise MachineError(found.missing())
    return found


def wants_json(args: argparse.Namespace) -> bool:
    """Return True if --json was given, to the command or to its subcommand."""
    return bool(getattr(args, "json", False))


def size(text: str) -> int:
    """Parse a size or an address: `64G`, `0x1000000`."""
    try:
        value = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value >= _TOO_FAR:
        raise argparse.ArgumentTypeError(f"{text!r} is larger than any file or RAM")
    return value


def number(text: str) -> int:
    """Parse a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a whole number above zero: {text!r}")
    return int(text)


def pfn(text: str) -> int:
    """Parse a page frame number, in hexadecimal as all messages print it."""
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"invalid pfn {text!r}: write it in hexadecimal")
    return value


def complain(program: str, message: str, level: str = "error") -> None:
    """Print one line on stderr; names of files in it are escaped. With --log-json it is an object."""
    if not logs.message(level, program, message):
        render.say(f"{program}: {message}", error=True)


def warn(program: str, message: str) -> None:
    """Print a warning on stderr; the command goes on."""
    if not logs.message("warning", program, message):
        complain(program, f"warning: {message}")


def note(found: "Machine", message: str) -> None:
    """Write a refusal to the machine's kernel log as well, if the machine exists."""
    if found.exists():
        found.log(message, warn=False)  # the message itself reaches the user in any case


def run(parser: argparse.ArgumentParser, act: Action, argv: Sequence[str] | None) -> int:
    """Parse, act, and turn any failure into one line and an exit status."""
    stdio.hold()
    words = list(sys.argv[1:] if argv is None else argv)
    render.settle()
    debug = "--debug" in words
    with logs.kept(parser.prog, words):
        return _run(parser, act, words, debug)


def _run(parser: argparse.ArgumentParser, act: Action, words: Sequence[str], debug: bool) -> int:
    try:
        with stdio.watched():
            args = parser.parse_args(words)
            debug = getattr(args, "debug", debug)
            if getattr(args, "log_verbose", False):
                logs.verbose(parser.prog)
            with signals.heard():
                status = act(args) or 0
    except SystemExit as leave:  # argparse has said why
        status = leave.code if isinstance(leave.code, int) else 0
    except (BrokenPipeError, stdio.PrintError) as error:
        return stdio.broken(parser.prog, error)
    except KeyboardInterrupt as ended:
        status = ended.status if isinstance(ended, signals.Ended) else INTERRUPTED
    except Exception as error:
        status = _report(parser.prog, error, debug=debug)
    return stdio.finish(parser.prog, status)


def _report(program: str, error: Exception, *, debug: bool) -> int:
    """Print an error and return the exit status."""
    if debug:
        import traceback

        for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
            if not logs.message("error", program, line):
                render.say(line, error=True)
    if isinstance(error, PkramfsError):
        lines, status = [str(error), *_details(error)], error.exit_status
    elif isinstance(error, OSError):
        lines, status = [explain(error)], PkramfsError.exit_status
    elif ended := signals.status():
        return ended  # an import of C code turns the signal into an error of its own
    else:
        kind = type(error).__name__
        lines, status = [f"internal error: {kind}: {error}; --debug shows where, please report it"], BUG
    for line in lines:
        complain(program, line)
    return status


def _details(error: PkramfsError) -> list[str]:
    """Return the list that an error carries: the conflicts of a ConflictError, one a line."""
    return [f"  {line}" for line in getattr(error, "conflicts", [])]


def need(condition: object, message: str) -> None:
    """Raise UsageError unless `condition` holds."""
    if not condition:
        raise UsageError(message)
