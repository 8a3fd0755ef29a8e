# SPDX-License-Identifier: GPL-2.0-or-later
"""Names, as tmpfs has them."""

import errno
import itertools
import stat

import pytest

from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT

USER = Credentials(uid=1000, gid=100, umask=0o022)


def refused(code: int):
    return pytest.raises(OSError, match=rf"^\[Errno {code}\]")


def test_create_and_look_up(tree) -> None:
    inode = tree.create(1, b"a", 0o666, USER)
    assert tree.lookup(1, b"a") is inode
    assert tree.lookup(1, b"b") is None
    assert (inode.mode, inode.uid, inode.gid, inode.nlink, inode.size) == (stat.S_IFREG | 0o644, 1000, 100, 1, 0)


def test_dot_and_dotdot(tree, sh) -> None:
    ino = sh.mkdir(b"d")
    assert tree.lookup(ino, b".").ino == ino
    assert tree.lookup(ino, b"..").ino == 1
    assert tree.lookup(1, b"..").ino == 1


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFLNK])
def test_anything_is_found_by_its_number_and_a_dot(tree, kind) -> None:
    """What the kernel asks for when it has only a file handle."""
    inode = tree.symlink(1, b"a", b"b") if kind == stat.S_IFLNK else tree.mknod(1, b"a", kind | 0o600)
    inode.lookups = 1
    assert tree.lookup(inode.ino, b".") is inode
    for name in (b"..", b"b"):
        with refused(errno.ENOTDIR):
            tree.lookup(inode.ino, name)
    tree.unlink(1, b"a")
    with refused(errno.ESTALE):  # the kernel has let go of it, and its FORGET is on the way
        tree.lookup(inode.ino, b".")


def test_a_removed_directory_is_not_found_by_a_dot(tree, sh) -> None:
    ino = sh.mkdir(b"d")
    tree.inode(ino).lookups = 1
    tree.rmdir(1, b"d")
    with refused(errno.ESTALE):
        tree.lookup(ino, b".")


@pytest.mark.parametrize("name", [b"a/b", b"a\0b", b""])
def test_impossible_names_are_refused(tree, name) -> None:
    with refused(errno.EINVAL):
        tree.create(1, name, 0o644)


@pytest.mark.parametrize("name", [b".", b".."])
def test_dots_exist_already(tree, name) -> None:
    with refused(errno.EEXIST):
        tree.mkdir(1, name, 0o755)


def test_names_are_up_to_255_bytes_of_anything(tree, sh) -> None:
    longest = bytes([0xFF, 0xFE, 10]) * 85
    ino = sh.write(longest)
    assert tree.lookup(1, longest).ino == ino
    for call in (
        lambda: tree.create(1, longest + b"x", 0o644),
        lambda: tree.lookup(1, longest + b"x"),
        lambda: tree.unlink(1, longest + b"x"),
        lambda: tree.rename(1, longest, 1, longest + b"x"),
        lambda: tree.link(ino, 1, longest + b"x"),
    ):
        with refused(errno.ENAMETOOLONG):
            call()


def test_directory_counts_and_times(tree, sh) -> None:
    root = tree.root
    before = root.mtime
    one, two = sh.mkdir(b"one"), sh.mkdir(b"two")
    assert (root.nlink, root.size) == (4, 80)
    assert root.mtime == root.ctime == tree.inode(two).ctime > before
    sh.mkdir(b"sub", parent=one)
    assert tree.inode(one).nlink == 3
    with refused(errno.ENOTEMPTY):
        tree.rmdir(1, b"one")
    tree.rmdir(1, b"two")
    assert (root.nlink, root.size) == (3, 60)


def test_files_and_directories_are_not_confused(tree, sh) -> None:
    sh.mkdir(b"d")
    ino = sh.write(b"f")
    with refused(errno.EISDIR):
        tree.unlink(1, b"d")
    with refused(errno.ENOTDIR):
        tree.rmdir(1, b"f")
    with refused(errno.ENOTDIR):
        tree.create(ino, b"x", 0o644)
    with refused(errno.ENOENT):
        tree.unlink(1, b"absent")
    with refused(errno.EEXIST):
        tree.create(1, b"d", 0o644)


