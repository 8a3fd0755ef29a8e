# SPDX-License-Identifier: GPL-2.0-or-later
"""Extended attributes: names, sizes, errors, kinds; ACLs and what they do to modes and new files."""

import os
import shutil
import subprocess
from typing import Any

import pytest

from tests.conformance.kinds import DEVICES, KINDS, make, write
from tests.conformance.system import acl

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0

NONE = 0xFFFFFFFF
OBJ, USR, GOBJ, GRP, MASK, OTH = 1, 2, 4, 8, 16, 32
NAMES = [
    "user.x", "user.", "user", "user.a.b", "User.x", "user.\u00fc", "user." + "n" * 250, "user." + "n" * 251,
    "trusted.x", "trusted.", "security.x", "security.", "system.x", "system.posix_acl_access", "system.", "other.x",
    "", "x", ".", "security.capability", "security.selinux", "security.ima", "btrfs.x", "user.x\n",
    "trusted.overlay.opaque",
]  # fmt: skip


def listed(path: str) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


@pytest.mark.parametrize("kind", [k for k in (*KINDS, *DEVICES[:1]) if k != "none"])
@pytest.mark.parametrize("name", NAMES)
def test_names(both: Any, name: str, kind: str) -> None:
    if name in ("security.selinux", "security.ima") and not ROOT:
        pytest.skip("asks another module of the kernel")

    def case(t: Any) -> None:
        make(kind, "a")
        for value in (b"value", b""):
            t(os.setxattr, "a", name, value, follow_symlinks=False)
            t(os.getxattr, "a", name, follow_symlinks=False)
        t(listed, "a")
        t(os.removexattr, "a", name, follow_symlinks=False)
        t(os.removexattr, "a", name, follow_symlinks=False)
        t(os.getxattr, "a", name, follow_symlinks=False)
        t(listed, "a")

    both(case)


def test_no_label(both: Any) -> None:
    def case(t: Any) -> None:
        write("a")
        t(os.getxattr, "a", "security.selinux")
        t(listed, "a")

    both(case)


@pytest.mark.parametrize("flags", [0, os.XATTR_CREATE, os.XATTR_REPLACE, 3, 4])
@pytest.mark.parametrize("name", ["user.x", "security.x", "system.posix_acl_access"])
def test_flags(both: Any, flags: int, name: str) -> None:
    value = acl((OBJ, 6, NONE), (USR, 4, 7), (GOBJ, 4, NONE), (MASK, 6, NONE), (OTH, 0, NONE))

    def case(t: Any) -> None:
        write("a")
        t(os.setxattr, "a", name, value, flags)
        t(os.setxattr, "a", name, value, flags)
        t(os.setxattr, "a", name, b"", flags)
        t(os.getxattr, "a", name)
        t(listed, "a")

    both(case)


