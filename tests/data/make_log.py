# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the RAM image of a log of the current version: run once for each version, by its own program, never again.

    python -m tests.data.make_log tests/data/log-1.ram.xz

It has a checkpoint, every kind of request behind it, and a node that the log holds. It must be replayed for ever: an
image that is there already is not replaced. What is printed belongs into tests/fs/test_old_logs.py.
"""

import hashlib
import sys

from pkramfs.fs.sealing import preserve
from pkramfs.fs.tree import Tree
from tests.data.make_image import dump
from tests.support.journals import Checkpoint, Driver, Memory, contents, end, live

BLOCKS, NODE = 8, b"shmem-x"


def summary(tree: Tree) -> str:
    """A checksum over what a tree is, its data included."""
    tree.wake()
    data, found = contents(tree), hashlib.sha256()
    for ino, i in sorted(tree.inodes.items()):
        names = sorted((name, child.ino) for name, (child, _) in i.entries.entries.items()) if i.entries else None
        about = ino, i.mode, i.uid, i.gid, i.nlink, i.size, i.mtime, i.ctime, i.btime, i.rdev, i.flags, i.target
        found.update(repr((about, names, sorted((i.xattrs or {}).items()), data.get(ino))).encode())
    return found.hexdigest()[:16]


def build(memory: Memory) -> Tree:
    """Make the tree."""
    tree = memory.tree()
    driver = Driver(tree, 8)
    driver.random.randbytes = lambda size: b"w" * size  # type: ignore[method-assign]
    for number in range(220):
        driver.step()
        if number == 60:
            Checkpoint(memory, tree).finish()
    for handle in driver.handles:
        tree.release(handle)
    for inode in [one for one in tree.inodes.values() if not one.nlink]:
        tree.close_all(inode)
    tree.commit()
    tree.tell()
    tree.freeze()
    end(preserve(tree, memory.store, NODE))
    return tree


def main(path: str) -> None:
    with Memory.make(BLOCKS) as memory, open(path, "xb") as file:
        tree = build(memory)
        file.write(dump(memory.ram))
        print(f"live {live(tree)}, {len(tree.inodes)} inodes, {summary(tree)!r}")


if __name__ == "__main__":
    main(sys.argv[1])
