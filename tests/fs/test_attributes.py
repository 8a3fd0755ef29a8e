# SPDX-License-Identifier: GPL-2.0-or-later
"""Attributes, xattrs and ACLs, as tmpfs has them."""

import errno

import pytest

from pkramfs.fs import acl
from pkramfs.fs.inode import CHOWN, FOWNER, FSETID, ROOT, SYS_ADMIN, Credentials

USER = Credentials(uid=1000, gid=100, umask=0o022)


def refused(code: int):
    return pytest.raises(OSError, match=rf"^\[Errno {code}\]")


@pytest.fixture
def file(tree, sh):
    return tree.inode(sh.write(b"f", b"data"))


# -- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "mtime_moves", "ctime_moves"),
    [
        ({"mode": 0o600}, False, True),
        ({"mode": 0o644}, False, True),
        ({"uid": 5}, False, True),
        ({"gid": 5}, False, True),
        ({"size": 2}, True, True),
        ({"size": 9}, True, True),
        ({"size": 4}, True, True),
        ({"atime": 5}, False, True),
        ({"mtime": 5}, True, True),
        ({}, False, False),
    ],
)
def test_which_change_sets_which_time(tree, file, change, mtime_moves, ctime_moves) -> None:
    before = (file.mtime, file.ctime)
    tree.setattr(file.ino, **change)
    assert (file.mtime != before[0], file.ctime != before[1]) == (mtime_moves, ctime_moves)


def test_times_are_kept_to_the_nanosecond_and_before_1970(tree, file) -> None:
    tree.setattr(file.ino, atime=-1, mtime=1_234_567_890_123_456_789, ctime=3)
    assert (file.atime, file.mtime, file.ctime) == (-1, 1_234_567_890_123_456_789, 3)


def test_xattrs_set_ctime_only(tree, file) -> None:
    before = (file.mtime, file.ctime)
    tree.setxattr(file.ino, b"user.a", b"1")
    assert file.mtime == before[0] and file.ctime > before[1]


# -- owner and mode -------------------------------------------------------------------------------


def test_chmod_keeps_the_type(tree, file) -> None:
    tree.setattr(file.ino, mode=0o107777)
    assert file.mode == 0o107777
    tree.setattr(file.ino, mode=0o040123)
    assert file.mode == 0o100123


@pytest.mark.parametrize(("mode", "after"), [(0o6755, 0o755), (0o6745, 0o2745), (0o2755, 0o755), (0o4644, 0o644)])
def test_chown_drops_set_id_bits_even_for_root(tree, file, mode, after) -> None:
    tree.setattr(file.ino, mode=mode)
    tree.setxattr(file.ino, b"security.capability", b"cap")
    tree.setattr(file.ino, gid=7)
    assert file.mode & 0o7777 == after
    assert tree.listxattr(file.ino) == []


def test_a_copy_gets_its_owner_and_keeps_its_bits(tree, file) -> None:
    tree.setattr(file.ino, mode=0o6755)
    tree.setxattr(file.ino, b"security.capability", b"cap")
    tree.setattr(file.ino, uid=5, gid=7, keep=True)
    assert (file.mode & 0o7777, file.uid, tree.listxattr(file.ino)) == (0o6755, 5, [b"security.capability"])


def test_chown_of_a_directory_keeps_its_bits(tree, sh) -> None:
    ino = sh.mkdir(b"d")
    tree.setattr(ino, mode=0o6755)
    tree.setattr(ino, uid=5)
    assert tree.inode(ino).mode & 0o7777 == 0o6755


@pytest.mark.parametrize(("mode", "after"), [(0o6755, 0o755), (0o6745, 0o745), (0o4644, 0o644), (0o755, 0o755)])
def test_chown_to_nobody_else_drops_bits_and_sets_ctime(tree, file, mode, after) -> None:
    tree.setattr(file.ino, mode=mode, uid=1000, gid=7)
    tree.setattr(file.ino, mode=mode)
    tree.set_nothing(file.ino, 5, USER)
    assert (file.mode & 0o7777, file.ctime) == (after, 5)


