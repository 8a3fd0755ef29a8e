# SPDX-License-Identifier: GPL-2.0-or-later
"""Another program preserves memory with the library alone: the manual's own example, in processes of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pkramfs

PACKAGE = Path(pkramfs.__file__).parent


def run(name: str) -> str:
    """Run one of the manual's examples in a Python of its own."""
    page = (PACKAGE / "resources" / "man" / "pkramfs-library.3.md").read_text()
    program = textwrap.dedent(page.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0])
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60
    ).stdout


def test_memory_of_a_program_crosses_a_kexec(lab: Any) -> None:
    lab.up()
    assert run("save") == ""
    for generation in (2, 3):  # once with nobody looking at it in between
        kernel = lab.cycle()
        assert kernel.generation == generation
        assert [node.name for node in kernel.store.nodes()] == [b"guest-7"]
    assert run("load") == "cpu state\n0 1000 guest\n"
    assert lab.up().store.nodes() == []
    assert lab.up().leases.counts()["tree"] == 0


def test_what_was_not_preserved_is_not_there(lab: Any) -> None:
    lab.up()
    run("save")
    lab.up().store.withdraw(b"guest-7")
    kernel = lab.cycle()
    assert kernel.store.nodes() == []
    assert kernel.leases.counts()["tree"] == 0
