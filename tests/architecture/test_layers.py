# SPDX-License-Identifier: GPL-2.0-or-later
"""Imports point down: a chapter imports what stands below it, and third-party code where it may."""

import ast
import sys
from pathlib import Path

from tests.support.sources import MODULES, ROOT, parsed, relative

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


def test_imports_point_down() -> None:
    found = [(path, name) for path in MODULES for name in imported(parsed(path))]
    assert [
        f"{relative(path)} may not import {name}" for path, name in found if not may_import(chapter(path), name)
    ] == []


def may_import(here: str, name: str) -> bool:
    """Return whether a chapter may import a module."""
    package, _, rest = name.partition(".")
    if package != "pkramfs":
        return package in sys.stdlib_module_names or here in ALLOWED.get(package, ())
    there = rest.partition(".")[0] or "__init__"
    return there not in RANK or here == there or RANK[there] < RANK[here]


def test_commands_start_light() -> None:
    """Require that chapters are imported inside functions, so that --help does not pay for them."""
    found = [(path, name) for path in sorted((ROOT / "cli").glob("*.py")) for name in at_top(parsed(path))]
    assert len(found) > 200
    heavy = [
        f"{relative(path)}: import {name} inside the function that needs it" for path, name in found if not light(name)
    ]
    assert heavy == []


def at_top(tree: ast.Module) -> list[str]:
    """Return what a module imports as soon as it is imported."""
    there = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [name for node in there for name in imported(ast.Module([node], []))]


def light(name: str) -> bool:
    """Return whether a command may import a module before it knows what it has to do."""
    package, _, rest = name.partition(".")
    if package != "pkramfs":
        return package in sys.stdlib_module_names
    return rest.partition(".")[0] in TOP_LEVEL_OF_COMMANDS or rest == "__version__"


def named(path: Path) -> str:
    """Return a module's name below pkramfs, as imports have it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def neighbours(source: ast.AST, here: str, known: set[str]) -> set[str]:
    """Return the modules of its own chapter that a module imports: at its top, for types, or in functions."""
    found = set()
    for node in ast.walk(source):
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
    imports = {named(path): neighbours(parsed(path), named(path), known) for path in MODULES}
    assert sum(map(len, imports.values())) > 150
    found = circles(imports)
    assert sorted(found - set(CIRCLES)) == []
    assert sorted(set(CIRCLES) - found) == [], "mended: take it off the list"


def test_a_circle_is_seen_wherever_the_import_stands() -> None:
    known = {"fs.a", "fs.b", "pkram.c"}
    imports = {
        "fs.a": neighbours(ast.parse("from pkramfs.fs import b\nfrom pkramfs.pkram.c import d"), "fs.a", known),
        "fs.b": neighbours(ast.parse("if TYPE_CHECKING:\n    from pkramfs.fs.a import A"), "fs.b", known),
    }
    assert imports == {"fs.a": {"fs.b"}, "fs.b": {"fs.a"}} and circles(imports) == {("fs.a", "fs.b")}
    assert neighbours(ast.parse("def f():\n    import pkramfs.fs.a"), "fs.b", known) == {"fs.a"}


def test_the_test_sees_violations() -> None:
    assert imported(ast.parse("from pkramfs.fs import tree\nimport trio")) == ["pkramfs.fs", "trio"]
    assert RANK["fs"] > RANK["pkram"] and RANK["fs"] == RANK["kernel"]
    assert may_import("fs", "pkramfs.pkram.store") and not may_import("pkram", "pkramfs.fs.tree")
    assert may_import("fuse", "trio") and not may_import("fs", "trio")
    assert light("pkramfs.mounting.options") and not light("pkramfs.fs.tree") and not light("numpy")
