# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl install: what it writes is what systemd understands, and nothing of an administrator's is overwritten."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

UNIT = "systemd/system/pkramfs-preserve@.service"


def test_files_are_written_once(ctl: Any, tmp_path: Path) -> None:
    status, out, _ = ctl("install", "--etc", str(tmp_path))
    assert status == 0 and out.count("wrote ") == 2 and "systemctl enable --now pkramfs-preserve@mnt.service" in out
    assert 'SUBSYSTEM=="dax", TAG+="systemd"' in (tmp_path / "udev/rules.d/70-pkramfs.rules").read_text()
    assert "wrote" not in ctl("install", "--etc", str(tmp_path))[1]


def test_what_was_changed_stays_unless_forced(ctl: Any, tmp_path: Path) -> None:
    ctl("install", "--etc", str(tmp_path))
    (tmp_path / UNIT).write_text("mine\n")
    status, _, err = ctl("install", "--etc", str(tmp_path))
    assert status == 8 and "exists and is not ours: move it away, or --force replaces it" in err
    assert (tmp_path / UNIT).read_text() == "mine\n"
    assert ctl("install", "--etc", str(tmp_path), "--force")[0] == 0
    assert "ExecStop=" in (tmp_path / UNIT).read_text()


def test_a_place_that_cannot_be_written_is_named(ctl: Any, tmp_path: Path) -> None:
    (tmp_path / "systemd").write_text("")
    status, _, err = ctl("install", "--etc", str(tmp_path))
    assert status == 8 and f"cannot write {tmp_path}/systemd" in err


def test_systemd_understands_the_unit(ctl: Any, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing")
    ctl("install", "--etc", str(tmp_path))
    units = tmp_path / "systemd/system"
    (units / "mnt.mount").write_text("[Mount]\nWhat=none\nWhere=/mnt\nType=tmpfs\n")
    shutil.copy(tmp_path / UNIT, units / "pkramfs-preserve@mnt.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(units / "pkramfs-preserve@mnt.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "pkramfs" in line]
    assert (done.returncode, said) == (0, []), done.stderr


def test_what_the_unit_does_at_shutdown(ctl: Any, tmp_path: Path) -> None:
    """The unit's command, run by a shell: nothing is done where nothing is mounted, whatever the path is called."""
    ctl("install", "--etc", str(tmp_path))
    text = (tmp_path / UNIT).read_text()
    found = re.search(r"^ExecStop=/bin/sh -c '(.*)' %f$", text, re.MULTILINE)
    assert found is not None
    assert re.search("^Before=local-fs.target .*umount.target$", text, re.MULTILINE), "services end before it"
    odd = tmp_path / "a b$(touch x);'"
    odd.mkdir()
    assert subprocess.run(["/bin/sh", "-c", found[1], str(odd)], cwd=tmp_path, check=False).returncode == 0
    told = tmp_path / "told"
    for name, text in (("mountpoint", "exit 0"), ("mount", f'printf "%s\\n" "$@" > "{told}"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["/bin/sh", "-c", found[1], str(odd)], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, check=True)
    assert told.read_text() == f"-o\nremount,preserve,ro\n{odd}\n" and not (tmp_path / "x").exists()
