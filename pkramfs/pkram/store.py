# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes by name: save one, load one, list them, withdraw one.

    prepare_save ─► objects … ─► finish      the node appears, whole, by one store
                              └► discard     everything is freed, nothing was visible
    prepare_load ─► objects … ─► finish      nothing is consumed (unless asked for)
    withdraw                                 the node disappears, by one store
    rename                                   the node has another name, by one store
    mend                                     a damaged list is made whole, from all nodes that can be found

The super block leads to a list of nodes, newest first. The list is changed only under the machine's
table lock, and read without it: every step of a reader is checked, so a reader that meets a node
which is being withdrawn gets an error and reads again.

A save, its metadata included, lies in the page blocks of its owner (`tree_id`). So withdrawing a node,
or sweeping a dead owner, needs no walk over its pages. A save or a load in progress claims the name
(`claims`: within this process, or among all processes of a machine), and the claim ends with its holder.

    in progress     prepare_save    prepare_load    withdraw, free
    a save          EEXIST          EBUSY           EBUSY
    loads           (the node)      may go on       EBUSY

Kernel: mm/pkram.c (pkram_prepare_save … pkram_finish_load), patches 2, 3, 7 and 19
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

from pkramfs.errors import FormatError, PkramError
from pkramfs.machine.claims import Claim, Claims, LocalClaims
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.pkram.format import LINK_CAPACITY, NAME_MAX, NEXT, WITHDRAWN_MAGIC
from pkramfs.pkram.node import (
    Node,
    check_frames,
    following,
    list_nodes,
    own_pages,
    read_node,
    read_objects,
    read_table,
    shown,
    walk_nodes,
)
from pkramfs.pkram.page import read_word, seal, write_word
from pkramfs.pkram.relocate import Allocator
from pkramfs.pkram.renaming import write_twin
from pkramfs.pkram.rescue import Survey, behind_break, search
from pkramfs.pkram.save import Place, Save, no_memory
from pkramfs.pkram.saveframes import SaveFrames
from pkramfs.pkram.streams.reader import ObjectReader
from pkramfs.spans import Spans
from pkramfs.units import PAGE_SHIFT, pages

_SAVE, _LOAD = "save", "load"
"""Kinds of work that claim a name."""


