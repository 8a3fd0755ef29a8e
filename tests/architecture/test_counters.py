# SPDX-License-Identifier: GPL-2.0-or-later
"""The counters of a tree have one owner: nobody but fs/ledger.py adds to them or subtracts from them."""

import ast

from tests.support.sources import MODULES, ROOT, parsed, relative

COUNTERS = {"pages", "inode_space", "bytes", "directories", "runs", "stream_bytes"}
OWNERS = {"limits", "ledger"}
LEDGER = ROOT / "fs" / "ledger.py"


def changes(tree: ast.AST) -> list[str]:
    """Return the counters that a module assigns to: `limits.pages`, `self.ledger.runs` and the like."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _is_assignment(node) else []
        for target in [part for one in targets for part in ast.walk(one)]:
            if isinstance(target, ast.Attribute) and target.attr in COUNTERS:
                owner = ast.unparse(target.value).rpartition(".")[2]
                found += [f"{owner}.{target.attr}"] if owner in OWNERS else []
    return found


def _is_assignment(node: ast.AST) -> bool:
    return isinstance(node, ast.AugAssign | ast.AnnAssign)


def test_nobody_else_counts() -> None:
    found = {relative(path): changes(parsed(path)) for path in MODULES if path != LEDGER}
    assert {name: counters for name, counters in found.items() if counters} == {}


def test_the_test_sees_who_counts() -> None:
    source = "self.limits.pages += 1\nlimits.pages, ledger.runs = 2, 3\ninode.pages = None\nself.ledger.grow()"
    assert changes(ast.parse(source)) == ["limits.pages", "limits.pages", "ledger.runs"]
    assert changes(parsed(LEDGER))
