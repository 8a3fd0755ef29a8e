# SPDX-License-Identifier: GPL-2.0-or-later
"""What differs from tmpfs, and why it must.

A row names the cases (a pattern of the test's name), what differs (an expression that every line that
differs in such a case must match) and the reason. A row is a promise in both directions: other
differences in the same case fail, and so does a case that a row names and that does not differ (unless
the row says that it need not).
"""

import os
import re
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import NamedTuple


class Difference(NamedTuple):
    """One row."""

    case: str
    what: str
    why: str
    always: bool = True
    """Whether it must differ; else what the kernel happens to have cached decides."""


DIFFERENCES: tuple[Difference, ...] = (
    *(
        Difference(
            case,
            r"^ +(tmpfs .*a: mtime ctime|pkramfs .*no time changes)$",
            "truncate(2) to the size that a file has: the kernel owns the times of cached files, and FUSE's kernel "
            "changes them only with the size",
        )
        for case in ("test_truncate[[]100-small]", "test_truncate[[]4096-page]", "test_changes[[]truncate-same]")
    ),
    Difference(
        "test_changes[[]map-read-write]",
        r"^ +(tmpfs .*no time changes|pkramfs .*a: mtime ctime)$",
        "a store into a page that was read through the map before: tmpfs gave the page for writing then and notices "
        "nothing; FUSE's kernel is told of the first store into each clean page",
    ),
    Difference(
        "test_changes[[]fallocate-refused]",
        r"^ +(tmpfs .*no time changes|pkramfs .*a: mtime ctime)$",
        "FUSE's kernel stamps a file before it asks for fallocate, which may be refused",
        always=False,
    ),
    Difference(
        "test_map_grows_with_the_file*",
        r" a .* blocks=",
        "reading a hole through a map takes pages of a tmpfs; here they are the kernel's, and the file has none",
    ),
    *(
        Difference(
            f"test_access_time[[]{age}-{call}]",
            r"·  (a: atime|no time changes)$",
            "FUSE's inodes are S_NOATIME, and what the kernel has cached is read without asking us",
            always=False,
        )
        for age in ("older", "day")
        for call in ("read", "read-twice", "map")
    ),
    Difference(
        "test_set_id_bits[[]chown-none-*-stranger]",
        r"^ +\w+ +a [-p]",
        "chown(-1, -1) by one who must not: FUSE's kernel removes the file's capabilities before it asks",
    ),
    Difference(
        "test_a_chown_of_nothing_through_an_idmapped_mount[[]0o4755]",
        r"chown|below/a",
        "FUSE's kernel does not say who asks where mounts may be idmapped, and nobody knows their mapping",
    ),
    Difference(
        "test_what_flags_forbid_through_a_descriptor_of_before*",
        r"utimensat\('a', \(0, 1073741822\), \(0, 1073741823\)\)|copy_of_nothing|^ +\w+ +a ",
        "the mtime that a file has is what the kernel sends after a write-back; and it asks nobody to copy nothing",
        always=False,
    ),
    Difference(
        "test_advice_for_maps[[]shared-REMOVE]",
        r" a .* blocks=",
        "reading a hole through a map takes pages of a tmpfs; here they are the kernel's, and the file has none",
    ),
    Difference(
        "test_a_copy_to_another_mount",
        r"copy_file_range|pread",
        "the kernel copies between mounts of one type if the type has a request for copies; a tmpfs has none",
    ),
    Difference(
        "test_times_of_flags[[]file]",
        r"set_flags",
        "chattr(1) of a file: the kernel owns ctime of cached files, and does not change it",
    ),
    *(
        Difference(f"test_what_a_file_system_in_the_kernel_decides[[]{what}]", r"<lambda>", why, always=what != "uuid")
        for what, why in (
            ("folder-end", "FUSE's kernel seeks in directories as in files"),
            ("folder-data", "FUSE's kernel seeks in directories as in files"),
            ("epoll", "FUSE's kernel lets files be polled, and they are always ready"),
            ("uuid", "FUSE's kernel gives file systems no UUID"),
            ("unnamed", "FUSE's kernel shows no name of what never had one"),
        )
    ),
    Difference("test_seals", r"fcntl", "FUSE's kernel knows no seals; a file of a tmpfs is sealed against sealing"),
    Difference(
        "test_statx*",
        r"statx\('a', \d+\) = \[",
        "FUSE's kernel takes no attributes of files, and says of none that it could have them",
    ),
    Difference(
        "test_a_write_too_large",
        r"write|fsync| a -rw",
        "a write that does not fit whole is refused whole, where a tmpfs writes a part of it",
    ),
    Difference(
        "test_no_label",
        r"getxattr\(",
        "where no file has a label, ls(1) takes EOPNOTSUPP for the whole mount, and asks no file for its own",
        always=False,
    ),
    *(
        Difference(
            f"test_utimensat[[][!i]*-{far}]",
            r"^ +\w+ +\[-?\d{16,}, ",
            "times are preserved as 64 bits of nanoseconds, from 1677 to 2262: an access time beyond is cut",
        )
        for far in ("far", "before")
    ),
)