def test_setgid_directories_hand_down_their_group(tree) -> None:
    folder = tree.mkdir(1, b"shared", 0o755)
    tree.setattr(folder.ino, mode=0o2775, gid=7)
    assert tree.create(folder.ino, b"f", 0o644, USER).gid == 7
    below = tree.mkdir(folder.ino, b"d", 0o755, USER)
    assert (below.gid, below.mode & 0o7777) == (7, 0o2755)
    assert tree.create(folder.ino, b"g", 0o644, USER).mode & 0o7777 == 0o644


def test_umask(tree) -> None:
    strict = Credentials(umask=0o077)
    assert tree.create(1, b"f", 0o666, strict).mode & 0o777 == 0o600
    assert tree.mkdir(1, b"d", 0o777, strict).mode & 0o777 == 0o700
    assert tree.symlink(1, b"l", b"f", strict).mode == stat.S_IFLNK | 0o777


@pytest.mark.parametrize(
    ("kind", "rdev", "kept"),
    [(stat.S_IFIFO, 5, 0), (stat.S_IFSOCK, 5, 0), (stat.S_IFCHR, 0x0105, 0x0105), (stat.S_IFBLK, 0x0800, 0x0800)],
)
def test_special_files(tree, kind, rdev, kept) -> None:
    inode = tree.mknod(1, b"n", kind | 0o644, rdev)
    assert (inode.kind, inode.rdev) == (kind, kept)
    with refused(errno.EINVAL):
        tree.write(inode.ino, 0, b"x")


def test_mknod_makes_no_directories_or_links(tree) -> None:
    with refused(errno.EPERM):
        tree.mknod(1, b"d", stat.S_IFDIR | 0o755)
    with refused(errno.EINVAL):
        tree.mknod(1, b"l", stat.S_IFLNK | 0o777)


def test_symlinks(tree) -> None:
    inode = tree.symlink(1, b"l", b"\xff/x")
    assert (tree.readlink(inode.ino), inode.size, inode.blocks) == (b"\xff/x", 3, 0)
    longer = tree.symlink(1, b"m", b"y" * 128)
    assert (longer.blocks, tree.limits.pages) == (8, 1)
    with refused(errno.ENAMETOOLONG):
        tree.symlink(1, b"n", b"y" * 4096)
    with refused(errno.EINVAL):
        tree.readlink(1)
    tree.unlink(1, b"m")
    assert tree.limits.pages == 0


def test_hard_links(tree, sh) -> None:
    ino = sh.write(b"a", b"data")
    tree.link(ino, 1, b"b")
    assert tree.inode(ino).nlink == 2
    tree.unlink(1, b"a")
    assert sh.content(tree.lookup(1, b"b").ino) == b"data"
    folder = sh.mkdir(b"d")
    with refused(errno.EPERM):
        tree.link(folder, 1, b"e")
    with refused(errno.EEXIST):
        tree.link(ino, 1, b"d")


def test_a_deleted_file_lives_while_it_is_open(tree, sh) -> None:
    ino = sh.write(b"a", b"data")
    handle = tree.open(ino, 2)
    tree.unlink(1, b"a")
    assert tree.write(handle, 4, b"more") == 4
    assert sh.content(ino) == b"datamore"
    assert tree.deleted() == [b"/a (deleted)"]
    assert tree.writers() == [b"/a (deleted)"]
    with refused(errno.ENOENT):
        tree.link(ino, 1, b"again")
    tree.release(handle)
    with refused(errno.ESTALE):
        tree.inode(ino)
    assert tree.limits.pages == 0


