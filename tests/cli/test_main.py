# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m pkramfs VERB` finds its commands and says what it knows."""

import pytest

from pkramfs.__main__ import main


def test_unknown_verb_is_a_usage_error(capsys):
    assert main(["dance"]) == 2
    assert capsys.readouterr().err.startswith("pkramfs: unknown verb 'dance'; usage: ")


def test_no_verb_is_a_usage_error(capsys):
    assert main([]) == 2
    assert "mount-daemon" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_no_error(capsys, word):
    assert main([word]) == 0
    assert "kexec" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pkramfs ")
