# SPDX-License-Identifier: GPL-2.0-or-later
"""Holes in files on a mount: punched, allocated, sparsified through the doors, and compared with tmpfs's fallocate."""

import errno
import mmap
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
PAGE, MIB = 4096, 1 << 20


def order(path: Path, what: str, value: str = "") -> None:
    os.setxattr(path, f"user.pkramfs.{what}", value.encode())


def blocks(path: Path) -> int:
    return os.stat(path).st_blocks


@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_is_as_on_tmpfs(lab: Any, tmpfs: Path, seed: int) -> None:
    """Writes, punches, allocations and truncations with a descriptor and a mapping open all the time."""
    rng, size = random.Random(seed), 256 * PAGE
    paths = (lab.mount("one") / "f", tmpfs / "f")
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    for fd in fds:
        os.write(fd, random.Random(seed).randbytes(size))
    maps = [mmap.mmap(fd, size) for fd in fds]
    for step in range(60):
        offset, length = rng.randrange(size - 1), rng.choice((1, 100, PAGE, 3 * PAGE + 5, 40 * PAGE))
        length, data = min(length, size - offset), rng.randbytes(1 + rng.randrange(9000))
        match rng.choice(("write", "map", "punch", "punch", "allocate", "read")):
            case "write":
                for fd in fds:
                    os.pwrite(fd, data[: size - offset], offset)
            case "map":
                for mapped in maps:
                    mapped[offset : offset + len(data)] = data[: size - offset]
            case "punch":
                order(paths[0], "punch", f"{offset}:{length}")
                words = ["fallocate", "--punch-hole", "--offset", str(offset), "--length", str(length), str(paths[1])]
                subprocess.run(words, check=True)
            case "allocate":
                order(paths[0], "allocate", f"{offset}:{length}")
                words = ["fallocate", "--keep-size", "--offset", str(offset), "--length", str(length), str(paths[1])]
                subprocess.run(words, check=True)
            case "read":
                assert maps[0][offset : offset + length] == maps[1][offset : offset + length], step
        assert os.pread(fds[0], size, 0) == os.pread(fds[1], size, 0), step
        assert maps[0][:] == maps[1][:], step
    for mapped in maps:
        mapped.close()
    for fd in fds:
        os.fsync(fd)
        os.close(fd)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_commands(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,size=8M")
    file = mnt / "f"
    file.write_bytes(b"x" * 4 * MIB)
    backed = lab.machine.ram().backed
    os.utime(file, (1, 1))
    assert lab.run("ctl", "punch", str(file), "1M", "2M").stdout == f"{file}: 2.0 MiB given back\n"
    assert backed - lab.machine.ram().backed >= 2 * MIB - 64 * PAGE
    assert time.time() - os.stat(file).st_mtime < 60
    assert file.read_bytes() == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB
    listed = lab.run("ctl", "--json", "extents", str(file)).stdout
    assert listed.split() == [
        "[",
        "{",
        '"offset":',
        "0,",
        '"length":',
        "1048576",
        "},",
        "{",
        '"offset":',
        "3145728,",
        '"length":',
        "1048576",
        "}",
        "]",
    ]
    assert lab.run("ctl", "allocate", str(file), "4M", "1M").stdout == f"{file}: 1.0 MiB allocated\n"
    (file.parent / "hole").touch()
    assert "hole: 1.0 MiB allocated" in lab.run("ctl", "allocate", str(file.parent / "hole"), "0", "1M").stdout
    (file.parent / "hole").unlink()
    assert (os.stat(file).st_size, blocks(file)) == (5 * MIB, 3 * MIB // 512)
    done = lab.run("ctl", "allocate", str(file), "0", "100M")
    assert (done.returncode, done.stderr) == (1, f"pkramctl: {file}: No space left on device\n")
    assert os.stat(file).st_size == 5 * MIB and blocks(file) == 3 * MIB // 512, "all or nothing"
    (mnt / "d").mkdir()
    (mnt / "d" / "zeros").write_bytes(bytes(2 * MIB) + b"end")
    before = os.stat(mnt / "d" / "zeros").st_mtime_ns
    os.sync()
    backed = lab.machine.ram().backed
    assert lab.run("ctl", "sparsify", str(mnt)).stdout == "2 files: 3.0 MiB of zeros given back\n"
    assert backed - lab.machine.ram().backed >= 2 * MIB - 64 * PAGE  # what was only allocated has never cost the host
    assert (mnt / "d" / "zeros").read_bytes() == bytes(2 * MIB) + b"end"
    assert os.stat(mnt / "d" / "zeros").st_mtime_ns == before
    assert os.listxattr(file) == []


def test_a_restored_tree_without_zeros_stays_preserved(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "f").write_bytes(b"x" * PAGE)
    (mnt / "zeros").write_bytes(bytes(10 * PAGE))
    before = os.stat(mnt / "zeros")
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    mnt = lab.mount("one")
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        os.getxattr(mnt / "zeros", "user.pkramfs.sparsify")  # nobody has it open for writing
    assert lab.run("ctl", "sparsify", str(mnt / "f")).stdout == "1 file: 0 B of zeros given back\n"
    assert lab.status(mnt)["state"] == "preserved"
    assert lab.run("ctl", "sparsify", str(mnt)).stdout == "2 files: 40.0 KiB of zeros given back\n"
    assert lab.status(mnt)["state"] == "live"
    after = os.stat(mnt / "zeros")
    assert (after.st_ctime_ns, after.st_mtime_ns) == (before.st_ctime_ns, before.st_mtime_ns)


def test_what_is_refused(lab: Any, tmp_path: Path) -> None:
    mnt = lab.mount("one")
    (mnt / "f").write_bytes(b"x" * PAGE)
    (tmp_path / "elsewhere").write_bytes(b"x")
    os.mkfifo(mnt / "fifo")
    os.mknod(mnt / "socket", 0o140644)
    for words, reason in (
        (("punch", str(tmp_path / "elsewhere"), "0", "1"), "is not on a pkramfs mount: use fallocate(1)"),
        (("punch", str(mnt), "0", "1"), "is not a regular file"),
        (("allocate", str(mnt / "fifo"), "0", "1"), "is not a regular file"),
        (("sparsify", str(mnt / "socket")), "is not a regular file"),
        (("extents", str(mnt / "absent")), "No such file or directory"),
        (("punch", str(mnt / "f"), "0", "0"), "Invalid argument"),
        (("punch", str(mnt / "f"), "0", "x"), "not a size"),
    ):
        done = lab.run("ctl", *words)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done
        assert reason in done.stderr
    for what, value, code in (
        ("punch", "nonsense", errno.EINVAL),
        ("punch", f"{1 << 62}:{1 << 62}", errno.EFBIG),
        ("unheard-of", "0:1", errno.EOPNOTSUPP),
    ):
        with pytest.raises(OSError) as caught:
            order(mnt / "f", what, value)
        assert caught.value.errno == code
    with pytest.raises(OSError) as caught:
        order(mnt, "punch", "0:1")
    assert caught.value.errno == errno.EISDIR
    lab.remount(mnt, "preserve,ro")
    with pytest.raises(OSError) as caught:
        order(mnt / "f", "punch", "0:1")
    assert caught.value.errno == errno.EROFS
    done = lab.run("ctl", "punch", str(mnt / "f"), "0", "1")
    assert (done.returncode, done.stderr) == (1, f"pkramctl: {mnt / 'f'}: Read-only file system\n")
    assert (mnt / "f").read_bytes() == b"x" * PAGE


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_who_may_not_write_may_not_punch(lab: Any) -> None:
    mnt = lab.mount("one")
    lab.admit_others()
    (mnt / "f").write_bytes(b"x")
    script = f"import os; os.setxattr('{mnt}/f', 'user.pkramfs.punch', b'0:1')"
    done = subprocess.run(["python3", "-c", script], user=1000, group=1000, extra_groups=[], capture_output=True)
    assert b"PermissionError" in done.stderr
    assert (mnt / "f").read_bytes() == b"x"


def test_many_at_once_on_files_that_are_being_written(lab: Any) -> None:
    """Each waits until the kernel has written back, which needs answers meanwhile."""
    mnt = lab.mount("one")

    def work(number: int) -> None:
        path = mnt / str(number)
        for turn in range(5):
            path.write_bytes(bytes([1 + turn]) * MIB)
            order(path, "punch", f"{PAGE}:{MIB // 2}")

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    expected = b"\5" * PAGE + bytes(MIB // 2) + b"\5" * (MIB - MIB // 2 - PAGE)
    assert all((mnt / str(number)).read_bytes() == expected for number in range(24))


def test_holes_survive(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "f").write_bytes(b"x" * 4 * MIB)
    order(mnt / "f", "punch", f"{MIB}:{MIB}")
    order(mnt / "f", "allocate", f"{6 * MIB}:{MIB}")
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    lab.mount("one")
    assert blocks(mnt / "f") == 4 * MIB // 512
    assert os.getxattr(mnt / "f", "user.pkramfs.extents") == b"0:1048576\n2097152:2097152\n"
    assert os.listxattr(mnt / "f") == []


def test_copies_with_holes_are_stored_with_holes(lab: Any, tmp_path: Path) -> None:
    mnt = lab.mount("one")
    with open(tmp_path / "sparse", "wb") as file:
        file.write(b"begin")
        file.seek(32 * MIB)
        file.write(b"end")
    subprocess.run(["cp", "--sparse=always", tmp_path / "sparse", mnt / "copy"], check=True)
    os.sync()
    assert blocks(mnt / "copy") == 16
    assert lab.machine.ram().backed < 16 * MIB


def test_a_file_that_grows_is_seen_to_grow(lab: Any) -> None:
    """du of a download: blocks follow what the kernel has written back, although the file stays open."""
    mnt = lab.mount("one")
    (mnt / "f").write_bytes(b"x" * PAGE)
    assert blocks(mnt / "f") == 8
    with open(mnt / "f", "ab", buffering=0) as file:
        for pages in (2, 10, 200):
            file.write(b"y" * (pages * PAGE - os.fstat(file.fileno()).st_size))
            os.fsync(file.fileno())
            deadline = time.monotonic() + 60
            while blocks(mnt / "f") != 8 * pages:
                assert time.monotonic() < deadline, blocks(mnt / "f")
                os.stat(mnt)


def _write(path: Path) -> BinaryIO:
    file = open(path, "wb", buffering=0)  # noqa: SIM115
    file.write(b"data" * (MIB // 4))
    return file


def _write_behind_a_hole(path: Path) -> BinaryIO:
    file = open(path, "wb", buffering=0)  # noqa: SIM115
    file.seek(3 * MIB)
    file.write(b"end")
    return file


def _map(path: Path) -> mmap.mmap:
    with open(path, "w+b") as file:
        file.truncate(MIB)
        memory = mmap.mmap(file.fileno(), MIB)
    memory[5 * PAGE : 6 * PAGE] = b"data" * (PAGE // 4)
    return memory


@pytest.mark.parametrize("use", [_write, _write_behind_a_hole, _map])
def test_an_archive_of_a_file_that_is_being_written_has_its_data(
    lab: Any, use: Callable[[Path], BinaryIO | mmap.mmap]
) -> None:
    """tar takes a file without blocks for one without data, also while all that it has is in the kernel's cache."""
    mnt = lab.mount("one")
    with use(mnt / "f"):
        assert blocks(mnt / "f") > 0
        packed = subprocess.run(["tar", "-C", mnt, "-cSf", "-", "f"], check=True, capture_output=True).stdout
        out = lab.dir("out")
        subprocess.run(["tar", "-C", out, "-xf", "-"], input=packed, check=True)
        assert (out / "f").read_bytes() == (mnt / "f").read_bytes() != bytes(os.path.getsize(mnt / "f"))


def test_blocks_are_exact_when_nobody_writes(lab: Any) -> None:
    """Of a file that has been open for writing, whatever was said meanwhile."""
    mnt = lab.mount("one")
    for number in range(20):
        with open(mnt / f"{number}", "wb") as file:
            assert blocks(mnt / f"{number}") > 0
            file.truncate(number * PAGE)
            assert blocks(mnt / f"{number}") > 0
        assert blocks(mnt / f"{number}") == 0
        with open(mnt / f"{number}", "r+b"):
            assert blocks(mnt / f"{number}") > 0
            with os.scandir(mnt) as entries:
                assert all(entry.stat() for entry in entries)
        assert blocks(mnt / f"{number}") == 0


def test_extents_have_what_is_not_written_back(lab: Any) -> None:
    mnt = lab.mount("one")
    with _write_behind_a_hole(mnt / "f"):
        assert os.getxattr(mnt / "f", "user.pkramfs.extents") == b"%d:3\n" % (3 * MIB)
