# SPDX-License-Identifier: GPL-2.0-or-later
"""Trees with journals: on a small RAM with real leases and a store, copied, recovered, driven at random."""

import contextlib
import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from pkramfs.fs import acl
from pkramfs.fs.checkpoint import Supply, figures, write
from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.pagecache import END, PageMap
from pkramfs.fs.recover import Rebuilt, begin, rebuild, recover
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_SIZE, PAGE_SHIFT

TREE, SUPER_PFN, LEASES_PFN = 0x1234, 9, 1
NAMES = [b"a", b"b", b"c", b"d" * 255]
USER = Credentials(1000, 1000, 0o027)


class Memory:
    """A RAM with a lease table and a super block, as a kernel makes it; another process sees it by `copy`."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.leases = Leases(ram, LEASES_PFN, ram.size // BLOCK_SIZE, contextlib.nullcontext)
        self.frames = Frames(ram, self.leases, TREE)
        self.store = Store(ram, SUPER_PFN, contextlib.nullcontext)

    @classmethod
    @contextlib.contextmanager
    def make(cls, blocks: int = 32, kind: Callable[..., Ram] = Ram) -> Iterator["Memory"]:
        """A new one, on the host's own tmpfs."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            ram = kind(os.path.join(directory, "ram"), blocks * BLOCK_SIZE, create=True)
            superblock.create(ram, SUPER_PFN, generation=7)
            memory = cls(ram)
            memory.leases.ids[0] = KERNEL
            yield memory
            ram.close()

    @contextlib.contextmanager
    def copy(self) -> Iterator["Memory"]:
        """What another process would find, which may change it as it likes."""
        path = self.ram.path + ".copy"
        copy_ram(self.ram, path)
        ram = Ram(path, self.ram.size)
        try:
            yield Memory(ram)
        finally:
            ram.close()
            os.unlink(path)

    def tree(self, limits: Limits | None = None, *, huge: str = "never") -> Tree:
        """A new tree with a journal."""
        tree = Tree(self.ram, self.frames, limits or Limits())
        tree.huge = huge
        begin(tree, b"x", 1)
        return tree

    def rebuild(self, live: int, position: int | None = None, frames: Frames | None = None) -> Rebuilt:
        """What a log describes."""
        return end(rebuild(self.store, live, self.ram, frames or self.frames, Limits(), position))

    def recover(self, live: int, *, taken: bytes | None = b"none") -> Tree:
        """The tree of a log, by a process that knows nothing else and takes its mount over."""
        tree: Tree = end(recover(self.store, live, self.ram, self.frames, Limits(), 1, taken))
        tree.assume_known()
        return tree


def copy_ram(ram: Ram, path: str) -> None:
    """Copy what the host has behind RAM."""
    with open(path, "wb") as file:
        os.ftruncate(file.fileno(), ram.size)
        for start, stop in ram.data_spans():
            os.pwrite(file.fileno(), ram.peek(start, stop - start), start * 4096)


def end(work: Any) -> Any:
    """Run a long work to its end."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def live(tree: Tree) -> int:
    """Where the log of a tree begins."""
    assert tree.journal is not None
    return tree.journal.log.live


class Checkpoint:
    """What a daemon and its shadow do for a checkpoint of a tree as it is now, which may change until `finish`."""

    def __init__(self, memory: Memory, tree: Tree) -> None:
        assert tree.journal is not None
        tree.commit()
        self.memory, self.tree, self.journal = memory, tree, tree.journal
        self.position, self.figures = tree.journal.log.tail, figures(tree)
        self.runs = tree.frames.allocate(tree.ledger.pages_needed(), held=True)

    def finish(self) -> None:
        """Make it, and begin with it."""
        rebuilt = self.memory.rebuild(live(self.tree), self.position)
        assert figures(rebuilt.tree) == self.figures
        node, pages = end(write(rebuilt.tree, self.memory.store, b"shmem-x", Supply(self.runs)))
        self.journal.rebase(node, pages, self.position)
        rest = Spans((start, start + count) for start, count in self.runs) - pages
        if rest:
            self.tree.frames.free(rest.starts, rest.counts)
        self.tree.commit()


def state(tree: Tree) -> dict[str, Any]:
    """Everything that a journal keeps. The bytes of a description are counted with the padding of a checkpoint."""
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
        "figures": (ledger.directories, ledger.bytes, ledger.runs),
        "limits": (tree.limits.pages, tree.limits.inode_space),
        "orphans": sorted(tree.orphans),
        "unnamed": sorted(tree.unnamed),
        "writing": sorted(tree.writing),
        "lost": {ino: deepcopy(found.state()) for ino, found in tree.losses.files.items()},
    }


class Driver:
    """Random requests: what each does is up to the tree, and whether it is refused."""

    def __init__(self, tree: Tree, seed: int) -> None:
        self.tree, self.random, self.handles = tree, random.Random(seed), list[int]()
        self.files = set[int]()
        """Files whose contents the last request was about."""
        self.requests = [getattr(self, name) for name in dir(self) if name.startswith("do_")]
        self.requests += [self.do_write] * 4

    def step(self) -> str:
        """One request, committed."""
        did = self.change()
        self.tree.commit()
        self.tree.tell()
        return did

    def change(self) -> str:
        """One request up to where it would be committed."""
        self.files.clear()
        request = self.random.choice(self.requests)
        with contextlib.suppress(OSError):
            request()
        return str(request.__name__)

    def folder(self) -> int:
        return self.random.choice([i.ino for i in self.tree.inodes.values() if i.entries is not None and i.nlink])

    def any(self) -> int:
        return self.random.choice(list(self.tree.inodes))

    def file(self) -> int:
        files = [inode.ino for inode in self.tree.inodes.values() if inode.is_file]
        found = self.random.choice(files or [1])
        self.files.add(found)
        return found

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
        source, target = self.file(), self.file()
        if source != target:
            self.tree.copy(source, 0, target, self.random.choice([0, 4096, 6000]), 30_000)

    def do_lose(self) -> None:
        self.tree.lose(self.file(), self.random.choice([0, 8192]), 20_000, errno.ENOSPC)


def contents(tree: Tree) -> dict[int, bytes]:
    """The bytes of every file, of which there are none but zeros behind its end."""
    found = {i.ino: bytes(tree.read(i.ino, 0, i.size)) for i in tree.inodes.values() if i.is_file}
    for inode in tree.inodes.values():
        for index, pfn, count in (inode.pages or PageMap()).between(inode.size >> PAGE_SHIFT, END):
            behind = tree.ram.peek(pfn, count)[max(inode.size - (index << PAGE_SHIFT), 0) :]
            assert not any(behind), f"bytes behind the end of {inode}"
    return found
