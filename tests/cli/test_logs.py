# SPDX-License-Identifier: GPL-2.0-or-later
"""-v and --log-json: what a command says on stderr, by the standard logging module."""

import json
import logging

import pytest

from pkramfs.cli import arguments, logs
from pkramfs.errors import MachineError, UsageError


def objects(err: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in err.splitlines()]


@pytest.fixture
def parser():
    made = arguments.Parser(prog="pkramctl")
    arguments.add_common(made)
    made.add_argument("--number", type=arguments.number)
    return made


def test_an_error_is_an_object(root, ctl):
    status, out, err = ctl("--log-json", "dmesg")
    (found,) = objects(err)
    assert (status, out) == (8, "")
    assert set(found) == {"time", "level", "program", "logger", "message"}
    assert (found["level"], found["program"], found["logger"]) == ("error", "pkramctl", "pkramfs.cli")
    assert found["message"].startswith("there is no machine in ")
    assert ctl("dmesg", "--log-json")[2].startswith("{") and ctl("dmesg")[2].startswith("pkramctl: there is no")


def test_a_wrong_command_line_is_an_object_too(parser, capsys):
    assert arguments.run(parser, lambda _: None, ["--log-json", "--number", "x"]) == 2
    (found,) = objects(capsys.readouterr().err)
    assert found["message"].startswith("argument --number: not a whole number above zero")


def test_texts_are_exact_and_one_line(parser, capsys):
    def fail(_):
        arguments.warn("pkramctl", "a\nb\x7f")
        raise MachineError("\x1b[31m\udcff")

    assert arguments.run(parser, fail, ["--log-json"]) == 8
    err = capsys.readouterr().err
    assert err.isascii() and "\x7f" not in err
    assert [(one["level"], one["message"]) for one in objects(err)] == [
        ("warning", "a\nb\x7f"),
        ("error", "\x1b[31m\udcff"),
    ]


def test_a_traceback_is_objects(parser, capsys):
    def fail(_):
        raise ValueError("oops")

    assert arguments.run(parser, fail, ["--log-json", "--debug"]) == 70
    found = [one["message"] for one in objects(capsys.readouterr().err)]
    assert found[0].startswith("Traceback") and found[-1].startswith("internal error: ValueError: oops")


def test_what_is_done_is_said(root, ctl):
    assert ctl("machine", "create", "--ram", "64M", "--seed", "1")[0] == 0
    assert ctl("status")[2] == ""
    err = ctl("-v", "status")[2]
    assert err == f"pkramctl: the machine is {root}/default\n"
    (found,) = objects(ctl("status", "-v", "--log-json")[2])
    assert (found["level"], found["message"]) == ("info", f"the machine is {root}/default")


def test_lines_of_the_kernel_log_are_said(root, ctl, parser, capsys):
    from pkramfs.machine.directory import Machine

    assert ctl("boot")[0] == 0

    def act(_):
        logs.verbose("pkramctl")
        Machine.locate().log("pkram: some\x1bthing")

    assert arguments.run(parser, act, []) == 0
    assert capsys.readouterr().err == "pkramctl: pkram: some\\x1bthing\n"


def test_logging_is_left_as_it_was(parser, capsys):
    logger = logging.getLogger("pkramfs")
    before = (list(logger.handlers), logger.level, logger.propagate)
    for words in (["--log-json"], []):
        for error in (None, UsageError("x")):

            def act(_, error=error):
                logs.verbose("pkramctl")
                assert logger.level == logging.INFO
                if error:
                    raise error

            arguments.run(parser, act, words)
            assert (list(logger.handlers), logger.level, logger.propagate) == before
    logs.info("nobody listens")
    assert "nobody" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["kexec", "mount"])
def test_the_other_commands_have_it(command, capsys, root):
    from pkramfs.__main__ import main

    assert main([command, "--log-json", "--nonsense"]) in (1, 2)
    (found,) = objects(capsys.readouterr().err)
    assert found["level"] == "error" and found["program"] in ("pkram-kexec", "mount.pkramfs")
