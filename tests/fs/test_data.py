# SPDX-License-Identifier: GPL-2.0-or-later
"""Content: against a bytearray, and the places where others fail."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkramfs.fs.access import NOATIME, Access
from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.rules import MAX_SIZE
from pkramfs.fs.tree import Tree

PAGE = 4096
USER = Credentials(uid=1000, gid=100)


def refused(code: int):
    return pytest.raises(OSError, match=rf"^\[Errno {code}\]")


def data_blocks(ram) -> int:
    return ram.data_spans().total


def test_a_write_past_the_end_leaves_a_hole(tree, sh, ram) -> None:
    ino = sh.write(b"f", b"head")
    tree.write(ino, 1 << 40, b"tail")
    inode = tree.inode(ino)
    assert (inode.size, inode.blocks) == ((1 << 40) + 4, 16)
    before = data_blocks(ram)
    assert bytes(tree.read(ino, 2, 10)) == b"ad" + bytes(8)
    assert bytes(tree.read(ino, 1 << 30, 1 << 20)) == bytes(1 << 20)
    assert len(tree.read(ino, 1 << 30, 5 << 20)) == 5 << 20
    assert bytes(tree.read(ino, (1 << 40) - 2, 100)) == b"\0\0tail"
    assert data_blocks(ram) == before, "reading a hole must not touch RAM"


def test_shrink_then_grow_shows_zeros(tree, sh) -> None:
    ino = sh.write(b"f", b"x" * 10000)
    tree.setattr(ino, size=5000)
    tree.setattr(ino, size=10000)
    assert sh.content(ino) == b"x" * 5000 + bytes(5000)
    assert tree.inode(ino).blocks == 16


def test_what_a_file_gives_up_goes_back_to_the_host(tree, sh, ram) -> None:
    before = ram.backed
    ino = sh.write(b"f", b"x" * (1 << 20))
    assert ram.backed >= before + (1 << 20)
    tree.setattr(ino, size=PAGE)
    assert ram.backed <= before + 2 * PAGE
    tree.unlink(1, b"f")
    assert ram.backed <= before


def test_the_largest_file(tree, sh) -> None:
    ino = sh.write(b"f")
    tree.setattr(ino, size=MAX_SIZE)
    assert tree.inode(ino).size == MAX_SIZE
    with refused(errno.EFBIG):
        tree.setattr(ino, size=MAX_SIZE + 1)
    with refused(errno.EFBIG):
        tree.write(ino, MAX_SIZE, b"x")
    assert tree.write(ino, MAX_SIZE - 2, b"abc") == 2
    assert bytes(tree.read(ino, MAX_SIZE - 4, 100)) == b"\0\0ab"
    with refused(errno.EINVAL):
        tree.setattr(ino, size=-1)


def test_size_belongs_to_files(tree, sh) -> None:
    with refused(errno.EISDIR):
        tree.setattr(1, size=0)
    with refused(errno.EISDIR):
        tree.read(1, 0, 1)
    with refused(errno.EISDIR):
        tree.write(1, 0, b"x")
    fifo = tree.mknod(1, b"p", 0o010644).ino
    with refused(errno.EINVAL):
        tree.setattr(fifo, size=0)


def test_reads_of_one_run_are_views_of_ram(tree, sh, ram) -> None:
    ino = sh.write(b"f", bytes(range(256)) * 1024)
    view = tree.read(ino, 100, 200_000)
    assert isinstance(view, memoryview)
    assert view.obj is ram.bytes.obj
    assert bytes(tree.read(ino, 256 * 1024 - 5, 100)) == bytes(range(251, 256))
    assert tree.read(ino, 1 << 20, 10) == b""


def test_no_space_leaves_what_fits_and_says_how_much(tree, sh) -> None:
    tree.limits.max_pages = 10
    ino = sh.write(b"f", b"a" * PAGE)
    assert tree.write(ino, PAGE // 2, b"b" * (20 * PAGE)) == 9 * PAGE + PAGE // 2
    assert tree.inode(ino).size == 10 * PAGE
    with refused(errno.ENOSPC):
        tree.write(ino, 10 * PAGE, b"x")
    assert tree.write(ino, 0, b"c" * (10 * PAGE)) == 10 * PAGE, "rewriting needs nothing new"
    tree.setattr(ino, size=1 << 40)
    assert (tree.statfs().blocks, tree.statfs().blocks_free) == (10, 0)
    tree.setattr(ino, size=PAGE)
    assert tree.statfs().blocks_free == 9


def test_out_of_frames_is_no_space_too(ram, frames, sh) -> None:
    tree = sh.tree
    frames.hold(frames.free_pages - 5)
    ino = sh.write(b"f")
    assert tree.write(ino, 0, b"x" * (8 * PAGE)) == 5 * PAGE
    assert tree.limits.pages == 5


@pytest.mark.parametrize("head", [0, 100, PAGE])
def test_a_host_without_memory_leaves_nothing_behind_the_end(tree, sh, ram, monkeypatch, head) -> None:
    """The host's ENOSPC in the midst of a write is the writer's, and growth shows zeros all the same."""
    ino = sh.write(b"f", b"h" * head)
    pwrite = os.pwrite

    def half(fd: int, data: memoryview, at: int) -> int:
        if len(data) < 4 * PAGE:
            raise OSError(errno.ENOSPC, "the host is full")
        return pwrite(fd, data[: len(data) // 2], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with refused(errno.ENOSPC):
            tree.write(ino, head, b"x" * (7 * PAGE))
    inode = tree.inode(ino)
    assert (inode.size, tree.limits.pages) == (head, bool(head))
    tree.setattr(ino, size=10 * PAGE)
    assert sh.content(ino) == b"h" * head + bytes(10 * PAGE - head)
    assert tree.write(ino, head, b"y" * PAGE) == PAGE


def test_scattered_frames_read_and_write_as_one(ram, frames, sh) -> None:
    frames.longest = 3
    ino = sh.write(b"f", b"")
    text = bytes(range(251)) * 700
    assert sh.tree.write(ino, 1234, text) == len(text)
    frames.longest = 1
    other = sh.write(b"g", text)
    assert bytes(sh.tree.read(ino, 1234, len(text))) == text
    assert sh.content(other) == text


def test_open_truncates_and_sets_times(tree, sh) -> None:
    ino = sh.write(b"f", b"data")
    before = tree.inode(ino).mtime
    tree.release(tree.open(ino, os.O_RDWR | os.O_TRUNC))
    inode = tree.inode(ino)
    assert inode.size == 0 and inode.mtime == inode.ctime > before
    again = inode.mtime
    tree.release(tree.open(ino, os.O_WRONLY | os.O_TRUNC))
    assert inode.mtime > again


def test_writes_drop_set_id_bits_and_capabilities(tree, sh) -> None:
    ino = sh.write(b"f", mode=0o644)
    inode = tree.inode(ino)
    for mode, after in ((0o6755, 0o755), (0o6745, 0o2745), (0o2755, 0o755)):
        tree.setattr(ino, mode=mode)
        tree.setxattr(ino, b"security.capability", b"cap")
        handle = tree.open(ino, os.O_WRONLY, USER)
        tree.write(handle, 0, b"x")
        tree.release(handle)
        assert inode.mode & 0o7777 == after
        assert tree.listxattr(ino) == []
    tree.setattr(ino, mode=0o4755)
    handle = tree.open(ino, os.O_WRONLY)
    tree.write(handle, 0, b"x")
    assert inode.mode & 0o7777 == 0o4755, "root may keep them"
    tree.release(handle)


def test_access_times_are_relative(tree, sh) -> None:
    ino = sh.write(b"f", b"data")
    inode = tree.inode(ino)
    tree.read(ino, 0, 1)
    first = inode.atime
    assert first > inode.mtime
    tree.read(ino, 0, 1)
    assert inode.atime == first
    tree.write(ino, 0, b"x")
    tree.read(ino, 0, 1)
    assert inode.atime > first
    tree.access = lambda: NOATIME
    tree.write(ino, 0, b"x")
    noted = inode.atime
    tree.read(ino, 0, 1)
    assert inode.atime == noted


@pytest.mark.parametrize(
    ("access", "noted"),
    [
        (Access(), {"file", "link", "folder"}),
        (Access(always=True), {"file", "link", "folder", "file again", "folder again"}),
        (Access(directories=False), {"file", "link"}),
        (Access(False, False, True), set()),
        (NOATIME, set()),
    ],
)
def test_the_mount_says_which_accesses_are_noted(tree, sh, access, noted) -> None:
    file, folder, link = tree.inode(sh.write(b"f", b"x")), tree.inode(sh.mkdir(b"d")), tree.symlink(1, b"l", b"f")
    tree.access = lambda: access
    for inode in (file, folder, link):
        tree.set_times(inode.ino, 5, None, None)

    def changed(inode, look) -> bool:
        before = inode.atime
        look()
        return inode.atime != before

    found = {
        "file": changed(file, lambda: tree.read(file.ino, 0, 1)),
        "link": changed(link, lambda: tree.readlink(link.ino)),
        "folder": changed(folder, lambda: list(tree.readdir(folder.ino))),
        "file again": changed(file, lambda: tree.read(file.ino, 0, 1)),
        "folder again": changed(folder, lambda: list(tree.readdir(folder.ino))),
    }
    assert {name for name, yes in found.items() if yes} == noted


def test_an_access_after_a_day_is_noted(tree, sh, monkeypatch) -> None:
    inode = tree.inode(sh.write(b"f", b"x"))
    tree.read(inode.ino, 0, 1)
    first = inode.atime
    for later, seen in ((86_399 * 10**9, first), (86_400 * 10**9, first + 86_400 * 10**9)):
        monkeypatch.setattr("pkramfs.fs.clock.now", lambda later=later: first + later)
        monkeypatch.setattr("pkramfs.fs.clock.coarse", lambda later=later: first + later)
        tree.read(inode.ino, 0, 1)
        assert inode.atime == seen


def test_what_was_opened_with_noatime_notes_nothing(tree, sh) -> None:
    tree.access = lambda: Access(always=True)
    file, folder = sh.write(b"f", b"data"), sh.mkdir(b"d")
    quiet, loud = tree.open(file, os.O_RDWR | os.O_NOATIME), tree.open(file, os.O_RDONLY)
    before = tree.inode(file).atime
    assert bytes(tree.read(quiet, 0, 4)) == b"data" and tree.inode(file).atime == before
    tree.write(quiet, 0, b"more")
    assert tree.inode(quiet).writers == 1
    tree.release(quiet)
    assert tree.inode(file).writers == 0 and tree.inode(file).opens == 1
    assert bytes(tree.read(loud, 0, 4)) == b"more" and tree.inode(file).atime > before
    before = tree.inode(folder).atime
    list(tree.readdir(tree.opendir(folder, os.O_NOATIME)))
    assert tree.inode(folder).atime == before
    list(tree.readdir(tree.opendir(folder)))
    assert tree.inode(folder).atime > before


def test_allocate_and_punch(tree, sh) -> None:
    ino = sh.write(b"f", b"x" * 3 * PAGE)
    inode = tree.inode(ino)
    tree.punch(ino, 100, 2 * PAGE)
    assert inode.blocks == 16
    assert sh.content(ino) == b"x" * 100 + bytes(2 * PAGE) + b"x" * (PAGE - 100)
    tree.punch(ino, 5, 3)
    assert bytes(tree.read(ino, 0, 10)) == b"xxxxx\0\0\0xx"
    tree.allocate(ino, 10 * PAGE, PAGE, keep_size=True)
    assert (inode.size, inode.blocks) == (3 * PAGE, 24)
    tree.allocate(ino, 0, 5 * PAGE)
    assert (inode.size, inode.blocks) == (5 * PAGE, 48)
    tree.setattr(ino, size=3 * PAGE)
    assert inode.blocks == 24, "truncation takes what lies beyond the end"
    with refused(errno.EINVAL):
        tree.allocate(ino, 0, 0)


def test_truncation_to_the_same_size_takes_what_lies_beyond(tree, sh) -> None:
    for size in (0, 3 * PAGE, 3 * PAGE + 5):
        ino = sh.write(b"%d" % size, b"x" * size)
        inode = tree.inode(ino)
        before = inode.blocks
        tree.allocate(ino, 0, 10 * PAGE, keep_size=True)
        tree.setattr(ino, size=size)
        assert (inode.size, inode.blocks) == (size, before)
        assert sh.content(ino) == b"x" * size
    tree.allocate(ino := sh.write(b"f"), 0, 10 * PAGE, keep_size=True)
    tree.release(tree.open(ino, os.O_WRONLY | os.O_TRUNC))
    assert tree.inode(ino).blocks == 0


def test_zeros_can_be_given_back(tree, sh) -> None:
    text = b"x" * PAGE + bytes(300 * PAGE) + b"y" + bytes(2 * PAGE)
    ino = sh.write(b"f", text)
    before = tree.inode(ino).mtime, tree.inode(ino).ctime
    assert tree.sparsify(ino, 0, 1) == 0
    assert tree.sparsify(ino, 0, 11) == 10
    assert tree.sparsify(ino) == 292
    assert tree.inode(ino).blocks == 16
    assert (tree.inode(ino).mtime, tree.inode(ino).ctime) == before
    assert sh.content(ino) == text
    assert tree.sparsify(ino) == 0
    assert tree.sparsify(sh.write(b"g")) == 0


def test_looking_for_zeros_touches_no_page(tree, sh, monkeypatch) -> None:
    """A page that was allocated and never written lies in a hole of the RAM file, and is zeros without a look."""
    ino = sh.write(b"f", b"x" * PAGE)
    tree.allocate(ino, PAGE, 999 * PAGE)
    tree.write(ino, 500 * PAGE, b"y")
    tree.write(ino, 600 * PAGE, bytes(PAGE))
    before, backed, free = tree.ram.backed, [], tree._free_pages
    monkeypatch.setattr(tree, "_free_pages", lambda *where: (backed.append(tree.ram.backed), free(*where)))
    assert tree.sparsify(ino) == 998
    assert max(backed) <= before
    assert [offset // PAGE for offset, _ in tree.extents(ino)] == [0, 500]


def test_extents_are_what_is_no_hole(tree, sh) -> None:
    ino = sh.write(b"f", b"x" * 100)
    assert list(tree.extents(ino)) == [(0, 100)]
    tree.write(ino, 10 * PAGE, b"x" * (PAGE + 1))
    tree.write(ino, 12 * PAGE, b"x")
    tree.allocate(ino, 50 * PAGE, PAGE, keep_size=True)
    assert list(tree.extents(ino)) == [(0, PAGE), (10 * PAGE, 2 * PAGE + 1)]
    for start, expected in (
        (1, [(1, PAGE - 1), (10 * PAGE, 2 * PAGE + 1)]),
        (PAGE, [(10 * PAGE, 2 * PAGE + 1)]),
        (11 * PAGE + 7, [(11 * PAGE + 7, PAGE - 6)]),
        (12 * PAGE + 1, []),
        (1 << 40, []),
    ):
        assert list(tree.extents(ino, start)) == expected
    assert list(tree.extents(sh.write(b"g"))) == []


operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "truncate", "punch", "allocate", "read"]),
        st.integers(0, 40_000),
        st.integers(1, 20_000),
    ),
    max_size=40,
)


@given(operations, st.sampled_from([1, 2, 1 << 30]))
@settings(max_examples=150, deadline=None)
def test_a_file_is_a_bytearray(tmp_path_factory, operations, longest) -> None:
    ram, small, audit = make_ram(tmp_path_factory)
    small.longest = longest
    tree = Tree(ram, small, Limits())
    ino = tree.create(1, b"f", 0o644).ino
    model = bytearray()
    for number, (action, offset, size) in enumerate(operations):
        if action == "write":
            data = bytes([number + 1]) * size
            assert tree.write(ino, offset, data) == size
            model.extend(bytes(max(offset + size - len(model), 0)))
            model[offset : offset + size] = data
        elif action == "truncate":
            tree.setattr(ino, size=offset)
            model = model[:offset] + bytes(max(offset - len(model), 0))
        elif action == "punch":
            tree.punch(ino, offset, size)
            stop = min(offset + size, len(model))
            model[offset:stop] = bytes(max(stop - offset, 0))
        elif action == "allocate":
            tree.allocate(ino, offset, size)
            model.extend(bytes(max(offset + size - len(model), 0)))
        else:
            assert bytes(tree.read(ino, offset, size)) == model[offset : offset + size]
        assert tree.inode(ino).size == len(model)
    assert bytes(tree.read(ino, 0, len(model))) == model
    audit(tree)
    tree.unlink(1, b"f")
    assert not small.used()


MADE: list = []


def make_ram(factory):
    """One RAM for all examples: every example leaves it empty."""
    assert MADE, "the fixture below has run"
    return MADE[0]


@pytest.fixture(autouse=True, scope="module")
def _one_ram(small_machine):
    MADE.append(small_machine)
    yield
    MADE.clear()
