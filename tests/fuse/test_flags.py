# SPDX-License-Identifier: GPL-2.0-or-later
"""What the flags of a mount say of access times."""

from contextlib import closing

import pytest

from pkramfs.fs.access import NOATIME, RELATIME, Access
from pkramfs.fuse import flags
from pkramfs.fuse.flags import MountFlags
from pkramfs.mounting import syscalls

HEAD, TAIL = "36 35 0:39 / ", "- fuse.pkramfs none"


@pytest.mark.parametrize(
    ("mount", "super_block", "expected"),
    [
        ("rw,relatime", "rw", RELATIME),
        ("rw,nosuid,noexec,relatime", "rw", RELATIME),
        ("rw", "rw", Access(always=True)),
        ("rw,noatime", "rw", NOATIME),
        ("ro,relatime", "rw", NOATIME),
        ("rw,relatime", "ro,user_id=0", NOATIME),
        ("rw,nodiratime,relatime", "rw", Access(directories=False)),
    ],
)
def test_a_line_of_mountinfo(tmp_path, monkeypatch, mount, super_block, expected) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"35 1 0:38 / /a rw - tmpfs none rw\n{HEAD}/m {mount} {TAIL} {super_block}\n")
    monkeypatch.setattr(syscalls, "MOUNTINFO", str(table))
    assert flags.rule(syscalls.places_of(39)[0].flags) == expected


def test_the_mount_point_counts_or_else_the_first_place(tmp_path, monkeypatch) -> None:
    """A table is no file that tells of changes: POLLPRI never comes, so the first look counts."""
    table = tmp_path / "mountinfo"
    lines = [f"{HEAD}/other ro,relatime", f"{HEAD}/m\\040m rw", "35 1 0:139 / /m rw,relatime"]
    table.write_text("".join(f"{line} {TAIL} rw\n" for line in lines))
    monkeypatch.setattr(syscalls, "MOUNTINFO", str(table))
    for dev, place, expected in (
        (39, "/m m", Access(always=True)),
        (39, "/gone", NOATIME),
        (40, "/m", RELATIME),  # of which nothing is known
    ):
        with closing(MountFlags(dev, place)) as found:
            assert found() == expected