def test_a_deleted_file_lives_while_the_kernel_refers_to_it(tree, sh) -> None:
    ino = sh.write(b"a", b"data")
    tree.inode(ino).lookups = 3
    tree.unlink(1, b"a")
    tree.forget(ino, 2)
    assert sh.content(ino) == b"data"
    tree.forget(ino, 1)
    assert ino not in tree.inodes


def test_nothing_is_created_in_a_removed_directory(tree, sh) -> None:
    ino = sh.mkdir(b"d")
    tree.inode(ino).lookups = 1
    tree.rmdir(1, b"d")
    for call in (
        lambda: tree.create(ino, b"f", 0o644),
        lambda: tree.mkdir(ino, b"f", 0o644),
        lambda: tree.symlink(ino, b"f", b"x"),
    ):
        with refused(errno.ENOENT):
            call()
    assert tree.lookup(ino, b"f") is None
    assert tree.inode(ino).nlink == 0
    tree.forget(ino)


# -- rename ---------------------------------------------------------------------------------------


def make(tree, kind: str, name: bytes) -> int:
    if kind == "file":
        return tree.create(1, name, 0o644).ino
    if kind == "link":
        return tree.symlink(1, name, b"x").ino
    if kind == "fifo":
        return tree.mknod(1, name, stat.S_IFIFO | 0o644).ino
    ino = tree.mkdir(1, name, 0o755).ino
    if kind == "full":
        tree.create(ino, b"inside", 0o644)
    return ino


KINDS = ["file", "link", "fifo", "empty", "full"]
PAIRS = list(itertools.product(KINDS, KINDS))


@pytest.mark.parametrize(("kind", "over"), PAIRS)
def test_rename_over(tree, kind, over) -> None:
    source, target = make(tree, kind, b"a"), make(tree, over, b"b")
    folder, replaced_folder = kind in ("empty", "full"), over in ("empty", "full")
    if folder and not replaced_folder:
        expected = errno.ENOTDIR
    elif not folder and replaced_folder:
        expected = errno.EISDIR
    else:
        expected = errno.ENOTEMPTY if over == "full" else 0
    if expected:
        with refused(expected):
            tree.rename(1, b"a", 1, b"b")
        assert tree.lookup(1, b"b").ino == target
        return
    tree.rename(1, b"a", 1, b"b")
    assert tree.lookup(1, b"a") is None
    assert tree.lookup(1, b"b").ino == source
    assert target not in tree.inodes


@pytest.mark.parametrize(("kind", "over"), PAIRS)
def test_rename_exchange_swaps_any_two(tree, sh, kind, over) -> None:
    below = sh.mkdir(b"below")
    one, two = make(tree, kind, b"a"), make(tree, over, b"x")
    tree.rename(1, b"x", below, b"b")
    tree.rename(1, b"a", below, b"b", RENAME_EXCHANGE)
    assert tree.lookup(1, b"a").ino == two
    assert tree.lookup(below, b"b").ino == one
    if kind in ("empty", "full"):
        assert tree.lookup(one, b"..").ino == below
    if over in ("empty", "full"):
        assert tree.lookup(two, b"..").ino == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rename_whiteout_leaves_a_device(tree, sh, kind) -> None:
    ino = make(tree, kind, b"a")
    below = sh.mkdir(b"below")
    tree.rename(1, b"a", below, b"b", RENAME_WHITEOUT, USER)
    white = tree.lookup(1, b"a")
    assert (white.mode, white.rdev, white.uid) == (stat.S_IFCHR, 0, 1000)
    assert tree.lookup(below, b"b").ino == ino


@pytest.mark.parametrize(("kind", "over"), PAIRS)
def test_rename_noreplace(tree, kind, over) -> None:
    make(tree, kind, b"a")
    make(tree, over, b"b")
    with refused(errno.EEXIST):
        tree.rename(1, b"a", 1, b"b", RENAME_NOREPLACE)
    tree.rename(1, b"a", 1, b"c", RENAME_NOREPLACE)


