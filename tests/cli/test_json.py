# SPDX-License-Identifier: GPL-2.0-or-later
"""What --json prints is ASCII, and has the shapes that pkramctl(8) declares; each command is declared."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import pkramfs
from pkramfs.cli import ctl as command
from tests.support.preserved import Trees, write

from .test_overview import commands

PAGE = Path(pkramfs.__file__).parent / "resources" / "man" / "pkramctl.8.md"
PLAIN = {"metrics", "cat", "help", "format"}
"""Commands that print no JSON of their own, and `format`, whose rows are those of a manual page."""
HOSTILE = "n\x1b[31m\n\udcff\u202e"


class Type:
    """A plain value; with `or null` in the page, that or null."""

    def __init__(self, *kinds: type) -> None:
        self.kinds = kinds


class OrNull:
    def __init__(self, shape: Any) -> None:
        self.shape = shape


TYPES = {"text": Type(str), "number": Type(int, float), "flag": Type(bool), "any": Type(object)}


def declared() -> dict[str, Any]:
    """Return the shapes by command, as the page has them: dictionaries and lists with Types in them."""
    text = PAGE.read_text().partition("<!-- json -->\n")[2].partition("<!-- /json -->")[0]
    parts = (re.match(r" *(.*?) +([{\[A-Z].*)", row, re.DOTALL) for row in re.split(r"\n(?=    \S)", text))
    rows = dict(part.groups() for part in parts)
    known: dict[str, Any] = {}
    for name in sorted(rows, key=lambda name: not name.isupper()):  # what others are made of comes first
        written = rows[name].replace(" with ", " | ")
        for shape in (r"(\w+)(?= or null)", r"(\{[^{}]*\}|\{[^{}]*\{[^{}]*\}[^{}]*\})(?= or null)"):
            written = re.sub(shape, r"null(\1)", written)
        found = eval(written.replace(" or null", ""), {**TYPES, "null": OrNull, **known})
        known |= dict.fromkeys(name.split(", "), found)
    return known


SHAPES = declared()


def wrong(value: Any, shape: Any, at: str) -> list[str]:
    """Return what of a value is not as it was declared."""
    if isinstance(shape, OrNull):
        return [] if value is None else wrong(value, shape.shape, at)
    if isinstance(shape, Type):
        good = isinstance(value, shape.kinds) and (not isinstance(value, bool) or {bool, object} & {*shape.kinds})
        return [] if good else [f"{at}: {value!r}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{at}: {value!r} is no list"]
        return [line for number, one in enumerate(value) for line in wrong(one, shape[0], f"{at}[{number}]")]
    if not isinstance(value, dict):
        return [f"{at}: {value!r} is no object"]
    if keys := [key for key in shape if isinstance(key, Type)]:
        return [line for name, one in value.items() for line in wrong(one, shape[keys[0]], f"{at}.{name}")]
    fields = {name.removesuffix("?"): kind for name, kind in shape.items()}
    lacking = {name for name in shape if not name.endswith("?")} - {*value}
    found = [f"{at}.{name}: not declared" for name in sorted({*value} - {*fields})]
    found += [f"{at}.{name}: missing" for name in sorted(lacking)]
    return found + [line for name in {*value} & {*fields} for line in wrong(value[name], fields[name], f"{at}.{name}")]


def hold(run: Any, *words: str, declared: str = "", status: int = 0) -> None:
    """Run a command with --json: its output must be ASCII and have its shape."""
    got, out, err = run("--json", *words)
    assert got == status, err
    assert out.isascii(), words
    assert wrong(json.loads(out), SHAPES[declared or words[0]], words[0]) == []


def test_every_command_is_declared() -> None:
    verbs = {name for name in commands(command.parser())} - PLAIN
    assert verbs - {name.split()[0] for name in SHAPES} == set()


def fill(tree: Any) -> None:
    write(tree, os.fsencode(HOSTILE), b"x" * 5000)
    tree.setxattr(write(tree, b"f").ino, b"user.\x1b\xff", b"\xfe\n")


def test_the_answers_about_trees(machine, ctl, kexec, tmp_path) -> None:
    trees = Trees(machine)
    trees.plant("x", fill)
    trees.plant("y", fill)
    hold(ctl, "rename", "x", HOSTILE)
    hold(ctl, "status")
    hold(ctl, "nodes")
    hold(ctl, "verify")
    hold(ctl, "verify", "--data")
    hold(ctl, "ls", HOSTILE)
    hold(ctl, "tree", HOSTILE)
    hold(ctl, "stat", HOSTILE, "/f")
    hold(ctl, "diff", HOSTILE, str(tmp_path), status=1)
    hold(ctl, "cp", "y", "z")
    hold(ctl, "export", HOSTILE, str(tmp_path / "a.tar"))
    hold(ctl, "import", "new", str(tmp_path / "a.tar"))
    hold(ctl, "inspect", "node")
    hold(ctl, "free", "--dry-run", "y", declared="free --dry-run")
    hold(ctl, "free", "--damaged", "--dry-run", declared="free --damaged")
    assert kexec("-le", "builtin:2M", "--reuse-cmdline")[0] == 0
    for words in (["report"], ["timeline"], ["map"], ["dmesg"], ["iomem"], ["boot"], ["status"]):
        hold(ctl, *words)
    hold(ctl, "map", "--before-after", declared="map --before-after")
    hold(ctl, "free", HOSTILE)
    hold(ctl, "machine", "show", declared="machine show")


def test_the_answers_about_this_host(machine, ctl, tmp_path) -> None:
    hold(ctl, "doctor", status=ctl("doctor")[0])
    hold(ctl, "install", "--prefix", str(tmp_path))
    hold(ctl, "install", "--prefix", str(tmp_path), "--uninstall", declared="install --uninstall")
    hold(ctl, "machine", "create", "--ram", "64M", "--machine", "other", declared="machine create")
    hold(ctl, "machine", "destroy", "--machine", "other", declared="machine destroy")


@pytest.mark.mount
def test_the_answers_about_a_mount(machine, ctl, place) -> None:
    from pkramfs.cli.mount import main as mount

    directory = place()
    assert mount(["none", directory, "-o", "pkram=one"]) == 0
    path = Path(directory, "f")
    path.write_bytes(bytes(10_000))
    hold(ctl, "status")
    for verb in (["extents"], ["punch", "0", "4096"], ["allocate", "0", "4096"], ["sparsify"]):
        hold(ctl, verb[0], str(path), *verb[1:])
    hold(ctl, "upgrade", directory)
    hold(ctl, "status")
