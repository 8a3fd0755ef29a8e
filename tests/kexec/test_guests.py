# SPDX-License-Identifier: GPL-2.0-or-later
"""Real kernels, real kexecs, in guests that QEMU emulates: tools/real-kexec, which see. Minutes each, and downloads."""

import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "real-kexec"
CANNOT = 77


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--backend", "devdax"],
        ["--backend", "fsdax", "--to", "trixie-backports", "--kexecs", "1"],
        ["--backend", "devmem", "--kexecs", "1"],
        ["--systemd", "--kexecs", "1"],
        ["--controls"],
        ["--backend", "both"],
        ["--backend", "both", "--controls"],
    ],
    ids=" ".join,
)
def test_a_tree_survives_real_kexecs(words: list[str]) -> None:
    done = subprocess.run([TOOL, *words], capture_output=True, text=True, check=False)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "PASS"), done.stderr[-5000:]


def test_where_no_guest_can_run_the_tool_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("bash", "python3", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run([TOOL], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == CANNOT and "real-kexec: cannot run here: " in done.stderr
    assert "qemu-system-x86_64" in done.stderr and " missing" in done.stderr
