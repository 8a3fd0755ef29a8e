# SPDX-License-Identifier: GPL-2.0-or-later
"""What the manual says of differences is everything that differences.py knows."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import pkramfs
from tests.conformance.differences import DIFFERENCES, PYFUSE3, Difference

ROWS = {
    "test_truncate*": "truncate(2) to the size",
    "test_changes*truncate*": "truncate(2) to the size",
    "test_changes*map-read-write*": "a store through a map into a page",
    "test_changes*fallocate*": "fallocate(2) that is refused",
    "test_map_grows*": "reading a hole through a map",
    "test_access_time*": "atime",
    "test_set_id_bits*chown*": "`chown(-1, -1)`",
    "test_a_chown_of_nothing*": "`chown(-1, -1)` of a file with set-id bits by its owner",
    "test_what_flags_forbid_through*": "copy_file_range(2) of nothing",
    "test_advice_for_maps*REMOVE*": "reading a hole through a map",
    "test_a_copy_to_another_mount": "`copy_file_range` from one mount",
    "test_times_of_flags*": "`chattr`",
    "test_seals": "F_GET_SEALS",
    "test_what_a_file_system_in_the_kernel_decides*folder*": "lseek(2) of a directory",
    "test_what_a_file_system_in_the_kernel_decides*epoll*": "epoll",
    "test_what_a_file_system_in_the_kernel_decides*uuid*": "FS_IOC_GETFSUUID",
    "test_what_a_file_system_in_the_kernel_decides*unnamed*": "O_TMPFILE",
    "test_statx*": "`statx`",
    "test_a_write_too_large": "ENOSPC for data",
    "test_no_label": "`security.selinux`",
    "test_utimensat*": "times before 1677",
}
"""Which cases are told of in which row: a part of its first column."""

WORDS = {
    "test_posix_fallocate*": "fallocate",
    "test_fallocate*": "fallocate",
    "test_advice_for_maps*REMOVE*": "MADV_REMOVE",
    "test_seek*": "SEEK_HOLE",
    "test_tmpfile*": "O_TMPFILE",
    "test_ioctl*": "chattr",
    "test_flags*": "XATTR_CREATE",
}
"""Which cases of fuse=pyfuse3 are told of by which word of its paragraph."""


def _section() -> str:
    text = (Path(pkramfs.__file__).parent / "resources" / "man" / "mount.pkramfs.8.md").read_text()
    return text.partition("## DIFFERENCES TO TMPFS")[2].partition("\n## ")[0]


def _told() -> list[str]:
    """The first column of the table."""
    return [line.split(" | ")[0].removeprefix("| ") for line in _section().splitlines() if line.startswith("| ")][1:]


def _left_over(patterns: dict[str, str], rows: tuple[Difference, ...]) -> list[str]:
    cases = [re.sub(r"\[(.)\]", r"\1", row.case) for row in rows]
    return [pattern for pattern in patterns if not any(fnmatchcase(case, pattern) for case in cases)]


@pytest.mark.parametrize("case", sorted({row.case for row in DIFFERENCES}))
def test_a_difference_is_told(case: str) -> None:
    rows = [row for pattern, row in ROWS.items() if fnmatchcase(case, pattern)]
    assert rows, f"say here which row of mount.pkramfs(8) tells of {case}"
    assert all(any(row in told for told in _told()) for row in rows)


@pytest.mark.parametrize("case", sorted({row.case for row in PYFUSE3}))
def test_a_difference_of_pyfuse3_is_told(case: str) -> None:
    words = [word for pattern, word in WORDS.items() if fnmatchcase(case, pattern)]
    assert words, f"say here which word of mount.pkramfs(8) tells of {case}"
    (paragraph,) = (part for part in _section().split("\n\n") if part.startswith("With `fuse=pyfuse3`"))
    assert all(word in paragraph for word in words)


def test_no_row_is_left_over() -> None:
    assert _left_over(ROWS, DIFFERENCES) == [] == _left_over(WORDS, PYFUSE3)
