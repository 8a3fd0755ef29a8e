# SPDX-License-Identifier: GPL-2.0-or-later
"""Bring a tree up to date: apply the records of a journal, in their order.

    a checkpoint, or an empty tree ──▶ record by record ──▶ the tree as it was when the last request was answered

Every record is checked against the tree as it is at that point: a missing inode, a name that exists already, or pages
over pages are a FormatError with the position. Properties of the whole tree (shape, link counts, each frame once) are
checked by verify at the end.

The tree has no journal during the replay, so nothing is written to the log twice, and no frame is taken or freed.

Kernel: fs/ext4/fast_commit.c (ext4_fc_replay_…)
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pkramfs.errors import FormatError
from pkramfs.fs.amended import Amended
from pkramfs.fs.asleep import SleepingDirectory
from pkramfs.fs.collector import paused
from pkramfs.fs.directory import Directory
from pkramfs.fs.inode import Inode
from pkramfs.fs.lost import LostPages
from pkramfs.fs.pagecache import PageMap
from pkramfs.fs.pieces import KEY_SHIFT, PIECE_SHIFT
from pkramfs.fs.records import UNNAMED, UNPRIVILEGED, Kind, unpack
from pkramfs.fs.rules import INO_MASK, MAX_SIZE
from pkramfs.fs.sums import Sums
from pkramfs.fs.sumtable import DOUBTED
from pkramfs.journal.reader import AHEAD
from pkramfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree
    from pkramfs.journal.reader import Chunk

_SIZED, _DEVICES = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), 1 << 32
_DONE = 4096
"""How many are remembered: more than can be unanswered at once."""
_MOST_PIECES = 1 << 16
"""Pieces that one store can take the sums of."""
_LINKS = (1 << 32) - 1
_LAST_PAGE = (MAX_SIZE >> PAGE_SHIFT) + 1


class Replay:
    """The records of a journal, applied to a tree. Requests up to position `zeroed` have cleared what they cut."""

    def __init__(self, tree: Tree, zeroed: int) -> None:
        self.tree, self.zeroed, self._at = tree, zeroed, 0
        self.requests = self.records = 0
        self.done: dict[int, int] = {}
        """The last requests of this connection that were done, by number, and the inode that each has made or 0."""
        self._latest = 0
        self._to_clear: list[tuple[int, Inode, int, int]] = []
        self.touched: dict[int, list[tuple[int, int]]] = {}
        """The frames (pfn, count) that files had before their runs were changed, by inode."""
        self._names = dict[int, tuple[Inode, bytes]]()
        """Where each inode was named last, as long as it has no name."""
        self._apply: dict[int, Callable[..., None]] = {
            kind.value: getattr(self, f"_{kind.name.lower()}") for kind in Kind
        }

    def run(self, chunks: Iterable[Chunk]) -> None:
        """Apply every record; raise FormatError, with its position, for the first that is invalid."""
        apply, done = self._apply, deque(self.done.items(), maxlen=_DONE)
        records = requests = 0
        with paused():
            for position, asker, last, body in chunks:
                self._at = position
                told = unpack(body, AHEAD, position, apply)
                records += told
                if last:
                    requests += 1
                    if not told:  # a new connection begins, which counts references anew
                        done.clear()
                    elif asker:
                        done.append((asker, self._latest))
                    self._latest = 0
        self.done = dict(done)
        self.records += records
        self.requests += requests

    def clear(self) -> None:
        """Clear the rest of pages that the last request cut, if its daemon died before that."""
        for at, inode, start, end in self._to_clear:
            if at >= self.zeroed and inode.ino in self.tree.inodes:
                self.tree.clear(inode, start, end)

    def go_on(self, zeroed: int) -> None:
        """Expect more records; requests up to a position have cleared what they cut."""
        self.zeroed = zeroed
        self._to_clear = [one for one in self._to_clear if one[0] >= zeroed]

    def finish(self) -> None:
        """Note which inodes have no name, and which are open for writing."""
        tree = self.tree
        if tree.asleep is not None:
            for amended in tree.asleep.amended.values():
                amended.rest()
        tree.orphans.clear()
        tree.writing.clear()
        for inode in tree.inodes.values():
            if not inode.nlink:
                tree.orphans[inode.ino] = self._names.get(inode.ino, (tree.root, b"#%d" % inode.ino))
            if inode.writers:
                tree.writing[inode.ino] = inode

    # -- records --------------------------------------------------------------------------------

    def _find(self, number: int) -> Inode:
        """Return an inode, which may sleep."""
        inode = self.tree.inodes.get(number)
        if inode is None:
            asleep = self.tree.asleep
            inode = asleep.find(number) if asleep is not None else None
            if inode is None:
                raise self._wrong("ino", number, "an inode that is there")
        return inode

    def _wrong(self, field: str, found: object, expected: str) -> FormatError:
        return FormatError("Journal", f"{field} at position {self._at}", found=found, expected=expected)

    def _require(self, good: bool, field: str, found: object, expected: str) -> None:
        if not good:
            raise self._wrong(field, found, expected)

    def _inode(
        self, ino: int, mode: int, uid: int, gid: int, nlink: int, size: int, atime: int, mtime: int, ctime: int,
        btime: int, rdev: int, flags: int, opens: int, writers: int, marks: int, target: bytes,
    ) -> None:  # fmt: skip
        tree = self.tree
        inode = tree.inodes.get(ino)
        if inode is None and (ino < tree.next_ino and tree.asleep is not None):
            inode = tree.asleep.find(ino)
        if inode is None:
            inode = self._new(ino, mode, size, target)
        kind = mode & 0o170000
        if inode.mode & 0o170000 != kind:
            raise self._wrong("mode", oct(mode), "the type that the inode has")
        if size > MAX_SIZE or (size and kind not in _SIZED):
            raise self._wrong("size", size, "one that its type can have")
        if rdev >= _DEVICES:
            raise self._wrong("rdev", rdev, f"less than {_DEVICES}")
        if size != inode.size and kind == stat.S_IFREG:
            tree.ledger.add_bytes(size - inode.size)
        if nlink != inode.nlink and kind != stat.S_IFDIR:
            tree.ledger.add_links(max(nlink, 1) - max(inode.nlink, 1))
        inode.mode, inode.uid, inode.gid, inode.nlink, inode.size = mode, uid, gid, nlink, size
        inode.atime, inode.mtime, inode.ctime, inode.btime = atime, mtime, ctime, btime
        inode.rdev, inode.flags = rdev, flags
        self._set_open(inode, opens, writers, marks)

    def _new(self, ino: int, mode: int, size: int, target: bytes) -> Inode:
        """Make an inode that the checkpoint does not have."""
        tree = self.tree
        if not tree.next_ino <= ino <= INO_MASK:
            raise self._wrong("ino", ino, f"at least {tree.next_ino}, or an inode that is there")
        self._latest = ino
        inode = Inode(ino, mode, 0, 0, 0, 0, 0)
        tree.inodes[ino] = inode
        tree.next_ino = ino + 1
        tree.ledger.add_inode()
        kind = inode.kind
        if kind == stat.S_IFDIR:
            inode.entries = Directory(tree.root)
            tree.ledger.add_directory()
        elif kind == stat.S_IFLNK:
            if not 0 < len(target) == size:
                raise self._wrong("target", len(target), f"{size} bytes")
            inode.target = target
            tree.ledger.add_target(inode)
        return inode

    def _set_open(self, inode: Inode, opens: int, writers: int, marks: int) -> None:
        inode.opens, inode.writers, inode.unprivileged = opens, writers, bool(marks & UNPRIVILEGED)
        unnamed = self.tree.unnamed
        if not marks & UNNAMED:
            if unnamed:
                unnamed.discard(inode.ino)
        elif inode.nlink:
            raise self._wrong("marks", marks, "those of a file that has a name")
        else:
            unnamed.add(inode.ino)

    def _opened(self, ino: int, opens: int, writers: int, marks: int, _: int) -> None:
        self._set_open(self.tree.inodes.get(ino) or self._find(ino), opens, writers, marks)

    def _enter(self, folder: int, child: int, cookie: int, name: bytes) -> None:
        self._name(self._find(folder), self._find(child), cookie, name)

    def _name(self, above: Inode, inode: Inode, cookie: int, name: bytes) -> None:
        """Give an inode a name in a directory."""
        entries = _names(above)
        if entries is None:
            raise self._wrong("folder", above.ino, "a directory")
        if entries.holds(name):
            raise self._wrong("name", name, "a name that is not there yet")
        entries.add(name, inode, cookie)
        inode.folder, inode.name = above, name
        self._names.pop(inode.ino, None)
        self.tree.ledger.add_entry(name)
        if inode.entries is not None:
            inode.entries.parent = above

    def _made(
        self, folder: int, ino: int, cookie: int, now: int, mode: int, uid: int, gid: int, flags: int, nlink: int,
        opens: int, writers: int, marks: int, rdev: int, size: int, folder_size: int, folder_nlink: int, name: bytes,
    ) -> None:  # fmt: skip
        tree, above = self.tree, self.tree.inodes.get(folder) or self._find(folder)
        if size or rdev or marks or ino in tree.inodes:
            self._require(ino not in tree.inodes, "ino", ino, "a new inode")
            self._inode(ino, mode, uid, gid, nlink, size, now, now, now, now, rdev, flags, opens, writers, marks, b"")
            inode = tree.inodes[ino]
        else:
            inode = self._new(ino, mode, 0, b"")
            inode.uid, inode.gid, inode.flags = uid, gid, flags
            inode.atime = inode.mtime = inode.ctime = inode.btime = now
            inode.nlink, inode.opens, inode.writers = nlink, opens, writers
            if nlink > 1 and inode.entries is None:
                tree.ledger.add_links(nlink - 1)
        self._name(above, inode, cookie, name)
        self._changed(above, folder_size, folder_nlink, now)

    def _gone(
        self, folder: int, ino: int, now: int, folder_size: int, folder_nlink: int, nlink: int, opens: int,
        writers: int, marks: int, _: int, name: bytes,
    ) -> None:  # fmt: skip
        inodes = self.tree.inodes
        above, inode = inodes.get(folder) or self._find(folder), inodes.get(ino) or self._find(ino)
        self._unname(above, name, inode)
        self._changed(above, folder_size, folder_nlink, now)
        if nlink != inode.nlink and inode.entries is None:
            self.tree.ledger.add_links(max(nlink, 1) - max(inode.nlink, 1))
        inode.nlink, inode.ctime = nlink, now
        self._set_open(inode, opens, writers, marks)

    def _moved(
        self, source: int, target: int, ino: int, cookie: int, victim: int, now: int, source_size: int,
        target_size: int, source_nlink: int, target_nlink: int, name: bytes, new_name: bytes,
    ) -> None:  # fmt: skip
        inodes = self.tree.inodes
        before, inode = inodes.get(source) or self._find(source), inodes.get(ino) or self._find(ino)
        after = inodes.get(target) or self._find(target)
        self._unname(before, name, inode)
        if victim:
            self._unname(after, new_name, self._find(victim))
        self._name(after, inode, cookie, new_name)
        self._changed(before, source_size, source_nlink, now)
        self._changed(after, target_size, target_nlink, now)
        inode.ctime = now

    def _changed(self, folder: Inode, size: int, nlink: int, now: int) -> None:
        """Set the attributes of a directory after a change of its names."""
        if size > MAX_SIZE:
            raise self._wrong("size", size, "one that its type can have")
        if nlink > _LINKS:
            raise self._wrong("nlink", nlink, f"at most {_LINKS}")
        folder.size, folder.nlink, folder.mtime, folder.ctime = size, nlink, now, now

    def _times(self, ino: int, atime: int, mtime: int, ctime: int) -> None:
        inode = self.tree.inodes.get(ino) or self._find(ino)
        inode.atime, inode.mtime, inode.ctime = atime, mtime, ctime

    def _wrote(self, ino: int, size: int, mtime: int, ctime: int, index: int, pfn: int, count: int) -> None:
        inode = self.tree.inodes.get(ino) or self._find(ino)
        if not inode.is_file or size > MAX_SIZE:
            raise self._wrong("size", size, "one that its type can have")
        if count:
            self._give(inode, index, pfn, count)
        if size != inode.size:
            self.tree.ledger.add_bytes(size - inode.size)
        inode.size, inode.mtime, inode.ctime = size, mtime, ctime

    def _leave(self, folder: int, name: bytes) -> None:
        above = self._find(folder)
        entries = _names(above)
        inode = entries.find(name) if entries is not None else None
        if inode is None:
            raise self._wrong("name", name, "a name of the directory")
        self._unname(above, name, inode)

    def _unname(self, above: Inode, name: bytes, inode: Inode) -> None:
        """Take a name from an inode."""
        entries = _names(above)
        if entries is None or entries.find(name) is not inode:
            raise self._wrong("name", name, "a name of the directory")
        if entries.asleep:
            entries = _names(above)  # what was found may have woken the directory
            assert entries is not None
        entries.remove(name)
        self.tree.ledger.remove_entry(name)
        self._names[inode.ino] = above, name

    def _run(self, ino: int, index: int, pfn: int, count: int) -> None:
        self._give(self._find(ino), index, pfn, count)

    def _give(self, inode: Inode, index: int, pfn: int, count: int) -> None:
        """Give a file a run of frames."""
        ino = inode.ino
        if not inode.is_file:
            raise self._wrong("ino", ino, "a regular file")
        if not 0 < count <= _LAST_PAGE - index:
            raise self._wrong("count", count, "pages within a file")
        if not 0 < pfn <= self.tree.ram.pages - count:
            raise self._wrong("pfn", f"{pfn:x}", "frames of RAM")
        if ino not in self.touched:
            self._touch(inode)
        there = inode.pages
        if there is None:
            there = inode.pages = PageMap()
        elif there.count and there.between(index, index + count):
            raise self._wrong("index", index, "pages that are a hole")
        if self.tree.sums is not None:
            self.tree.sums.forget(ino, index >> PIECE_SHIFT, ((index + count - 1) >> PIECE_SHIFT) + 1)
        before = there.runs
        there.insert(index, pfn, count)
        self.tree.ledger.add_pages(count, there.runs - before)

    def _touch(self, inode: Inode) -> None:
        """Note the frames that a file has before they change for the first time."""
        self.touched[inode.ino] = [] if inode.pages is None else [(pfn, count) for _, pfn, count in inode.pages]

    def _cut(self, ino: int, first: int, last: int) -> None:
        inode = self._find(ino)
        if inode.pages is None:
            raise self._wrong("ino", ino, "a file with pages")
        if self.tree.sums is not None:
            self.tree.sums.cut(inode, first, last, compare=False)
        if ino not in self.touched:
            self._touch(inode)
        before, held = inode.pages.runs, inode.pages.count
        inode.pages.remove(first, last)
        self.tree.ledger.add_pages(inode.pages.count - held, inode.pages.runs - before)
        if not inode.pages.count:
            inode.pages = None

    def _reserved(self, ino: int, first: int, count: int) -> None:
        inode = self._find(ino)
        self._require(inode.is_file and count > 0 and first + count <= _LAST_PAGE, "count", count, "pages of a file")
        there = inode.unwritten or PageMap()
        before = there.runs
        self._require(not there.between(first, first + count), "first", first, "pages that are not reserved")
        there.insert(first, first, count)
        self.tree.ledger.add_unwritten(there.runs - before)
        inode.unwritten = there

    def _used(self, ino: int, first: int, last: int) -> None:
        inode = self._find(ino)
        there = inode.unwritten
        if there is None:
            return
        before = there.runs
        there.remove(first, last)
        self.tree.ledger.add_unwritten(there.runs - before)
        if not there.count:
            inode.unwritten = None

    def _zero(self, ino: int, start: int, end: int) -> None:
        self._require(start < end and start >> PAGE_SHIFT == end - 1 >> PAGE_SHIFT, "start", start, "bytes of one page")
        if self.tree.sums is not None:
            piece = start >> PAGE_SHIFT + PIECE_SHIFT
            self.tree.sums.forget(ino, piece, piece + 1)
        if self._at >= self.zeroed:
            self._to_clear.append((self._at, self._find(ino), start, end))

    def _xattr(self, ino: int, name: bytes, value: bytes) -> None:
        self.tree.put_xattr(self._find(ino), name, value)

    def _unset(self, ino: int, name: bytes) -> None:
        self.tree.put_xattr(self._find(ino), name, None)

    def _reaped(self, ino: int) -> None:
        inode, tree = self._find(ino), self.tree
        self._require(not self._named(inode), "ino", ino, "an inode without a name")
        if inode.entries is None:
            tree.ledger.add_links(1 - max(inode.nlink, 1))
        inode.nlink = inode.lookups = inode.opens = 0
        if inode.pages is not None:
            if tree.sums is not None:
                tree.sums.cut(inode, 0, compare=False)
            if ino not in self.touched:
                self._touch(inode)
            tree.ledger.add_pages(-inode.pages.count, -inode.pages.runs)
            inode.pages = None
        tree.drop_inode(inode)
        self._names.pop(ino, None)

    def _named(self, inode: Inode) -> bool:
        """Return True if the last known name of an inode still exists."""
        entries = None if inode.folder is None else _names(inode.folder)
        return entries is not None and entries.find(inode.name) is inode

    def _lost(self, ino: int, error: int, beyond: int, blocks: Any) -> None:
        files = self.tree.losses.files
        files.pop(ino, None)
        if blocks or beyond >= 0:
            self._require(self._find(ino).is_file, "ino", ino, "a regular file")
            files[ino] = LostPages(error)
            files[ino].set_state(beyond, dict(blocks))

    def _summed(self, rows: Any) -> None:
        sums = self._sums()
        for ino, piece, value in rows:
            self._require(self._find(ino).is_file and piece < 1 << KEY_SHIFT, "ino", ino, "a piece of a regular file")
            sums.table.put(ino, piece, value, DOUBTED)

    def _unsummed(self, ino: int, low: int, high: int) -> None:
        if not ino:
            self.tree.forget_sums()
        elif self.tree.sums is not None:
            self._require(low < high <= low + _MOST_PIECES, "low", low, "a few pieces")
            self.tree.sums.forget(ino, low, high)

    def _damaged(self, ino: int, piece: int, mask: int) -> None:
        self._require(self._find(ino).is_file and piece < 1 << KEY_SHIFT, "ino", ino, "a piece of a regular file")
        self._sums().mark_damaged(ino, piece, mask)

    def _sums(self) -> Sums:
        if self.tree.sums is None:
            self.tree.sums = Sums(self.tree)
        return self.tree.sums


def _names(folder: Inode) -> Directory | Amended | None:
    """Return what has the names of a directory, which may sleep on; None of what is no directory."""
    entries = folder.entries
    return entries.amend() if entries.__class__ is SleepingDirectory else entries
