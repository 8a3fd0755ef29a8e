"""The front door: nodes by name. Save one, load one, list, withdraw.

    prepare_save ─► objects … ─► finish      the node appears, whole, by one store
                              └► discard     everything is freed, nothing was visible
    prepare_load ─► objects … ─► finish      nothing is consumed (unless asked for)
    withdraw                                 the node disappears, by one store

Nodes hang in a list off the super block and are published newest first. The list is changed only
under the machine's table lock and read without: every step of a reader is checked, so a reader that
meets a node on its way out sees an error and looks again.

A save lives in the page blocks of its owner (`tree_id`), metadata too: so withdrawing a node, or
sweeping a dead owner, needs no walk over its pages.

Kernel: mm/pkram.c (pkram_prepare_save … pkram_finish_load), patches 2, 3, 7 and 19
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pkramfs.errors import FormatError, PkramError
from pkramfs.machine.ram import Ram
from pkramfs.pkram import pagetable, superblock
from pkramfs.pkram.format import LINK_CAPACITY, NAME_MAX, NEXT, NODE, NODE_MAGIC, OTHER
from pkramfs.pkram.page import expect_flags, expect_unused, publish, read_page, read_word, write_page
from pkramfs.pkram.relocate import Allocator
from pkramfs.pkram.streams import Arena, ObjectReader, ObjectWriter
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SIZE, format_pfn, pages

STRICT = 1


@dataclass(frozen=True)
class Node:
    """A published node. `pages` counts its frames, metadata included."""

    name: bytes
    tree_id: int
    pfn: int
    pages: int
    created_ns: int
    objects: int
    generation: int
    strict: bool
    table_pfn: int
    table_checksum: int
    object_pfn: int
    moved: int
    """Frames that hold copies: their pages lay where a loaded kernel, or this one, would be."""


class Store:
    """All nodes below one super block. `lock` gives the context manager of the table lock.

    `super_pfn` None is PKRAM switched off: everything answers ENODEV and nothing is touched.
    """

    def __init__(self, ram: Ram, super_pfn: int | None, lock: Callable[[], AbstractContextManager[Any]]) -> None:
        self.ram, self.super_pfn, self._lock = ram, super_pfn, lock
        self._saving: set[bytes] = set()
        self._loading: dict[bytes, int] = {}
        self._mutex = threading.Lock()

    def _root(self) -> int:
        if self.super_pfn is None:
            raise PkramError("PKRAM is switched off in this kernel", errno.ENODEV)
        return self.super_pfn

    # -- what is there ---------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Every published node, newest first; FormatError if the list is damaged."""
        try:
            return list(self._walk())
        except FormatError:
            return list(self._walk())  # a node may have been withdrawn under our eyes

    def _walk(self) -> Iterator[Node]:
        pfn, seen = read_word(self.ram, self._root(), NEXT, "Super", "node"), set[int]()
        while pfn:
            if pfn in seen:
                raise FormatError("Node", "next", pfn=pfn, found="a node met before", expected="the end of the list")
            seen.add(pfn)
            yield read_node(self.ram, pfn)
            pfn = read_word(self.ram, pfn, NEXT, "Node", "next")

    def find(self, name: bytes) -> Node | None:
        """The node of this name, if there is one."""
        return next((node for node in self.nodes() if node.name == name), None)

    def preserved_ids(self) -> set[int]:
        """Tree ids that published nodes name."""
        return set() if self.super_pfn is None else {node.tree_id for node in self.nodes()}

    def pages_of(self, node: Node) -> Spans:
        """Every frame of a node, from its page table."""
        found = pagetable.checksum(self.ram, node.table_pfn)
        if found != node.table_checksum:
            raise FormatError(
                "Node", "table_checksum", pfn=node.pfn, found=f"{found:016x}", expected=f"{node.table_checksum:016x}"
            )
        spans = pagetable.read(self.ram, node.table_pfn)
        if spans.total != node.pages:
            raise FormatError("Node", "pages", pfn=node.pfn, found=spans.total, expected=node.pages)
        return spans

    def preserved(self) -> Spans:
        """Every frame of every node."""
        spans = Spans()
        for node in self.nodes():
            spans = spans | self.pages_of(node)
        return spans

    def metadata_pages(self, name: bytes) -> Spans:
        """The frames that a node uses for itself, so that its owner can free them after a withdrawal."""
        node = self._named(name)
        spans = self.pages_of(node)
        for reader in read_objects(self.ram, node):
            spans = spans - reader.data
        return spans

    def _named(self, name: bytes) -> Node:
        node = self.find(name)
        if node is None:
            raise PkramError(f"there is no node {_shown(name)}", errno.ENOENT)
        return node

    # -- saving ----------------------------------------------------------------------------------

    def prepare_save(
        self,
        name: bytes,
        *,
        tree_id: int,
        frames: Allocator,
        banned: Spans | None = None,
        strict: bool = False,
        align: bool = False,
    ) -> "Save":
        """Begin a node. Use it in a `with`: leaving without `finish` discards it.

        Errors: ENODEV (off), ENAMETOOLONG, EINVAL (empty), EEXIST (also while being saved).
        """
        self._root()
        if len(name) > NAME_MAX:
            raise PkramError(f"the node name has {len(name)} bytes, at most {NAME_MAX} can be", errno.ENAMETOOLONG)
        if not name or b"\0" in name:
            raise PkramError("a node name must not be empty nor contain NUL", errno.EINVAL)
        with self._mutex:
            if name in self._saving or self.find(name) is not None:
                raise PkramError(f"node {_shown(name)} exists already", errno.EEXIST)
            self._saving.add(name)
        try:
            return Save(self, name, tree_id, frames, banned or Spans(), strict=strict, align=align)
        except BaseException:
            self._saved(name)
            raise

    def _publish(self, name: bytes, pfn: int) -> None:
        """Hang a complete node into the list."""
        root = self._root()
        with self._lock():
            if self.find(name) is not None:
                raise PkramError(f"node {_shown(name)} exists already", errno.EEXIST)
            publish(self.ram, pfn, NEXT, read_word(self.ram, root, NEXT, "Super", "node"))
            publish(self.ram, root, NEXT, pfn)

    def _saved(self, name: bytes) -> None:
        with self._mutex:
            self._saving.discard(name)

    # -- loading ---------------------------------------------------------------------------------

    def prepare_load(self, name: bytes, *, consume: bool = False) -> "Load":
        """Open a node. All of it has been checked when this returns; FormatError says what is wrong.

        With `consume`, PKRAM's own contract: the node is withdrawn at once and what is not used of
        it is the caller's to free. Errors: ENODEV, ENOENT, EBUSY (being saved).
        """
        self._root()
        with self._mutex:
            if name in self._saving:
                raise PkramError(f"node {_shown(name)} is being saved", errno.EBUSY)
            self._loading[name] = self._loading.get(name, 0) + 1
        try:
            load = Load(self, self._named(name))
            if consume:
                self._withdraw(name)
        except BaseException:
            self._loaded(name)
            raise
        return load

    def _loaded(self, name: bytes) -> None:
        with self._mutex:
            left = self._loading.pop(name, 1) - 1
            if left:
                self._loading[name] = left

    # -- freeing ---------------------------------------------------------------------------------

    def withdraw(self, name: bytes) -> Node:
        """Take a node out of the list by one store; its frames are its owner's again.

        Errors: ENOENT, EBUSY while this process saves or loads it.
        """
        with self._mutex:
            if name in self._saving or name in self._loading:
                raise PkramError(f"node {_shown(name)} is being saved or loaded", errno.EBUSY)
        return self._withdraw(name)

    def _withdraw(self, name: bytes) -> Node:
        before = self._root()
        with self._lock():
            for node in self._walk():
                if node.name == name:
                    publish(self.ram, before, NEXT, read_word(self.ram, node.pfn, NEXT, "Node", "next"))
                    return node
                before = node.pfn
        raise PkramError(f"there is no node {_shown(name)}", errno.ENOENT)


