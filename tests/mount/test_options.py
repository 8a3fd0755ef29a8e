# SPDX-License-Identifier: GPL-2.0-or-later
"""Options of a mount: huge= and what a remount changes, seen by programs, by pkramctl and after a kexec."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mount
MIB2 = 2 << 20


def _synced(path: Path) -> os.stat_result:
    """stat once all that was written has reached the daemon."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return path.stat()


def _kexec(lab: Any) -> None:
    done = lab.run("kexec", "-le", "builtin:4M", "--reuse-cmdline", "--poison")
    assert done.returncode == 0, done.stderr


def test_huge_pages_survive_and_so_does_the_option(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,huge=always")
    (mnt / "file").write_bytes(b"x" * (3 << 20))
    (mnt / "byte").write_bytes(b"y")
    expected = {"file": (2 * MIB2, MIB2), "byte": (MIB2, MIB2)}

    def seen() -> dict[str, tuple[int, int]]:
        stats = {name: _synced(mnt / name) for name in expected}
        return {name: (s.st_blocks * 512, s.st_blksize) for name, s in stats.items()}

    assert seen() == expected
    info = os.statvfs(mnt)
    assert (info.f_bsize, info.f_blocks - info.f_bfree) == (4096, 3 * MIB2 >> 12)
    assert lab.status(mnt)["options"] == "huge=always"
    lab.remount(mnt, "preserve,ro")
    _kexec(lab)
    assert seen() == expected
    assert (mnt / "file").read_bytes() == b"x" * (3 << 20)
    (mnt / "more").write_bytes(b"z")
    assert _synced(mnt / "more").st_blocks * 512 == MIB2


def test_huge_by_remount(lab: Any) -> None:
    mnt = lab.mount("one")
    for huge, blocks, blksize in (("always", MIB2, MIB2), ("never", 4096, 4096), ("advise", 4096, 4096)):
        lab.remount(mnt, f"huge={huge}")
        assert lab.status(mnt)["options"] == f"huge={huge}"
        (mnt / huge).write_bytes(b"x")
        assert (_synced(mnt / huge).st_blocks * 512, (mnt / huge).stat().st_blksize) == (blocks, blksize)
    assert (mnt / "always").stat().st_blksize == 4096  # of the mount, not of the file
    assert (mnt / "always").stat().st_blocks * 512 == MIB2  # what is there stays
    lab.remount(mnt, "huge=within_size")
    (mnt / "small").write_bytes(b"x")
    with open(mnt / "large", "wb") as file:
        file.truncate(MIB2)
        file.write(b"x")
    assert [_synced(mnt / name).st_blocks * 512 for name in ("small", "large")] == [4096, MIB2]


def test_what_a_remount_changed_is_what_is_mounted_again(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,size=8M,nr_inodes=10,mode=700")
    lab.remount(mnt, "nr_blocks=4096,nr_inodes=50")
    assert lab.status(mnt)["options"] == "size=16384k,nr_inodes=50,mode=700"
    lab.remount(mnt, "preserve,ro")
    _kexec(lab)
    found = os.statvfs(mnt)
    assert (found.f_blocks, found.f_files) == (4096, 50)
    assert "size=16384k,nr_inodes=50,mode=700" in lab.run("ctl", "status").stdout


def test_a_refused_remount_changes_nothing(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,size=8M")
    (mnt / "file").write_bytes(bytes(4 << 20))
    _synced(mnt / "file")
    for options, part in (
        ("huge=always,size=1M", "too small a size for current use"),
        ("huge=always,nr_inodes=1", "too few inodes"),
        ("size=16M,noswap", "noswap is only for the first mount"),
    ):
        done = lab.helper(mnt, f"remount,{options}")
        assert (done.returncode, done.stderr.count("\n")) == (32, 1), done
        assert part in done.stderr
        assert lab.status(mnt)["options"] == "size=8192k"


def _entries(lab: Any) -> list[tuple[int, int]]:
    """(order, flags) of the entries in the first link of the one node's page stream, as pkramctl reads them."""

    def inspect(what: str, pfn: int) -> dict[str, Any]:
        found = json.loads(lab.run("ctl", "--json", "inspect", what, f"{pfn:x}").stdout)
        assert found["problems"] == []
        return {field["name"]: field["value"] for field in found["fields"]} | {"entries": found["entries"]}

    (node,) = json.loads(lab.run("ctl", "--json", "nodes").stdout)
    pages = inspect("object", inspect("object", inspect("node", node["pfn"])["object"])["object"])
    return [(entry["order"], entry["flags"]) for entry in inspect("link", pages["pages_head"])["entries"]]


@pytest.mark.parametrize(("huge", "entry", "count"), [("never", (0, 0), 504), ("always", (9, 1), 3)])
def test_the_two_columns_of_the_announcement(lab: Any, huge: str, entry: tuple[int, int], count: int) -> None:
    """PKRAM's own form has an entry for each page, or for each huge page."""
    mnt = lab.mount("one", f"pkram=one,pkram_strict,huge={huge}")
    (mnt / "file").write_bytes(b"x" * (3 * MIB2))
    lab.remount(mnt, "preserve,ro")
    assert _entries(lab) == [entry] * count
