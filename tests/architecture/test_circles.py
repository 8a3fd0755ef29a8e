# SPDX-License-Identifier: GPL-2.0-or-later
"""No module of fs imports itself by way of others, not even for types: an inode, a directory and what sleeps may."""

import ast
from pathlib import Path

TOP = Path(__file__).parents[2]
ALLOWED = [{f"pkramfs.fs.{name}" for name in ("amended", "asleep", "directory", "inode")}]
"""An inode has a directory, which has inodes; one that sleeps wakes them, or is amended, and has some of them awake."""


def named(path: Path) -> str:
    return ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> set[str]:
    """Return all names that may be modules which a module imports, wherever it does."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that reach each other."""
    reached = {name: _reached(graph, name) for name in graph}
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted((set(one) for one in found if one), key=sorted)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, left = set[str](), [start]
    while left:
        fresh = graph[left.pop()] - seen
        seen |= fresh
        left += fresh
    return seen


def test_only_the_known_circle_is_there() -> None:
    sources = {named(path): path.read_text() for path in sorted((TOP / "pkramfs" / "fs").glob("*.py"))}
    graph = {name: imports(source) & sources.keys() for name, source in sources.items()}
    assert circles(graph) == ALLOWED


def test_the_test_sees_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}) == [{"a", "b", "c"}, {"e"}]
    assert imports("def f():\n    from a.b import c\nimport d") == {"a.b", "a.b.c", "d"}
