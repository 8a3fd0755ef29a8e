# SPDX-License-Identifier: GPL-2.0-or-later
"""The shape of the code: sizes, essays, linters, light commands."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
ROOT = TOP / "pkramfs"
MODULES = sorted(ROOT.rglob("*.py"))
CHAPTERS = [path.parent for path in sorted(ROOT.glob("*/__init__.py"))]


def relative(path: Path) -> str:
    return str(path.relative_to(TOP))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert docstring, "a module begins with what it is and why"
    assert not re.search(r"^Kernel: (none|nothing)", docstring, re.MULTILINE), "no counterpart needs no line"


NOUNS = {
    *("A", "All", "An", "Each", "Every", "How", "That", "The", "Those"),
    *("What", "Where", "Whether", "Which", "Who", "Whose"),
}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "Do").split()[0]
            assert first not in NOUNS and first[0].isupper(), f"{node.name} begins with {first!r}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_public_functions_have_docstrings(path: Path) -> None:
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if not node.name.startswith("_") and not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_all_that_is_printed_goes_through_one_door(path: Path) -> None:
    """Allow print() in render.py, which escapes, and in stdio.py below it."""
    if relative(path) in ("pkramfs/cli/render.py", "pkramfs/stdio.py"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


@pytest.mark.parametrize("path", CHAPTERS, ids=relative)
def test_chapters_open_with_an_essay_and_nothing_else(path: Path) -> None:
    tree = ast.parse((path / "__init__.py").read_text())
    assert len(tree.body) == 1 and len((ast.get_docstring(tree) or "").splitlines()) >= 15


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=lambda c: c[0])
def test_linters_agree(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=TOP, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.parametrize("command", ["mount", "kexec", "ctl"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['pkramfs', {command!r}, '--help']\n"
        "try:\n    runpy.run_module('pkramfs', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'numpy', 'trio', 'pyfuse3', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


def test_top_level_is_what_every_project_has() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=False)
    if tracked.returncode != 0 or not tracked.stdout:
        pytest.skip("not a git checkout")
    top = {name.partition("/")[0] for name in tracked.stdout.split()}
    assert {name for name in top if not name.startswith(".")} == {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "pkramfs",
        "pyproject.toml",
        "tests",
        "tools",
    }


def test_every_source_file_names_its_licence() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=False)
    if tracked.returncode != 0 or not tracked.stdout:
        pytest.skip("not a git checkout")
    sources = [TOP / name for name in tracked.stdout.split() if name.endswith((".py", ".sh")) or is_script(TOP / name)]
    assert len(sources) > 200
    heads = {path: path.read_text().split("\n", 2)[:2] for path in sources if path.exists()}
    assert [path for path, head in heads.items() if "# SPDX-License-Identifier: GPL-2.0-or-later" not in head] == []


def is_script(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


def test_tools_are_executable() -> None:
    for path in (TOP / "tools").iterdir():
        if not path.suffix and path.is_file():
            assert os.access(path, os.X_OK), path