class Save:
    """A node being saved; nobody sees it before `finish`."""

    def __init__(
        self,
        store: Store,
        name: bytes,
        tree_id: int,
        frames: Allocator,
        banned: Spans,
        *,
        strict: bool,
        align: bool,
    ) -> None:
        self.store, self.name, self.tree_id = store, name, tree_id
        self._ram, self._strict, self._align = store.ram, strict, align
        self._arena = Arena(store.ram, frames, banned, self._no_memory)
        self.generation = superblock.check(store.ram, store._root()).generation
        self._writers: list[ObjectWriter] = []
        self._open = True

    def _no_memory(self, error: OSError) -> PkramError:
        return PkramError(f"no memory to save node {_shown(self.name)}: {error}", errno.ENOMEM)

    def __enter__(self) -> "Save":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._open:
            self.discard()

    @property
    def moved(self) -> list[tuple[int, int]]:
        """Runs of frames that hold copies of banned pages."""
        return [run for writer in self._writers for run in writer.moved]

    def object(self) -> ObjectWriter:
        """Begin the next object; the one before must be finished."""
        if not self._open:
            raise PkramError(f"node {_shown(self.name)} is not being saved any more", errno.EINVAL)
        if self._writers and self._writers[-1].values is None:
            raise PkramError("the object before is not finished", errno.EBUSY)
        writer = ObjectWriter(self._arena, self.generation, strict=self._strict, align=self._align)
        self._writers.append(writer)
        return writer

    def finish(self) -> Node:
        """Publish the node by one store."""
        if not self._open:
            raise PkramError(f"node {_shown(self.name)} is not being saved any more", errno.EINVAL)
        data = Spans()
        for writer in self._writers:
            writer.finish()
            data = data | writer.data
        if data.total != sum(writer.page_count for writer in self._writers):
            raise PkramError("a frame was saved by two objects", errno.EINVAL)
        places = self._arena.pages(len(self._writers) + 1).tolist()
        node_pfn, objects = places[0], places[1:]
        for writer, pfn, following in zip(self._writers, objects, [*objects[1:], 0], strict=True):
            writer.write_record(pfn, following)
        root, digest, _ = pagetable.build(self._ram, data | self._arena.spans(), self._arena.pages)
        total = (data | self._arena.spans()).total
        write_page(
            self._ram,
            node_pfn,
            NODE,
            {NEXT: 0, OTHER: 0},
            magic=NODE_MAGIC,
            generation=self.generation,
            tree_id=self.tree_id,
            object=objects[0] if objects else 0,
            table=root,
            table_checksum=digest,
            pages=total,
            created=time.time_ns(),
            objects=len(objects),
            name_length=len(self.name),
            flags=STRICT if self._strict else 0,
            name=self.name,
            moved=sum(count for _, count in self.moved),
        )
        self.store._publish(self.name, node_pfn)
        self._open = False
        self.store._saved(self.name)
        return read_node(self._ram, node_pfn)

    def discard(self) -> None:
        """Give everything back; nobody saw it."""
        self._open = False
        self._arena.release()
        self.store._saved(self.name)


