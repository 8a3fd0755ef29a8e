# SPDX-License-Identifier: GPL-2.0-or-later
"""A node being saved: objects one after the other, then published whole, or given up without a trace.

    SAVING ──finish──► PUBLISHED       by one store, after everything else is in memory
       └────discard──► DISCARDED       also on an exception, or on leaving without finish

Whoever is interrupted inside of `finish` (a signal, a debugger) cannot know whether the store was
done; so giving up looks into the list first and never frees the frames of a node that can be found.

Kernel: mm/pkram.c (pkram_prepare_save_obj, pkram_finish_save, pkram_discard_save), patches 2 and 3
"""

import enum
import errno
import time
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from pkramfs.errors import PkramError
from pkramfs.machine.claims import Claim
from pkramfs.pkram import superblock
from pkramfs.pkram.format import NEXT, NODE, NODE_MAGIC, OTHER
from pkramfs.pkram.frameset import FrameSet
from pkramfs.pkram.node import STRICT, Node, read_node, shown
from pkramfs.pkram.page import write_page
from pkramfs.pkram.relocate import Allocator, Run
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.streams.writer import ObjectWriter
from pkramfs.pkram.table.writer import TableWriter
from pkramfs.spans import Spans

if TYPE_CHECKING:
    from pkramfs.pkram.store import Store


class State(enum.Enum):
    """What became of a save."""

    SAVING = enum.auto()
    PUBLISHED = enum.auto()
    DISCARDED = enum.auto()


class Save:
    """A node being saved; nobody sees it before `finish`. Use it in a `with`."""

    def __init__(
        self,
        store: "Store",
        name: bytes,
        tree_id: int,
        frames: Allocator,
        banned: Spans,
        *,
        strict: bool,
        align: bool,
        claim: Claim,
    ) -> None:
        self.store, self.name, self.tree_id, self._claim = store, name, tree_id, claim
        self._ram, self._strict, self._align = store.ram, strict, align
        self._frames = SaveFrames(store.ram, frames, banned, partial(_no_memory, name))
        self._named = FrameSet(store.ram.pages)
        self.generation = superblock.check(store.ram, store.root()).generation
        self._writers: list[ObjectWriter] = []
        self.state = State.SAVING
        self._node_pfn = 0

    def __enter__(self) -> "Save":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.state is State.SAVING:
            self.discard()

    @property
    def moved(self) -> list[Run]:
        """Runs of frames that hold copies of banned pages."""
        return [run for writer in self._writers for run in writer.moved]

    @property
    def taken(self) -> Spans:
        """The frames that are only the node's: metadata, byte pages, and copies of banned pages."""
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
        copies = Spans((start, start + count) for start, count in self.moved)
        if data & self._frames.spans() - copies:
            raise PkramError("a frame to preserve is in use by the save itself", errno.EINVAL)
        table = TableWriter(self._ram, self._frames.pages)
        self._frames.unlisted()
        table.add(data | self._frames.spans())
        digest = table.close(self._frames.unlisted)
        self._write_node(node_pfn, objects, table.root, digest, (data | self._frames.spans()).total)
        self._node_pfn = node_pfn
        self.store.publish(self.name, node_pfn)
        self._end(State.PUBLISHED)
        return read_node(self._ram, node_pfn)

    def _write_node(self, pfn: int, objects: list[int], table: int, digest: int, total: int) -> None:
        write_page(
            self._ram,
            pfn,
            NODE,
            {NEXT: 0, OTHER: 0},
            magic=NODE_MAGIC,
            generation=self.generation,
            tree_id=self.tree_id,
            object=objects[0] if objects else 0,
            table=table,
            table_checksum=digest,
            pages=total,
            created=time.time_ns(),
            objects=len(objects),
            name_length=len(self.name),
            flags=STRICT if self._strict else 0,
            name=self.name,
            moved=sum(count for _, count in self.moved),
        )

    def discard(self) -> None:
        """Give everything back; nobody saw it. A node that was published after all stays.

        Kernel: pkram_discard_save()
        """
        if self.state is not State.SAVING:
            return
        if self._node_pfn and any(node.pfn == self._node_pfn for node in self.store.nodes()):
            self._end(State.PUBLISHED)
            return
        for writer in self._writers:
            writer.give_up()
        self._frames.release()
        self._end(State.DISCARDED)

    def _end(self, state: State) -> None:
        """The name is free for others."""
        self.state = state
        self._claim.release()


def _no_memory(name: bytes, error: OSError) -> PkramError:
    return PkramError(f"no memory to save node {shown(name)}: {error}", errno.ENOMEM)