PYFUSE3: tuple[Difference, ...] = (
    Difference(
        "test_posix_fallocate[[]50000-4096]",
        r" a .* blocks=",
        "pyfuse3 has no fallocate; glibc writes a byte for each 4096 instead, and here misses a page it shares",
    ),
    *(
        Difference(
            f"test_fallocate[[]{mode}]",
            r"fallocate|pread| a .* blocks=",
            "pyfuse3 has no fallocate, and FUSE no other way to punch a hole",
        )
        for mode in ("0x0", "0x1", "0x3")
    ),
    *(
        Difference(
            f"test_seek[[]{content}]",
            r"lseek\(\d+, \d+, [34]\)",
            "pyfuse3 has no lseek, so the kernel takes a file for data from start to end",
        )
        for content in ("hole", "sparse")
    ),
    Difference("test_tmpfile*", r"4259|None|write|fstat|linkat| name | \. ", "pyfuse3 has no tmpfile"),
    Difference("test_ioctl*0x80086601]", r"control", "pyfuse3 has no ioctl, so chattr has nothing to set"),
    Difference(
        "test_advice_for_maps[[]shared-REMOVE]",
        r"madvise|<20000 bytes| a -rw",
        "MADV_REMOVE is fallocate's hole punching, which pyfuse3 does not have",
    ),
    *(
        Difference(
            f"test_flags[[]{name}-3]",
            r"'?(user|security)\.x|listed| a -rw",
            "pyfuse3 does not pass on the flags of setxattr, and takes XATTR_CREATE with XATTR_REPLACE for CREATE",
        )
        for name in ("user.x", *["security.x"] * (os.geteuid() == 0))
    ),
)
"""What differs, too, with fuse=pyfuse3, which has no handlers for newer requests."""


def _in_force() -> tuple[Difference, ...]:
    """Return the rows for the transport that the tests run with."""
    if os.environ.get("PKRAM_TEST_FUSE") != "pyfuse3":
        return DIFFERENCES
    replaced = {row.case for row in PYFUSE3}
    return (*(row for row in DIFFERENCES if row.case not in replaced), *PYFUSE3)


IN_FORCE = _in_force()


def judge(name: str, theirs: list[str], ours: list[str]) -> None:
    """Fail unless both are equal, or differ exactly as a row says."""
    rows = [row for row in IN_FORCE if fnmatchcase(name, row.case)]
    differing = _differing(theirs, ours)
    unknown = [line for line in differing if not any(re.search(row.what, line) for row in rows)]
    assert not unknown, f"{name} differs from tmpfs:\n" + "\n".join(unknown)
    for row in rows:
        seen = any(re.search(row.what, line) for line in differing)
        assert seen or not row.always, f"{name}: no difference any more: {row}"


def _differing(theirs: list[str], ours: list[str]) -> list[str]:
    found: list[str] = []
    for kind, i, j, k, m in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if kind != "equal":
            found += [f"  tmpfs    {line}" for line in theirs[i:j]] + [f"  pkramfs  {line}" for line in ours[k:m]]
    return found
