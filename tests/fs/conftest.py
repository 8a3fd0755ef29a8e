# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree over a small RAM with a page allocator that fits a page.

`SmallFrames` keeps the promises that fs/ counts on and checks the duties that fs/ has: nothing is
freed twice, nothing that is in use is handed out, what is free reads as zeros.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pkramfs.errors import ExhaustedError
from pkramfs.fs import clock
from pkramfs.fs.limits import Limits
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.machine.ram import Ram
from pkramfs.pkram.treeformat import DAMAGED, ENTRIES, INODES, SUMS, TREE, UNWRITTEN, XATTRS
from pkramfs.spans import Spans
from tests.support.journals import Memory

RAM_PAGES = 16384


@pytest.fixture(autouse=True)
def fine_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which any two changes can be told apart."""
    monkeypatch.setattr(clock, "now", time.time_ns)


class SmallFrames:
    """machine.frames.Frames, small: first fit over a mask of pages."""

    tree_id = 0x1234

    def __init__(self, ram: Ram, *, longest: int = 1 << 30) -> None:
        self.ram, self.longest = ram, longest
        self.free_mask = np.zeros(ram.pages, dtype=bool)
        self.free_mask[16:] = True
        self.held = 0
        self.leases = self  # all of RAM is leased to us

    @property
    def free_pages(self) -> int:
        return int(self.free_mask.sum())

    @property
    def used_pages(self) -> int:
        return self.used().total

    def used(self) -> Spans:
        return Spans.from_mask(~self.free_mask[16:], 16)

    def blocks_of(self, tree_id: int) -> Spans:
        return Spans([(0, self.ram.pages // 512)])

    @property
    def held_pages(self) -> int:
        return self.held

    def room(self) -> int:
        return self.free_pages - self.held

    def hold(self, pages: int) -> None:
        self.held = pages

    def allocate(self, count: int, order: int = 0, *, held: bool = False, last: bool = False) -> list[tuple[int, int]]:
        if count > self.free_pages - (0 if held else self.held):
            raise ExhaustedError("out of pages")
        runs, left = [], count
        for start, end in Spans.from_mask(self.free_mask):
            while start < end and left:
                take = min(end - start, left, self.longest)
                runs.append((start, take))
                start, left = start + take, left - take
        for start, take in runs:
            self.free_mask[start : start + take] = False
            assert not any(self.ram.peek(start, take)), "a free frame was not zero"
        return runs

    def allocate_pages(self, count: int) -> "np.ndarray":
        return np.concatenate([np.arange(s, s + n, dtype=np.uint64) for s, n in self.allocate(count)])

    def free(self, starts, counts) -> None:
        for start, count in zip(starts, counts, strict=True):
            assert not self.free_mask[int(start) : int(start) + int(count)].any(), "freed twice"
            self.free_mask[int(start) : int(start) + int(count)] = True
        self.ram.punch(Spans.from_runs(starts, counts))

    def adopt(self, used: Spans) -> None:
        self.free_mask[16:] = True
        for start, end in used:
            self.free_mask[start:end] = False


@contextmanager
def small_ram(pages: int = RAM_PAGES):
    """RAM on the host's own tmpfs, as a machine has it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        ram = Ram(os.path.join(directory, "ram"), pages * 4096, create=True)
        yield ram
        ram.close()


@pytest.fixture
def ram() -> Iterator[Ram]:
    with small_ram() as ram:
        yield ram


@pytest.fixture
def large_ram() -> Iterator[Ram]:
    with small_ram(4 * RAM_PAGES) as ram:
        yield ram


@pytest.fixture(scope="session")
def small_machine():
    """RAM, frames and the audit, made once: for tests that build many trees and leave none."""
    with small_ram() as ram:
        yield ram, SmallFrames(ram), audit


@pytest.fixture
def frames(ram: Ram) -> SmallFrames:
    return SmallFrames(ram)


