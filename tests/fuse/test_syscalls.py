"""What is mounted, as mountinfo says."""

from pkramfs.fuse import options as o
from pkramfs.fuse import syscalls


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
