# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checksums of a tree's data must be, worked out page by page from its frames."""

import xxhash

from pkramfs.fs.summing import Summing, begin
from pkramfs.fs.sums import Sums
from pkramfs.fs.sumtable import DOUBTED, SOUND
from pkramfs.fs.tree import Tree

PAGE, PIECE = 4096, 1 << 20


def enable(tree: Tree) -> Summing:
    """Have data summed, as verify=data does."""
    tree.sums = tree.sums or Sums(tree)
    begin(tree, tree.sums)
    return Summing(tree, tree.sums)


def rest(work: Summing, *, compare: bool = True) -> None:
    """Let all come to rest, and be summed and compared."""
    for _ in range(2):
        work.sums.table.turn()
        while work.step(compare=compare):
            pass


def expected(tree: Tree) -> dict[tuple[int, int], int]:
    """The sum of every piece that has frames, by inode number and piece; wakes the tree."""
    tree.wake()
    frames: dict[tuple[int, int], list[int]] = {}
    for inode in tree.inodes.values():
        for index, pfn, count in inode.pages or ():
            for page in range(count):
                frames.setdefault((inode.ino, (index + page) // 256), []).append(pfn + page)
    return {
        (ino, piece): xxhash.xxh3_64_intdigest(
            b"".join(tree.ram.peek(pfn) for pfn in pfns), seed=(ino << 32 ^ piece) % (1 << 64)
        )
        for (ino, piece), pfns in frames.items()
    }


def known(tree: Tree, *states: int) -> dict[tuple[int, int], int]:
    """The sums that a tree has."""
    assert tree.sums is not None
    rows = tree.sums.table.rows()
    found = {
        (ino, piece): value
        for ino, piece, value in zip(rows.ino.tolist(), rows.piece.tolist(), rows.sum.tolist(), strict=True)
    }
    assert len(found) == len(rows.ino), "a piece has two sums"
    if not states:
        return found
    rowed = {key: tree.sums.table.find(*key) for key in found}
    return {key: found[key] for key, row in rowed.items() if int(tree.sums.table.state[row]) in states}


def hold(tree: Tree, *, counted: bool = True) -> int:
    """All sums are right, and what has none is counted; return how many there are."""
    assert tree.sums is not None
    should, found = expected(tree), known(tree)
    damaged = {(key >> 43, key & (1 << 43) - 1) for key in tree.sums.damaged}
    assert not damaged & found.keys()
    for key, value in found.items():
        assert value == should.get(key), f"the sum of {key} is wrong"
    table = tree.sums.table
    assert table.doubted == len(known(tree, DOUBTED)) and len(known(tree, SOUND, DOUBTED)) == len(found)
    if counted:
        assert table.pending == len(should.keys() - found.keys() - damaged)
    return len(found)


def flip(tree: Tree, ino: int, offset: int) -> None:
    """Flip a bit of a file in its frame."""
    inode = tree.inode(ino)
    assert inode.pages is not None
    ((_, pfn, _),) = inode.pages.between(offset // PAGE, offset // PAGE + 1)
    tree.ram.bytes[pfn * PAGE + offset % PAGE] ^= 4
