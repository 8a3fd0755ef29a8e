# SPDX-License-Identifier: GPL-2.0-or-later
"""The shape of the code: sizes, essays, linters, light commands."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sources import MODULES, ROOT, functions, parsed, relative

TOP = ROOT.parent
CHAPTERS = [path.parent for path in sorted(ROOT.glob("*/__init__.py"))]
NOUNS = {
    *("A", "All", "An", "Each", "Every", "How", "That", "The", "Those"),
    *("What", "Where", "Whether", "Which", "Who", "Whose"),
}
PRINTERS = ("cli/render.py", "stdio.py")
"""One door for all that is printed: render.py, which escapes, and what is below it."""


def test_modules_and_functions_stay_small() -> None:
    lines = {relative(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > 500} == {}
    sizes = {(relative(path), it.name): (it.end_lineno or 0) - it.lineno for path in MODULES for it in functions(path)}
    assert {name: size for name, size in sizes.items() if size >= 60} == {}


def test_every_module_says_what_it_is_and_why() -> None:
    said = {relative(path): ast.get_docstring(parsed(path)) or "" for path in MODULES}
    assert [name for name, docstring in said.items() if not docstring] == []
    needless = re.compile(r"^Kernel: (none|nothing)", re.MULTILINE)
    assert [name for name, docstring in said.items() if needless.search(docstring)] == []


def test_docstrings_begin_with_a_verb() -> None:
    first = {
        (relative(path), it.name): (ast.get_docstring(it) or "Do").split()[0]
        for path in MODULES
        for it in functions(path)
    }
    assert {name: word for name, word in first.items() if word in NOUNS or not word[0].isupper()} == {}


def test_nothing_imports_masked_arrays() -> None:
    """numpy.unique and numpy.isin import numpy.ma, which takes a mount 20 ms and 3 MiB: spans has others."""
    calls = {
        (relative(path), ast.unparse(node))
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.unique", "np.isin") and not node.keywords
    }
    assert calls == set()


def test_public_functions_have_docstrings() -> None:
    public = [
        (relative(path), node)
        for path in MODULES
        for node in parsed(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert [(name, node.name) for name, node in public if not ast.get_docstring(node)] == []


def test_all_that_is_printed_goes_through_one_door() -> None:
    calls = [
        (relative(path), node.lineno)
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert {name for name, _ in calls} == {*PRINTERS}, calls


def test_chapters_open_with_an_essay_and_nothing_else() -> None:
    trees = {path.name: parsed(path / "__init__.py") for path in CHAPTERS}
    assert [name for name, tree in trees.items() if len(tree.body) != 1] == []
    assert [name for name, tree in trees.items() if len((ast.get_docstring(tree) or "").splitlines()) < 15] == []


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
