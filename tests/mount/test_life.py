# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount, use, unmount: what a program sees of a mounted tree, and what is left behind."""

import errno
import mmap
import os
import signal
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0


def test_files_and_directories(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "dir").mkdir(0o750)
    (mnt / "dir" / "file").write_bytes(b"hello")
    os.symlink("dir/file", mnt / "link")
    os.link(mnt / "dir" / "file", mnt / "hard")
    assert (mnt / "link").read_bytes() == b"hello"
    assert (mnt / "hard").stat().st_nlink == 2
    os.rename(mnt / "dir" / "file", mnt / "moved")
    assert sorted(os.listdir(mnt)) == ["dir", "hard", "link", "moved"]
    os.truncate(mnt / "moved", 2)
    assert (mnt / "hard").read_bytes() == b"he"
    os.chmod(mnt / "moved", 0o600)
    os.utime(mnt / "moved", ns=(1, 2))
    found = (mnt / "moved").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_atime_ns, found.st_mtime_ns) == (0o600, 1, 2)
    for name in ("hard", "moved", "link"):
        (mnt / name).unlink()
    (mnt / "dir").rmdir()
    assert os.listdir(mnt) == []
    lab.umount(mnt)
    assert not list(lab.machine.mounts())
    assert lab.leased() == 0


def test_what_findmnt_and_df_see(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,size=64M,nr_inodes=100,mode=0700")
    rows = [line.split() for line in Path("/proc/mounts").read_bytes().splitlines()]
    assert [(row[0], row[2]) for row in rows if row[1] == os.fsencode(mnt)] == [(b"none", b"fuse.pkramfs")]
    found = os.statvfs(mnt)
    assert (found.f_blocks * found.f_frsize, found.f_files, found.f_namemax) == (64 << 20, 100, 255)
    assert stat.S_IMODE(mnt.stat().st_mode) == 0o700
    if ROOT:
        assert not found.f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_RDONLY)


def test_size_is_a_limit(lab: Any) -> None:
    mnt = lab.mount("one", "size=1M")
    with pytest.raises(OSError) as caught, open(mnt / "big", "wb") as file:
        file.write(bytes(2 << 20))
    assert caught.value.errno == errno.ENOSPC
    os.unlink(mnt / "big")
    (mnt / "fits").write_bytes(bytes(1 << 20))


def test_shared_mappings_reach_the_tree(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_bytes(bytes(8192))
    with open(mnt / "file", "r+b") as file, mmap.mmap(file.fileno(), 8192) as view:
        view[4096:4101] = b"hello"
    lab.remount(mnt, "preserve,ro")
    assert (mnt / "file").read_bytes()[4096:4101] == b"hello"
    lab.umount(mnt)
    assert (lab.mount("one") / "file").read_bytes()[4096:4101] == b"hello"


def test_a_sparse_terabyte(lab: Any) -> None:
    mnt = lab.mount("one")
    fd = os.open(mnt / "sparse", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"a", 0)
    os.pwrite(fd, b"z", (1 << 40) - 1)
    os.close(fd)
    found = (mnt / "sparse").stat()
    assert (found.st_size, found.st_blocks) == (1 << 40, 16)


def test_absurd_sizes_do_not_end_the_daemon(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_bytes(b"x")
    os.truncate(mnt / "file", (1 << 63) - 1)
    assert (mnt / "file").stat().st_size == (1 << 63) - 1
    with pytest.raises(OSError) as caught:
        (mnt / ("n" * 256)).write_bytes(b"")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert (mnt / ("n" * 255)).write_bytes(b"") == 0


def test_cold_caches_show_the_same(lab: Any) -> None:
    """What the kernel has cached must be what the daemon would say."""
    mnt = lab.mount("one")
    fd = os.open(mnt / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * 5000, 0)
    os.ftruncate(fd, 3000)
    os.pwrite(fd, b"y", 9000)
    os.close(fd)
    warm, content = (mnt / "file").stat(), (mnt / "file").read_bytes()
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    mnt = lab.mount("one")
    cold = (mnt / "file").stat()
    assert (mnt / "file").read_bytes() == content == b"x" * 3000 + bytes(6000) + b"y"
    for field in ("st_mode", "st_size", "st_blocks", "st_mtime_ns", "st_ctime_ns", "st_nlink", "st_ino"):
        assert getattr(cold, field) == getattr(warm, field), field


def test_two_names_two_daemons(lab: Any) -> None:
    one, two = lab.mount("one"), lab.mount("two")
    (one / "a").write_text("1")
    (two / "a").write_text("2")
    assert lab.entry(one).pid != lab.entry(two).pid
    lab.umount(one)
    assert (two / "a").read_text() == "2"


def test_many_at_once(lab: Any) -> None:
    """Starting at the same time works, whoever boots the machine."""
    directories = [lab.dir(f"n{number}") for number in range(4)]
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda d=d: done.append(lab.helper(d, f"pkram={d.name}").returncode))
        for d in directories
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [0] * 4
    assert len(lab.machine.live_ids()) == 4


def test_one_name_mounted_twice_at_once(lab: Any) -> None:
    """Two commands race for one name: one mounts, the other is refused or says that it is mounted."""
    directories = [lab.dir("a"), lab.dir("b")]
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda d=d: done.append(lab.helper(d, "pkram=same").returncode)) for d in directories
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 32]
    assert len(lab.machine.live_ids()) == 1


