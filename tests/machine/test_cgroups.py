# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory cgroups of both versions, as files: what they allow, to whom, and how often they are asked."""

from pathlib import Path

import pytest

from pkramfs.errors import ExhaustedError
from pkramfs.machine import cgroups
from pkramfs.machine.cgroups import MemoryGroups
from pkramfs.units import GIB, MIB

UNLIMITED = 9223372036854771712
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file", "total_dirty")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file", "file_dirty")),
}


class Fake:
    """A hierarchy of one version below a directory, and the files of /proc that lead to it."""

    def __init__(self, top: Path, version: int) -> None:
        self.top, self.version, self.proc = top / "cg roup", version, top / "proc"
        self.proc.mkdir()
        self.top.mkdir()

    def member(self, path: str, root: str = "/") -> MemoryGroups:
        """This process is in group `path`; the mount shows the hierarchy from `root` on."""
        line = f"0::{path}\n" if self.version == 2 else f"9:name=systemd:/x\n4:cpu,memory:{path}\n0::/elsewhere\n"
        (self.proc / "cgroup").write_text(line)
        kind, options = ("cgroup2", "rw") if self.version == 2 else ("cgroup", "rw,cpu,memory")
        place = str(self.top).replace(" ", "\\040")
        lines = (
            f"31 23 0:28 / /proc rw - proc proc rw\n35 31 0:32 {root} {place} rw shared:9 - {kind} {kind} {options}\n"
        )
        (self.proc / "mountinfo").write_text(lines)
        return MemoryGroups(str(self.proc))

    def group(self, path: str, limit: int | None, used: int = 0, inactive: int = 0, active: int = 0, dirty: int = 0):
        where = self.top / path
        where.mkdir(parents=True, exist_ok=True)
        limit_name, used_name, stat = NAMES[self.version]
        none = str(UNLIMITED) if self.version == 1 else "max"
        (where / limit_name).write_text(f"{none if limit is None else limit}\n")
        (where / used_name).write_text(f"{used}\n")
        lines = zip(stat, (inactive, active, dirty), strict=True)
        (where / "memory.stat").write_text("anon 5\n" + "".join(f"{name} {value}\n" for name, value in lines))
        return where


@pytest.fixture(params=[1, 2])
def fake(tmp_path, request):
    return Fake(tmp_path, request.param)


def test_what_is_below_the_limit_less_a_reserve(fake):
    fake.group("a", 4 * GIB, 1 * GIB)
    groups = fake.member("/a")
    assert groups.room() == 3 * GIB - int(4 * GIB * 0.05)
    assert groups.room(floor=0) == 3 * GIB and groups.limit() == 4 * GIB


@pytest.mark.parametrize(("limit", "reserve"), [(300, 64), (100, 25), (2000, 100), (100_000, 256)])
def test_the_reserve(fake, limit, reserve):
    """5 % or 64 MiB, whichever is more, but of a small group a quarter, and never more than 256 MiB."""
    fake.group("a", limit * MIB)
    groups = fake.member("/a")
    assert groups.room() == (limit - reserve) * MIB
    assert groups.dirty() == reserve * MIB // 4, "writers leave three quarters of it to the daemon"


def test_the_clean_page_cache_counts_as_free(fake):
    fake.group("a", 1 * GIB, 1000 * MIB, inactive=300 * MIB, active=100 * MIB, dirty=150 * MIB)
    assert fake.member("/a").room(floor=0) == (24 + 250) * MIB


def test_the_tightest_of_all_above_counts(fake):
    fake.group("a/b/c", None, 5)
    fake.group("a/b", 900 * MIB, 100 * MIB)
    fake.group("a", 2 * GIB, 1900 * MIB)
    fake.group(".", None)
    assert fake.member("/a/b/c").room(floor=0) == 148 * MIB


def test_a_container_sees_its_own_part_only(fake):
    """Version 1 without a namespace of its own names the group as the host does; with one, from its root."""
    fake.group(".", 512 * MIB, 12 * MIB)
    assert fake.member("/docker/1234", root="/docker/1234").room(floor=0) == 500 * MIB
    assert fake.member("/").room(floor=0) == 500 * MIB
    assert fake.member("/../elsewhere").room(floor=0) == 500 * MIB


@pytest.mark.parametrize("name", ["\r", "\x85", "\u2028", "\x1c", "\u3000", "\udcff", ""], ids=ascii)
def test_what_others_mount_has_any_name(fake, name):
    """Source and mount point of a line of mountinfo; its kernel escapes a newline, a tab and a space only."""
    fake.group("a", 4 * GIB, 1 * GIB)
    groups = fake.member("/a")
    path = fake.proc / "mountinfo"
    other = f"40 31 0:40 / /mnt{name}x rw shared:5 - tmpfs {name} rw,inode64\n"
    path.write_bytes((other + path.read_text()).encode("utf-8", "surrogateescape"))
    assert groups.room() == 3 * GIB - int(4 * GIB * 0.05)


def test_no_limit_and_no_groups(fake, tmp_path):
    fake.group("a", None, 5 * GIB)
    groups = fake.member("/a")
    assert (groups.room(), groups.limit(), groups.dirty()) == (None, None, None)
    assert MemoryGroups(str(tmp_path / "nothing")).room() is None


def test_memory_high_is_a_limit_too(tmp_path):
    fake = Fake(tmp_path, 2)
    (fake.group("a", 4 * GIB) / "memory.high").write_text(f"{1 * GIB}\n")
    assert fake.member("/a").room(floor=0) == 1 * GIB


def test_it_looks_seldom_and_subtracts_what_is_taken(fake, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(cgroups.time, "monotonic", lambda: clock[0])
    fake.group("a", 1 * GIB)
    groups = fake.member("/a")
    assert groups.room(floor=0) == 1 * GIB
    groups.take(100 * MIB)
    fake.group("a", 1 * GIB, 900 * MIB)
    assert groups.room(floor=0) == 924 * MIB, "as last seen, less what was taken"
    clock[0] += 0.11
    assert groups.room(floor=0) == 124 * MIB
    fake.group("a", 2 * GIB, 900 * MIB)
    clock[0] += 0.011
    assert groups.room(floor=0) == 1148 * MIB, "where room is scarce it looks more often"


def test_a_process_that_is_moved(fake, monkeypatch):
    fake.group("a", None)
    fake.group("b", 1 * GIB)
    groups = fake.member("/a")
    assert groups.room() is None
    fake.member("/b")
    groups.look()
    assert groups.room(floor=0) == 1 * GIB


def test_ram_has_no_more_room_than_the_group(fake, ram, monkeypatch):
    where = fake.group("a", 600 * MIB)
    monkeypatch.setattr(ram, "_groups", fake.member("/a"))
    assert ram.room(floor=0) <= 600 * MIB and ram.most == 600 * MIB
    ram.check_room(500 * MIB)
    with pytest.raises(ExhaustedError, match="in this process's memory cgroup"):
        ram.check_room(600 * MIB)
    (where / NAMES[fake.version][0]).write_text(f"{4 * GIB}\n")
    ram.check_room(600 * MIB)  # what is refused was looked at again
