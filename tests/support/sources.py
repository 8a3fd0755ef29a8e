# SPDX-License-Identifier: GPL-2.0-or-later
"""The modules of the package, for tests of what is written in them."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "pkramfs"
MODULES = sorted(ROOT.rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return a module's tree, which is parsed once for all tests of this process."""
    return ast.parse(path.read_text())


def relative(path: Path) -> str:
    """Return a module's name in messages and lists of exceptions: `fs/tree.py`."""
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method of a module."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
