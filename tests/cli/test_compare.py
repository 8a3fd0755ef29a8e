# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl diff: one line for each difference, status 1 for any, names escaped, JSON exact."""

import json

import pytest

from pkramfs.machine.directory import Machine
from tests.support.preserved import Trees, write


@pytest.fixture
def trees(machine: Machine) -> Trees:
    made = Trees(machine)
    made.plant("x", lambda tree: (write(tree, b"a/f", b"one"), write(tree, b"e\x1b")))
    made.plant("y", lambda tree: (write(tree, b"a/f", b"ons!"), write(tree, b"new")))
    return made


def test_diff(trees, ctl, tmp_path, monkeypatch):
    status, out, err = ctl("diff", "--ignore-times", "x", "y")
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        "only in x: /e\\x1b",
        "only in y: /new",
        "/a/f: size 3 and 4",
        "/a/f: content differs at byte 2",
    ]
    found = json.loads(ctl("--json", "diff", "x", "y", "--ignore-times")[1])
    assert found[0] == {"path": "/e\x1b", "what": "only", "left": "e\x1b", "right": None}
    assert ctl("diff", "x", "shmem-x") == (0, "", "")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").touch()
    assert f"only in {tmp_path}/: /b\n" in ctl("diff", "x", f"{tmp_path}/")[1]
    monkeypatch.chdir(tmp_path)
    status, _, err = ctl("diff", "x", "a")
    assert status == 9 and err.startswith("pkramctl: warning: a is taken for a NAME; the directory is ./a\n")
    assert ctl("diff", "x", "./nosuch")[::2] == (1, "pkramctl: ./nosuch: No such file or directory\n")