@pytest.mark.parametrize("size", [0, 1, 255, 4096, 65_535, 65_536, 65_537, 1 << 20])
def test_sizes(both: Any, size: int) -> None:
    def case(t: Any) -> None:
        write("a")
        t(os.setxattr, "a", "user.x", b"v" * size)
        t(os.getxattr, "a", "user.x")
        t(os.setxattr, "a", "user.x", b"w" * (size // 2))
        t(os.getxattr, "a", "user.x")
        os.mkdir("d")
        t(os.setxattr, "d", "user.x", b"v" * size)

    both(case)


@pytest.mark.parametrize("count", [1, 10, 200, 300])
def test_many(both: Any, count: int) -> None:
    """300 names of 250 bytes do not fit the 64 KiB of a list."""

    def case(t: Any) -> None:
        write("a")
        for number in range(count):
            os.setxattr("a", f"user.{number * 7919 % 10007:05}" + "n" * 240, b"%d" % number)
        t(listed, "a")
        for number in range(0, count, 2):
            t(os.removexattr, "a", f"user.{number * 7919 % 10007:05}" + "n" * 240)
        t(listed, "a")

    both(case)


ACLS = {
    "empty": b"",
    "short": b"\x02",
    "header": acl(),
    "version": b"\x03\0\0\0",
    "minimal": acl((OBJ, 7, NONE), (GOBJ, 5, NONE), (OTH, 1, NONE)),
    "ids": acl((OBJ, 7, 5), (GOBJ, 5, 6), (OTH, 1, 7)),
    "odd": acl((OBJ, 7, NONE), (GOBJ, 5, NONE), (OTH, 1, NONE)) + b"x",
    "named": acl((OBJ, 6, NONE), (USR, 7, 1000), (GOBJ, 4, NONE), (MASK, 5, NONE), (OTH, 0, NONE)),
    "groups": acl((OBJ, 6, NONE), (GOBJ, 4, NONE), (GRP, 7, 3), (GRP, 2, 9), (MASK, 7, NONE), (OTH, 0, NONE)),
    "mask-only": acl((OBJ, 6, NONE), (GOBJ, 7, NONE), (MASK, 4, NONE), (OTH, 4, NONE)),
    "no-mask": acl((OBJ, 6, NONE), (USR, 7, 1000), (GOBJ, 4, NONE), (OTH, 0, NONE)),
    "no-owner": acl((GOBJ, 4, NONE), (OTH, 0, NONE)),
    "no-other": acl((OBJ, 6, NONE), (GOBJ, 4, NONE)),
    "twice": acl((OBJ, 6, NONE), (OBJ, 6, NONE), (GOBJ, 4, NONE), (OTH, 0, NONE)),
    "same-user": acl((OBJ, 6, NONE), (USR, 7, 9), (USR, 5, 9), (GOBJ, 4, NONE), (MASK, 5, NONE), (OTH, 0, NONE)),
    "user-order": acl((OBJ, 6, NONE), (USR, 7, 9), (USR, 5, 3), (GOBJ, 4, NONE), (MASK, 5, NONE), (OTH, 0, NONE)),
    "order": acl((OTH, 6, NONE), (GOBJ, 4, NONE), (OBJ, 0, NONE)),
    "perm": acl((OBJ, 9, NONE), (GOBJ, 4, NONE), (OTH, 0, NONE)),
    "tag": acl((OBJ, 6, NONE), (3, 4, NONE), (GOBJ, 4, NONE), (OTH, 0, NONE)),
    "bad-id": acl((OBJ, 6, NONE), (USR, 7, NONE), (GOBJ, 4, NONE), (MASK, 5, NONE), (OTH, 0, NONE)),
    "long": acl(
        (OBJ, 6, NONE), *((USR, n % 8, n) for n in range(500)), (GOBJ, 4, NONE), (MASK, 5, NONE), (OTH, 0, NONE)
    ),
}


@pytest.mark.parametrize("kind", ["file", "dir"])
@pytest.mark.parametrize("which", ["access", "default"])
@pytest.mark.parametrize("value", ACLS)
def test_acls(both: Any, value: str, which: str, kind: str) -> None:
    name = f"system.posix_acl_{which}"

    def case(t: Any) -> None:
        make(kind, "a")
        os.chmod("a", 0o754)
        t.touched(os.setxattr, "a", name, ACLS[value])
        t(os.stat, "a")
        t(os.getxattr, "a", name)
        t(listed, "a")
        t(os.chmod, "a", 0o621)
        t(os.getxattr, "a", name)
        t.touched(os.setxattr, "a", name, acl())
        t(listed, "a")
        t(os.stat, "a")
        t.touched(os.removexattr, "a", name)

    both(case)


@pytest.mark.parametrize("value", ["minimal", "named", "groups", "mask-only", "ids"])
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o777, 0o640, 0o600, 0])
def test_inheritance(both: Any, value: str, umask: int, mode: int) -> None:
    def case(t: Any) -> None:
        os.mkdir("d")
        t(os.setxattr, "d", "system.posix_acl_default", ACLS[value])
        os.umask(umask)
        t(os.open, "d/file", os.O_CREAT | os.O_WRONLY, mode)
        t(os.mkdir, "d/dir", mode)
        t(os.mkfifo, "d/fifo", mode)
        t(os.symlink, "x", "d/link")
        t(os.mknod, "d/node", 0o100000 | mode)
        os.chmod("d/dir", 0o700)
        t(os.mkdir, "d/dir/below", mode)
        t(os.open, "d/dir/file", os.O_CREAT | os.O_WRONLY, mode)
        for name in ("file", "dir", "fifo", "link", "node", "dir/below", "dir/file"):
            t(os.lstat, f"d/{name}")

    both(case)


@pytest.mark.skipif(shutil.which("setfacl") is None, reason="setfacl is missing")
def test_setfacl(both: Any) -> None:
    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    def case(t: Any) -> None:
        make("full", "d")
        t(run, "setfacl", "-R", "-m", "u:1000:rwX,g:2000:r-X,m::rx", "d")
        t(run, "setfacl", "-d", "-m", "u:1000:rwx", "d")
        t(run, "getfacl", "-R", "d")
        write("d/new", b"")
        t(run, "getfacl", "-n", "d/new")
        t(run, "setfacl", "-b", "d")
        t(run, "getfacl", "-R", "d")
        t(run, "cp", "-a", "d", "e")
        t(run, "getfacl", "-R", "e")

    both(case)
