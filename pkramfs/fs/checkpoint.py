# SPDX-License-Identifier: GPL-2.0-or-later
"""Write a tree that was rebuilt from its log as a checkpoint: a node that no list names.

It is written as `save` writes a tree, but with deleted inodes, which programs may have open. Frames of files are not
copied: they belong to the tree whose daemon asked for the checkpoint and serves meanwhile.

Kernel: fs/jbd2/checkpoint.c (jbd2_log_do_checkpoint)
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pkramfs.errors import ExhaustedError
from pkramfs.fs.picture import Progress, take
from pkramfs.fs.save import save_runs, stream
from pkramfs.journal.layout import Figures
from pkramfs.machine.frames import FreeRuns, Run
from pkramfs.spans import Spans

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree
    from pkramfs.pkram.store import Store


def figures(tree: Tree) -> Figures:
    """Return the figures of a tree. All of them are counters; nothing is searched."""
    counts = tree.counts()
    return Figures(counts.files + counts.directories, counts.pages, counts.bytes, tree.limits.inode_space)


class Supply:
    """An allocator of frames that another process has allocated."""

    def __init__(self, runs: list[Run]) -> None:
        self._free = FreeRuns()
        for run in runs:
            self._free.add(*run)

    def allocate(self, count: int, order: int = 0, *, held: bool = False) -> list[Run]:
        """Allocate runs of so many pages in all; raise ExhaustedError if the supply has fewer."""
        if count > self._free.total:
            raise ExhaustedError(f"the checkpoint needs more frames than it was given: {count} more")
        runs: list[Run] = []
        while count:
            run = self._free.take(count) or self._free.take_largest(count)
            assert run is not None
            runs.append(run)
            count -= run[1]
        return runs

    def free(self, starts: list[int], counts: list[int]) -> None:
        """Take runs back."""
        for start, count in zip(starts, counts, strict=True):
            self._free.add(int(start), int(count))


def write(tree: Tree, store: Store, name: bytes, supply: Supply) -> Generator[Progress, None, tuple[int, Spans]]:
    """Write a tree as a node with frames of the supply; return the node's pfn, and the frames of its metadata."""
    picture = yield from take(tree, deleted=True)
    with store.prepare_unlisted(name, tree_id=tree.frames.tree_id, frames=supply) as saving:
        with saving.object() as writer:
            for part in stream(tree, picture):
                writer.write(part)
        yield Progress("pages", 0, len(picture.runs))
        with saving.object() as writer:
            save_runs(writer, picture.runs)
        return saving.finish().pfn, saving.taken
