# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree that is rebuilt from its journal is the tree, after every request."""

import contextlib
import errno
import os
import random
from typing import Any

import pytest

from pkramfs.fs import acl
from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.recover import begin, rebuild
from pkramfs.fs.tree import Tree
from pkramfs.machine.ram import Ram
from tests.fs.conftest import SmallFrames, exhaust

NAMES = [b"a", b"b", b"c", b"d" * 255]
USER = Credentials(1000, 1000, 0o027)


def state(tree: Tree) -> dict[str, Any]:
    """Everything that a journal keeps."""
    tree.wake()
    inodes = {}
    for ino, inode in sorted(tree.inodes.items()):
        entries = None
        if inode.entries is not None:
            entries = sorted((name, child.ino, cookie) for name, (child, cookie) in inode.entries.entries.items())
        inodes[ino] = (
            (inode.mode, inode.uid, inode.gid, inode.nlink, inode.size, inode.mtime, inode.ctime, inode.btime),
            (inode.rdev, inode.flags, inode.opens, inode.writers, inode.unprivileged, inode.target),
            entries,
            inode.entries.parent.ino if inode.entries is not None and inode.nlink else None,
            list(inode.pages or ()) or None,
            list(inode.unwritten or ()) or None,
            dict(sorted((inode.xattrs or {}).items())),
        )
    ledger = tree.ledger
    return {
        "inodes": inodes,
        "next": tree.next_ino,
        "figures": (ledger.directories, ledger.bytes, ledger.stream_bytes),
        "limits": (tree.limits.pages, tree.limits.inode_space),
        "orphans": sorted(tree.orphans),
        "unnamed": sorted(tree.unnamed),
        "writing": sorted(tree.writing),
        "lost": {ino: found.state() for ino, found in tree.losses.files.items()},
    }


def again(tree: Tree, frames: SmallFrames, position: int | None = None) -> Tree:
    """The tree that another process would make of the journal."""
    assert tree.journal is not None
    log = tree.journal.log
    return exhaust(rebuild(None, log.live, tree.ram, frames, Limits(), position)).tree  # type: ignore[arg-type]