class Store:
    """All nodes below one super block; `lock` returns the context manager of the table lock.

    With `super_pfn` None, PKRAM is switched off: every call raises ENODEV and touches nothing. If
    several processes use the same RAM, they must share `claims`.
    """

    def __init__(
        self,
        ram: Ram,
        super_pfn: int | None,
        lock: Callable[[], AbstractContextManager[Any]],
        claims: Claims | None = None,
    ) -> None:
        self.ram, self.super_pfn, self._lock = ram, super_pfn, lock
        self._claims = LocalClaims() if claims is None else claims

    def root(self) -> int:
        """Return the super block's pfn; raise PkramError (ENODEV) if PKRAM is off."""
        if self.super_pfn is None:
            raise PkramError("no such device: PKRAM is switched off in this kernel", errno.ENODEV)
        return self.super_pfn

    def generation(self) -> int:
        """Return the boot count of the kernel whose super block this is."""
        try:
            return superblock.check(self.ram, self.root()).generation
        except FormatError as error:
            error.remedy = "`pkramctl free --damaged` mends it"
            raise

    # -- listing ---------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Return every published node, newest first; raise FormatError if the list is damaged."""
        return list_nodes(self.ram, self.root())

    def find(self, name: bytes) -> Node | None:
        """Return the node of this name, None without one."""
        return next((node for node in self.nodes() if node.name == name), None)

    def preserved_ids(self) -> set[int]:
        """Return the tree ids of published nodes."""
        return {node.tree_id for node in self.nodes()}

    def pages_of(self, node: Node) -> Spans:
        """Return every frame of a node, from its page table."""
        return read_table(self.ram, node).spans

    def pages_of_tree(self, tree_id: int) -> Spans:
        """Return every frame of all nodes of an owner, which may have saved more than one."""
        return Spans.union(self.pages_of(node) for node in self.nodes() if node.tree_id == tree_id)

    def own_pages(self, node: Node) -> Spans:
        """Return the frames that a published node uses for itself; its owner can free them after a withdrawal.

        The log of a node is not among them: it existed before, and stays.
        """
        table = read_table(self.ram, node)
        if node.log_pfn:
            return own_pages(node, table)
        return _metadata(table.spans, read_objects(self.ram, node, table.spans))

    def metadata_pages(self, name: bytes) -> Spans:
        """Return the frames that the node of this name uses for itself."""
        return self.own_pages(self._named(name))

    def preserved(self) -> Spans:
        """Return every frame of every node."""
        return Spans.union(self.pages_of(node) for node in self.nodes())

    def _named(self, name: bytes) -> Node:
        node = self.find(name)
        if node is None:
            raise PkramError(f"there is no node {shown(name)}", errno.ENOENT)
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
        instead: bool = False,
    ) -> Save:
        """Begin a node, to be used in a `with`: leaving it without `finish` discards the node.

        With `instead` it replaces the node of this name by one store, and the old one's own pages become the
        caller's. Errors: ENODEV (off), ENAMETOOLONG, EINVAL (empty), EEXIST (also while being saved); MachineError
        if the file behind RAM was removed or replaced, so that the node could not be found.
        """
        self.root()
        self.ram.require_named()
        _check_name(name)
        claim = self._claims.take(_SAVE, name)
        if claim is None:
            raise PkramError(f"node {shown(name)} exists already, it is being saved", errno.EEXIST)
        try:
            old = self.find(name)
            if old is not None and not instead:
                raise PkramError(f"node {shown(name)} exists already", errno.EEXIST)
            publish = self._publish if old is None else partial(self._replace, old)
            place = Place(self.generation(), publish, self._is_published)
            return Save(
                self.ram, place, name, tree_id, frames, banned or Spans(), strict=strict, align=align, claim=claim
            )
        except BaseException:
            claim.release()
            raise

    def prepare_unlisted(self, name: bytes, *, tree_id: int, frames: Allocator) -> Save:
        """Begin a node that no list will name: a checkpoint, which `open_unlisted` opens by its pfn."""
        place = Place(self.generation(), lambda *_: None, lambda _: False, False)
        claim = Claim(shared=True)
        return Save(self.ram, place, name, tree_id, frames, Spans(), strict=False, align=False, claim=claim)

    def _publish(self, name: bytes, pfn: int) -> None:
        """Put a complete node at the head of the list. EEXIST if another has its name."""
        root = self.root()
        with self._lock():
            if self.find(name) is not None:
                raise PkramError(f"node {shown(name)} exists already", errno.EEXIST)
            write_word(self.ram, pfn, NEXT, read_word(self.ram, root, NEXT, "Super", "node"))
            write_word(self.ram, root, NEXT, pfn)

    def _is_published(self, pfn: int) -> bool:
        return any(node.pfn == pfn for node in self.nodes())

    # -- loading ---------------------------------------------------------------------------------

    def prepare_load(self, name: bytes, *, consume: bool = False) -> "Load":
        """Open a node after checking all of it; raise FormatError for the first fault.

        `consume` is PKRAM's own contract: the node is withdrawn at once, and the caller frees the
        frames that it does not use. Errors: ENODEV, ENOENT, EBUSY (being saved).
        """
        self.root()
        claim = self._claim_load(name, shared=True)
        try:
            load = Load(self, self._named(name), claim)
            if consume:
                self._withdraw(name)
            return load
        except FormatError as error:
            claim.release()
            error.remedy = error.remedy or f"`pkramctl free {shown(name)}` gives the node up"
            raise
        except BaseException:
            claim.release()
            raise

    def open_unlisted(self, pfn: int, allowed: Spans) -> "Load":
        """Open a node that no list names, or that one names now: a checkpoint. Its frames must lie in `allowed`."""
        if pfn not in allowed:
            raise FormatError("Node", "pfn", found=f"{pfn:x}", expected="a frame in the page blocks of its tree")
        node = read_node(self.ram, pfn, listed=False)
        load = Load(self, node, Claim(shared=True))
        if outside := load.metadata() - allowed:
            found = f"pfn {int(outside.starts[0]):x}"
            raise FormatError("Node", "pages", pfn=pfn, found=found, expected="frames in the page blocks of its tree")
        return load

    def _claim_load(self, name: bytes, *, shared: bool) -> Claim:
        """Claim a node against being freed (shared), or against being loaded; EBUSY also while it is being saved."""
        if self._claims.held(_SAVE, name):
            raise PkramError(f"node {shown(name)} is being saved", errno.EBUSY)
        claim = self._claims.take(_LOAD, name, shared=shared)
        if claim is None:
            raise PkramError(f"node {shown(name)} is being {'freed' if shared else 'loaded'}", errno.EBUSY)
        return claim

    # -- freeing ---------------------------------------------------------------------------------

    def withdraw(self, which: bytes | int) -> Node:
        """Withdraw a node (by name or tree id) from the list by one store; its frames return to its owner.

        Errors: ENODEV, ENOENT, EBUSY while it is being saved or loaded.
        """
        self.root()
        name = which if isinstance(which, bytes) else self._owned(which).name
        claim = self._claim_load(name, shared=False)
        try:
            return self._withdraw(name)
        finally:
            claim.release()

    def rename(self, name: bytes, new: bytes, frames: Allocator, banned: Spans | None = None) -> Node:
        """Give a node another name by one store. `frames` are its owner's, who holds its tree id, and nothing else's.

        Errors: ENODEV, ENOENT, ENAMETOOLONG, EINVAL, EEXIST, ENOMEM, EBUSY while it is being saved or loaded.
        """
        self.root()
        _check_name(new)
        claim = self._claim_load(name, shared=False)
        try:
            claimed = self._claims.take(_SAVE, new)
            if claimed is None:
                raise PkramError(f"node {shown(new)} exists already, it is being saved", errno.EEXIST)
            try:
                return self._rename(self._named(name), new, frames, banned or Spans())
            finally:
                claimed.release()
        finally:
            claim.release()

    def _rename(self, node: Node, new: bytes, frames: Allocator, banned: Spans) -> Node:
        taken, pfn = SaveFrames(self.ram, frames, banned, partial(no_memory, new)), 0
        try:
            pfn, left = write_twin(self.ram, node, new, taken)
            self._exchange(node, pfn, new)
        except BaseException:
            if not pfn or not self._is_published(pfn):
                taken.release()
            raise
        frames.free(left.starts.tolist(), left.counts.tolist())
        return read_node(self.ram, pfn)

    def _exchange(self, old: Node, pfn: int, name: bytes) -> None:
        """Put a node's twin, which has another name, in its place."""
        with self._lock():
            if self.find(name) is not None:
                raise PkramError(f"node {shown(name)} exists already", errno.EEXIST)
            self._put_in_place(old, pfn)

    def _replace(self, old: Node, name: bytes, pfn: int) -> None:
        """Replace a node by another of the same name; raise EBUSY while the old one is being loaded."""
        claim = self._claims.take(_LOAD, name)
        if claim is None:
            raise PkramError(f"node {shown(name)} is being loaded", errno.EBUSY)
        with self._lock():
            try:
                self._put_in_place(old, pfn)
            finally:
                claim.release()

    def _put_in_place(self, old: Node, pfn: int) -> None:
        before = self.root()
        for node in walk_nodes(self.ram, before):
            if node.pfn == old.pfn:
                write_word(self.ram, pfn, NEXT, read_word(self.ram, old.pfn, NEXT, "Node", "next"))
                write_word(self.ram, before, NEXT, pfn)
                self.ram.publish(old.pfn << PAGE_SHIFT, WITHDRAWN_MAGIC)
                return
            before = node.pfn
        raise PkramError(f"there is no node {shown(old.name)}", errno.ENOENT)

    def _owned(self, tree_id: int) -> Node:
        for node in self.nodes():
            if node.tree_id == tree_id:
                return node
        raise PkramError(f"there is no node {shown(tree_id)}", errno.ENOENT)

    def _withdraw(self, name: bytes) -> Node:
        before = self.root()
        with self._lock():
            for node in walk_nodes(self.ram, before):
                if node.name == name:
                    write_word(self.ram, before, NEXT, read_word(self.ram, node.pfn, NEXT, "Node", "next"))
                    self.ram.publish(node.pfn << PAGE_SHIFT, WITHDRAWN_MAGIC)  # a search must not find it
                    return node
                before = node.pfn
        raise PkramError(f"there is no node {shown(name)}", errno.ENOENT)

    def withdraw_damaged(self) -> list[FormatError]:
        """Remove every node that cannot be read from the list; return what was wrong with each.

        A broken list ends where it breaks: nodes behind that are lost unless `mend` searches for them.
        """
        return self.mend().problems

    def survey(self, pages: Spans | None = None, owner: Callable[[int], int] = lambda _: 0) -> Survey:
        """Read the whole list and note damage. If there is any, search for nodes in `pages`, too.

        Without `pages` nothing can be searched for: then a word in which one bit has flipped is read nevertheless.
        `owner(pfn)` returns the tree id that has leased the page block of a page.
        """
        found, at, seen = Survey(), self.root(), set[int]()
        while at < self.ram.pages:
            try:
                pfn = following(self.ram, self.root(), at, seen)
            except FormatError as error:
                found.note(error, page=False)
                known = behind_break(self.ram, at, seen) if pages is None else None
                found.cut = known is None
                pfn = known or 0
                seen.add(pfn)
            if not pfn:
                break
            try:
                found.listed.append(read_node(self.ram, pfn))
            except FormatError as error:
                found.note(error, page=True)
            at = pfn
        if found.problems and pages:
            search(self.ram, pages, owner, partial(self._claims.held, _SAVE), found)
        return found

    def mend(
        self,
        pages: Spans | None = None,
        owner: Callable[[int], int] = lambda _: 0,
        *,
        generation: int | None = None,
        before: Callable[[Survey], None] = lambda _: None,
    ) -> Survey:
        """Rebuild the list from all nodes that can be read; return the survey.

        `before` gets the survey before anything is changed. The stores go from the end of the list to its head,
        so that a process which dies in between leaves the list broken at the same place. With `generation`, a
        super block that cannot be read is made anew.
        """
        root = self.root()
        with self._lock():
            found = self.survey(pages, owner)
            before(found)
            chain = [root, *(node.pfn for node in found.nodes)]
            if found.problems:
                for at, following in reversed(list(zip(chain, [*chain[1:], 0], strict=True))):
                    self._name(at, following)
            if generation is not None and superblock.damage(self.ram, root):
                superblock.create(self.ram, root, generation, [*chain, 0][1])
        return found

    def _name(self, at: int, following: int) -> None:
        """Name the node that follows a node (or the super block), unless it is named already."""
        address = (at << PAGE_SHIFT) + NEXT
        if self.ram.load(address) != seal(following, address):
            write_word(self.ram, at, NEXT, following)

    def free(self, names: list[bytes] | None = None) -> int:
        """Withdraw these nodes, or all that are not being saved or loaded; return the number of freed pages.

        The pages are free once their owners' page blocks are swept. Errors: those of `withdraw`, for
        the first name that has one; the ones before it are gone by then.

        Kernel: writing 0 to /sys/kernel/pkram (patch 19), which knows no names
        """
        if names is not None:
            return sum(self.withdraw(name).pages for name in names)
        freed = 0
        for node in self.nodes():
            try:
                freed += self.withdraw(node.name).pages
            except PkramError as error:
                if error.errno not in (errno.EBUSY, errno.ENOENT):
                    raise
        return freed


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise PkramError(f"node name of {len(name)} bytes is too long: at most {NAME_MAX}", errno.ENAMETOOLONG)
    if not name or b"\0" in name:
        raise PkramError(f"invalid node name {shown(name)!r}: it is empty or contains NUL", errno.EINVAL)


