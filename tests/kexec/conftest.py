# SPDX-License-Identifier: GPL-2.0-or-later
"""A user at the keyboard: mounts, remounts and kexecs with the real commands."""

from pathlib import Path

import pytest

from tests.support.lab import User


@pytest.fixture
def user(pkram_root: Path) -> User:
    return User(pkram_root)
