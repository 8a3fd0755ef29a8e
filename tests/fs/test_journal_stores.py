# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that dies between any two of the stores of a request has done all of it, or nothing."""

import errno
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from pkramfs.fs import acl
from pkramfs.fs.inode import Credentials
from pkramfs.fs.limits import Limits
from pkramfs.fs.recover import begin, recover
from pkramfs.fs.restore import restore as restore_node
from pkramfs.fs.save import save
from pkramfs.fs.sealing import preserve
from pkramfs.fs.tree import Tree
from pkramfs.machine.frames import Frames
from tests.fs.conftest import audit
from tests.support.journals import Checkpoint, Memory, contents, end, live, state
from tests.support.stores import Image, Recording, deaths, restore

BLOCKS, NODE = 8, b"shmem-x"
USER = Credentials(1000, 1000, 0o022)
ACL = acl.pack([(1, 7, 0xFFFFFFFF), (2, 5, 7), (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)])

Numbers = dict[str, int]
Request = Callable[[Tree, Numbers], object]


def prepare(tree: Tree) -> Numbers:
    """A tree with one of everything; returns inode numbers and handles."""
    made = {
        name: tree.create(1, name.encode(), 0o6755, USER).ino for name in ("file", "other", "open", "loose", "lost")
    }
    for name, ino in made.items():
        tree.write(ino, 0, name.encode() * 5000)
    made["dir"] = tree.mkdir(1, b"dir", 0o2755, USER).ino
    made["sub"] = tree.mkdir(made["dir"], b"sub", 0o755).ino
    tree.setxattr(made["dir"], acl.DEFAULT, ACL)
    tree.setxattr(made["file"], b"security.capability", b"c" * 20)
    tree.setxattr(made["file"], b"user.a", b"a" * 100)
    tree.symlink(1, b"symlink", b"t" * 200)
    tree.link(made["other"], made["dir"], b"second")
    tree.allocate(made["lost"], 100_000, 30_000)
    tree.allocate(made["lost"], 130_000, 30_000, keep_size=True)
    tree.lose(made["lost"], 4096, 20_000, errno.ENOSPC)
    made["handle"] = tree.open(made["open"], os.O_RDWR, USER)
    tree.unlink(1, b"open")
    made["temporary"] = tree.tmpfile(1, 0o600).ino
    made["unnamed"] = tree.open(made["temporary"], os.O_RDWR)
    tree.remember(tree.inode(made["loose"]))
    tree.unlink(1, b"loose")
    tree.commit()
    return made


