# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual says what the commands do: every option is in it, and the table of patches points at what exists."""

import argparse
import re
from pathlib import Path

import pytest

import pkramfs
from pkramfs.cli import ctl, kexec

PACKAGE = Path(pkramfs.__file__).parent
MANUAL = PACKAGE / "resources" / "man"
TESTS = Path(__file__).parents[2]


def parsers(parser: argparse.ArgumentParser):
    """A parser and all its subparsers."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def options(parser: argparse.ArgumentParser) -> set[str]:
    found = {option for one in parsers(parser) for action in one._actions for option in action.option_strings}
    return {option for option in found if option.startswith("--")}


@pytest.mark.parametrize(("page", "parser"), [("pkram-kexec.8", kexec.parser()), ("pkramctl.8", ctl.parser())])
def test_every_option_is_in_the_manual_and_none_else(page, parser):
    text = (MANUAL / f"{page}.md").read_text()
    known = options(parser)
    written = set(re.findall(r"`(--[a-z-]+)`|`-\w`, `(--[a-z-]+)`", text))
    named = {name for pair in written for name in pair if name}
    assert {o for o in known if f"`{o}`" not in text} == set()
    assert named - known == set()


def test_every_command_is_in_the_manual():
    text = (MANUAL / "pkramctl.8.md").read_text()
    for one in parsers(ctl.parser()):
        command = one.prog.removeprefix("pkramctl").strip()
        if command and command != "machine":
            assert f"\n`{command}`" in text, command


def table(name: str = "table") -> list[tuple[str, ...]]:
    text = (MANUAL / "pkramfs.7.md").read_text()
    body = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    rows = [entry.splitlines() for entry in body.strip().split("\n\n")]
    return [(*term.split(" - ", 1), *(line.removeprefix(": ") for line in lines)) for term, *lines in rows]


def test_all_43_patches_are_in_the_table():
    assert [int(row[0]) for row in table()] == list(range(1, 44))


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_each_patch_has_its_code_and_its_test(row):
    assert (PACKAGE.parent / row[2]).is_file(), row[2]
    path, _, name = row[3].partition("::")
    assert f"def {name}(" in (TESTS / path).read_text(), row[3]


@pytest.mark.parametrize("row", table("defects"), ids=lambda row: row[0])
def test_each_defect_has_its_test(row):
    path, _, name = row[2].partition("::")
    assert name.startswith(f"test_{row[0].lower()}_")
    assert f"def {name}(" in (TESTS / path).read_text(), row[2]


def test_defects_are_in_order():
    numbers = [int(row[0].removeprefix("D")) for row in table("defects")]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("page", sorted(MANUAL.glob("*.md")), ids=lambda page: page.name)
def test_pages_have_the_usual_sections_in_order(page):
    headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert headings[0] == "NAME"
    assert headings[-1] == "SEE ALSO"
    title, name = page.read_text().splitlines()[0], page.name.removesuffix(".md")
    assert title == f"# {name.rpartition('.')[0]}({name.rpartition('.')[2]})"


def test_the_format_page_is_what_the_declarations_say():
    from pkramfs.cli.inspect import format_tables

    text = (MANUAL / "pkramfs-format.5.md").read_text()
    written = text.partition("<!-- records -->\n")[2].partition("\n<!-- /records -->")[0]
    assert written == format_tables(), "paste what `pkramctl format` prints into pkramfs-format.5.md"


def test_every_mount_option_is_in_the_manual():
    from pkramfs.mounting import options

    text = (MANUAL / "mount.pkramfs.8.md").read_text()
    for name in [*options._VALUES, *options._WORDS]:
        assert f"`{name}=" in text or f"`{name}`" in text or f"`{name}," in text, name
