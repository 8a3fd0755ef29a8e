# SPDX-License-Identifier: GPL-2.0-or-later
"""A user at the keyboard: mounts, remounts and kexecs with our commands."""

from pathlib import Path

import pytest

from tests.support.lab import User


@pytest.fixture
def user(pkram_root: Path, request: pytest.FixtureRequest) -> User:
    """Commands of ours run in this process, unless a test asks for `installed`."""
    made = User(pkram_root)
    made.in_process = "installed" not in request.fixturenames
    return made


@pytest.fixture
def installed() -> None:
    """For tests in which each command is the program that is installed, and starts what it needs."""