class Load:
    """An open node: iterate over its objects in the order of saving."""

    def __init__(self, store: Store, node: Node) -> None:
        self.store, self.node = store, node
        self._readers = read_objects(store.ram, node)
        check_frames(node, self._readers, store.pages_of(node))
        self._open = True

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.finish()

    def __iter__(self) -> Iterator[ObjectReader]:
        return iter(self._readers)

    def finish(self) -> None:
        """Done with the node; it stays published."""
        if self._open:
            self._open = False
            self.store._loaded(self.node.name)


def read_node(ram: Ram, pfn: int) -> Node:
    """A checked node page."""
    page = read_page(ram, pfn, NODE, NODE_MAGIC)
    if not 0 < page.name_length <= NAME_MAX:
        raise FormatError("Node", "name_length", pfn=pfn, found=page.name_length, expected=f"1 to {NAME_MAX}")
    expect_flags("Node", pfn, page.flags, STRICT)
    expect_unused(ram, pfn, "Node", OTHER, "other")
    return Node(
        name=page.name[: page.name_length],
        tree_id=page.tree_id,
        pfn=pfn,
        pages=page.pages,
        created_ns=page.created,
        objects=page.objects,
        generation=page.generation,
        strict=bool(page.flags & STRICT),
        table_pfn=page.table,
        table_checksum=page.table_checksum,
        object_pfn=page.object,
        moved=page.moved,
    )


def read_objects(ram: Ram, node: Node) -> list[ObjectReader]:
    """All objects of a node, checked one by one and against the node's page table."""
    readers: list[ObjectReader] = []
    pfn = node.object_pfn
    while pfn:
        if len(readers) >= node.objects:
            raise FormatError("Object", "object", pfn=pfn, found="one more object", expected=f"{node.objects}")
        readers.append(ObjectReader(ram, pfn, node.generation))
        pfn = readers[-1].record.object
    if len(readers) != node.objects:
        raise FormatError("Node", "objects", pfn=node.pfn, found=len(readers), expected=node.objects)
    return readers


def check_frames(node: Node, readers: list[ObjectReader], table: Spans) -> None:
    """FormatError unless the objects' frames are all in the page table, and no frame has two users."""
    total, union = 0, Spans()
    for reader in readers:
        for spans in (reader.data, reader.metadata()):
            total += spans.total
            union = union | spans
    if union.total != total:
        raise FormatError("Node", "objects", pfn=node.pfn, found="a frame with two uses", expected="one use each")
    if missing := union - table:
        raise FormatError(
            "PageTable", "pages", pfn=node.table_pfn, found=f"pfn {int(missing.starts[0]):x} absent", expected="present"
        )


def estimate(runs: int, stream_bytes: int) -> int:
    """Frames that saving so many runs and bytes surely needs for itself."""
    blocks = runs * 4 + 64
    links = -(-blocks // LINK_CAPACITY) + 2
    table = 8 + 2 * -(-runs // 8)
    return pages(stream_bytes) + links + table + 8


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def describe(node: Node) -> str:
    """One line for logs."""
    return f"{_shown(node.name)} at pfn {format_pfn(node.pfn)}, {node.pages * PAGE_SIZE} bytes"