REQUESTS: dict[str, Request] = {
    "create": lambda tree, n: tree.create(1, b"new", 0o600),
    "create and open": lambda tree, n: tree.open_inode(tree.create(1, b"new", 0o600), os.O_RDWR, USER),
    "create with an ACL": lambda tree, n: tree.create(n["dir"], b"new", 0o666, USER),
    "mkdir": lambda tree, n: tree.mkdir(n["dir"], b"new", 0o755),
    "mknod": lambda tree, n: tree.mknod(1, b"new", 0o20600, 259),
    "symlink": lambda tree, n: tree.symlink(1, b"new", b"t" * 4000),
    "link": lambda tree, n: tree.link(n["file"], n["sub"], b"new"),
    "link a tmpfile": lambda tree, n: tree.link(n["temporary"], n["sub"], b"new"),
    "tmpfile": lambda tree, n: tree.open_inode(tree.tmpfile(1, 0o600), os.O_RDWR, USER),
    "unlink": lambda tree, n: tree.unlink(1, b"file"),
    "unlink one of two names": lambda tree, n: tree.unlink(1, b"other"),
    "unlink an open file": lambda tree, n: (tree.open(n["file"]), tree.unlink(1, b"file")),
    "rmdir": lambda tree, n: tree.rmdir(n["dir"], b"sub"),
    "rename": lambda tree, n: tree.rename(1, b"file", n["sub"], b"new"),
    "rename a directory": lambda tree, n: tree.rename(n["dir"], b"sub", 1, b"new"),
    "rename over a file": lambda tree, n: tree.rename(1, b"other", 1, b"file"),
    "rename over a directory": lambda tree, n: tree.rename(n["dir"], b"sub", 1, b"sub"),
    "exchange": lambda tree, n: tree.rename(1, b"file", n["dir"], b"sub", 2),
    "whiteout": lambda tree, n: tree.rename(1, b"file", 1, b"other", 4),
    "write into a hole": lambda tree, n: tree.write(n["file"], 50_000, b"w" * 10_000),
    "append": lambda tree, n: tree.write(n["file"], 20_000, b"w" * 3000),
    "append within a page": lambda tree, n: tree.write(n["file"], 20_000, b"w" * 100),
    "append to reserved pages": lambda tree, n: tree.write(n["lost"], 130_500, b"w" * 7000),
    "write over data": lambda tree, n: tree.write(n["file"], 3000, b"w" * 6000),
    "write over data without times": lambda tree, n: tree.write(n["file"], 3000, b"w" * 6000, stamp=False),
    "write over unwritten pages": lambda tree, n: tree.write(n["lost"], 105_000, b"w" * 5000),
    "write over lost pages": lambda tree, n: tree.write(n["lost"], 0, b"w" * 9000),
    "cut within a page": lambda tree, n: tree.setattr(n["file"], size=5000, caller=USER),
    "cut all": lambda tree, n: tree.setattr(n["lost"], size=0),
    "grow": lambda tree, n: tree.setattr(n["file"], size=1 << 20),
    "chmod": lambda tree, n: tree.setattr(n["file"], mode=0o4711),
    "chown": lambda tree, n: tree.setattr(n["file"], uid=1, gid=2, caller=USER),
    "times": lambda tree, n: tree.set_times(n["file"], -5, 10**18, 7),
    "flags": lambda tree, n: tree.set_flags(n["file"], 0x40),
    "set an xattr": lambda tree, n: tree.setxattr(n["file"], b"user.b", b"b" * 5000),
    "replace an xattr": lambda tree, n: tree.setxattr(n["file"], b"user.a", b"b"),
    "remove an xattr": lambda tree, n: tree.removexattr(n["file"], b"user.a"),
    "set an ACL": lambda tree, n: tree.setxattr(n["file"], acl.ACCESS, ACL),
    "open": lambda tree, n: tree.open(n["file"], os.O_RDWR, USER),
    "open and cut": lambda tree, n: tree.open(n["file"], os.O_WRONLY | os.O_TRUNC, USER),
    "release": lambda tree, n: tree.release(tree.open(n["file"], os.O_RDWR)),
    "release a deleted file": lambda tree, n: tree.release(n["handle"]),
    "forget a deleted file": lambda tree, n: tree.forget(n["loose"], 1),
    "allocate": lambda tree, n: tree.allocate(n["file"], 10_000, 60_000),
    "punch": lambda tree, n: tree.punch(n["file"], 3000, 12_000),
    "punch within a page": lambda tree, n: tree.punch(n["file"], 100, 200),
    "sparsify": lambda tree, n: (tree.allocate(n["file"], 40_000, 9000), tree.sparsify(n["file"])),
    "copy": lambda tree, n: tree.copy(n["other"], 0, n["file"], 6000, 30_000),
    "lose": lambda tree, n: tree.lose(n["file"], 0, 9000, errno.EIO),
    "an empty request": lambda tree, n: None,
}
OVERWRITING = [name for name in REQUESTS if name.startswith("write over ")] + ["copy"]
"""Requests that write over data."""


@pytest.fixture(scope="module")
def counted() -> Iterator[list[int]]:
    """How many deaths were tried, for the report."""
    counts: list[int] = []
    yield counts
    print(f"\n{sum(counts)} deaths in {len(counts)} requests")


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory.make(BLOCKS, Recording) as made:
        yield made


