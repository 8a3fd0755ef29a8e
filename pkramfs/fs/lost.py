# SPDX-License-Identifier: GPL-2.0-or-later
"""Data that programs wrote and that are lost, because a write-back was refused.

write(2) into the kernel's cache and a store through a mapping succeed at once. When the kernel writes back later and
there is no room, it reports the error to the next fsync or close (errseq), and keeps the page as if nothing had
happened. A program that calls neither, or stores and unmaps, never learns of it. When the page is dropped from the
cache, the range reads as before. So a tree remembers which pages of which files are *lost*:

    lost ── the page is written, whole ──────▶ not lost: the cached page arrives after all, or is written anew
         ── the file is cut before it ───────▶ not lost: the page is gone
         ── a hole is punched, the file goes ─▶ the same
         ── the tree is preserved in spite of it (lossy): the missing pages are named and forgotten

A number for each 2 MiB of a file has a bit for each page. If a file has lost pages in more than LIMIT of these ranges,
everything from there on counts as lost, until the file is cut.

Kernel: mm/filemap.c (mapping_set_error), lib/errseq.c; there the page is forgotten with its inode
"""

from collections.abc import Callable

from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT, pages

LIMIT = 4096


class LostPages:
    """The lost pages of one file, and the error of the first of them."""

    __slots__ = ("_blocks", "_from", "error")

    def __init__(self, error: int) -> None:
        self.error = error
        self._blocks: dict[int, int] = {}
        self._from: int | None = None  # the first 2 MiB from which on everything is lost

    def __bool__(self) -> bool:
        return bool(self._blocks) or self._from is not None

    def add(self, first: int, last: int) -> None:
        """Mark the pages [first, last) as lost."""
        for block, bits in _masks(first, last):
            if self._from is not None and block >= self._from:
                continue
            if block in self._blocks or len(self._blocks) < LIMIT:
                self._blocks[block] = self._blocks.get(block, 0) | bits
            else:
                self._from = block

    def remove(self, first: int, last: int) -> None:
        """Mark the pages [first, last) as not lost."""
        for block, bits in _masks(first, last) if last - first <= LIMIT * BLOCK_PAGES else self._among(first, last):
            left = self._blocks.get(block, 0) & ~bits
            if left:
                self._blocks[block] = left
            else:
                self._blocks.pop(block, None)

    def state(self) -> tuple[int, dict[int, int]]:
        """Return the 2 MiB range from which on all is lost (-1: none), and the mask of each range with lost pages."""
        return -1 if self._from is None else self._from, self._blocks

    def set_state(self, beyond: int, blocks: dict[int, int]) -> None:
        """Set a state that `state` returned."""
        self._from, self._blocks = None if beyond < 0 else beyond, blocks

    def cut(self, first: int) -> None:
        """Forget all lost pages from page `first` on."""
        if self._from is not None and first <= self._from * BLOCK_PAGES:
            self._from = None
        if self._blocks:
            self.remove(first, (max(self._blocks) + 1) * BLOCK_PAGES)

    def _among(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return `_masks` of a long range, but only for each 2 MiB with lost pages."""
        found = []
        for block in self._blocks:
            start = block * BLOCK_PAGES
            found += _masks(max(first, start), min(last, start + BLOCK_PAGES))
        return found


class Losses:
    """The files of a tree that have lost pages, by inode number."""

    def __init__(self) -> None:
        self.files: dict[int, LostPages] = {}
        self.refused = 0
        """The number of losses so far, mended or not."""
        self.changed: Callable[[int], object] = _nobody
        """Called with the number of a file of which other pages are lost than before."""

    def note(self, ino: int, offset: int, end: int, error: int) -> None:
        """Note that the bytes [offset, end) of a file were refused with this errno."""
        if offset < end:
            self.refused += 1
            found = self.files.get(ino)
            if found is None:
                found = self.files[ino] = LostPages(error)
            found.add(offset >> PAGE_SHIFT, pages(end))
            self.changed(ino)

    def written(self, ino: int, offset: int, end: int, size: int) -> None:
        """Note that the bytes [offset, end) of a file that is `size` long arrived.

        A page of which only a part arrived stays lost.
        """
        found = self.files.get(ino)
        if found is not None:
            found.remove(pages(offset), pages(end) if end >= size else end >> PAGE_SHIFT)
            self._tidy(ino)
            self.changed(ino)

    def cut(self, ino: int, size: int) -> None:
        """Forget lost pages beyond the new size of a file that was cut."""
        found = self.files.get(ino)
        if found is not None:
            found.cut(pages(size))
            self._tidy(ino)
            self.changed(ino)

    def drop(self, ino: int) -> None:
        """Forget a file that is gone."""
        self.files.pop(ino, None)

    def forget(self) -> None:
        """Forget all losses: the tree was preserved without these data."""
        files, self.files = self.files, {}
        for ino in files:
            self.changed(ino)

    def _tidy(self, ino: int) -> None:
        if not self.files[ino]:
            del self.files[ino]


def _nobody(ino: int) -> None:
    """Do nothing."""


def _masks(first: int, last: int) -> list[tuple[int, int]]:
    """Return the pages [first, last) as bits of each 2 MiB."""
    found = []
    for block in range(first // BLOCK_PAGES, -(-last // BLOCK_PAGES)) if first < last else ():
        start = block * BLOCK_PAGES
        low, high = max(first - start, 0), min(last - start, BLOCK_PAGES)
        found.append((block, (1 << high) - (1 << low)))
    return found