class Driver:
    """Random requests: what each does is up to the tree, and whether it is refused."""

    def __init__(self, tree: Tree, seed: int) -> None:
        self.tree, self.random, self.handles = tree, random.Random(seed), list[int]()
        self.requests = [getattr(self, name) for name in dir(self) if name.startswith("do_")]

    def step(self) -> str:
        request = self.random.choice(self.requests)
        with contextlib.suppress(OSError):
            request()
        self.tree.commit()
        return str(request.__name__)

    def folder(self) -> int:
        return self.random.choice([i.ino for i in self.tree.inodes.values() if i.entries is not None and i.nlink])

    def any(self) -> int:
        return self.random.choice(list(self.tree.inodes))

    def file(self) -> int:
        files = [inode.ino for inode in self.tree.inodes.values() if inode.is_file]
        return self.random.choice(files or [1])

    def name(self) -> bytes:
        return self.random.choice(NAMES)

    def do_create(self) -> None:
        caller = self.random.choice([USER, Credentials()])
        self.tree.create(self.folder(), self.name(), 0o6755, caller)

    def do_mkdir(self) -> None:
        self.tree.mkdir(self.folder(), self.name(), self.random.choice([0o755, 0o2755]), USER)

    def do_mknod(self) -> None:
        self.tree.mknod(self.folder(), self.name(), self.random.choice([0o10644, 0o20600, 0o140777]), 259)

    def do_symlink(self) -> None:
        self.tree.symlink(self.folder(), self.name(), b"t" * self.random.choice([1, 7, 8, 200, 4000]))

    def do_link(self) -> None:
        self.tree.link(self.any(), self.folder(), self.name())

    def do_unlink(self) -> None:
        self.tree.unlink(self.folder(), self.name())

    def do_rmdir(self) -> None:
        self.tree.rmdir(self.folder(), self.name())

    def do_rename(self) -> None:
        flags = self.random.choice([0, 0, 1, 2, 4])
        self.tree.rename(self.folder(), self.name(), self.folder(), self.name(), flags)

    def do_write(self) -> None:
        offset = self.random.choice([0, 100, 4096, 9000, 70_000])
        data = self.random.randbytes(self.random.choice([1, 100, 4096, 5000, 20_000]))
        self.tree.write(self.file(), offset, data, stamp=self.random.random() < 0.5)

    def do_truncate(self) -> None:
        self.tree.setattr(self.file(), size=self.random.choice([0, 10, 4096, 5000, 100_000]), caller=USER)

    def do_chmod(self) -> None:
        self.tree.setattr(self.any(), mode=self.random.randrange(0o10000), caller=USER)

    def do_chown(self) -> None:
        self.tree.setattr(self.any(), uid=self.random.randrange(3), gid=4)

    def do_times(self) -> None:
        self.tree.set_times(self.any(), self.random.randrange(-5, 5), self.random.randrange(10**18), 7)

    def do_flags(self) -> None:
        self.tree.set_flags(self.file(), self.random.choice([0, 0, 0x40, 0x80]))

    def do_xattr(self) -> None:
        value = b"v" * self.random.choice([0, 3, 5000, 65_000])
        self.tree.setxattr(self.any(), self.random.choice([b"user.a", b"trusted.b", b"security.capability"]), value)

    def do_remove_xattr(self) -> None:
        self.tree.removexattr(self.any(), self.random.choice([b"user.a", b"trusted.b"]))

    def do_acl(self) -> None:
        name = self.random.choice([acl.ACCESS, acl.DEFAULT])
        entries = [(1, 7, 0xFFFFFFFF), (2, 5, 7), (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
        self.tree.setxattr(self.any(), name, acl.pack(entries), caller=USER)

    def do_open(self) -> None:
        caller = self.random.choice([USER, Credentials()])
        flags = self.random.choice([os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
        self.handles.append(self.tree.open(self.file(), flags, caller))

    def do_release(self) -> None:
        if self.handles:
            self.tree.release(self.handles.pop(self.random.randrange(len(self.handles))))

    def do_tmpfile(self) -> None:
        inode = self.tree.tmpfile(self.folder(), 0o600, linkable=self.random.random() < 0.5)
        self.handles.append(self.tree.open_inode(inode, os.O_RDWR, USER))

    def do_remember(self) -> None:
        self.tree.remember(self.tree.inode(self.any()))

    def do_forget(self) -> None:
        self.tree.forget(self.any(), 3)

    def do_allocate(self) -> None:
        self.tree.allocate(self.file(), self.random.choice([0, 8192, 50_000]), 30_000, keep_size=True)

    def do_punch(self) -> None:
        self.tree.punch(self.file(), self.random.choice([0, 10, 4096, 5000]), self.random.choice([5, 4096, 12_000]))

    def do_sparsify(self) -> None:
        self.tree.sparsify(self.file())

    def do_copy(self) -> None:
        self.tree.copy(self.file(), 0, self.file(), self.random.choice([0, 4096, 6000]), 30_000)

    def do_lose(self) -> None:
        self.tree.lose(self.file(), self.random.choice([0, 8192]), 20_000, errno.ENOSPC)


def contents(tree: Tree) -> dict[int, bytes]:
    return {i.ino: bytes(tree.read(i.ino, 0, i.size)) for i in tree.inodes.values() if i.is_file}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("huge", ["never", "always"])
def test_what_is_rebuilt_is_the_tree(ram: Ram, frames: SmallFrames, seed: int, huge: str) -> None:
    tree = Tree(ram, frames, Limits())  # type: ignore[arg-type]
    tree.huge = huge
    begin(tree, b"x", 1)
    driver = Driver(tree, seed)
    for number in range(250):
        did = driver.step()
        if number % 5 == 0:
            assert state(again(tree, frames)) == state(tree), f"seed {seed}, request {number}: {did}"
    assert tree.journal is not None and tree.journal.log.position > 0