class Load:
    """An open node: iterate over its objects in the order of saving."""

    def __init__(self, store: Store, node: Node, claim: Claim) -> None:
        self.store, self.node, self._claim = store, node, claim
        self._table = read_table(store.ram, node)
        self.frames = self._table.spans
        """Every frame that the node names."""
        self._readers = read_objects(store.ram, node, self.frames)
        check_frames(node, self._table, self._readers)
        self._open = True

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.finish()

    def __iter__(self) -> Iterator[ObjectReader]:
        return iter(self._readers)

    def metadata(self) -> Spans:
        """Return the frames that the node uses for itself: all but those of its page streams."""
        return _metadata(self.frames, self._readers)

    def own_pages(self) -> Spans:
        """Return the frames of a node whose tree is in a log: its page, its page table, and the seal."""
        return own_pages(self.node, self._table)

    def finish(self) -> None:
        """End the load and its claim; the node stays published."""
        if self._open:
            self._open = False
            self._claim.release()


def _metadata(spans: Spans, readers: list[ObjectReader]) -> Spans:
    """Return the frames of a node without those of its page streams."""
    for reader in readers:
        spans = spans - reader.data
    return spans


def estimate(runs: int, stream_bytes: int, page_count: int = 0) -> int:
    """Return the frames that a save of so many runs and bytes may need for itself, relocated pages aside.

    A run becomes up to two blocks of each order that is smaller than it. Without `page_count`, the
    number of pages in all runs, the usual length of runs is assumed.
    """
    each = 2 * (page_count // max(runs, 1)).bit_length() if page_count else 4
    blocks = runs * min(each, 40) + (page_count >> 18) + 64
    links = -(-blocks // LINK_CAPACITY) + 2
    table = 8 + 2 * -(-runs // 8)
    return pages(stream_bytes) + links + table + 8
