# SPDX-License-Identifier: GPL-2.0-or-later
"""What is mounted, as mountinfo says."""

import errno
import os
from pathlib import Path

import pytest

from pkramfs.mounting import options as o
from pkramfs.mounting import syscalls


def test_a_line_of_mountinfo() -> None:
    line = (
        rb"36 35 0:39 / /mnt/a\040b\134c rw,nosuid,relatime shared:1 master:2 - fuse.pkramfs none ro,user_id=0" + b"\n"
    )
    found = syscalls._line(line)
    assert (found.dev, found.mountpoint, found.fstype) == (39, "/mnt/a b\\c", "fuse.pkramfs")
    assert found.flags == o.MS_NOSUID | o.MS_RELATIME | o.MS_RDONLY


def test_the_root_is_mounted() -> None:
    assert syscalls.mounted_at("/") is not None
    assert syscalls.mounted_at("/nowhere at all") is None
    assert not syscalls.is_dead("/")


def test_what_a_line_of_mountinfo_says_of_its_place() -> None:
    place, groups = b"/a\\040\xe9//deleted /m\xe9 ro,noexec,noatime", b"shared:7 master:2 propagate_from:5"
    found = syscalls._line(b"36 35 0:39 %b %b - fuse.x n rw,sync\n" % (place, groups))
    assert (found.id, found.parent, found.root) == (36, 35, "/a \udce9//deleted")
    assert found.mountpoint == "/m\udce9"
    assert found.own == o.MS_RDONLY | o.MS_NOEXEC | o.MS_NOATIME
    assert found.flags == found.own | o.MS_SYNCHRONOUS
    assert found.groups == {b"7", b"2"}


def line(number: int, parent: int, place: str, dev: int = 1) -> syscalls.Mounted:
    return syscalls.Mounted(dev, place, "x", 0, id=number, parent=parent)


def test_what_covers_and_what_hides_a_mount() -> None:
    root, tree, inside = line(1, 0, "/"), line(2, 1, "/a/b"), line(3, 2, "/a/b/c/d")
    over, above, beside = line(4, 2, "/a/b"), line(5, 1, "/a"), line(6, 1, "/a/bb")
    assert syscalls.Table([root, tree, inside, beside]).hidden(tree) is None
    assert syscalls.Table([root, tree, inside]).cover(tree) is None
    assert list(syscalls.Table([root, tree, inside]).above(inside)) == [tree, root]
    covered = syscalls.Table([root, tree, inside, over])
    assert (covered.cover(tree), covered.hidden(tree), covered.hidden(inside)) == (over, None, over)
    hidden = syscalls.Table([root, tree, inside, above])
    assert (hidden.cover(tree), hidden.hidden(tree), hidden.hidden(inside)) == (None, above, above)


def test_a_deep_stack_of_mounts_is_no_recursion() -> None:
    stack = [line(number, number - 1, "/m") for number in range(1, 3000)]
    table = syscalls.Table(stack)
    assert table.hidden(stack[-1]) is None
    assert sum(1 for _ in table.above(stack[-1])) == 2998


@pytest.mark.parametrize("planted", ["last", "above"])
@pytest.mark.parametrize("directory", [True, False])
def test_a_symbolic_link_on_the_way_is_not_followed(tmp_path: Path, planted: str, directory: bool) -> None:
    (tmp_path / "real" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = tmp_path / ("link" if planted == "last" else "link/m")
    with pytest.raises(OSError, match=f"symbolic link by now: '{tmp_path / 'link'}'") as caught:
        syscalls.hold(str(path), directory=directory)
    assert caught.value.errno == errno.ELOOP


def test_what_is_held_is_what_is_compared(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    (tmp_path / "file").touch()
    found = place.stat()
    with syscalls.holding(str(place)) as held:
        (tmp_path / "a").rename(tmp_path / "c")
        assert syscalls.identity(held) == (found.st_dev, found.st_ino)
        assert os.readlink(syscalls.held_path(held)) == str(tmp_path / "c" / "b")
    with pytest.raises(NotADirectoryError):
        syscalls.hold(str(tmp_path / "file"))
    os.close(syscalls.hold(str(tmp_path / "file"), directory=False))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        syscalls.hold(str(tmp_path / "none" / "x"))


def test_an_identity_without_a_number_is_the_device() -> None:
    assert syscalls.same((1, 2), (1, 2)) and syscalls.same((1, 2), (1, None))
    assert not syscalls.same((1, 2), (1, 3)) and not syscalls.same((1, 2), (2, None))


def test_the_mount_of_what_is_held(tmp_path: Path) -> None:
    with syscalls.holding("/proc") as held:
        proc = syscalls.mounted_at("/proc")
        assert proc is not None and syscalls.mount_id(held) == proc.id


def made(id_: int, place: str, dev: int = 7, fstype: str = syscalls.FSTYPE) -> syscalls.Mounted:
    return syscalls.Mounted(dev, place, fstype, 0, id=id_)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([made(5, "/x")], [made(5, "/x"), made(6, "/a", 8), made(9, "/b", 9)], made(6, "/a", 8)),
        ([made(5, "/x")], [made(5, "/a"), made(6, "/b", 8)], made(5, "/a")),
        ([made(5, "/a")], [made(5, "/a"), made(6, "/b", 8)], made(5, "/a")),
        ([made(5, "/a")], [made(5, "/a"), made(6, "/a", 8)], made(6, "/a", 8)),
        ([made(5, "/x")], [made(5, "/x"), made(6, "/moved", 8)], made(6, "/moved", 8)),
        ([made(5, "/x")], [made(5, "/x"), made(6, "/a", 8, "tmpfs")], None),
    ],
    ids=["beside another", "an id again", "id, device and place again", "over another", "moved", "none"],
)
def test_the_mount_that_was_made(
    monkeypatch: pytest.MonkeyPatch,
    before: list[syscalls.Mounted],
    now: list[syscalls.Mounted],
    expected: syscalls.Mounted | None,
) -> None:
    """The kernel gives ids again at once: in two tests that ran side by side, a mount took the id of one that ended."""
    monkeypatch.setattr(syscalls, "mounts", lambda: now)
    assert syscalls.mounted_since(before, "/a") == expected
