# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong or unguarded in the original's mounts, by number: it cannot happen here."""

import errno
import os

import pytest

from pkramfs.control.protocol import RefusedError

pytestmark = pytest.mark.mount


def refused(done, *parts):
    assert done.returncode != 0 and done.stderr.count("\n") == 1, done
    for part in parts:
        assert part in done.stderr


def test_d6_a_name_belongs_to_one_mount(lab):
    """In the original the second mount takes the node, and the same pages are in two files."""
    one = lab.mount("one")
    (one / "file").write_bytes(b"x" * 5000)
    lab.remount(one, "preserve,ro")
    refused(lab.helper(lab.dir("two"), "pkram=one"), f"one is mounted on {one} already")
    refused(lab.run("ctl", "free", "one"), "is in use")
    assert (one / "file").read_bytes() == b"x" * 5000
    lab.umount(one)
    two = lab.mount("two", "pkram=one")
    assert (two / "file").read_bytes() == b"x" * 5000


def test_d10_a_name_given_later_is_refused(lab):
    """In the original it is taken, files made before may be swapped, and are zeros after the kexec."""
    plain = lab.mount("plain", "size=16M")
    (plain / "file").write_bytes(b"x" * 5000)
    refused(lab.helper(plain, "remount,pkram=late,preserve,ro"), "cannot be changed by a remount")
    (plain / "file").write_bytes(b"still writable")
    assert lab.nodes() == []


def test_d27_preserve_on_the_first_mount_is_not_ignored(lab):
    refused(lab.helper(lab.dir("one"), "pkram=one,preserve,ro"), "mount first")
    assert not os.path.ismount(lab.dir("one"))


def test_d28_a_remount_that_fails_changes_nothing(lab):
    """In the original the mount has its new name, although the remount failed."""
    one = lab.mount("one")
    refused(lab.helper(one, "remount,pkram=two,preserve"), "cannot be changed by a remount")
    assert lab.status(one)["name"] == "one"
    with open(one / "busy", "w"):
        refused(lab.helper(one, "remount,preserve,ro"), "busy")
    assert not os.statvfs(one).f_flag & os.ST_RDONLY
    lab.remount(one, "preserve,ro")
    assert lab.nodes() == ["shmem-one"]


def test_d29_a_failure_says_what_it_is(lab):
    """In the original every failed remount is EINVAL, and only the log knows more."""
    one, plain = lab.mount("one"), lab.mount("plain", "size=1M")
    codes = {}
    for path in (one, plain):
        with open(path / "busy", "w"), pytest.raises(RefusedError) as caught:
            lab.call(path, "preserve")
        codes[path.name] = caught.value.errno
    assert codes == {"one": errno.EBUSY, "plain": errno.EINVAL}
