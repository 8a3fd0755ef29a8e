# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of the suite side by side share no directory, and none of them touches a user's machines."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest as suite


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begin a run, with this basetemp on its command line: (config, its PKRAM_ROOT)."""
    begun: list[Any] = []

    def begin(basetemp: str | None = None) -> tuple[Any, Path]:
        config: Any = SimpleNamespace(option=SimpleNamespace(basetemp=basetemp), stash=pytest.Stash())
        begun.append(config)
        monkeypatch.setenv("PKRAM_ROOT", "")
        suite.keep_apart(config)
        return config, Path(os.environ["PKRAM_ROOT"])

    yield begin
    for config in begun:
        config.stash[suite.FAILED] = False
        suite.pytest_unconfigure(config)


def test_two_runs_have_nothing_in_common(configure: Any) -> None:
    (one, its), (other, others) = configure(), configure()
    assert its.parent != others.parent and its.parent.is_dir() and others.parent.is_dir()
    assert Path(one.option.basetemp).parent == its.parent and Path(other.option.basetemp).parent == others.parent


def test_a_basetemp_that_was_asked_for_is_taken(configure: Any, tmp_path: Path) -> None:
    config, root = configure(str(tmp_path))
    assert config.option.basetemp == str(tmp_path) and tmp_path not in root.parents


@pytest.mark.parametrize("failed", [True, False])
def test_files_are_kept_where_a_test_failed(configure: Any, failed: bool) -> None:
    config, root = configure()
    suite.pytest_sessionfinish(SimpleNamespace(config=config), int(failed))  # type: ignore[arg-type]
    suite.pytest_unconfigure(config)
    assert root.parent.exists() == failed


def test_this_run_is_apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the machines of whoever runs it, even one that asks for no root of its own."""
    assert "pkram-run-" in os.environ["PKRAM_ROOT"] and not os.path.exists(os.environ["PKRAM_ROOT"])
    assert not tmp_path_factory.getbasetemp().parent.name.startswith("pytest-of-")
