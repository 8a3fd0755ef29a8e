# SPDX-License-Identifier: GPL-2.0-or-later
"""What a refused write-back leaves behind: which data are lost, and when they are not any more."""

import errno
import os
import random
from typing import Any

import pytest

from pkramfs.fs.lost import LIMIT, Losses, LostPages
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE


@pytest.mark.few(5)
@pytest.mark.parametrize("seed", range(20))
def test_pages_are_as_in_a_set(seed: int) -> None:
    rng, lost, model = random.Random(seed), LostPages(errno.ENOSPC), set[int]()
    for _ in range(300):
        first = rng.randrange(5 * BLOCK_PAGES)
        last = first + rng.choice((0, 1, 3, 256, 2000))
        match rng.randrange(5):
            case 0 | 1:
                lost.add(first, last)
                model |= set(range(first, last))
            case 2 | 3:
                lost.remove(first, last)
                model -= set(range(first, last))
            case 4 if rng.random() < 0.2:
                lost.cut(first)
                model = {page for page in model if page < first}
        found = {
            block * BLOCK_PAGES + bit for block, bits in lost._blocks.items() for bit in range(512) if bits >> bit & 1
        }
        assert found == model and bool(lost) == bool(model)


def test_a_file_that_lost_pages_everywhere_costs_no_more() -> None:
    lost = LostPages(errno.ENOSPC)
    for block in range(2 * LIMIT):
        lost.add(block * BLOCK_PAGES, block * BLOCK_PAGES + 1)
    assert len(lost._blocks) == LIMIT
    lost.remove(0, 1 << 50)
    assert lost and not lost._blocks, "not all of them are known"
    lost.cut(LIMIT * BLOCK_PAGES + 1)
    assert lost
    lost.cut(LIMIT * BLOCK_PAGES)
    assert not lost


def test_what_ends_a_loss(sh: Any) -> None:
    tree = sh.tree
    mends = {
        "write": lambda ino: tree.write(ino, 2 * PAGE_SIZE, b"x" * 2 * PAGE_SIZE),
        "write-more": lambda ino: tree.write(ino, 0, b"x" * 8 * PAGE_SIZE),
        "to-the-end": lambda ino: tree.write(ino, 2 * PAGE_SIZE, b"x" * (PAGE_SIZE + 7)),
        "truncate": lambda ino: tree.setattr(ino, size=2 * PAGE_SIZE),
        "truncate-same": lambda ino: tree.setattr(ino, size=PAGE_SIZE),
        "open": lambda ino: tree.open(ino, os.O_WRONLY | os.O_TRUNC),
        "punch": lambda ino: tree.punch(ino, 0, 1 << 20),
    }
    for name, mend in mends.items():
        ino = sh.write(name.encode(), b"x" * PAGE_SIZE)
        tree.lose(ino, 2 * PAGE_SIZE, 3 * PAGE_SIZE + 7, errno.ENOSPC)
        assert (tree.lost(), tree.lost_count) == ([b"/" + name.encode()], 1), name
        mend(ino)
        assert (tree.lost(), tree.lost_count) == ([], 0), name


def test_what_does_not_end_a_loss(sh: Any) -> None:
    """Other pages, and a page of which only a part is written: the rest of it may be missing still."""
    tree, ino = sh.tree, sh.write(b"a", b"x" * 8 * PAGE_SIZE)
    tree.lose(ino, 2 * PAGE_SIZE, 3 * PAGE_SIZE)
    for change in (
        lambda: tree.write(ino, 0, b"x" * 2 * PAGE_SIZE),
        lambda: tree.write(ino, 2 * PAGE_SIZE, b"x" * 100),
        lambda: tree.write(ino, 2 * PAGE_SIZE + 1, b"x" * PAGE_SIZE),
        lambda: tree.write(ino, 3 * PAGE_SIZE, b"x" * PAGE_SIZE),
        lambda: tree.setattr(ino, size=3 * PAGE_SIZE),
        lambda: tree.setattr(ino, size=1 << 40),
        lambda: tree.setattr(ino, mode=0o600),
        lambda: tree.allocate(ino, 0, 8 * PAGE_SIZE),
        lambda: tree.punch(ino, 0, 2 * PAGE_SIZE),
        lambda: tree.rename(1, b"a", 1, b"b"),
        lambda: tree.open(ino, os.O_RDWR),
    ):
        change()
        assert tree.lost_count == 1
    assert tree.lost() == [b"/b"]


def test_a_deleted_file_has_lost_nothing(sh: Any) -> None:
    tree, ino = sh.tree, sh.write(b"a")
    handle = tree.open(ino, os.O_RDWR | os.O_DIRECT)
    tree.lose(handle, 0, 1)
    assert tree.lost() == [b"/a"]
    tree.unlink(1, b"a")
    assert (tree.lost(), tree.lost_count) == ([], 0) and tree.losses.files
    tree.release(handle)
    assert not tree.losses.files
    tree.lose(handle, 0, 1)  # a late one
    assert not tree.losses.files


def test_what_is_forgotten_is_told_to_whoever_keeps_account() -> None:
    losses, told = Losses(), list[int]()
    losses.note(7, 0, 4096, 28)
    losses.note(9, 0, 4096, 28)
    losses.changed = told.append
    losses.forget()
    assert (losses.files, told) == ({}, [7, 9])
