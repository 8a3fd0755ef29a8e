# SPDX-License-Identifier: GPL-2.0-or-later
"""Completions for bash, zsh and fish, made from the parsers, so that no option is forgotten.

    parser ──describe──▶ Place (words so far, commands, options) … ──bash, zsh, fish──▶ a script

Each script finds how far the command line has come (`/machine/create`), then offers the commands and options of that
place. An option whose value is a file completes files, another value is the user's own. A first word that is no option
completes files where the command takes them.

See zshcompsys(1), fish-completions(7), and compgen in bash(1).
"""

import argparse
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_FILES = ("FILE", "PATH", "DIR", "IMAGE", "FILE@ADDRESS", "WHERE")
"""What is a file, by the word that --help has for it."""


class Option(NamedTuple):
    """An option: its names, its help in a line, and the kind of its value: none, a file, a choice, or any."""

    names: tuple[str, ...]
    text: str
    takes: str
    """`""`, `"file"`, `"any"`, or choices, with blanks between."""


class Place(NamedTuple):
    """A place in a command line: the path of commands to it (`/machine`), and the words that may follow."""

    path: str
    commands: tuple[tuple[str, str], ...]
    options: tuple[Option, ...]
    choices: str
    files: bool


def describe(parser: argparse.ArgumentParser, path: str = "") -> Iterator[Place]:
    """Yield the places of a parser's command line, from the outermost inwards."""
    commands: list[tuple[str, str]] = []
    options, choices, files, inner = [], "", False, []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {one.dest: one.help or "" for one in action._choices_actions}
            commands += [(name, _plain(texts.get(name, ""))) for name in action.choices]
            inner += list(action.choices.items())
        elif not action.option_strings:
            choices += " ".join(map(str, action.choices or ()))
            files = files or str(action.metavar or action.dest).upper() in _FILES
        elif action.help != argparse.SUPPRESS:
            options.append(Option(tuple(action.option_strings), _plain(action.help or ""), _takes(action)))
    yield Place(path, tuple(commands), tuple(options), choices, files)
    for name, child in inner:
        yield from describe(child, f"{path}/{name}")


def _takes(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return " ".join(map(str, action.choices))
    return "file" if str(action.metavar or action.dest).upper() in _FILES else "any"


def _plain(text: str) -> str:
    """Return help as text that needs no quoting in any shell."""
    return re.sub(r"[^\w .,;/=()-]", "", text.replace("%%", "%"))


def _word(program: str) -> str:
    """Return the name of a program as the name of a function."""
    return re.sub(r"\W", "_", program)


def _paths(places: list[Place]) -> str:
    """Return the pattern of all places but the outermost; a pattern that nothing matches where there are none."""
    return "|".join(place.path for place in places if place.path) or "/"


def bash(program: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion for bash."""
    places, name = list(describe(parser)), _word(program)
    lines = [
        f"# bash completion for {program}, made by pkramctl install from its parser",
        f"_{name}() {{",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} at='' word words='' files=''",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do',
        f'        case "$at/$word" in {_paths(places)}) at="$at/$word" ;; esac',
        "    done",
        '    case "$at $prev" in',
    ]
    for place in places:
        for option in place.options:
            if option.takes:
                pattern = "|".join(f"'{place.path} {one}'" for one in option.names)
                lines.append(f"        {pattern}) {_bash_value(option.takes)}; return ;;")
    lines += ["    esac", '    case "$at" in']
    for place in places:
        words = [*(command for command, _ in place.commands), *place.choices.split()]
        words += [one for option in place.options for one in option.names]
        files = " files=yes" if place.files else ""
        lines.append(f"        '{place.path}') words='{' '.join(words)}'{files} ;;")
    lines += [
        "    esac",
        '    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")',
        '    [[ -z $files || $cur == -* ]] || mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "$cur")',
        "}",
        f"complete -o filenames -F _{name} {program}",
    ]
    return "\n".join(lines) + "\n"


def _bash_value(takes: str) -> str:
    if takes == "any":
        return "COMPREPLY=()"
    return f'mapfile -t COMPREPLY < <(compgen {"-f" if takes == "file" else f"-W {takes!r}"} -- "$cur")'


def zsh(program: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion for zsh."""
    places = list(describe(parser))
    lines = [
        f"#compdef {program}",
        f"# made by pkramctl install from the parser of {program}",
        "local at='' word files=''",
        "local -a commands options",
        'for word in "${(@)words[2,CURRENT-1]}"; do',
        f'    case "$at/$word" in ({_paths(places)}) at="$at/$word" ;; esac',
        "done",
        'case "$at ${words[CURRENT-1]}" in',
    ]
    for place in places:
        for option in place.options:
            if option.takes:
                pattern = "|".join(f"'{place.path} {one}'" for one in option.names)
                lines.append(f"    ({pattern}) {_zsh_value(option.takes)}; return ;;")
    lines += ["esac", 'case "$at" in']
    for place in places:
        commands = [*place.commands, *((one, "") for one in place.choices.split())]
        pairs = [(one, option.text) for option in place.options for one in option.names]
        lines.append(f"    ('{place.path}') commands=({_zsh_list(commands)})")
        lines.append(f"        options=({_zsh_list(pairs)}){' files=yes' if place.files else ''} ;;")
    lines += [
        "esac",
        "(( ${#commands} )) && _describe -t commands command commands",
        "[[ $PREFIX == -* ]] && _describe -o -t options option options",
        "[[ -n $files && $PREFIX != -* ]] && _files",
        "return 0",
    ]
    return "\n".join(lines) + "\n"


def _zsh_value(takes: str) -> str:
    return {"any": "_message value", "file": "_files"}.get(takes, f"compadd {takes}")


def _zsh_list(pairs: list[tuple[str, str]]) -> str:
    return " ".join(f"'{name}:{text}'" if text else f"'{name}'" for name, text in pairs)


def fish(program: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion for fish."""
    places, name = list(describe(parser)), _word(program)
    lines = [
        f"# fish completion for {program}, made by pkramctl install from its parser",
        f"function __{name}_at",
        "    set -l at ''",
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$at/$word"',
        f"            case {_paths(places).replace('|', ' ')}",
        '                set at "$at/$word"',
        "        end",
        "    end",
        '    test "$at" = "$argv[1]"',
        "end",
        f"complete -c {program} -f",
    ]
    for place in places:
        head = f"complete -c {program} -n \"__{name}_at '{place.path}'\""
        lines += [f"{head} -a {command} -d '{text}'" for command, text in place.commands]
        lines += [f"{head} -a '{place.choices}'"] if place.choices else []
        lines += [f"{head} -F"] if place.files else []
        lines += [f"{head} {_fish_option(option)}" for option in place.options]
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    names = [f"-l {one[2:]}" if one.startswith("--") else f"-s {one[1:]}" for one in option.names]
    value = {"": [], "file": ["-r", "-F"], "any": ["-x"]}.get(option.takes, ["-x", f"-a '{option.takes}'"])
    return " ".join([*names, *value, f"-d '{option.text}'"])


SHELLS: dict[str, tuple[str, Callable[[str, argparse.ArgumentParser], str]]] = {
    "bash": ("share/bash-completion/completions/{}", bash),
    "zsh": ("share/zsh/site-functions/_{}", zsh),
    "fish": ("share/fish/vendor_completions.d/{}.fish", fish),
}
"""Where each shell looks for the completion of a program, below a prefix, and what makes it."""
