# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl --help: on one screen, and no command forgotten."""

import argparse

import pytest

from pkramfs.cli import arguments, ctl, kexec, mount, overview


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(action.choices)


def test_the_overview_fits_a_screen_and_names_every_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = ctl.parser()
    text = parser.format_help()
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 80
    assert {name for name in commands(parser) if name not in text.split()} == set()
    assert "more " not in text, "put new commands into a group of overview.py"
    for option in ("--machine NAME", "--json", "--log-json"):
        assert option in text


def test_the_help_of_each_command_fits_a_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = {
        name: len(one.format_help().splitlines())
        for name, one in commands(ctl.parser()).items()
        if len(one.format_help().splitlines()) > 24
    }
    assert set(long) <= {"help"}


@pytest.mark.parametrize("module", [kexec, mount])
def test_help_of_a_program_with_many_options_fits_a_screen(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    made = module.parser()
    text, whole = made.format_help(), made.format_all()
    assert len(text.splitlines()) <= 24 < len(whole.splitlines())
    assert "--help-all" in text and set(text.split()) - {"used", "most:"} <= set(whole.split()) | {"[-f]"}
    assert module.main(["--help-all"]) == 0
    assert capsys.readouterr().out == whole


def test_help_has_a_line_for_each_command(ctl):
    status, out, err = ctl("help")
    assert (status, err) == (0, "")
    from pkramfs.cli.ctl import parser

    lines = {line.split()[0] for line in out.splitlines() if line.startswith("    ")}
    assert set(commands(parser())) <= lines


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_a_command_that_no_group_names_is_seen(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    made = overview.Parser(prog="x", description="word " * 30)
    under = made.add_subparsers(parser_class=arguments.Parser)
    under.add_parser("status")
    under.add_parser("unheard-of")
    lines = made.format_help().splitlines()
    assert any(line.split() == ["more", "unheard-of"] for line in lines)
    assert any(line.split()[-1:] == ["status"] for line in lines)
