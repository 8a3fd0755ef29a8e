# SPDX-License-Identifier: GPL-2.0-or-later
"""Imports point down: a chapter imports what stands below it, and third-party code where it may."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "pkramfs"
LAYERS = [
    {"cli"},
    {"daemon", "library"},
    {"fuse", "control", "archive"},
    {"fs", "kernel"},
    {"journal"},
    {"pkram"},
    {"machine"},
    {"mounting"},
    {"spans", "record", "schema"},
    {"units", "errors", "stdio", "text"},
]
RANK = {name: rank for rank, names in enumerate(reversed(LAYERS)) for name in names}
RANK |= {"__main__": len(LAYERS), "__init__": -1}
NUMPY = {"spans", "record", "machine", "pkram", "fs", "kernel", "archive", "daemon", "library"}
ALLOWED = {
    "numpy": NUMPY,
    "xxhash": {"machine", "pkram", "journal", "fs", "archive"},
    "trio": {"daemon", "fuse", "control"},
    "pyfuse3": {"fuse"},
    "rich": {"cli"},
    "prometheus_client": {"cli"},
}
TOP_LEVEL_OF_COMMANDS = {"cli", "mounting", "units", "errors", "stdio", "schema", "text", "__init__"}
"""Chapters that commands may import before they know what they have to do (start-up time)."""

CIRCLES = {
    ("fs.asleep", "fs.directory"): "a directory that is asleep wakes up as one that is not",
    ("fs.directory", "fs.inode"): "directories are inodes, and an inode's parent is a directory",
}
"""Modules that may import each other, and why."""

MODULES = sorted(ROOT.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def chapter(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "pkramfs" else [module]
    return names


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    here = chapter(path)
    for name in imported(ast.parse(path.read_text())):
        package, _, rest = name.partition(".")
        if package == "pkramfs":
            there = rest.partition(".")[0] or "__init__"
            if there in RANK:
                assert here == there or RANK[there] < RANK[here], f"{here} may not import {name}"
        elif package not in sys.stdlib_module_names:
            assert here in ALLOWED.get(package, ()), f"{here} may not import {package}"


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=relative)
def test_commands_start_light(path: Path) -> None:
    """Require that chapters are imported inside functions, so that --help does not pay for them."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if is_type_checking(node):
            continue
        for name in imported(ast.Module([node], [])) if isinstance(node, ast.Import | ast.ImportFrom) else []:
            package, _, rest = name.partition(".")
            if package == "pkramfs":
                light = rest.partition(".")[0] in TOP_LEVEL_OF_COMMANDS
                assert light or rest == "__version__", f"import {name} inside the function that needs it"
            else:
                assert package in sys.stdlib_module_names, f"import {name} inside the function that needs it"


def named(path: Path) -> str:
    """Return a module's name below pkramfs, as imports have it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def neighbours(source: str, here: str, known: set[str]) -> set[str]:
    """Return the modules of its own chapter that a module imports: at its top, for types, or in functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("pkramfs.") for name in found if name.startswith("pkramfs.")} & known
    return {name for name in inside - {here} if name.partition(".")[0] == here.partition(".")[0]}


def circles(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return the pairs of modules that import each other."""
    return {
        (one, other) for one, others in imports.items() for other in others if one < other and one in imports[other]
    }


def test_no_two_modules_of_a_chapter_import_each_other() -> None:
    known = {named(path) for path in MODULES}
    imports = {named(path): neighbours(path.read_text(), named(path), known) for path in MODULES}
    assert sum(map(len, imports.values())) > 150
    found = circles(imports)
    assert sorted(found - set(CIRCLES)) == []
    assert sorted(set(CIRCLES) - found) == [], "mended: take it off the list"


def test_a_circle_is_seen_wherever_the_import_stands() -> None:
    known = {"fs.a", "fs.b", "pkram.c"}
    imports = {
        "fs.a": neighbours("from pkramfs.fs import b\nfrom pkramfs.pkram.c import d", "fs.a", known),
        "fs.b": neighbours("if TYPE_CHECKING:\n    from pkramfs.fs.a import A", "fs.b", known),
    }
    assert imports == {"fs.a": {"fs.b"}, "fs.b": {"fs.a"}} and circles(imports) == {("fs.a", "fs.b")}
    assert neighbours("def f():\n    import pkramfs.fs.a", "fs.b", known) == {"fs.a"}


def test_the_test_sees_violations() -> None:
    assert imported(ast.parse("from pkramfs.fs import tree\nimport trio")) == ["pkramfs.fs", "trio"]
    assert RANK["fs"] > RANK["pkram"] and RANK["fs"] == RANK["kernel"]
