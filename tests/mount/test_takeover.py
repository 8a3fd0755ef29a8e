# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon dies while it serves a request, and the next one goes on: callers see neither an error nor a wrong byte."""

import ctypes
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkramfs.fuse.wire import Op
from tests.support.mortal import held

pytestmark = pytest.mark.mount
libc = ctypes.CDLL(None, use_errno=True)
EXCHANGE, AT_SYMLINK_FOLLOW = 2, 0x400

Act = Callable[[Path], object]


def rename2(source: Path, target: Path, flags: int) -> None:
    if libc.renameat2(-100, bytes(source), -100, bytes(target), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def create(at: Path) -> None:
    fd = os.open(at / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
    os.write(fd, b"content")
    os.close(fd)
    assert (at / "new").read_bytes() == b"content"
    assert stat.S_IMODE((at / "new").stat().st_mode) == 0o640


def mkfifo(at: Path) -> None:
    os.mkfifo(at / "new")
    assert (at / "new").is_fifo()


def mkdir(at: Path) -> None:
    (at / "new").mkdir()
    assert at.stat().st_nlink == 4
    (at / "new" / "below").touch()


def symlink(at: Path) -> None:
    (at / "new").symlink_to("target")
    assert os.readlink(at / "new") == "target"


def link(at: Path) -> None:
    os.link(at / "file", at / "new")
    assert os.stat(at / "new").st_nlink == 2


def unlink(at: Path) -> None:
    (at / "file").unlink()
    assert "file" not in os.listdir(at)


def unlink_open(at: Path) -> None:
    with open(at / "file", "rb+") as file:
        (at / "file").unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"after")
        file.flush()
        file.seek(0)
        assert file.read() == b"after" + b"f" * 9995


def rmdir(at: Path) -> None:
    (at / "sub").rmdir()
    assert at.stat().st_nlink == 2


def rename(at: Path) -> None:
    os.rename(at / "file", at / "sub" / "new")
    assert (at / "sub" / "new").read_bytes() == b"f" * 10_000
    assert not (at / "file").exists()


def rename_over(at: Path) -> None:
    os.rename(at / "other", at / "file")
    assert (at / "file").read_bytes() == b"other"
    assert not (at / "other").exists()


def exchange(at: Path) -> None:
    before = {entry.name: entry.inode() for entry in os.scandir(at)}
    rename2(at / "file", at / "other", EXCHANGE)
    after = {entry.name: entry.inode() for entry in os.scandir(at)}  # asked for, not remembered by the kernel
    assert (after["file"], after["other"]) == (before["other"], before["file"])
    assert (at / "other").read_bytes() == b"f" * 10_000
    assert (at / "file").read_bytes() == b"other"


def set_xattr(at: Path) -> None:
    os.setxattr(at / "file", "user.new", b"value", os.XATTR_CREATE)
    assert os.getxattr(at / "file", "user.new") == b"value"


def remove_xattr(at: Path) -> None:
    os.removexattr(at / "file", "user.old")
    assert os.listxattr(at / "file") == []


def write(at: Path) -> None:
    with open(at / "file", "ab") as file:
        file.write(b"more")
        file.flush()
        os.fsync(file.fileno())
    assert (at / "file").read_bytes() == b"f" * 10_000 + b"more"


def truncate(at: Path) -> None:
    os.truncate(at / "file", 5000)
    os.truncate(at / "file", 6000)
    assert (at / "file").read_bytes() == b"f" * 5000 + bytes(1000)


def chmod(at: Path) -> None:
    (at / "file").chmod(0o4711)
    assert stat.S_IMODE((at / "file").stat().st_mode) == 0o4711


def utimes(at: Path) -> None:
    os.utime(at / "file", ns=(1, 2))
    assert (at / "file").stat().st_mtime_ns == 2


def opened(at: Path) -> None:
    fd = os.open(at / "file", os.O_RDWR)
    assert os.pread(fd, 3, 0) == b"fff"
    os.pwrite(fd, b"w", 0)
    os.close(fd)
    assert (at / "file").read_bytes()[:2] == b"wf"


def open_truncating(at: Path) -> None:
    (at / "file").write_bytes(b"short")
    assert (at / "file").read_bytes() == b"short"


def release(at: Path) -> None:
    os.close(os.open(at / "file", os.O_RDWR))
    os.statvfs(at)


def fallocate(at: Path) -> None:
    with open(at / "file", "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, 50_000)
    assert (at / "file").stat().st_size == 50_000


def copy(at: Path) -> None:
    with open(at / "file", "rb") as source, open(at / "other", "rb+") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 10_000, 0, 3) == 10_000
    assert (at / "other").read_bytes() == b"oth" + b"f" * 10_000


def tmpfile(at: Path) -> None:
    fd = os.open(at, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"unnamed")
    assert not libc.linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, bytes(at / "new"), AT_SYMLINK_FOLLOW)
    os.close(fd)
    assert (at / "new").read_bytes() == b"unnamed"


