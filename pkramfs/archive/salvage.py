# SPDX-License-Identifier: GPL-2.0-or-later
"""The readable part of a damaged node: its tree as far as it verifies, and the files that have lost pages.

    page table damaged     ─▶ the page blocks of the tree's id stand for it
    object damaged         ─▶ its fields are tried: the pages that they lead to have checksums of their own
    link damaged           ─▶ its entries are lost; its `next`, which has a check, leads on, or a neighbour does
    description damaged    ─▶ if its rules hold (fs/verify) it is taken as it is; else rows are given up (mending.py)
    log damaged            ─▶ the tree as it was before the first request that cannot be read

A page of metadata is believed only under its own checksum. Lost entries leave gaps in the page stream, and the files
there are named, as are those whose contents are not what their checksums say, where there are any (verify=data).
Nothing is changed, and nothing is claimed.

Counterparts: debugfs(8) rdump, btrfs-restore(8)
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from pkramfs.archive.mending import mend
from pkramfs.archive.view import SavedTree, open_tree
from pkramfs.errors import FormatError, PkramError
from pkramfs.fs.nodes import sound_part
from pkramfs.fs.verify import verify
from pkramfs.pkram.format import LINK, LINK_CAPACITY, LINK_MAGIC, NEXT, OBJECT, OBJECT_MAGIC
from pkramfs.pkram.node import Node, read_table, shown
from pkramfs.pkram.page import read_page, unseal
from pkramfs.pkram.streams.link import decode, sizes
from pkramfs.pkram.treeformat import DAMAGED, SUMS, UNWRITTEN, XATTRS, TreeStream
from pkramfs.spans import U64, Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, pages, plural

if TYPE_CHECKING:
    from pkramfs.kernel.running import Running
    from pkramfs.machine.ram import Ram
    from pkramfs.pkram.streams.runs import Runs

LOST = 1 << 51
"""Frames from here on stand for pages whose place is not known."""
_NEIGHBOURS = 8
"""Pages behind a damaged link that are tried as the next one."""


class Salvaged(NamedTuple):
    """A tree, why which places of it are lost, and all that was wrong."""

    tree: SavedTree
    damage: dict[int, str]
    problems: list[str]


def salvage(kernel: Running, name: bytes) -> Salvaged:
    """Read the readable part of a node; raise FormatError if even the tree's description cannot be read."""
    survey = kernel.survey()
    node = next((node for node in survey.nodes if node.name == name), None)
    if node is None:
        unreadable = "".join(f"; unreadable: {problem}" for problem in survey.damaged[:1])
        raise PkramError(f"no node {shown(name)} can be read{unreadable}", errno.ENOENT)
    found = _from_log(kernel, node) if node.log_pfn else _from_objects(kernel, node)
    return found if found.problems else found._replace(problems=_refused(kernel, name))


def _refused(kernel: Running, name: bytes) -> list[str]:
    """Return why a tree would be refused all of which came out: a word is damaged that nothing of it needs."""
    try:
        open_tree(kernel.store, name)
    except FormatError as error:
        return [str(error)]
    return []


def _from_objects(kernel: Running, node: Node) -> Salvaged:
    """Read the readable part of a tree that was saved whole."""
    reading = _Reading(kernel.ram, node, _frames(kernel, node))
    description, contents = reading.objects()
    parts = reading.description(description)
    runs = reading.runs(contents, int(parts.header.pages))
    reading.expect_tree(parts, runs)
    tree = SavedTree(kernel.ram, node, parts, runs)
    return Salvaged(tree, _damage(tree) | reading.damage, reading.problems)


def _from_log(kernel: Running, node: Node) -> Salvaged:
    """Read the tree of a log as far as that is sound."""
    allowed, problems = _frames(kernel, node)
    sound = sound_part(kernel.store, node, allowed)
    if sound.wrong:
        later = "what was done from there on is missing, and files deleted since may hold other data"
        problems.append(f"{sound.wrong}: {later}")
    (description, _), (_, runs) = sound.objects
    tree = SavedTree(kernel.ram, node, TreeStream(description), runs)
    return Salvaged(tree, dict.fromkeys(tree.places_in(sound.log), "deleted later, and overwritten"), problems)


def _frames(kernel: Running, node: Node) -> tuple[Spans, list[str]]:
    """Return the pages that may be a node's, and the faults of its page table."""
    try:
        return read_table(kernel.ram, node).spans, []
    except FormatError as error:
        return kernel.leases.blocks_of(node.tree_id).scale(BLOCK_PAGES), [str(error)]


def _damage(tree: SavedTree) -> dict[int, str]:
    """Return the files that have lost pages, or whose data are damaged."""
    lost, damaged = tree.lost_pages(LOST), tree.damaged_data()
    found = {place: f"{plural(count, 'piece')} of it, 1 MiB each, damaged" for place, count in damaged.items()}
    return found | {place: f"{plural(count, 'page')} of it cannot be found" for place, count in lost.items()}


