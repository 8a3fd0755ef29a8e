# SPDX-License-Identifier: GPL-2.0-or-later
"""Every failure of a command is one line and a status; a traceback only with --debug."""

import argparse
import os
import subprocess
import sys

import pytest

from pkramfs import stdio
from pkramfs.cli import arguments
from pkramfs.cli.arguments import Parser, run
from pkramfs.errors import ConflictError, ExhaustedError, MachineError, NotPreservedError, PkramError, UsageError


@pytest.fixture
def parser() -> Parser:
    made = Parser(prog="pkram-test")
    arguments.add_common(made)
    made.add_argument("--ram", type=arguments.size)
    made.add_argument("--nodes", type=arguments.number)
    made.add_argument("--pfn", type=arguments.pfn)
    return made


def raising(error):
    def act(args):
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("x"), 2),
        (ExhaustedError("x"), 4),
        (ConflictError("x"), 5),
        (NotPreservedError("x"), 6),
        (MachineError("x"), 8),
        (PkramError("x"), 9),
        (FileNotFoundError(2, "No such file or directory", "/nowhere"), 1),
        (ZeroDivisionError("x"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_status_and_no_traceback(parser, capsys, error, status):
    assert run(parser, raising(error), []) == status
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.count("\n") == (0 if isinstance(error, KeyboardInterrupt) else 1)


def test_message_starts_with_the_command(parser, capsys):
    run(parser, raising(FileNotFoundError(2, "No such file or directory", "/nowhere")), [])
    assert capsys.readouterr().err == "pkram-test: /nowhere: No such file or directory\n"


def test_conflicts_are_listed_below_the_message(parser, capsys):
    run(parser, raising(ConflictError("kernel would overwrite preserved pages", ["1000-2000: node a"])), [])
    assert capsys.readouterr().err.splitlines() == [
        "pkram-test: kernel would overwrite preserved pages",
        "pkram-test:   1000-2000: node a",
    ]


def test_debug_shows_the_traceback(parser, capsys):
    assert run(parser, raising(UsageError("wrong")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ram", "much"], "not a size"),
        (["--ram", "-1"], "not a size"),
        (["--nodes", "0"], "not a whole number above zero"),
        (["--pfn", "zz"], "write it in hexadecimal"),
        (["--machin", "x"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(parser, capsys, words, message):
    assert run(parser, raising(AssertionError), words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert shown.startswith("pkram-test: ")


def test_values_are_parsed(parser):
    seen = {}
    assert run(parser, lambda args: seen.update(vars(args)), ["--ram", "64G", "--nodes", "2", "--pfn", "34f"]) == 0
    assert (seen["ram"], seen["nodes"], seen["pfn"]) == (64 << 30, 2, 0x34F)


def test_common_options_hold_before_and_after_a_subcommand():
    outer = Parser(prog="pkram-test")
    arguments.add_common(outer)
    inner = outer.add_subparsers().add_parser("verb")
    arguments.add_common(inner)
    for words in (["--machine", "m", "verb"], ["verb", "--machine", "m"]):
        assert outer.parse_args(words).machine == "m"
    assert outer.parse_args(["--debug", "verb", "--machine", "m"]) == argparse.Namespace(debug=True, machine="m")


def test_version(parser, capsys):
    assert run(parser, raising(AssertionError), ["--version"]) == 0
    assert capsys.readouterr().out.startswith("pkram-test (pkramfs) ")


def test_a_closed_pipe_is_silent():
    program = (
        "from pkramfs.cli.arguments import *\n"
        "p = Parser(prog='x')\n"
        "def act(args):\n"
        "    while True: print('line ' * 100)\n"
        "sys.exit(run(p, act, []))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == stdio.BROKEN_PIPE


@pytest.mark.parametrize("verb", ["mount", "kexec", "ctl"])
def test_help_imports_nothing_heavy(verb):
    """Nor what is cheap once but adds up: each of the standard modules named here costs 1 to 15 ms."""
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from pkramfs.__main__ import main\n"
        f"main([{verb!r}, '--help'])\n"
        "heavy = {'numpy', 'trio', 'pyfuse3', 'xxhash', 'rich'}\n"
        "heavy |= {'dataclasses', 'inspect', 'json', 'shutil', 'subprocess', 'threading'}\n"
        "heavy &= set(sys.modules) - before\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(("columns", "width"), [("50", 50), ("", 80), ("wide", 80), ("0", 80)])
def test_help_is_as_wide_as_the_terminal(columns, width, monkeypatch):
    """No terminal in a test: COLUMNS, if it is a width, or 80."""
    monkeypatch.setenv("COLUMNS", columns)
    parser = arguments.Parser(prog="x")
    parser.add_argument("--long", help="word " * 60)
    longest = max(len(line) for line in parser.format_help().splitlines())
    assert width - 12 < longest <= width - 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statu"], "pkramctl: unknown command 'statu' (similar: status); see pkramctl --help\n"),
        (["xyzzy"], "pkramctl: unknown command 'xyzzy'; see pkramctl --help\n"),
        (
            ["machine", "creat"],
            "pkramctl machine: unknown command 'creat' (similar: create); see pkramctl machine --help\n",
        ),
    ],
)
def test_an_unknown_command_is_named_with_a_similar_one(capsys, words, said):
    from pkramfs.cli import ctl

    assert (ctl.main(words), capsys.readouterr().err) == (2, said)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["none", "", "-o", "pkram=a"], 32, "invalid mount point '': give a directory"),
        (["none", "/mnt", "-o", "pkram=a", "--machine", ""], 1, "mount option machine needs a value: machine=…"),
    ],
)
def test_an_empty_word_of_a_mount_is_refused(capsys, pkram_root, words, status, said):
    from pkramfs.cli import mount

    assert (mount.main(words), capsys.readouterr().err) == (status, f"mount.pkramfs: {said}\n")
