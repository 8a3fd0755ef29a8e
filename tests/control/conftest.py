# SPDX-License-Identifier: GPL-2.0-or-later
"""A clock for trio that jumps to the next deadline."""

import pytest
import trio.testing


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)
