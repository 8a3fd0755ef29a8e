# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl --help on one screen: the commands by purpose, and where to read more.

    usage: pkramctl [OPTIONS] COMMAND …

    state             status nodes map …
    history           report dmesg timeline …

A command that no group names is listed under `more`, so that none can be forgotten. `pkramctl help` has a line for
each.
"""

import argparse

from pkramfs.cli import arguments, render

GROUPS = {
    "state": ("status", "nodes", "map", "iomem", "inspect", "ls", "tree", "stat", "cat", "diff"),
    "history": ("report", "dmesg", "timeline", "metrics"),
    "checks": ("doctor", "verify"),
    "preserved trees": ("free", "export", "import", "cp", "rename"),
    "mounts": ("upgrade", "punch", "allocate", "sparsify", "extents"),
    "the machine": ("boot", "machine"),
    "this package": ("install", "format", "help"),
}
_NARROW = 2


class Parser(arguments.Parser):
    """The outermost parser of a program with many commands."""

    def format_help(self) -> str:
        """Return the overview."""
        import textwrap

        known = [name for action in self._actions for name in _commands(action)]
        groups = {title: [name for name in names if name in known] for title, names in GROUPS.items()}
        groups["more"] = [name for name in known if not any(name in names for names in GROUPS.values())]
        wide = max(map(len, groups)) + _NARROW
        lines = [
            f"usage: {self.prog} [OPTIONS] COMMAND …",
            "",
            *textwrap.wrap(self.description or "", self._width()),
            "",
        ]
        for title, names in groups.items():
            lines += _entry(title, " ".join(names), wide, self._width()) if names else []
        lines += ["", *_entry("options", ", ".join(self._options()), wide, self._width())]
        lines += _entry("", "before or after COMMAND; a COMMAND has options of its own, too", wide, self._width())
        return "\n".join([*lines, "", *self._more()]) + "\n"

    def format_all(self) -> str:
        """Return a line for each option and command."""
        return super().format_help()

    def _width(self) -> int:
        return max(arguments.columns() - 2, 20)

    def _options(self) -> list[str]:
        """Return each option with its value, by its longest name."""
        shown = [action for action in self._actions if action.option_strings and action.help != argparse.SUPPRESS]
        return [f"{max(one.option_strings, key=len)} {one.metavar or ''}".strip() for one in shown]

    def _more(self) -> list[str]:
        return [
            f"{self.prog} COMMAND --help    shows one command and its options",
            f"{self.prog} help              lists all commands, a line for each",
            f"man {self.prog}               describes everything",
        ]


def _commands(action: argparse.Action) -> list[str]:
    return list(action.choices) if isinstance(action, argparse._SubParsersAction) else []


def _entry(title: str, text: str, wide: int, columns: int) -> list[str]:
    """Return a title and its text, wrapped beside it."""
    import textwrap

    return textwrap.wrap(
        text,
        columns,
        initial_indent=title.ljust(wide),
        subsequent_indent=" " * wide,
        break_on_hyphens=False,
        break_long_words=False,
    )


def add(made: argparse.ArgumentParser, whole: "Parser") -> None:
    """Have `help` print a line for each command of the whole program."""
    made.set_defaults(whole=whole)


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl help`."""
    for line in args.whole.format_all().rstrip("\n").split("\n"):
        render.say(line)