@pytest.fixture
def tree(ram: Ram, frames: SmallFrames) -> Iterator[Tree]:
    tree = Tree(ram, frames, Limits())  # type: ignore[arg-type]
    yield tree
    audit(tree)


def audit(tree: Tree) -> None:
    """What must hold after every test: counts agree with the tree, and frames with its files."""
    tree.wake()
    used: list[tuple[int, int]] = []
    links = {tree.root.ino: 2}
    for inode in tree.inodes.values():
        if inode.pages is not None:
            assert sum(n for _, _, n in inode.pages) == inode.pages.count
            used += [(pfn, pfn + n) for _, pfn, n in inode.pages]
        if inode.entries is not None:
            assert inode.size == 40 + 20 * len(inode.entries)
            for child, _ in inode.entries.entries.values():
                links[child.ino] = links.get(child.ino, 2 if child.entries is not None else 0)
                if child.entries is not None:
                    assert child.entries.parent is inode
                    links[inode.ino] = links.get(inode.ino, 2) + 1
                else:
                    links[child.ino] += 1
    for inode in tree.inodes.values():
        assert inode.nlink == links.get(inode.ino, 0), inode
        assert inode.nlink or inode.lookups or inode.opens, f"{inode} should be gone"
    held = Spans(used).total
    assert held == sum(b - a for a, b in used), "two files share a frame"
    if tree.journal is not None:
        begin, node = tree.journal.pages, tree.preservation.pages
        pages = [tree.journal.log.pages(), begin, Spans(used), *([node] if node != begin else [])]
        assert not any(one & other for one, other in combinations(pages, 2)), "frames in two places"
        used += [run for one in (pages[0], begin, node) for run in one]
    assert Spans(used) == tree.frames.used()
    assert tree.limits.pages == held + sum(i.own_pages for i in tree.inodes.values())
    assert tree.ledger.runs == sum(i.pages.runs for i in tree.inodes.values() if i.pages is not None)
    stream = TREE.size + sum(INODES.width + len(i.target or b"") for i in tree.inodes.values())
    folders = [inode.entries.entries for inode in tree.inodes.values() if inode.entries is not None]
    stream += sum(ENTRIES.width + len(name) for names in folders for name in names)
    stream += sum(XATTRS.width + len(n) + len(v) for i in tree.inodes.values() for n, v in (i.xattrs or {}).items())
    stream += sum(UNWRITTEN.width * i.unwritten.runs for i in tree.inodes.values() if i.unwritten is not None)
    if tree.sums is not None:
        stream += SUMS.width * tree.sums.size[0] + DAMAGED.width * tree.sums.size[1]
    assert 0 <= tree.ledger.stream_bytes - stream < 256
    assert tree.counts().directories == sum(i.entries is not None for i in tree.inodes.values())
    assert tree.counts().bytes == sum(i.size for i in tree.inodes.values() if i.is_file)