def check(memory: Memory, before: Any, after: Any, image: Image, where: str, taken: bytes, over: int) -> None:
    """Recover what a death has left, and compare it with the tree before the request and after it."""
    path = memory.ram.path + ".death"
    ram = restore(image, path, memory.ram.size)
    try:
        other = Memory(ram)
        tree = end(recover(other.store, before[2], ram, other.frames, Limits(), 1, taken))
        tree.assume_known()
        audit(tree)
        found, held = state(tree), contents(tree)
        assert found in (before[0], after[0]), where
        done = found == after[0] != before[0]
        for ino, data in held.items():
            was, will = before[1].get(ino), after[1].get(ino)
            if done or ino != over:
                assert data == (will if done else was), f"{where}: inode {ino}"
            else:  # what is written over data is there as soon as it is stored
                assert all(one in two for one, *two in zip(data, was, will, strict=False)), where
    finally:
        ram.close()
        os.unlink(path)


def run(memory: Memory, tree: Tree, request: Callable[[], object], *, taken: bytes = b"none", over: int = 0) -> int:
    """Do a request, which may write over data of inode `over`, and check every death in it; return how many."""
    ram = memory.ram
    assert isinstance(ram, Recording)
    before = state(tree), contents(tree), live(tree)
    held = ram.record()
    request()
    tree.commit()
    stores = ram.recorded()
    after = state(tree), contents(tree)
    count = 0
    for what, image in deaths(held, stores):
        check(memory, before, after, image, f"{what} of {len(stores)}", taken, over)
        count += 1
    audit(tree)
    return count


@pytest.mark.parametrize("name", REQUESTS)
def test_all_or_nothing(memory: Memory, counted: list[int], name: str) -> None:
    tree = memory.tree()
    numbers = prepare(tree)
    over = numbers["lost" if "pages" in name else "file"] if name in OVERWRITING else 0
    counted.append(run(memory, tree, lambda: REQUESTS[name](tree, numbers), over=over))


def test_all_or_nothing_of_huge_pages(memory: Memory, counted: list[int]) -> None:
    tree = memory.tree(huge="always")
    ino = tree.create(1, b"file", 0o644).ino
    tree.commit()
    counted.append(run(memory, tree, lambda: tree.write(ino, 5000, b"x" * 20_000)))
    counted.append(run(memory, tree, lambda: tree.setattr(ino, size=6000)))


@pytest.mark.parametrize("size", [10, 60_000], ids=["one", "large"])
def test_all_or_nothing_where_a_segment_ends(memory: Memory, counted: list[int], size: int) -> None:
    """A request that goes on in the next segment, of which the links come before the tail."""
    tree = memory.tree()
    ino = tree.create(1, b"file", 0o644).ino
    assert tree.journal is not None
    log = tree.journal.log
    while log.left > 65_536:
        tree.setxattr(ino, b"user.a", b"x" * 60_000)
        tree.commit()
    while log.left > 100:
        tree.set_times(ino, 1, log.left, 1)
        tree.commit()
    segments = len(log.segments)
    counted.append(run(memory, tree, lambda: tree.setxattr(ino, b"user.b", b"y" * size)))
    assert len(log.segments) == segments + 1


def test_all_or_nothing_of_a_checkpoint(memory: Memory, counted: list[int]) -> None:
    tree = memory.tree()
    numbers = prepare(tree)
    made = Checkpoint(memory, tree)
    tree.unlink(1, b"file")
    tree.commit()
    counted.append(run(memory, tree, made.finish))
    counted.append(run(memory, tree, Checkpoint(memory, tree).finish))
    counted.append(run(memory, tree, lambda: tree.release(numbers["handle"])))
    counted.append(run(memory, tree, lambda: tree.write(numbers["other"], 25_000, b"w" * 100)))