def read(at: Path) -> None:
    fd = os.open(at / "file", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.read(fd, 20_000) == b"f" * 10_000
    os.close(fd)


def look(at: Path) -> None:
    assert (at / "sub" / "below").read_bytes() == b"below"


def listing(at: Path) -> None:
    assert sorted(os.listdir(at)) == ["file", "other", "sub"]


def seek(at: Path) -> None:
    with open(at / "file", "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 10_000


def statfs(at: Path) -> None:
    assert os.statvfs(at).f_bsize == 4096


ONCE: dict[str, tuple[Op, Act]] = {
    "create": (Op.CREATE, create),
    "mknod": (Op.MKNOD, mkfifo),
    "mkdir": (Op.MKDIR, mkdir),
    "symlink": (Op.SYMLINK, symlink),
    "link": (Op.LINK, link),
    "unlink": (Op.UNLINK, unlink),
    "unlink an open file": (Op.UNLINK, unlink_open),
    "rmdir": (Op.RMDIR, rmdir),
    "rename": (Op.RENAME, rename),
    "rename over a file": (Op.RENAME, rename_over),
    "exchange": (Op.RENAME2, exchange),
    "setxattr": (Op.SETXATTR, set_xattr),
    "removexattr": (Op.REMOVEXATTR, remove_xattr),
}
"""Requests that may not be done twice."""
ANY: dict[str, tuple[Op, Act]] = {
    "write": (Op.WRITE, write),
    "truncate": (Op.SETATTR, truncate),
    "chmod": (Op.SETATTR, chmod),
    "utimes": (Op.SETATTR, utimes),
    "open": (Op.OPEN, opened),
    "open and truncate": (Op.OPEN, open_truncating),
    "release": (Op.RELEASE, release),
    "fallocate": (Op.FALLOCATE, fallocate),
    "copy": (Op.COPY_FILE_RANGE, copy),
    "tmpfile": (Op.TMPFILE, tmpfile),
    "link a tmpfile": (Op.LINK, tmpfile),
    "read": (Op.READ, read),
    "lookup": (Op.LOOKUP, look),
    "listing": (Op.READDIRPLUS, listing),
    "lseek": (Op.LSEEK, seek),
    "statfs": (Op.STATFS, statfs),
}


def prepare(at: Path) -> Path:
    (at / "sub").mkdir(parents=True)
    (at / "file").write_bytes(b"f" * 10_000)
    (at / "other").write_bytes(b"other")
    (at / "sub" / "below").write_bytes(b"below")
    os.setxattr(at / "file", "user.old", b"old")
    return at


def test_every_request_wherever_its_daemon_dies(lab: Any) -> None:
    """Before it counts, between that and the reply, and after the reply."""
    failed, died = [], 0
    with held(lab) as mount:
        for name, (op, act) in (ONCE | ANY).items():
            for when in ("before", "after", "replied") if name in ONCE else ("before", "after"):
                at = prepare(mount.directory / f"{name} {when}")
                empty = name == "rmdir"
                if empty:
                    (at / "sub" / "below").unlink()
                mount.die((op, when))
                try:
                    act(at)
                except (OSError, AssertionError) as error:
                    failed.append(f"{name}, {when}: {error!r}")
                died += mount.died
                mount.orders.unlink(missing_ok=True)
        assert failed == []
        assert died >= 3 * len(ONCE) + 2 * len(ANY) - 6, died  # the kernel asks some things seldom
        assert lab.run("ctl", "verify").returncode == 0


def test_without_answers_to_what_was_done_callers_see_it(lab: Any) -> None:
    """The control: what may not be done twice is done twice."""
    went_well = []
    with held(lab, extra="again.Again.answer = lambda *_: None") as mount:
        for name, (op, act) in ONCE.items():
            at = prepare(mount.directory / name)
            if name == "rmdir":
                (at / "sub" / "below").unlink()
            mount.die((op, "after"))
            try:
                act(at)
            except (OSError, AssertionError):
                continue
            went_well.append(name)
    assert went_well == []