@pytest.fixture(name="audit")
def _audit() -> Callable[[Tree], None]:
    """See audit()."""
    return audit


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Memory in which a tree with a log lives; see Memory."""
    with Memory.make() as made:
        yield made


class SmallStore:
    """pkram.store.Store, small: nodes in a dictionary instead of RAM."""

    def __init__(self) -> None:
        self.saved: dict[bytes, list[object]] = {}

    @contextmanager
    def prepare_save(self, name, *, tree_id, frames, banned, strict, instead):
        yield SmallSave(self, name)

    @contextmanager
    def prepare_load(self, name):
        yield SmallLoad(self.saved[name])

    def withdraw(self, name):
        self.saved.pop(name, None)  # trees that are compared may stand on one node


class SmallSave:
    def __init__(self, store: SmallStore, name: bytes) -> None:
        self.store, self.name, self.objects, self.relocated = store, name, [], []

    @contextmanager
    def object(self):
        self.stream, self.runs = b"", [(np.empty(0, dtype=np.uint64),) * 3]
        yield self
        pages = tuple(np.concatenate(column) for column in zip(*self.runs, strict=True))
        self.objects.append(pages if self.objects else self.stream)

    def write(self, data: bytes) -> None:
        self.stream += bytes(data)

    def save_runs(self, index, pfn, count) -> None:
        self.runs.append((index, pfn, count))

    def finish(self) -> SimpleNamespace:
        self.store.saved[self.name] = self.objects
        return SimpleNamespace(pfn=len(self.store.saved))

    taken = Spans()


class SmallLoad(list):
    def __init__(self, objects: list) -> None:
        super().__init__(SmallReader(content) for content in objects)
        self.node = SimpleNamespace(log_pfn=0)

    def metadata(self) -> Spans:
        return Spans()

    def finish(self) -> None:
        pass


class SmallReader:
    def __init__(self, content) -> None:
        self.content = content

    def read(self) -> bytes:
        return self.content

    def load_bytes(self) -> memoryview:
        return memoryview(self.content)

    def load_runs(self):
        return self.content

    @property
    def data(self) -> Spans:
        return Spans.from_runs(*self.content[1:])


def exhaust(steps):
    """Run a generator of progress to its end and return its result."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value


class Shell:
    """Shorthands for tests: names in the root, contents, listings."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.audit = audit

    def write(self, name: bytes, data: bytes = b"", *, mode: int = 0o644, parent: int = 1) -> int:
        """A new file with content; returns its inode number."""
        ino = self.tree.create(parent, name, mode).ino
        if data:
            assert self.tree.write(ino, 0, data) == len(data)
        return ino

    def content(self, ino: int, tree: Tree | None = None) -> bytes:
        tree = tree or self.tree
        return bytes(tree.read(ino, 0, tree.inode(ino).size))

    def listing(self, ino: int = 1) -> list[bytes]:
        return [name for name, _, _ in self.tree.readdir(ino, 2)]

    save = staticmethod(save)

    def exhaust(self, steps: Any) -> Any:
        """The result of a generator of progress."""
        return exhaust(steps)

    def mkdir(self, name: bytes, *, mode: int = 0o755, parent: int = 1) -> int:
        return self.tree.mkdir(parent, name, mode).ino


@pytest.fixture
def sh(tree: Tree) -> Shell:
    return Shell(tree)


@pytest.fixture
def small_store() -> SmallStore:
    return SmallStore()


@pytest.fixture
def round_trip(ram, frames, small_store):
    """Save a tree, restore it with frames that know nothing but their tree id, and return the copy, all asleep."""

    def run(tree: Tree, limits: Limits | None = None, **options: Any) -> Tree:
        tree.freeze()
        exhaust(save(tree, small_store, b"shmem-x", **options))
        tree.thaw()
        audit(exhaust(restore(small_store, b"shmem-x", ram, SmallFrames(ram), limits or Limits())))
        return exhaust(restore(small_store, b"shmem-x", ram, SmallFrames(ram), limits or Limits()))

    return run


@pytest.fixture(scope="session")
def small_round_trip():
    """For hypothesis: an empty tree on a RAM that they share, one after the other, and a way to save and restore it.

    It is not that of `small_machine`: what the last tree has left there would be no zeros for whoever comes next.
    """
    with small_ram() as ram:
        yield _round_trips(ram)


def _round_trips(ram):
    def make():
        ram.punch(Spans([(16, ram.pages)]))
        return Tree(ram, SmallFrames(ram), Limits()), check

    def check(tree: Tree) -> Tree:
        audit(tree)
        store = SmallStore()
        tree.freeze()
        exhaust(save(tree, store, b"shmem-x"))
        audit(exhaust(restore(store, b"shmem-x", ram, SmallFrames(ram), Limits())))
        return exhaust(restore(store, b"shmem-x", ram, SmallFrames(ram), Limits()))

    return make
