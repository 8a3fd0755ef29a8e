# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree that was rebuilt from its log, verified as a whole: what was done before only what is awake was verified."""

import contextlib
from collections.abc import Iterator

import pytest

from pkramfs.errors import FormatError
from pkramfs.fs import recheck, recover
from pkramfs.fs.picture import complete, take
from pkramfs.fs.save import stream
from pkramfs.fs.tree import Tree
from pkramfs.fs.verify import verify
from pkramfs.pkram.treeformat import TreeStream
from pkramfs.spans import Spans


def verify_whole(tree: Tree) -> Spans:
    """Raise FormatError unless the whole tree holds; return the frames of all files."""
    picture = complete(take(tree, deleted=True))
    index, pfn, count = picture.page_stream()
    data = Spans.from_runs(pfn, count)
    verify(TreeStream(b"".join(stream(tree, picture))), (index, pfn, count), data, data, deleted=True)
    return data


class Both:
    """What is said of the trees that are rebuilt from now on: the last error of both, None for a tree that holds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.whole: str | None = None
        self.awake: str | None = None
        self.amended = False
        """Whether the last tree had directories that slept on while their names were changed."""
        self._data = Spans()
        patch.setattr(recover, "recheck", self._recheck)
        patch.setattr(recover, "frames_of_all", self._frames)

    def _recheck(self, tree: Tree) -> None:
        """First what is asked for: to verify all of a tree wakes what a log has amended."""
        self.asked, self.whole, self.awake = self.asked + 1, None, None
        self.amended = tree.asleep is not None and bool(tree.asleep.amended)
        failed = None
        try:
            recheck.recheck(tree)
        except FormatError as error:
            failed = error
        try:
            self._data = verify_whole(tree)
        except FormatError as error:
            self.whole = str(error)
        with self._noted():
            if failed is not None:
                raise failed

    def _frames(self, tree: Tree, touched: recheck.Touched, before: Spans) -> Spans:
        with self._noted():
            found = recheck.frames_of_all(tree, touched, before)
        assert self.whole is None, f"the whole tree does not hold: {self.whole}"
        assert found == self._data
        return found

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except FormatError as error:
            self.awake = str(error)
            assert self.whole is not None, f"the whole tree holds, but what is awake does not: {error}"
            raise
