# SPDX-License-Identifier: GPL-2.0-or-later
"""One object being saved: a byte stream and a page stream, and the record that names both.

    write(b"…")                     ─► bytewriter ─┐
    save_runs(…)  save_pages(…)     ─► pagewriter ─┼─► linkwriter ─► links
                                    finish ────────┘       the record: heads, tails, lengths, checksum

Any number of threads may save pages; the byte stream belongs to one.

Kernel: mm/pkram.c (pkram_prepare_save_obj, pkram_finish_save_obj), patches 3, 4 and 6
"""

import errno
from types import TracebackType
from typing import Any

from pkramfs.errors import PkramError
from pkramfs.machine.frames import Run
from pkramfs.pkram.format import NEXT, OBJECT, OBJECT_MAGIC, OTHER
from pkramfs.pkram.frameset import FrameSet
from pkramfs.pkram.page import write_page
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.streams.bytewriter import ByteWriter
from pkramfs.pkram.streams.completeness import Completeness
from pkramfs.pkram.streams.linkwriter import LinkWriter
from pkramfs.pkram.streams.pagewriter import PageWriter
from pkramfs.spans import U64


class ObjectWriter:
    """One object being saved. Use it in a `with`: leaving finishes it.

    Where a call fails after a part of it was done (no memory, a page named twice), or the `with` is left by an
    exception, the object is incomplete for good: every further call raises, and so does `Save.finish`.
    """

    def __init__(self, frames: SaveFrames, named: FrameSet, generation: int, *, strict: bool, align: bool) -> None:
        self._ram, self._strict = frames.ram, strict
        self._completeness = Completeness()
        self._links = LinkWriter(frames, generation)
        self._bytes = ByteWriter(frames, self._completeness)
        self._pages = PageWriter(frames, named, self._links, self._completeness, strict=strict, align=align)
        self.values: dict[str, int] | None = None
        """The object record's fields, once finished."""

    def __enter__(self) -> "ObjectWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._completeness.fail(error)

    @property
    def page_count(self) -> int:
        """Return the number of frames that the page stream names so far."""
        return self._pages.count

    @property
    def relocated(self) -> list[Run]:
        """Return the runs of frames that hold copies of banned pages."""
        return self._pages.relocated

    def give_up(self) -> None:
        """Take no more frames for this object: its save was discarded."""
        self._completeness.fail(PkramError("its node is not being saved any more", errno.EINVAL))

    def _expect_open(self) -> None:
        if self.values is not None:
            raise PkramError("the object is finished, nothing can be added to it", errno.EINVAL)
        self._completeness.expect()

    def write(self, data: Any) -> int:
        """Append bytes to the byte stream; return how many. PkramError (ENOMEM) if memory is out.

        Kernel: pkram_write()
        """
        self._expect_open()
        return self._bytes.write(data)

    def save_runs(self, index: Any, pfn: Any, count: Any) -> None:
        """Preserve runs of frames: arrays (u64) of first index, first pfn and pages; from any thread.

        Frames are not copied unless they are banned. They become the fewest naturally aligned
        blocks, or one entry each in a strict save. Errors: EINVAL (not memory, index too large),
        EEXIST (a frame or an index is saved twice; told here or by `finish`), ENOMEM.

        Kernel: pkram_save_file_page()
        """
        self._expect_open()
        self._pages.save_runs(index, pfn, count)

    def save_pages(self, index: Any, pfn: Any, order: Any) -> None:
        """Preserve blocks as they are: arrays of index, pfn (aligned to the order) and order 0 to 18.

        An order-9 block is marked as a huge page. Blocks that touch banned memory are relocated and
        come back in pieces. Errors as in `save_runs`.

        Kernel: pkram_save_file_page() with a compound page
        """
        self._expect_open()
        self._pages.save_pages(index, pfn, order)

    def finish(self) -> None:
        """Write the collected rows and chain the links, which completes the object. Raise PkramError if a part is
        missing.

        Kernel: pkram_finish_save_obj()
        """
        if self.values is not None:
            return
        self._completeness.expect()
        with self._completeness.required():
            self._finish()

    def _finish(self) -> None:
        self._bytes.flush()
        self._pages.flush()
        rows = self._bytes.rows(strict=self._strict)
        byte_links: U64 | list[int] = [] if rows is None else self._links.write(rows)
        page_links = self._pages.finish()
        self.values = {
            "generation": self._links.generation,
            **_ends("pages", page_links),
            **_ends("bytes", byte_links),
            "data_length": self._bytes.length,
            "data_checksum": self._bytes.checksum,
            "page_count": self._pages.count,
            "page_links": len(page_links),
            "byte_links": len(byte_links),
        }

    def write_record(self, pfn: int, following: int) -> None:
        """Write the object's own page, naming the next object."""
        if self.values is None:
            raise AssertionError("the object was not finished")
        write_page(self._ram, pfn, OBJECT, {NEXT: 0, OTHER: 0}, magic=OBJECT_MAGIC, object=following, **self.values)


def _ends(stream: str, links: U64 | list[int]) -> dict[str, int]:
    """Return the fields that name the first and the last link of a stream, 0 where it has none."""
    head, tail = (int(links[0]), int(links[-1])) if len(links) else (0, 0)
    return {f"{stream}_head": head, f"{stream}_tail": tail}
