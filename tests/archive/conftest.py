# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine whose nodes hold trees that were made without a mount."""

from pathlib import Path

import pytest

from pkramfs.machine.directory import Machine
from pkramfs.machine.firmware import FirmwareMap
from tests.support import here
from tests.support.preserved import Trees


@pytest.fixture
def trees(pkram_root: Path) -> Trees:
    machine = Machine.locate()
    machine.create(FirmwareMap.default(256 << 20, seed=5))
    here.bring_up(machine)
    return Trees(machine)
