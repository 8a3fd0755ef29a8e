# SPDX-License-Identifier: GPL-2.0-or-later
"""Preserved whole: a tree with everything in it that a tree can have, compared over remount,preserve and a kexec.

Compared are, for every path: type, mode, owner, links, which paths are one inode, size, blocks, where the
holes are, content or target, device, all xattrs (ACLs and capabilities among them), the three times to the
nanosecond, and the order of listings.
"""

import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.trees import snapshot

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
TIMES = (1_234_567_890_123_456_789, 987_654_321_987_654_321)


def build(top: bytes) -> None:
    """Every kind of file, name and attribute."""
    os.chdir(top)
    rng = iter(range(1, 1 << 30))
    for name in (b"plain", b"\xff\xfe not utf-8 \x01", b"n" * 255, b" ", b"-rf", b"new\nline", "ünïcode".encode()):
        _write(name, next(rng).to_bytes(4, "little") * 3000)
    os.makedirs(b"deep" + b"/d" * 40)
    _write(b"deep" + b"/d" * 40 + b"/file", b"bottom")
    os.link(b"plain", b"deep/hard link")
    os.link(b"plain", b"second")
    os.symlink(b"deep/hard link", b"short link")
    os.symlink(b"t" * 4000, b"long dangling link")
    os.mkfifo(b"fifo", 0o640)
    os.link(b"fifo", b"fifo again")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    with open(b"sparse", "wb") as file:
        file.truncate((1 << 43) + 3)
        for offset in (0, 5 << 12, (1 << 40) + 4095):
            os.pwrite(file.fileno(), b"island", offset)
    open(b"empty", "wb").close()
    os.mkdir(b"empty directory", 0o711)
    _write(b"xattrs", b"")
    for number in range(20):
        os.setxattr(b"xattrs", b"user.%d \xff" % number, bytes([number]) * (number * 100))
    os.chmod(b"second", 0o4751)
    os.mkdir(b"setgid", 0o2775)
    os.chmod(b"setgid", 0o3775)
    if ROOT:
        _build_as_root()
    for path in _walk(b"."):  # a time of its own for each
        number = next(rng)
        os.utime(path, ns=(TIMES[0] + number, TIMES[1] + number), follow_symlinks=False)
    os.chdir("/")


def _build_as_root() -> None:
    os.mknod(b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(b"block", stat.S_IFBLK | 0o600, os.makedev(259, 1 << 18))
    os.chown(b"empty", 12345, 4_000_000_000)
    os.setxattr(b"plain", b"trusted.overlay.opaque", b"y")
    os.setxattr(b"short link", b"trusted.of a link", b"v", follow_symlinks=False)
    os.setxattr(b"fifo", b"security.anything", b"\0\1")
    os.setxattr(b"empty", b"security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    if shutil.which("setfacl"):
        subprocess.run(["setfacl", "-m", "u:1000:rwx,g:7:r", "xattrs"], check=True)
        subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx", "setgid"], check=True)


def _write(name: bytes, data: bytes) -> None:
    with open(name, "wb") as file:
        file.write(data)


def _walk(top: bytes) -> Iterator[bytes]:
    """Children before their directory, whose times they change."""
    for name in os.listdir(top):
        path = os.path.join(top, name)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            yield from _walk(path)
        yield path


def test_everything_survives(lab: Any) -> None:
    mnt = os.fsencode(lab.mount("one"))
    build(mnt)
    lab.remount(os.fsdecode(mnt), "preserve,ro")
    before = snapshot(os.fsdecode(mnt), atime=True)
    by_kind = {stat.S_IFMT(row.mode) for row in before.values()}
    assert len(by_kind) == (7 if ROOT else 5)
    assert before[b"plain"].ino == before[b"deep/hard link"].ino == before[b"second"].ino
    assert [offset for offset, _ in before[b"sparse"].content] == [0, 5 << 12, 1 << 40]
    done = lab.run("kexec", "-le", "builtin", "--reuse-cmdline", "--poison")
    assert done.returncode == 0, done.stderr
    after = snapshot(os.fsdecode(mnt), atime=True)
    assert after.keys() == before.keys()
    assert [path for path in before if before[path] != after[path]] == []


KINDS = {
    "directory": (lambda top: (top / "bad").mkdir(), "/bad is not a regular file"),
    "symlink": (lambda top: (top / "bad").symlink_to("x"), "/bad is not a regular file"),
    "fifo": (lambda top: os.mkfifo(top / "bad"), "/bad is not a regular file"),
    "socket": (lambda top: os.mknod(top / "bad", stat.S_IFSOCK | 0o600), "/bad is not a regular file"),
    "hard link": (lambda top: os.link(top / "good", top / "good too"), "has 2 hard links"),
    "odd name": (lambda top: (top / "bad\nname").mkdir(), "/bad"),
}


def test_strict_refuses_what_pkram_refuses_and_names_it(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,pkram_strict")
    (mnt / "good").write_text("x")
    for make, said in KINDS.values():
        make(mnt)
        done = lab.helper(mnt, "remount,preserve,ro")
        assert (done.returncode, done.stderr.count("\n")) == (32, 1), done
        assert said in done.stderr
        assert "/good" in done.stderr or "/bad" in done.stderr
        assert lab.nodes() == []
        for name in os.listdir(mnt):  # it is writable again
            if name != "good":
                (mnt / name).rmdir() if (mnt / name).is_dir() else (mnt / name).unlink()
    lab.remount(mnt, "preserve,ro")
    assert lab.nodes() == ["shmem-one"]


def test_what_is_deleted_but_open_is_named(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkramfs.cli import mount as helper

    mnt = lab.mount("one")
    (mnt / "kept").write_text("x")
    (mnt / "gone").write_text("y")
    with open(mnt / "gone") as file:
        os.unlink(mnt / "gone")
        if ROOT:  # the kernel makes no mount with such a file read-only
            done = lab.helper(mnt, "remount,preserve,ro")
            assert done.returncode == 32
            assert "/gone (deleted) is still open" in done.stderr
        assert lab.run("kexec", "-l", "builtin", "--reuse-cmdline").returncode == 0
        plan = lab.run("kexec", "-e", "--dry-run").stdout
        assert f"{mnt}: /gone (deleted) will be lost" in plan
        with monkeypatch.context() as patch:
            patch.setattr("pkramfs.cli.remount.os.geteuid", lambda: 1000)  # as a user: the daemon's freeze is enough
            said = _stderr_of(helper.main, ["none", str(mnt), "-o", "remount,preserve,ro"])
        assert said == f"mount.pkramfs: warning: {mnt}: /gone (deleted) is not preserved\n"
        assert file.read() == "y"
    lab.umount(mnt)
    assert os.listdir(lab.mount("one")) == ["kept"]


def _stderr_of(function: Any, argv: list[str]) -> str:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as caught:
        assert function(argv) == 0
    return caught.getvalue()
