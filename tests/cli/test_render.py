# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables are aligned, JSON takes what we have, and no text talks to the terminal."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

from pkramfs.cli import render
from pkramfs.cli.render import Column

COLUMNS = [Column("NAME"), Column("FILES", figures=True), Column("STATE")]


def test_a_table_is_aligned_and_has_no_trailing_blanks():
    assert render.plain_table(COLUMNS, [["a", "1", "live"], ["mytmpfs", "12,345", "preserved"]]) == [
        "NAME       FILES   STATE",
        "a              1   live",
        "mytmpfs   12,345   preserved",
    ]


def test_a_table_without_rows_is_its_titles():
    assert render.plain_table(COLUMNS, []) == ["NAME   FILES   STATE"]


def test_names_cannot_talk_to_the_terminal(capsys):
    render.table([Column("NAME")], [[b"\x1b[2Jgone\n\xff"], ["naïve ☃"]])
    assert capsys.readouterr().out == "NAME\n\\x1b[2Jgone\\n\\xff\nnaïve ☃\n"


def test_json_is_ascii_and_has_names_exactly(capsys):
    names = [b"\xff\xfe", b"\\xff", b"\xc2\x9b\x1b\x7f\n", "é\u202e\U0001f600".encode(), bytes(range(1, 256))]
    render.emit_json([render.exact(name) for name in names])
    out = capsys.readouterr().out
    assert out.isascii() and "\x7f" not in out and "\x1b" not in out
    assert [os.fsencode(name) for name in json.loads(out)] == names


def test_no_locale_keeps_a_message_from_being_printed():
    program = "from pkramfs.cli import render; render.settle(); render.say('é…\\udcff'); render.emit_json('é…\\udcff')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (0, '\\xe9\\u2026\\xff\n"\\u00e9\\u2026\\udcff"\n')


def test_fields_leave_out_what_is_not_known(capsys):
    render.fields([("machine", "default"), ("pid", None), ("ram", "64 GiB")])
    assert capsys.readouterr().out == "machine   default\nram       64 GiB\n"


def test_json_takes_bytes_sets_arrays_and_named_tuples(capsys):
    class Pair(NamedTuple):
        a: int
        b: bytes

    class Array:
        def tolist(self):
            return [1, 2]

    render.emit_json({"pair": [Pair(1, b"x")], "set": {2, 1}, "raw": b"\xff", "array": Array(), "name": "ü"})
    assert json.loads(capsys.readouterr().out) == {
        "pair": [[1, "x"]],
        "set": [1, 2],
        "raw": "\udcff",
        "array": [1, 2],
        "name": "ü",
    }