def test_all_or_nothing_of_a_preservation(memory: Memory, counted: list[int]) -> None:
    tree = memory.tree()
    tree.write(tree.create(1, b"file", 0o644).ino, 0, b"x" * 10_000)
    tree.commit()

    def write_whole() -> None:
        tree.freeze()
        end(save(tree, memory.store, NODE))
        tree.thaw()

    counted.append(run(memory, tree, write_whole, taken=NODE))
    counted.append(run(memory, tree, lambda: tree.mkdir(1, b"new", 0o755), taken=NODE))
    counted.append(run(memory, tree, write_whole, taken=NODE))


def restored(image: Image, path: str, size: int) -> tuple[bool, Any]:
    """Return whether a memory has the node, and the tree of whoever mounts the NAME: from the node, or the log."""
    ram = restore(image, path, size)
    try:
        other = Memory(ram)
        node = other.store.find(NODE)
        if node is None:
            return False, None
        tree = end(restore_node(other.store, NODE, ram, other.frames, Limits()))
        if tree.journal is None:
            begin(tree, b"x", 1, node.pfn)
        audit(tree)
        return True, (state(tree), contents(tree))
    finally:
        ram.close()
        os.unlink(path)


def closed(memory: Memory, tree: Tree) -> Any:
    """Return what a restore must bring back of a tree: nothing is open, and no data are lost any more."""
    with memory.copy() as other:
        again = end(recover(other.store, live(tree), other.ram, other.frames, Limits(), 1, None))
        again.losses.forget()
        return state(again), contents(again)


def test_a_node_is_whole_at_every_store(memory: Memory, counted: list[int]) -> None:
    """Preserved by a log, then written whole instead, then changed: whenever there is a node, it holds the tree."""
    tree = memory.tree()
    prepare(tree)
    tree.freeze()
    expected, path, seen = closed(memory, tree), memory.ram.path + ".node", list[bool]()
    assert isinstance(memory.ram, Recording)
    for work in (
        lambda: end(preserve(tree, memory.store, NODE)),
        lambda: end(save(tree, memory.store, NODE, instead=True)),
        lambda: (tree.thaw(), tree.mkdir(1, b"new", 0o755), tree.commit()),
    ):
        held = memory.ram.record()
        work()
        count = 0
        for what, image in deaths(held, memory.ram.recorded()):
            there, found = restored(image, path, memory.ram.size)
            assert not there or found == expected, what
            seen.append(there)
            count += 1
        counted.append(count)
    assert not seen[0] and not seen[-1] and sum(one != two for one, two in pairwise(seen)) == 2, "no moment without it"


def test_a_takeover_while_a_log_is_preserved(memory: Memory, counted: list[int]) -> None:
    tree = memory.tree()
    numbers = prepare(tree)
    tree.freeze()
    counted.append(run(memory, tree, lambda: end(preserve(tree, memory.store, NODE)), taken=NODE))
    counted.append(run(memory, tree, lambda: tree.release(numbers["handle"]), taken=NODE))
    counted.append(run(memory, tree, lambda: end(save(tree, memory.store, NODE, instead=True)), taken=NODE))
    tree.thaw()
    counted.append(run(memory, tree, lambda: tree.unlink(1, b"file"), taken=NODE))


def test_a_restore_from_a_log_may_be_interrupted(memory: Memory, counted: list[int]) -> None:
    """Until it is changed the node is there, so whoever comes next begins with it again."""
    tree = memory.tree()
    prepare(tree)
    tree.freeze()
    expected, path = closed(memory, tree), memory.ram.path + ".node"
    end(preserve(tree, memory.store, NODE))
    assert isinstance(memory.ram, Recording)
    frames = Frames(memory.ram, memory.leases, memory.frames.tree_id)
    held = memory.ram.record()
    again = end(restore_node(memory.store, NODE, memory.ram, frames, Limits()))
    stores = memory.ram.recorded()
    count = 0
    for what, image in deaths(held, stores):
        assert restored(image, path, memory.ram.size) == (True, expected), what
        count += 1
    counted.append(count)
    counted.append(run(memory, again, lambda: again.mkdir(1, b"new", 0o755), taken=NODE))
