"""What differs from tmpfs, and why it must.

A row names the cases (a pattern of the test's name), what differs (an expression that every line that
differs in such a case must match) and the reason. A row is a promise in both directions: other
differences in the same case fail, and so does a case that a row names and that does not differ.
"""

import re
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import NamedTuple


class Difference(NamedTuple):
    """One row."""

    case: str
    what: str
    why: str


DIFFERENCES: tuple[Difference, ...] = ()


def judge(name: str, theirs: list[str], ours: list[str]) -> None:
    """Fail unless both are equal, or differ exactly as a row says."""
    rows = [row for row in DIFFERENCES if fnmatchcase(name, row.case)]
    differing = _differing(theirs, ours)
    unknown = [line for line in differing if not any(re.search(row.what, line) for row in rows)]
    assert not unknown, f"{name} differs from tmpfs:\n" + "\n".join(unknown)
    for row in rows:
        assert any(re.search(row.what, line) for line in differing), f"{name}: no difference any more: {row}"


def _differing(theirs: list[str], ours: list[str]) -> list[str]:
    found: list[str] = []
    for kind, i, j, k, m in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if kind != "equal":
            found += [f"  tmpfs    {line}" for line in theirs[i:j]] + [f"  pkramfs  {line}" for line in ours[k:m]]
    return found