def test_rename_flags_that_contradict(tree, sh) -> None:
    sh.write(b"a")
    for flags in (RENAME_EXCHANGE | RENAME_NOREPLACE, RENAME_EXCHANGE | RENAME_WHITEOUT, 8):
        with refused(errno.EINVAL):
            tree.rename(1, b"a", 1, b"b", flags)
    with refused(errno.ENOENT):
        tree.rename(1, b"a", 1, b"b", RENAME_EXCHANGE)


def test_rename_moves_a_directory_with_its_dotdot(tree, sh) -> None:
    one, two = sh.mkdir(b"one"), sh.mkdir(b"two")
    moved = sh.mkdir(b"d", parent=one)
    tree.rename(one, b"d", two, b"d")
    assert tree.lookup(moved, b"..").ino == two
    assert (tree.inode(one).nlink, tree.inode(two).nlink) == (2, 3)


def test_a_directory_cannot_go_below_itself(tree, sh) -> None:
    one = sh.mkdir(b"one")
    two = sh.mkdir(b"two", parent=one)
    for target in (one, two):
        with refused(errno.EINVAL):
            tree.rename(1, b"one", target, b"x")
    with refused(errno.ENOTEMPTY):
        tree.rename(one, b"two", 1, b"one")
    with refused(errno.EINVAL):
        tree.rename(one, b"two", 1, b"one", RENAME_EXCHANGE)


def test_rename_to_another_name_of_the_same_file_does_nothing(tree, sh) -> None:
    ino = sh.write(b"a")
    tree.link(ino, 1, b"b")
    tree.rename(1, b"a", 1, b"b")
    assert sh.listing() == [b"b", b"a"]


def test_rename_times(tree, sh) -> None:
    ino, victim = sh.write(b"a"), sh.write(b"b")
    below = sh.mkdir(b"d")
    tree.link(victim, 1, b"keep")
    earlier = tree.root.mtime
    tree.rename(1, b"b", below, b"b")
    tree.rename(1, b"a", below, b"b")
    stamps = {tree.root.mtime, tree.root.ctime, tree.inode(below).mtime, tree.inode(ino).ctime}
    assert stamps == {tree.inode(victim).ctime} and stamps.pop() > earlier


# -- limits ---------------------------------------------------------------------------------------


def test_nr_inodes_counts_links_too(tree, sh) -> None:
    tree.limits.max_inodes = 4  # the root is one
    ino = sh.write(b"a")
    sh.mkdir(b"b")
    tree.link(ino, 1, b"c")
    for call in (
        lambda: tree.create(1, b"d", 0o644),
        lambda: tree.mkdir(1, b"d", 0o755),
        lambda: tree.symlink(1, b"d", b"x"),
        lambda: tree.link(ino, 1, b"d"),
        lambda: tree.rename(1, b"a", 1, b"z", RENAME_WHITEOUT),
    ):
        with refused(errno.ENOSPC):
            call()
    assert tree.statfs().files_free == 0
    tree.unlink(1, b"c")
    assert (tree.statfs().files, tree.statfs().files_free) == (4, 1)
    sh.write(b"d")


def test_a_long_symlink_needs_a_page(tree) -> None:
    tree.limits.max_pages = 1
    tree.symlink(1, b"a", b"x" * 128)
    with refused(errno.ENOSPC):
        tree.symlink(1, b"b", b"x" * 128)
    tree.symlink(1, b"b", b"x" * 127)
    assert tree.limits.inode_space == 3 * 1024


def test_remounting_with_other_limits() -> None:
    limits = Limits(10, 10)
    limits.pages, limits.inode_space = 5, 5 * 1024
    limits.resize(5, 5)
    limits.resize(0, 0)
    for wrong in ((4, None), (None, 4)):
        with refused(errno.EINVAL):
            limits.resize(*wrong)
    unlimited = Limits()
    with refused(errno.EINVAL):
        unlimited.resize(5)
    with refused(errno.EINVAL):
        unlimited.resize(None, 5)
