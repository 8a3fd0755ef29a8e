# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what, whose new files are, and which bits a change of content or owner takes away."""

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import system
from tests.conformance.kinds import make, write
from tests.conformance.system import acl

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

USER, OTHER, GROUP = 1000, 2000, 3000
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""security.capability: cap_net_bind_service, effective and permitted."""


def mapped_write(path: str) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4) as memory:
        memory[:2] = b"ZZ"


def written(path: str, data: bytes) -> int:
    with open(path, "r+b", buffering=0) as file:
        return file.write(data) or 0


def appended(path: str, data: bytes) -> int:
    with open(path, "ab", buffering=0) as file:
        return file.write(data) or 0


def resized(path: str, size: int) -> None:
    with open(path, "r+b") as file:
        os.ftruncate(file.fileno(), size)


def allocated(path: str, size: int) -> None:
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def copied(source: str, target: str) -> int:
    with open(source, "rb") as reader, open(target, "r+b") as writer:
        return os.copy_file_range(reader.fileno(), writer.fileno(), 3)


DROPPING = {
    "write": lambda t: t(written, "a", b"new"),
    "write-nothing": lambda t: t(written, "a", b""),
    "append": lambda t: t(appended, "a", b"new"),
    "truncate": lambda t: t(os.truncate, "a", 3),
    "truncate-same": lambda t: t(os.truncate, "a", 7),
    "ftruncate": lambda t: t(resized, "a", 30),
    "open-trunc": lambda t: t(os.open, "a", os.O_WRONLY | os.O_TRUNC),
    "fallocate": lambda t: t(allocated, "a", 9000),
    "mmap": lambda t: t(mapped_write, "a"),
    "copy": lambda t: t(copied, "source", "a"),
    "chown-same": lambda t: t(os.chown, "a", USER, GROUP),
    "chown-none": lambda t: t(os.chown, "a", -1, -1),
    "chgrp": lambda t: t(os.chown, "a", -1, GROUP + 1),
    "chmod": lambda t: t(os.chmod, "a", 0o6755),
    "setxattr": lambda t: t(os.setxattr, "a", "user.x", b"1"),
    "utime": lambda t: t(os.utime, "a"),
    "rename": lambda t: t(os.rename, "a", "b"),
    "link": lambda t: t(os.link, "a", "b"),
}
WHO = {"root": (0, 0, ()), "owner": (USER, GROUP, (GROUP + 1,)), "stranger": (OTHER, OTHER, ())}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("mode", [0o4777, 0o2777, 0o2767, 0o6777, 0o7666], ids=oct)
@pytest.mark.parametrize("call", DROPPING)
def test_set_id_bits(both: Any, call: str, mode: int, who: str) -> None:
    def case(t: Any) -> None:
        write("a", b"content")
        write("source", b"source", 0o644)
        os.chown("a", USER, GROUP)
        os.setxattr("a", "security.capability", CAPABILITY)
        os.chmod("a", mode)
        t.other(lambda u: DROPPING[call](u), *WHO[who])
        t(os.listdir, ".")

    both(case)


ALL, CAPABILITIES = (1 << 64) - 1, {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "SYS_ADMIN": 21}
DEFAULT_ACL = acl((1, 7, 0xFFFFFFFF), (4, 5, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF))
CAREFUL = {
    **{
        name: DROPPING[name] for name in ("write", "truncate", "truncate-same", "open-trunc", "fallocate", "chown-none")
    },
    "chmod": lambda t: t(os.chmod, "a", 0o2755),
    "chgrp": lambda t: t(os.chown, "a", -1, USER),
    "acl": lambda t: t(os.setxattr, "a", "system.posix_acl_access", DEFAULT_ACL),
    "list": lambda t: t(os.listxattr, "a"),
}


@pytest.mark.few(20)
@pytest.mark.parametrize("call", CAREFUL)
@pytest.mark.parametrize("uid", [0, USER])
@pytest.mark.parametrize("owner", [0, USER, OTHER])
@pytest.mark.parametrize("kept", ["none", "but", "only"])
@pytest.mark.parametrize("name", CAPABILITIES)
def test_capabilities(both: Any, name: str, kept: str, owner: int, uid: int, call: str) -> None:
    """Root who lacks one, as in containers, and others who have one."""
    bit = 1 << CAPABILITIES[name]

    def case(t: Any) -> None:
        write("a", b"content")
        os.chown("a", owner, 77)
        os.setxattr("a", "trusted.x", b"1")
        os.chmod("a", 0o6777)

        def user(u: Any) -> None:
            system.keep_capabilities({"none": 0, "but": ALL & ~bit, "only": bit}[kept])
            CAREFUL[call](u)

        system.keep_over_setuid(keep=True)
        try:
            t.other(user, uid, uid)
        finally:
            system.keep_over_setuid(keep=False)

    both(case)


@pytest.mark.skipif("\toverlay" not in Path("/proc/filesystems").read_text(), reason="no overlayfs here")
@pytest.mark.parametrize("call", ["append", "chgrp", "utime"])
def test_overlayfs_copies_privileges(both: Any, call: str) -> None:
    """It sets the owner of its copy behind the mode."""

    def case(t: Any) -> None:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(name)
        write("lower/a", b"content")
        os.chown("lower/a", USER, GROUP)
        os.chmod("lower/a", 0o6755)
        os.setxattr("lower/a", "security.capability", CAPABILITY)
        options = "lowerdir=lower,upperdir=upper,workdir=work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "none", "merged"], check=True)
        try:
            os.chdir("merged")
            DROPPING[call](t)
            t(os.stat, "a")
            t(os.listxattr, "a")
        finally:
            os.chdir("..")
            system.umount("merged")
        t(os.stat, "upper/a")
        for name in ("upper", "work"):
            shutil.rmtree(name)

    both(case)


def test_set_id_bits_of_an_open_file(both: Any) -> None:
    """Bits that are set between two writes of one descriptor."""

    def case(t: Any) -> None:
        write("a", b"content", 0o666)
        os.chown("a", USER, GROUP)

        def user(u: Any) -> None:
            fd = u(os.open, "a", os.O_RDWR)
            for _ in range(3):
                u(os.fchmod, fd, 0o6777)
                u(os.fstat, fd)
                u(os.write, fd, b"x")
                u(os.fstat, fd)

        t.other(user, USER, GROUP)

    both(case)


@pytest.mark.parametrize("kind", ["file", "dir", "fifo", "link"])
@pytest.mark.parametrize("mode", [0, 0o777, 0o1777, 0o2755, 0o4755, 0o7777])
@pytest.mark.parametrize("who", WHO)
def test_chmod(both: Any, kind: str, mode: int, who: str) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        os.lchown("a", USER, GROUP)
        t.other(lambda u: (u(os.chmod, "a", mode), u(os.lstat, "a")), *WHO[who])
        os.chown("a", USER, OTHER)
        t.other(lambda u: (u(os.chmod, "a", mode), u(os.lstat, "a")), *WHO[who])

    both(case)


@pytest.mark.parametrize("kind", ["file", "dir", "fifo", "link"])
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(
    ("uid", "gid"),
    [(-1, -1), (USER, -1), (OTHER, -1), (-1, GROUP), (-1, GROUP + 1), (-1, 77), (USER, GROUP + 1), (0, 0)],
)
def test_chown(both: Any, kind: str, who: str, uid: int, gid: int) -> None:
    def case(t: Any) -> None:
        make(kind, "a")
        os.lchown("a", USER, GROUP)
        if kind != "link":
            os.chmod("a", 0o6775)
        t.other(lambda u: (u(os.lchown, "a", uid, gid), u(os.lstat, "a")), *WHO[who])

    both(case)


@pytest.mark.parametrize("mode", [0o755, 0o2777, 0o3777, 0o2775])
@pytest.mark.parametrize("who", {"root": 0, "member": 0, "stranger": 0, "supplementary": 0})
def test_what_is_created_in_a_setgid_directory(both: Any, mode: int, who: str) -> None:
    callers = {"root": (0, 0, ()), "member": (USER, GROUP, ()), "stranger": (OTHER, OTHER, ())}
    callers["supplementary"] = (OTHER, OTHER, (GROUP,))

    def user(u: Any) -> None:
        os.umask(0)
        u(os.mkdir, "d/dir", 0o755)
        u(os.mkdir, "d/sgid", 0o2755)
        u(os.close, u(os.open, "d/file", os.O_CREAT | os.O_WRONLY, 0o2755) or -1)
        u(os.close, u(os.open, "d/noexec", os.O_CREAT | os.O_WRONLY, 0o2644) or -1)
        u(os.mkfifo, "d/fifo", 0o2777)
        u(os.symlink, "x", "d/link")
        u(os.chmod, "d/file", 0o2755)
        u(os.mknod, "d/node", 0o102777)
        u(os.link, "d/file", "d/hard")

    def case(t: Any) -> None:
        os.mkdir("d")
        os.chown("d", USER, GROUP)
        os.chmod("d", mode)
        t.other(user, *callers[who])

    both(case)


ACTIONS = {
    "read": lambda t: t(os.open, "d/f", os.O_RDONLY),
    "write": lambda t: t(os.open, "d/f", os.O_WRONLY),
    "exec": lambda t: t(os.access, "d/f", os.X_OK),
    "create": lambda t: t(os.mkdir, "d/new"),
    "unlink": lambda t: t(os.unlink, "d/f"),
    "rename": lambda t: t(os.rename, "d/f", "d/g"),
    "replace": lambda t: t(os.rename, "d/own", "d/f"),
    "exchange": lambda t: t(system.renameat2, "d/own", "d/f", system.EXCHANGE),
    "link": lambda t: t(os.link, "d/f", "d/h"),
    "list": lambda t: t(os.listdir, "d"),
    "stat": lambda t: t(os.stat, "d/f"),
    "chmod": lambda t: t(os.chmod, "d/f", 0o777),
    "truncate": lambda t: t(os.truncate, "d/f", 1),
    "utime": lambda t: t(os.utime, "d/f"),
    "setxattr": lambda t: t(os.setxattr, "d/f", "user.x", b"1"),
    "getxattr": lambda t: t(os.getxattr, "d/f", "user.y"),
    "access": lambda t: [t(os.access, "d/f", bits) for bits in range(8)],
    "rmdir": lambda t: t(os.rmdir, "d/sub"),
    "chdir": lambda t: t(os.chdir, "d"),
}
CALLERS = {
    "root": (0, 0, ()),
    "owner": (USER, USER, ()),
    "group": (OTHER, GROUP, ()),
    "supplementary": (OTHER, OTHER, (5, GROUP, 6)),
    "stranger": (OTHER, OTHER, ()),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("modes", [(0o755, 0o640), (0o1777, 0o666), (0o711, 0o604), (0o774, 0o060), (0o070, 0o777)])
def test_permissions(both: Any, modes: tuple[int, int], caller: str) -> None:
    def case(t: Any) -> None:
        for action in ACTIONS:
            os.mkdir(action)
            os.chdir(action)
            os.mkdir("d")
            write("d/f", b"content")
            os.setxattr("d/f", "user.y", b"1")
            write("d/own")
            os.mkdir("d/sub")
            os.chown("d/own", OTHER, OTHER)
            for path, mode in (("d/f", modes[1]), ("d", modes[0])):
                os.chown(path, USER, GROUP)
                os.chmod(path, mode)
            t.other(lambda u, a=action: ACTIONS[a](u), *CALLERS[caller])
            os.chdir("..")

    both(case)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("mask", [0, 4, 7])
def test_acl_permissions(both: Any, mask: int, caller: str) -> None:
    def case(t: Any) -> None:
        write("a", b"content")
        os.chown("a", USER, USER)
        entries = (1, 6, 0xFFFFFFFF), (2, 7, OTHER), (4, 0, 0xFFFFFFFF), (8, 6, GROUP), (16, mask, 0xFFFFFFFF)
        t(os.setxattr, "a", "system.posix_acl_access", acl(*entries, (32, 0, 0xFFFFFFFF)))
        t(os.stat, "a")

        def user(u: Any) -> None:
            for bits in range(8):
                u(os.access, "a", bits)
            u(os.open, "a", os.O_RDWR)

        t.other(user, *CALLERS[caller])

    both(case)


@pytest.mark.parametrize("name", ["user.x", "trusted.x", "security.x", "system.posix_acl_access"])
@pytest.mark.parametrize("caller", ["owner", "stranger"])
@pytest.mark.parametrize("mode", [0o600, 0o666, 0o444])
def test_xattrs_of_users(both: Any, name: str, caller: str, mode: int) -> None:
    no_one = 0xFFFFFFFF
    value = acl((1, 7, no_one), (2, 7, 5), (4, 7, no_one), (16, 7, no_one), (32, 0, no_one))

    def user(u: Any) -> None:
        u(os.setxattr, "a", name, value)
        u(os.getxattr, "a", name)
        u(os.listxattr, "a")
        u(os.removexattr, "a", name)

    def case(t: Any) -> None:
        write("a", b"", mode)
        os.chown("a", USER, USER)
        t.other(user, *CALLERS[caller])
        os.setxattr("a", name, value)
        t.other(user, *CALLERS[caller])
        t(os.listxattr, "a")

    both(case)


@pytest.mark.parametrize("protected", ["regular", "fifo", "link"])
def test_protected_names_in_sticky_directories(both: Any, protected: str) -> None:
    """fs.protected_*: the kernel's, but they need right owners."""

    def user(u: Any) -> None:
        match protected:
            case "regular":
                u(os.open, "d/f", os.O_CREAT | os.O_WRONLY)
            case "fifo":
                u(os.open, "d/p", os.O_CREAT | os.O_RDWR | os.O_NONBLOCK)
            case "link":
                u(os.open, "d/l", os.O_RDONLY)

    def case(t: Any) -> None:
        os.mkdir("d")
        os.chmod("d", 0o1777)
        write("target", b"x", 0o666)
        write("d/f", b"x", 0o666)
        os.mkfifo("d/p")
        os.symlink("../target", "d/l")
        for name in ("d/f", "d/p", "d/l"):
            os.lchown(name, USER, USER)
        t.other(user, *CALLERS["stranger"])
        t.other(user, *CALLERS["owner"])

    both(case)