def test_chown_to_nobody_else_takes_bits_only_from_ones_own(tree, file) -> None:
    tree.setattr(file.ino, mode=0o4755)
    with refused(errno.EPERM):
        tree.set_nothing(file.ino, 5, USER)
    assert file.mode & 0o7777 == 0o4755 and file.ctime != 5
    tree.set_nothing(file.ino, 5, ROOT)
    assert file.mode & 0o7777 == 0o755


@pytest.mark.parametrize("kind", [0o010000, 0o020000, 0o060000, 0o140000])
def test_chown_to_nobody_else_of_what_is_no_file_comes_without_ctime(tree, kind) -> None:
    inode = tree.mknod(1, b"x", kind | 0o755)
    tree.setattr(inode.ino, mode=0o4755, ctime=5)
    tree.set_nothing(inode.ino, None, ROOT)
    assert inode.mode & 0o7777 == 0o755 and inode.ctime > 5


class Container(Credentials):
    """Root without all of root's capabilities, and others with some."""

    have: tuple[int, ...] = ()

    def capable(self, capability: int) -> bool:
        return capability in self.have


def test_rules_ask_for_capabilities_not_for_root(tree, file) -> None:
    def held(*some: int, uid: int = 0) -> Container:
        made = Container(uid=uid, gid=7)
        made.have = some
        return made

    tree.setxattr(file.ino, b"trusted.a", b"1")
    assert tree.listxattr(file.ino, held()) == [] and tree.listxattr(file.ino, held(SYS_ADMIN, uid=5)) == [b"trusted.a"]
    tree.setattr(file.ino, mode=0o6755, uid=1)
    with refused(errno.EPERM):
        tree.setattr(file.ino, gid=9, caller=held(CHOWN))
    with refused(errno.EPERM):
        tree.set_nothing(file.ino, 5, held(CHOWN))
    tree.setattr(file.ino, gid=9, caller=held(uid=5))  # whose file it is behind an idmapped mount
    assert file.mode & 0o7777 == 0o755
    tree.setattr(file.ino, mode=0o6755)
    tree.setattr(file.ino, size=1, caller=held(FSETID, uid=5))
    tree.set_nothing(file.ino, None, held(FSETID, uid=5))
    assert file.mode & 0o7777 == 0o6755
    tree.setattr(file.ino, size=2, caller=held(FOWNER))
    assert file.mode & 0o7777 == 0o755
    tree.setattr(file.ino, mode=0o6755)
    tree.set_nothing(file.ino, 5, held(FOWNER, uid=5))
    assert file.mode & 0o7777 == 0o755


def test_a_write_takes_bits_unless_it_is_roots(tree, file) -> None:
    tree.setattr(file.ino, mode=0o6755, ctime=5)
    tree.set_nothing(file.ino, None, ROOT)
    assert file.mode & 0o7777 == 0o6755
    tree.set_nothing(file.ino, None, USER)
    assert (file.mode & 0o7777, file.ctime) == (0o755, 5)


def test_truncate_drops_bits_unless_root_does_it(tree, file) -> None:
    tree.setattr(file.ino, mode=0o6755)
    tree.setattr(file.ino, size=1)
    assert file.mode & 0o7777 == 0o6755
    tree.setattr(file.ino, size=0, caller=USER)
    assert file.mode & 0o7777 == 0o755


# -- xattrs ---------------------------------------------------------------------------------------


def test_labels_are_none_until_one_is_stored(tree, file, sh, round_trip) -> None:
    """ls(1) takes the answer for all files of a mount; it must not once there is a label."""
    other = sh.write(b"other")
    for code, store in ((errno.EOPNOTSUPP, False), (errno.ENODATA, True)):
        if store:
            tree.setxattr(other, b"security.selinux", b"label")
        with pytest.raises(OSError) as refused:
            tree.getxattr(file.ino, b"security.selinux")
        assert refused.value.errno == code
    assert tree.getxattr(other, b"security.selinux") == b"label" and round_trip(tree).labelled


