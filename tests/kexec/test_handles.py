# SPDX-License-Identifier: GPL-2.0-or-later
"""File handles, as NFS and backup programs keep them, over a kexec."""

import errno
import os
import stat

import pytest

from tests.conformance import system

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="open_by_handle_at needs root"),
]


def named(path, handle):
    """(type, inode number) of what a handle names."""
    top = os.open(path, os.O_RDONLY)
    try:
        fd = system.open_by_handle_at(top, handle, os.O_PATH)
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
    finally:
        os.close(top)
    return stat.S_IFMT(found.st_mode), found.st_ino


def test_handles_are_good_for_the_same_files_after_a_kexec(user):
    """Inode numbers and the generation cross, and a handle finds what sleeps in the restored tree."""
    path = user.mount("one")
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "b" / "file").write_bytes(b"data")
    os.symlink("file", path / "a" / "b" / "link")
    os.mkfifo(path / "a" / "b" / "pipe")
    names = [path / "a", *(path / "a" / "b" / name for name in ("file", "link", "pipe"))]
    handles = [system.name_to_handle_at(str(name)) for name in names]
    before = [named(path, handle) for handle in handles]
    assert [ino for _, ino in before] == [name.lstat().st_ino for name in names]
    user.preserve(path)
    user.kexec()
    assert [named(path, handle) for handle in handles] == before
    (path / "a" / "b" / "file").unlink()
    (path / "new").write_bytes(b"another")
    with pytest.raises(OSError) as caught:
        named(path, handles[1])
    assert caught.value.errno == errno.ESTALE


def test_a_handle_of_a_tree_that_is_gone_is_stale(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    handle = system.name_to_handle_at(str(path / "file"))
    user.load()
    user.ok("pkram-kexec", "-e", "--force")
    user.mount("one")
    (path / "file").write_bytes(b"data")
    with pytest.raises(OSError) as caught:
        named(path, handle)
    assert caught.value.errno == errno.ESTALE
