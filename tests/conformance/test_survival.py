# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree that all cases have left is the same after a kexec.

A kexec leaves no cache warm, either: what cold caches alone change is looked for with --long. Runs last (see
conftest.py). Compared are types, modes, owners, link counts and which names are one file, sizes, blocks, contents,
xattrs and ACLs, mtime and ctime to the nanosecond, and the order of listings.
"""

import contextlib
import os
from pathlib import Path

import pytest

from tests.conformance.record import picture
from tests.support.lab import Pairs
from tests.support.places import ROOT, mounts_below

pytestmark = pytest.mark.mount


def _everything(top: Path) -> list[str]:
    """The picture with times and numbers, and the order of each listing."""
    rows = picture(str(top), exact=True)
    for directory, _, _ in os.walk(top):
        with contextlib.suppress(OSError):
            rows.append(f"{directory}: {' '.join(os.listdir(directory))}")
    return rows


def _differing(before: list[str], after: list[str]) -> list[str]:
    gone, new = set(before) - set(after), set(after) - set(before)
    return sorted(f"{row[:300]}" for row in gone)[:20] + sorted(f"+ {row[:300]}" for row in new)[:20]


def _cold() -> None:
    """Let go of all names and attributes that are not in use, and of clean pages."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _assert_same(before: list[str], after: list[str]) -> None:
    differing = _differing(before, after)
    assert not differing, "\n".join(differing)


def test_cold_caches_and_kexec(pair: tuple[Path, Path], laboratory: Pairs, request: pytest.FixtureRequest) -> None:
    top = pair[1]
    before = _everything(top)
    if ROOT and request.config.getoption("--long"):  # nobody else may have the kernel drop its caches
        _cold()
        _assert_same(before, _everything(top))
    for place in mounts_below(laboratory.places):
        laboratory.ok("mount", "none", place, "-o", "remount,preserve,ro")
    laboratory.ok("kexec", "-s", "-l", "builtin", f"--append=ro pkram={laboratory.pfn()}")
    laboratory.ok("kexec", "-e", "--poison")
    assert os.path.ismount(top)
    _assert_same(before, _everything(top))
