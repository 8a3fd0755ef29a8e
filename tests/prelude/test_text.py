# SPDX-License-Identifier: GPL-2.0-or-later
"""Text from outside is one line that prints, and exact text is the bytes it was made from."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkramfs.text import exact, printable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain é ☃ 日本", "plain é ☃ 日本"),
        ("a\n[    0.000000] forged", "a\\n[    0.000000] forged"),
        ("\t\r\a\b\f\v\0", "\\t\\r\\a\\b\\f\\v\\x00"),
        ("\x1b[2J\x7f", "\\x1b[2J\\x7f"),
        ("\x80\x85\x9b31m\xa0\xad", "\\u0080\\u0085\\u009b31m\\u00a0\\u00ad"),
        ("\u202egnp\u2066\u2028\u2029\ufeff\u200b", "\\u202egnp\\u2066\\u2028\\u2029\\ufeff\\u200b"),
        ("\ue000\U000e0001\U0010ffff", "\\ue000\\U000e0001\\U0010ffff"),
        ("\udcff\udc80 \ud800\udfff", "\\xff\\x80 \\ud800\\udfff"),
        (b"\xff\xc2\x9b\xc3\xa9\n", "\\xff\\u009bé\\n"),
        ("back\\slash \\n", "back\\slash \\n"),
        (17, "17"),
    ],
)
def test_what_does_not_print_is_escaped(value, shown):
    assert printable(value) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_it_prints_whatever_it_was_and_once_is_enough(text):
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    assert printable(shown) == shown


def test_every_character_is_escaped_or_prints():
    for code in range(sys.maxunicode + 1):
        shown = printable(chr(code))
        assert shown.isprintable() and (shown == chr(code)) == chr(code).isprintable(), hex(code)


@given(st.binary())
def test_exact_text_is_what_it_was(raw):
    assert exact(raw).encode("utf-8", "surrogateescape") == raw