def test_killed_daemon_leaves_enotconn_and_can_be_replaced(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("kept")
    lab.kill(lab.entry(mnt))
    with pytest.raises(OSError) as caught:
        os.listdir(mnt)
    assert caught.value.errno == errno.ENOTCONN
    assert lab.mount("one") == mnt
    assert (mnt / "file").read_text() == "kept"
    assert sum(os.fsencode(mnt) in line for line in Path("/proc/mounts").read_bytes().splitlines()) == 1


def test_sigterm_unmounts(lab: Any) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    os.kill(entry.pid, signal.SIGTERM)
    lab.gone(entry)
    assert not os.path.ismount(mnt)
    assert "one unmounted" in lab.dmesg()


def test_sigterm_with_open_files_detaches(lab: Any) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    fd = os.open(mnt / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x")
    os.kill(entry.pid, signal.SIGTERM)
    lab.gone(entry)
    assert not os.path.ismount(mnt)
    with pytest.raises(OSError) as caught:
        os.fstat(fd)
        os.close(fd)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED), "asked after, or just when the connection ended"


def test_stop_verb(lab: Any) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    assert lab.call(mnt, "stop") == {}
    lab.gone(entry)
    assert not os.path.ismount(mnt)


def test_lazy_umount_keeps_the_daemon_until_the_last_user_leaves(lab: Any) -> None:
    mnt = lab.mount("one")
    entry = lab.entry(mnt)
    with open(mnt / "file", "w+b", buffering=0) as file:
        subprocess.run(["umount", "-l", str(mnt)] if ROOT else ["fusermount3", "-uz", str(mnt)], check=True)
        file.write(b"still here")
        assert os.pread(file.fileno(), 20, 0) == b"still here"
        assert entry.tree_id in lab.machine.live_ids()
    lab.gone(entry)


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_other_users(lab: Any) -> None:
    mnt = lab.mount("one")
    lab.admit_others()
    script = f"umask 022; echo hi > {mnt}/theirs && stat -c '%u %g %a' {mnt}/theirs && rm {mnt}/root"
    (mnt / "root").write_text("")
    done = subprocess.run(["sh", "-c", script], user=1000, group=1000, extra_groups=[], capture_output=True, text=True)
    assert done.stdout == "1000 1000 644\n"
    assert "Operation not permitted" in done.stderr  # the root of the tree is sticky


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_device_nodes_and_flags(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,nosuid,noexec,noatime,ro")
    flags = os.statvfs(mnt).f_flag
    assert flags & os.ST_NOSUID and flags & os.ST_NOEXEC and flags & os.ST_NOATIME and flags & os.ST_RDONLY
    lab.remount(mnt, "rw,exec")
    flags = os.statvfs(mnt).f_flag
    assert flags & os.ST_NOSUID and not flags & os.ST_NOEXEC and not flags & os.ST_RDONLY
    os.mknod(mnt / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with open(mnt / "null", "wb") as null:
        assert null.write(b"gone") == 4