def test_xattr_flags(tree, file) -> None:
    with refused(errno.ENODATA):
        tree.setxattr(file.ino, b"user.a", b"1", 2)
    tree.setxattr(file.ino, b"user.a", b"1", 1)
    with refused(errno.EEXIST):
        tree.setxattr(file.ino, b"user.a", b"2", 1)
    tree.setxattr(file.ino, b"user.a", b"", 2)
    assert tree.getxattr(file.ino, b"user.a") == b""
    tree.removexattr(file.ino, b"user.a")
    for call in (tree.removexattr, tree.getxattr):
        with refused(errno.ENODATA):
            call(file.ino, b"user.a")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"other.a", errno.EOPNOTSUPP),
        (b"system.other", errno.EOPNOTSUPP),
        (b"user.", errno.EINVAL),
        (b"plain", errno.EOPNOTSUPP),
        (b"user." + b"x" * 251, errno.ERANGE),
    ],
)
def test_xattr_names_that_tmpfs_does_not_have(tree, file, name, code) -> None:
    with refused(code):
        tree.setxattr(file.ino, name, b"1")
    with refused(code):
        tree.getxattr(file.ino, name)


def test_xattr_sizes(tree, file) -> None:
    tree.setxattr(file.ino, b"user." + b"x" * 250, b"y" * 65536)
    with refused(errno.E2BIG):
        tree.setxattr(file.ino, b"user.a", b"y" * 65537)


def test_user_xattrs_are_for_files_and_directories(tree) -> None:
    fifo = tree.mknod(1, b"p", 0o010644).ino
    with refused(errno.EPERM):
        tree.setxattr(fifo, b"user.a", b"1")
    tree.setxattr(fifo, b"security.a", b"1")
    tree.setxattr(1, b"user.a", b"1")


def test_list_of_xattrs(tree, file) -> None:
    for name in (b"user.b", b"trusted.a", b"user.a", b"security.z"):
        tree.setxattr(file.ino, name, b"1")
    tree.setxattr(file.ino, acl.ACCESS, acl.pack(NAMED))
    assert tree.listxattr(file.ino) == [acl.ACCESS, b"user.b", b"user.a", b"trusted.a", b"security.z"]
    assert tree.listxattr(file.ino, USER) == [acl.ACCESS, b"user.b", b"user.a", b"security.z"]


def test_xattrs_take_inode_space_to_the_byte(tree, file) -> None:
    tree.limits.max_inodes = 3
    before = tree.limits.inode_space
    tree.setxattr(file.ino, b"user.a", b"x" * 500)
    assert tree.limits.inode_space == before + 40 + 6 + 500
    with refused(errno.ENOSPC):
        tree.setxattr(file.ino, b"user.b", b"x" * 500)
    tree.setxattr(file.ino, b"user.a", b"")
    tree.setxattr(file.ino, b"user.b", b"x" * 500)
    tree.unlink(1, b"f")
    assert tree.limits.inode_space == 1024


# -- ACLs -----------------------------------------------------------------------------------------

UNDEFINED = 0xFFFFFFFF
PLAIN = [(1, 6, UNDEFINED), (4, 4, UNDEFINED), (32, 0, UNDEFINED)]
NAMED = [(1, 7, UNDEFINED), (2, 6, 1000), (4, 5, UNDEFINED), (8, 7, 50), (16, 7, UNDEFINED), (32, 1, UNDEFINED)]


def test_an_acl_sets_the_mode(tree, file) -> None:
    tree.setxattr(file.ino, acl.ACCESS, acl.pack(NAMED))
    assert file.mode & 0o777 == 0o771
    assert acl.parse(tree.getxattr(file.ino, acl.ACCESS)) == NAMED