class _Reading:
    """One node while it is read, and the problems so far."""

    def __init__(self, ram: Ram, node: Node, frames: tuple[Spans, list[str]]) -> None:
        self._ram, self._node = ram, node
        self._allowed, self.problems = frames
        self.damage: dict[int, str] = {}
        """Why which files are given up."""

    def objects(self) -> tuple[Any, Any]:
        """Return the records of both objects, checked or as they are."""
        first = self._object(self._node.object_pfn, last=False)
        return first, self._object(int(first.object), last=True)

    def _object(self, pfn: int, *, last: bool) -> Any:
        """Return an object's record; where nothing leads to the second, look behind the first."""
        behind = range(self._node.object_pfn + 1, self._node.object_pfn + 1 + _NEIGHBOURS) if last else ()
        for number, at in enumerate((pfn, *behind)):
            if at not in self._allowed or not 0 < at < self._ram.pages:
                continue
            try:
                return read_page(self._ram, at, OBJECT, OBJECT_MAGIC)
            except FormatError as error:
                if not number:
                    self.problems.append(str(error))
                    return OBJECT.read(self._ram.peek(at))
        raise FormatError("Node", "object", pfn=self._node.pfn, found="nothing that can be read", expected="an object")

    # -- streams --------------------------------------------------------------------------------

    def _entries(self, head: int, most: int) -> Runs:
        """Return the runs of all links of a chain that are sound, by index."""
        columns, pfn, seen = list[tuple[U64, U64, U64]](), head, set[int]()
        while pfn and pfn not in seen and len(seen) < most + _NEIGHBOURS:
            seen.add(pfn)
            if pfn >= self._ram.pages or pfn not in self._allowed:
                self.problems.append(f"a chain of links leads to pfn {pfn:x}, which is no page of the node")
                break
            try:
                columns.append(self._link(pfn))
            except FormatError as error:
                self.problems.append(str(error))
            pfn = self._following(pfn, seen)
        if not columns:
            empty = np.empty(0, dtype=np.uint64)
            return empty, empty, empty
        index, start, count = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.argsort(index, kind="stable")
        return index[order], start[order], count[order]

    def _link(self, pfn: int) -> Runs:
        head = read_page(self._ram, pfn, LINK, LINK_MAGIC)
        if head.generation != self._node.generation or not 0 < head.count <= LINK_CAPACITY:
            raise FormatError("Link", "generation", pfn=pfn, found=head.generation, expected=self._node.generation)
        words = np.frombuffer(self._ram.peek(pfn), dtype=np.uint64)[LINK.size // 8 :][: head.count]
        start, order, _ = decode(words)
        count = sizes(order)
        return np.uint64(head.index) + np.cumsum(count) - count, start, count

    def _following(self, pfn: int, seen: set[int]) -> int:
        """Return the next link: the one that this names, or a sound one right behind it."""
        address = (pfn << PAGE_SHIFT) + NEXT
        word = int.from_bytes(self._ram.peek(pfn)[NEXT : NEXT + 8], "little")
        try:
            return unseal(word, address, "Link", "next")
        except FormatError as error:
            self.problems.append(str(error))
        for near in range(pfn + 1, min(pfn + 1 + _NEIGHBOURS, self._ram.pages)):
            try:
                self._link(near)
            except FormatError:
                continue
            if near in self._allowed and near not in seen:
                return near
        return 0

    # -- the description ------------------------------------------------------------------------

    def description(self, found: Any) -> TreeStream:
        """Return the tree's description, or its readable part."""
        index, start, count = self._entries(found.bytes_head, self._node.pages)
        length = int(found.data_length)
        if pages(length) > self._node.pages:
            raise FormatError("Object", "data_length", found=length, expected=f"at most {self._node.pages} pages")
        stream = bytearray(pages(length) * PAGE_SIZE)
        for at, pfn, size in zip(index.tolist(), start.tolist(), count.tolist(), strict=True):
            if pfn + size <= self._ram.pages and (at + size) * PAGE_SIZE <= len(stream):
                stream[at * PAGE_SIZE : (at + size) * PAGE_SIZE] = self._ram.peek(pfn, size)
        if xxhash.xxh3_64_intdigest(memoryview(stream)[:length]) != found.data_checksum:
            self.problems.append("the description of the tree is damaged: names and attributes may be wrong")
        return TreeStream(bytes(stream[:length]))

    def runs(self, found: Any, total: int) -> Runs:
        """Return the page stream without gaps: lost pages have frames from LOST on."""
        index, start, count = self._entries(found.pages_head, self._node.pages)
        inside = index + count <= np.uint64(total)
        known = Spans.from_runs(start, count) - self._allowed
        if known or not inside.all() or Spans.from_runs(start, count).total != int(count.sum()):
            raise FormatError("Object", "pages", found="frames that are not its own", expected="each frame once")
        gaps = Spans.from_runs(index, count).gaps(0, total)
        index = np.concatenate((index, gaps.starts))
        start = np.concatenate((start, gaps.starts + np.uint64(LOST)))
        count = np.concatenate((count, gaps.counts))
        order = np.argsort(index, kind="stable")
        return index[order], start[order], count[order]

    def expect_tree(self, parts: TreeStream, runs: Runs) -> None:
        """Raise FormatError unless the rules of a tree hold, or can be made to hold by giving parts of it up."""
        used = Spans.from_runs(runs[1], runs[2])
        try:
            verify(parts, runs, used, used)
        except FormatError as broken:
            try:
                self.damage, problems = mend(parts)
                self.problems += [f"the description breaks a rule: {broken}", *problems]
                self._verify_mended(parts, runs, used)
            except FormatError:
                broken.remedy = "nothing of it can be got out"
                raise broken from None

    def _verify_mended(self, parts: TreeStream, runs: Runs, used: Spans) -> None:
        """Raise FormatError unless the rules hold now, without extended attributes and checksums if need be."""
        try:
            verify(parts, runs, used, used, deleted=True)
        except FormatError as error:
            for section in (XATTRS, UNWRITTEN, SUMS, DAMAGED):
                setattr(parts, section.name, {c.name: np.zeros(0, dtype=c.dtype) for c in section.columns})
            parts.values = b""
            verify(parts, runs, used, used, deleted=True)
            self.problems.append(f"extended attributes and ACLs are given up: {error}")
