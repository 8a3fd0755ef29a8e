# SPDX-License-Identifier: GPL-2.0-or-later
"""A node being saved: objects one after the other, then published whole, or discarded without a trace.

    SAVING ──finish──► PUBLISHED       by one store, after everything else is in memory
       └────discard──► DISCARDED       also on an exception, or on leaving without finish

A save that is interrupted inside of `finish` (a signal, a debugger) cannot know whether the store was
done. So `discard` looks into the list first and never frees the frames of a node that can be found.

A save knows the node list only through its `Place`: how to publish a node, and how to tell whether one is published.
The list itself is the store's.

Kernel: mm/pkram.c (pkram_prepare_save_obj, pkram_finish_save, pkram_discard_save), patches 2 and 3
"""

import enum
import errno
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import NamedTuple

from pkramfs.errors import PkramError
from pkramfs.machine.claims import Claim
from pkramfs.machine.frames import Run, spans_of
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NEXT, NODE, NODE_MAGIC, OTHER, WITHDRAWN_MAGIC
from pkramfs.pkram.frameset import FrameSet
from pkramfs.pkram.node import LOGGED, STRICT, Node, read_node, shown
from pkramfs.pkram.page import write_page
from pkramfs.pkram.relocate import Allocator
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.streams.writer import ObjectWriter
from pkramfs.pkram.table.writer import TableWriter
from pkramfs.spans import Spans


class State(enum.Enum):
    """The state of a save."""

    SAVING = enum.auto()
    PUBLISHED = enum.auto()
    DISCARDED = enum.auto()


class Place(NamedTuple):
    """The node list as a save sees it: the generation of its super block, and the operations on the list."""

    generation: int
    publish: Callable[[bytes, int], None]
    """Make the node page of this name and pfn part of the list; PkramError (EEXIST) if the name is taken."""
    is_published: Callable[[int], bool]
    """Return True if the list leads to the node page at this pfn."""
    listed: bool = True
    """A node that is not to be listed looks like one that was withdrawn, so that no search finds it."""


class Save:
    """A node being saved; it is not visible before `finish`. Use it in a `with`."""

    def __init__(
        self,
        ram: Ram,
        place: Place,
        name: bytes,
        tree_id: int,
        frames: Allocator,
        banned: Spans,
        *,
        strict: bool,
        align: bool,
        claim: Claim,
    ) -> None:
        self.name, self.tree_id, self.generation = name, tree_id, place.generation
        self._ram, self._place, self._claim = ram, place, claim
        self._strict, self._align = strict, align
        self._frames = SaveFrames(ram, frames, banned, partial(no_memory, name))
        self._named = FrameSet(ram.pages)
        self._writers: list[ObjectWriter] = []
        self._log, self._logged = 0, Spans()
        self.state = State.SAVING
        self._node_pfn = 0

    def __enter__(self) -> "Save":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.state is State.SAVING:
            self.discard()

    @property
    def relocated(self) -> list[Run]:
        """Return the runs of frames that hold copies of banned pages."""
        return [run for writer in self._writers for run in writer.relocated]

    @property
    def taken(self) -> Spans:
        """Return the frames that are only the node's: metadata, byte pages, and copies of banned pages."""
        return self._frames.spans()

    def _expect_open(self) -> None:
        if self.state is not State.SAVING:
            raise PkramError(f"node {shown(self.name)} is not being saved any more", errno.EINVAL)

    def object(self) -> ObjectWriter:
        """Begin the next object; the one before must be finished (EBUSY).

        Kernel: pkram_prepare_save_obj()
        """
        self._expect_open()
        if self._writers and self._writers[-1].values is None:
            raise PkramError("the object before is not finished", errno.EBUSY)
        writer = ObjectWriter(self._frames, self._named, self.generation, strict=self._strict, align=self._align)
        self._writers.append(writer)
        return writer

    def pages(self, count: int) -> list[int]:
        """Take zeroed frames for structures that the node leads to besides objects; return their pfns."""
        self._expect_open()
        found: list[int] = self._frames.pages(count).tolist()
        return found

    def log(self, pfn: int, pages: Spans) -> None:
        """Save a log instead of objects: the page that seals it, and all pages to which it leads.

        `pages` may contain more: all pages of the owner, including free ones. None is copied, so none may be banned.
        """
        self._expect_open()
        if self._writers:
            raise PkramError("a node has objects or a log, not both", errno.EINVAL)
        self._log, self._logged = pfn, pages

    def finish(self) -> Node:
        """Publish the node by one store. Errors: EEXIST (the name, or a frame saved twice), ENOMEM.

        Kernel: pkram_finish_save()
        """
        self._expect_open()
        for writer in self._writers:
            writer.finish()
        data = self._named.spans()
        places = self._frames.pages(len(self._writers) + 1).tolist()
        node_pfn, objects = places[0], places[1:]
        for writer, pfn, following in zip(self._writers, objects, [*objects, 0][1:], strict=True):
            writer.write_record(pfn, following)
        relocated = spans_of(self.relocated)
        if data & self._frames.spans() - relocated:
            raise PkramError("a frame to preserve is in use by the save itself", errno.EINVAL)
        data = data | self._logged
        table = TableWriter(self._ram, self._frames.pages)
        self._frames.unlisted()
        table.add(data | self._frames.spans())
        digest = table.close(lambda: self._frames.unlisted() - data)
        self._write_node(node_pfn, objects, table.root, digest, (data | self._frames.spans()).total)
        self._node_pfn = node_pfn
        self._place.publish(self.name, node_pfn)
        self._end(State.PUBLISHED)
        return read_node(self._ram, node_pfn, listed=self._place.listed)

    def _write_node(self, pfn: int, objects: list[int], table: int, digest: int, total: int) -> None:
        write_page(
            self._ram,
            pfn,
            NODE,
            {NEXT: 0, OTHER: 0},
            magic=NODE_MAGIC if self._place.listed else WITHDRAWN_MAGIC,
            generation=self.generation,
            tree_id=self.tree_id,
            object=objects[0] if objects else 0,
            table=table,
            table_checksum=digest,
            pages=total,
            created=time.time_ns(),
            objects=len(objects),
            name_length=len(self.name),
            flags=(STRICT if self._strict else 0) | (LOGGED if self._log else 0),
            name=self.name,
            moved=sum(count for _, count in self.relocated),
            log=self._log,
        )

    def discard(self) -> None:
        """Free everything that the save has taken. A node that was published after all stays.

        Kernel: pkram_discard_save()
        """
        if self.state is not State.SAVING:
            return
        if self._node_pfn and self._place.is_published(self._node_pfn):
            self._end(State.PUBLISHED)
            return
        for writer in self._writers:
            writer.give_up()
        self._frames.release()
        self._end(State.DISCARDED)

    def _end(self, state: State) -> None:
        """End the save; its name is free for others."""
        self.state = state
        self._claim.release()


def no_memory(name: bytes, error: OSError) -> PkramError:
    """Return the error (ENOMEM) for an allocator, or a host, that has no memory for a node."""
    return PkramError(f"no memory to save node {shown(name)}: {error}", errno.ENOMEM)
