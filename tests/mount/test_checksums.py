# SPDX-License-Identifier: GPL-2.0-or-later
"""Checksums of data through a real mount: a flipped bit is EIO where it is, named, and mended by writing anew."""

import errno
import json
import mmap
import os
import random
from pathlib import Path

import pytest

from tests.support.lab import Mounts

pytestmark = pytest.mark.mount
PIECE, PAGE = 1 << 20, 4096
OPTIONS = "pkram=x,verify=data"


def flip(lab: Mounts, data: bytes) -> None:
    """Flip a bit where RAM holds these bytes."""
    with open(lab.files / "ram", "r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
        at = ram.find(data)
        assert at >= 0
        ram[at] ^= 0x10


def bad(path: Path) -> list[int]:
    """The pages of a file that cannot be read."""
    found, file = [], os.open(path, os.O_RDONLY)
    try:
        for page in range(-(-path.stat().st_size // PAGE)):
            try:
                os.pread(file, PAGE, page * PAGE)
            except OSError as error:
                assert error.errno == errno.EIO
                found.append(page)
    finally:
        os.close(file)
    return found


def test_a_flipped_bit_is_an_error_and_writing_anew_mends_it(lab: Mounts) -> None:
    place, data = lab.mount("m", OPTIONS), random.Random(1).randbytes(3 * PIECE + 100)
    (place / "f").write_bytes(data)
    (place / "other").write_bytes(b"o" * PIECE)
    with open(place / "mapped", "w+b") as file:
        file.truncate(PIECE)
        with mmap.mmap(file.fileno(), PIECE) as mapped:
            mapped[5000:5005] = b"hello"
    done = lab.helper(place, "remount,preserve,ro,verify", "-v")
    assert done.returncode == 0 and "unchecked" not in done.stdout, done
    assert json.loads(lab.ok("ctl", "--json", "nodes"))[0]["unchecked"] == 0
    lab.umount(place)
    flip(lab, data[PIECE + 77_777 : PIECE + 77_900])
    line = "shmem-x: bytes 1048576-2097151 of /f are damaged"
    checked = lab.run("ctl", "verify", "--data")
    assert checked.returncode == 3 and line in checked.stdout.splitlines()
    assert "nothing is wrong" in lab.ok("ctl", "verify")

    assert lab.mount("m", OPTIONS) == place
    assert (place / "mapped").read_bytes()[5000:5005] == b"hello" and (place / "other").read_bytes() == b"o" * PIECE
    assert bad(place / "f") == list(range(256, 512))
    assert "data of /f are damaged between byte 1048576 and 2097152" in lab.dmesg()
    assert lab.status(place)["damaged"] == ["bytes 1048576-2097151 of /f"]
    assert "problem   " in (shown := lab.ok("ctl", "status")) and "bytes 1048576-2097151 of /f are damaged" in shown

    with open(place / "f", "r+b") as file:
        file.seek(PIECE)
        file.write(data[PIECE : 2 * PIECE])
    assert lab.status(place)["damaged_count"] == 0
    assert (place / "f").read_bytes() == data
    lab.remount(place, "preserve,ro,verify")
    assert "nothing is wrong" in lab.ok("ctl", "verify", "--data")


def test_what_was_changed_just_now_is_counted(lab: Mounts) -> None:
    place = lab.mount("m", OPTIONS)
    (place / "f").write_bytes(b"x")
    assert lab.status(place)["options"] == "verify=data" and lab.status(place)["unsummed"] == 1
    assert "unchecked up to 1.0 MiB" in lab.helper(place, "remount,preserve,dryrun").stdout
    done = lab.helper(place, "remount,preserve,ro", "-v")
    assert done.returncode == 0 and "up to 1.0 MiB unchecked" in done.stdout
    assert "up to 1.0 MiB unchecked" in lab.dmesg() and "1.0 MiB" in lab.ok("ctl", "nodes")
    assert "up to 1.0 MiB unchecked" in lab.ok("ctl", "verify", "--data")
    lab.ok("kexec", "-le", "builtin", "--reuse-cmdline")
    assert [line.split()[-2:] for line in lab.ok("ctl", "report").splitlines() if line.startswith("shmem-x ")] == [
        ["1.0", "MiB"]
    ]
    lab.remount(place, "rw")
    lab.remount(place, "verify=none")
    assert "unsummed" not in lab.status(place) and lab.status(place)["options"] == "verify=none"
    (place / "f").write_bytes(b"y")
    lab.remount(place, "preserve,ro")
    assert json.loads(lab.ok("ctl", "--json", "nodes"))[0]["unchecked"] is None
    assert "no checksums: shmem-x" in lab.ok("ctl", "verify", "--data")


def test_a_living_tree_is_compared_by_its_daemon_also_by_the_next_one(lab: Mounts) -> None:
    place, data = lab.mount("m", OPTIONS), random.Random(2).randbytes(PIECE)
    (place / "f").write_bytes(data)
    lab.remount(place, "preserve,ro,verify")
    lab.remount(place, "rw")
    said = lab.ok("ctl", "verify", "--data", "x")
    assert "nothing is wrong" in said and "1.0 MiB of data compared" in said
    flip(lab, data[:100])
    assert "x: bytes 0-1048575 of /f are damaged" in lab.run("ctl", "verify", "--data").stdout
    before = lab.entry(place)
    os.kill(before.pid, 9)
    assert bad(place / "f") in ([], list(range(256))), "what the kernel has cached is well"
    assert lab.status(place)["damaged"] == ["bytes 0-1048575 of /f"] and lab.entry(place).pid != before.pid