def test_an_acl_that_is_no_more_than_a_mode_is_not_kept(tree, file) -> None:
    tree.setxattr(file.ino, acl.ACCESS, acl.pack(NAMED))
    tree.setxattr(file.ino, acl.ACCESS, acl.pack(PLAIN))
    assert file.mode & 0o777 == 0o640
    with refused(errno.ENODATA):
        tree.getxattr(file.ino, acl.ACCESS)
    tree.removexattr(file.ino, acl.ACCESS)  # absent: no error


def test_chmod_sets_the_mask(tree, file) -> None:
    tree.setxattr(file.ino, acl.ACCESS, acl.pack(NAMED))
    tree.setattr(file.ino, mode=0o640)
    entries = dict((tag, perm) for tag, perm, _ in acl.parse(tree.getxattr(file.ino, acl.ACCESS)))
    assert (entries[1], entries[16], entries[32], entries[4]) == (6, 4, 0, 5)


def test_default_acls_replace_the_umask_and_are_handed_down(tree, sh) -> None:
    folder = sh.mkdir(b"d")
    tree.setxattr(folder, acl.DEFAULT, acl.pack(NAMED))
    made = tree.create(folder, b"f", 0o666, USER)
    assert made.mode & 0o777 == 0o660
    entries = {tag: perm for tag, perm, _ in acl.parse(tree.getxattr(made.ino, acl.ACCESS))}
    assert entries == {1: 6, 2: 6, 4: 5, 8: 7, 16: 6, 32: 0}
    with refused(errno.ENODATA):
        tree.getxattr(made.ino, acl.DEFAULT)
    below = tree.mkdir(folder, b"below", 0o777, USER)
    assert acl.parse(tree.getxattr(below.ino, acl.DEFAULT)) == NAMED
    assert below.mode & 0o777 == 0o771
    link = tree.symlink(folder, b"l", b"x")
    assert link.xattrs is None and link.mode & 0o777 == 0o777


def test_a_plain_default_acl_gives_files_a_mode_and_no_acl(tree, sh) -> None:
    folder = sh.mkdir(b"d")
    tree.setxattr(folder, acl.DEFAULT, acl.pack(PLAIN))
    made = tree.create(folder, b"f", 0o666, Credentials(umask=0o777))
    assert (made.mode & 0o777, made.xattrs) == (0o640, None)


def test_default_acls_are_for_directories(tree, file) -> None:
    with refused(errno.EACCES):
        tree.setxattr(file.ino, acl.DEFAULT, acl.pack(NAMED))
    tree.removexattr(file.ino, acl.DEFAULT)
    link = tree.symlink(1, b"l", b"x").ino
    with refused(errno.EOPNOTSUPP):
        tree.getxattr(link, acl.ACCESS)


@pytest.mark.parametrize(
    "entries",
    [
        PLAIN[:2],
        [PLAIN[0], *PLAIN],
        [*PLAIN, (2, 7, 5)],
        [(1, 8, UNDEFINED), *PLAIN[1:]],
        [PLAIN[0], (2, 7, 5), *PLAIN[1:]],
        [*PLAIN, (64, 1, 1)],
    ],
)
def test_wrong_acls(tree, file, entries) -> None:
    with refused(errno.EINVAL):
        tree.setxattr(file.ino, acl.ACCESS, acl.pack(entries))


def test_acls_of_other_versions_or_lengths(tree, file) -> None:
    good = acl.pack(NAMED)
    with refused(errno.EOPNOTSUPP):
        tree.setxattr(file.ino, acl.ACCESS, b"\1" + good[1:])
    for value in (good[:-1], b"", b"\2"):
        with refused(errno.EINVAL):
            tree.setxattr(file.ino, acl.ACCESS, value)


def test_setting_an_acl_from_outside_the_group_drops_setgid(tree, file) -> None:
    tree.setattr(file.ino, mode=0o2755)
    tree.setxattr(file.ino, acl.ACCESS, acl.pack(NAMED), caller=USER)
    assert file.mode & 0o7777 == 0o771
