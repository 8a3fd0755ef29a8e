# SPDX-License-Identifier: GPL-2.0-or-later
"""ENOSPC for write(2), before the kernel accepts data for which there is no room.

With the writeback cache write(2) returns when the kernel has the data. A lack of room shows only when they are written
back: a program that writes without end never learns of it, and the accepted data are lost (fs/lost). But before the
kernel accepts data for a file, it asks for the file's attributes if those in its cache are too old, and passes an error
on to the program:

    write(2) ── attributes good? ─ yes ──────────────────────────────────────▶ the kernel takes the data
                     └ no ── GETATTR of a descriptor ──▶ room? ─ yes ─────────▶ … and for so long it need not ask
                                                          └ no ── ENOSPC

So the attributes of a file with writers are valid for as long as the fastest writer takes to fill the remaining room.
If little room is left they are not valid at all: then each write(2) asks. /proc shows the size and the place of the
write (callers). The kernel does not tell how many dirty pages it holds. So the pages of every admitted write count as
*expected*, less those that have arrived since. If the expected pages and the next write would not fit together, the
daemon tells the kernel to write back, waits, and then knows the room that is left. A write that needs no new page is
always admitted. Any other write is refused if it needs more pages than there are. Before a write-back the daemon waits,
some milliseconds, for admitted threads that have not written yet.

If /proc shows nothing, a write is assumed to bring twice as much as the writes before. Now and then the kernel is told
to write back, to measure the writes of each file. Then these files are refused if their next write would not fit:

    a file that grew, by its usual write          a file without a page, or that has lost some

Writers of other files may be overwriting. If they are not, they lose one write, and the next one is refused.

Requests that take pages without a write (fallocate, copy_file_range) also wait for expected pages to arrive.

A file with small writes need not ask for some milliseconds. A store through a mapping never asks, nor does a write
through pyfuse3, which does not tell which thread asks. A read behind the end of the file, or a seek to it, asks the
same question; /proc tells it from a write.

Kernel: fs/fuse/file.c (fuse_cache_write_iter), fs/fuse/dir.c (fuse_update_get_attr)
"""

import contextlib
import errno
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import trio

from pkramfs.fs.failure import fail
from pkramfs.fs.inode import Inode
from pkramfs.fs.tree import Tree
from pkramfs.fuse.callers import Call, look, run_time
from pkramfs.fuse.translate import WRITTEN
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE, pages

Result = TypeVar("Result")

SHORT = (256 << 20) >> PAGE_SHIFT
"""Pages of room below which each write asks: what the kernel may have unwritten (session._tune)."""
LONG = int(WRITTEN * 10**9)
"""Nanoseconds for which attributes are good where there is room, so that `du` sees a download grow."""
_FASTEST = 4
"""Bytes in a nanosecond that programs write at most."""
_USUAL, _LEAST, _MORE = 1024, 16, 2
"""Pages of a write before any was seen; at least; and how many times the last ones it may be."""
_FEW, _MANY = 4, 64
"""Questions after which one finds out what a write of the file brings; and what it usually brings."""
_REST, _WRITES = 4_000_000, 40_000
"""Nanoseconds for which a writer of little need not ask; how often it can write meanwhile, at most: the kernel makes
two of its ticks of them."""
_SPARE = 2048
"""Pages left beside what a file that need not ask may bring: one of its writes may be larger than all before."""
_FILES = 1000
"""Files of which it is known how they are written to."""
_PAUSE, _PAUSES = 0.0005, 40
"""Seconds between two looks at a thread that does not wait for us yet, and how many."""
_FLIGHT, _LONGEST = 50_000_000, 1_000_000_000
"""Nanoseconds of its run time, or of any time, after which an admitted thread has written, whatever it seems to do."""
_LOOK = 20_000_000
"""Nanoseconds after which the room is looked up again when a file is opened, or takes pages by itself."""


class Host(Protocol):
    """The part of the mount that a brake needs: fuse.operations."""

    cache: Any

    def room(self) -> int:
        """Return the pages of room in the machine, for any tree."""

    def may_forget(self) -> bool:
        """Return True if the memory of deleted files will be freed soon."""

    async def wait_for_room(self) -> None:
        """Wait until it was freed, or will not be."""


class Teller(Protocol):
    """The part that tells the kernel how long attributes are valid: fuse.replies."""

    def hold(self, nanoseconds: int) -> None:
        """Make the attributes of files with writers valid for so many nanoseconds."""


class _Writer:
    """A file whose writers ask: its state at the last full write-back, and the number of questions since."""

    __slots__ = ("asks", "bytes", "long", "pages", "rested", "size", "usual")

    def __init__(self, inode: Inode, usual: int | None = None, *, long: bool = False) -> None:
        self.bytes = 0  # pages that admitted writes brought, by /proc
        self.pages, self.size, self.asks, self.rested = _held(inode), inode.size, 0, False
        self.usual, self.long = usual, long
        """Bytes that a write adds, if known; True if they are known of many writes, so that not each needs to ask."""

    def again(self, inode: Inode) -> "_Writer":
        """Return the present state of the file. Its usual write is measured again: writes may be larger now."""
        if not self.asks or self.rested:
            return _Writer(inode, self.usual)
        grown = max(inode.size - self.size, 0) if _held(inode) > self.pages else 0
        grown = max(grown, (_held(inode) - self.pages) * PAGE_SIZE if grown < PAGE_SIZE else 0)
        return _Writer(inode, grown // self.asks, long=self.asks >= _MANY)

    def needs(self, inode: Inode) -> int:
        """Return an estimate of the pages that the next write will take."""
        return pages(inode.size + self.usual) - pages(inode.size) if self.usual else 0


class Brake:
    """Tells threads that are about to write whether there is room."""

    def __init__(self, tree: Tree, host: Host, teller: Teller) -> None:
        self._tree, self._host, self._teller = tree, host, teller
        self._one = trio.Lock()
        self._writers: dict[int, _Writer] = {}
        self._usual, self._expected, self._before = _USUAL, 0, 0
        """Pages of a write; pages that may have come since all was written back; pages that the tree had then."""
        self._settling = False
        """True while the kernel writes back: who brings a page waits for the result."""
        self._known = False
        """False while there may be anything in the kernel's cache."""
        self._flying: dict[int, tuple[int, int | None]] = {}
        """Threads that were admitted and have not asked again: when that was, and their run time then."""
        self._next_look = self._seen = 0
        """When the room is to be looked up again, and how many pages it was."""
        self._rests = False
        """True if the file for which one has asked last may be written to for a moment without asking."""

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """While the answer to `ask` is made, let a slow file's attributes be valid for a moment."""
        if self._rests:
            self._teller.hold(_REST)
        try:
            yield
        finally:
            if self._rests:
                self._teller.hold(0)
                self._rests = False

    def glance(self) -> None:
        """Check now and then whether room is short: a file is opened for writing."""
        if time.monotonic_ns() >= self._next_look:
            self._left()

    def ask(self, number: int, pid: int) -> Coroutine[Any, Any, None] | None:
        """Return None if a thread may write to a file, or a coroutine to run before that, which may raise ENOSPC."""
        left, self._rests = self._left(), False
        self._flying.pop(pid, None)  # a thread that asks again has written
        if left >= SHORT:
            self._known = False
            self._writers.clear()
            return None
        try:
            call = look(pid)
        except BlockingIOError:
            return self._ask_again(number, pid)
        return None if self._passes(self._tree.inode(number), call, left, pid) else self._settle(number, call, pid)

    async def _ask_again(self, number: int, pid: int) -> None:
        """Answer a thread that has asked but does not wait yet."""
        call = None
        for _ in range(_PAUSES):
            await trio.sleep(_PAUSE)
            with contextlib.suppress(BlockingIOError):
                call = look(pid)
                break
        if not self._passes(self._tree.inode(number), call, self._left(), pid):
            await self._settle(number, call, pid)

    def taking(self, count: int, act: Callable[[], Result]) -> Result | Coroutine[Any, Any, Result]:
        """Run an action that takes up to `count` pages itself, after the expected pages have arrived."""
        if not count:
            return act()
        recent = time.monotonic_ns() < self._next_look
        if recent and self._seen - count >= 2 * SHORT:  # no writer fills half of that so soon
            self._seen -= count
            return self._apart(act)
        left = self._left()
        if left >= SHORT or (self._known and not self._settling and count + self._on_its_way() <= left):
            return self._apart(act)
        return self._after_all(act)

    async def _after_all(self, act: Callable[[], Result]) -> Result:
        async with self._one:
            await self._write_back()
            return self._apart(act)

    def _apart(self, act: Callable[[], Result]) -> Result:
        """Run the action, and do not count its pages as expected pages that have arrived."""
        before = self._tree.limits.pages
        try:
            return act()
        finally:
            self._before += max(self._tree.limits.pages - before, 0)

    def _passes(self, inode: Inode, call: Call | None, left: int, pid: int) -> bool:
        """Admit another write if there is room for it, and expect its pages."""
        if call is None:
            return not self._settling and self._granted(inode, left)
        if not call.count:
            return True
        left -= self._on_its_way()
        count = pages(call.count) + 1
        if not self._known or self._settling or count > left:
            count = _missing(inode, call, None, count)  # only the kernel knows the end of the file now
            if not count:
                return True
            if not self._known or self._settling or count > left:
                return False
        self._note(inode, call, left - count)
        self._expect(count)
        self._fly(pid)
        return True

    def _fly(self, pid: int) -> None:
        """Note that a thread was admitted, and may not have written yet."""
        if len(self._flying) > _FILES:
            self._flying.clear()
        self._flying[pid] = time.monotonic_ns(), run_time(pid)

    async def _landed(self) -> None:
        """Wait until admitted threads have written: the write-back must include their data."""
        while self._flying:
            self._flying = {pid: since for pid, since in self._flying.items() if _may_write(pid, *since)}
            await trio.sleep(_PAUSE if self._flying else 0)

    def _note(self, inode: Inode, call: Call, left: int) -> None:
        """Count a write; let the file rest if its writes are small ones."""
        if len(self._writers) > _FILES:
            self._writers.clear()
        writer = self._writers.get(inode.ino) or self._writers.setdefault(inode.ino, _Writer(inode))
        writer.asks += 1
        writer.bytes += call.count
        if writer.usual is not None and writer.long:
            count = (writer.usual * _WRITES >> PAGE_SHIFT) + _LEAST
            if count + _SPARE <= left:
                self._rests = True
                self._expect(count)
        if writer.asks >= _MANY:
            writer.usual, writer.long = writer.bytes // writer.asks, True
            writer.asks = writer.bytes = 0

    def _on_its_way(self) -> int:
        """Return the expected pages that have not arrived yet."""
        return max(self._expected - max(self._tree.limits.pages - self._before, 0), 0)

    def _granted(self, inode: Inode, left: int) -> bool:
        """Do as `_passes` for a write of which /proc shows nothing."""
        writer = self._writers.get(inode.ino)
        if not self._known or writer is None:
            return False
        if writer.asks >= (_FEW if writer.usual is None else _MANY) and (writer.rested or not writer.long):
            return False
        left -= self._on_its_way()
        usual = writer.usual
        if usual is not None and writer.long and usual * _WRITES >> PAGE_SHIFT <= left - _LEAST:
            writer.rested = self._rests = True
            self._grant(writer, (usual * _WRITES >> PAGE_SHIFT) + _LEAST)
            return True
        count = self._may_bring(writer)
        if count > left:
            return False
        self._grant(writer, count)
        return True

    def _may_bring(self, writer: _Writer) -> int:
        """Return the pages that a write may bring."""
        return self._usual if writer.usual is None else pages(_MORE * writer.usual) + 2

    def _grant(self, writer: _Writer, count: int) -> None:
        """Expect so many pages of a file."""
        writer.asks += 1
        self._expect(count)

    def _expect(self, count: int) -> None:
        """Expect so many pages."""
        self._expected += count

    async def _settle(self, number: int, call: Call | None, pid: int) -> None:
        """Make the expected pages arrive, and refuse the writer if there is no room for more."""
        async with self._one:
            inode = self._tree.inode(number)
            if self._passes(inode, call, self._left(), pid):
                return  # another writer has settled meanwhile
            await self._write_back()
            writer = self._writers.setdefault(inode.ino, _Writer(inode))
            needed = self._needed(inode, writer, call)
            if self._free() < needed and self._host.may_forget():
                await self._host.wait_for_room()
            if self._free() < needed:
                writer.usual = None  # the next write may be smaller
                raise fail(errno.ENOSPC)
            self._grant(writer, self._may_bring(writer) if call is None else needed)
            self._fly(pid)

    def _needed(self, inode: Inode, writer: _Writer, call: Call | None) -> int:
        """Return the pages without which a write is refused."""
        if call is not None:
            return _missing(inode, call, inode.size, pages(call.count))
        return max(writer.needs(inode), int(not _held(inode) or inode.ino in self._tree.losses.files))

    def _free(self) -> int:
        """Return the pages of room that are not expected to be filled."""
        return self._left() - self._on_its_way()

    async def _write_back(self) -> None:
        """Make the kernel write back, and admit no new pages meanwhile."""
        self._settling = True
        try:
            await self._landed()
            await self._host.cache.write_back()
        finally:
            self._settling = False
        self._start_anew()

    def _start_anew(self) -> None:
        """Note the present state of all files: everything written to them has arrived."""
        writers = self._writers.items()
        self._writers = {
            ino: writer.again(self._tree.writing[ino]) for ino, writer in writers if ino in self._tree.writing
        }
        known = [writer.usual for writer in self._writers.values() if writer.usual is not None]
        if known:
            self._usual = max(pages(_MORE * max(known)), self._usual >> 1, _LEAST)
        self._known, self._expected, self._before = True, 0, self._tree.limits.pages

    def _left(self) -> int:
        """Return the pages of room, and set for how long attributes are valid with so much room."""
        limits = self._tree.limits
        left = self._host.room()
        if limits.max_pages:
            left = min(left, limits.max_pages - limits.pages)
        self._seen, self._next_look = left, time.monotonic_ns() + _LOOK
        self._teller.hold(0 if left < SHORT else min(LONG, (left << PAGE_SHIFT) // _FASTEST))
        return left


def _held(inode: Inode) -> int:
    """Return the pages of a file."""
    return inode.pages.count if inode.pages is not None else 0


def _missing(inode: Inode, call: Call, size: int | None, most: int) -> int:
    """Return the pages that a write to a file of that size takes; `most` if its place is not known."""
    start = call.place(size)
    if start is None:
        return most
    first, last = start >> PAGE_SHIFT, pages(start + call.count)
    held = sum(count for _, _, count in inode.pages.between(first, last)) if inode.pages is not None else 0
    return last - first - held


def _may_write(pid: int, since: int, ran: int | None) -> bool:
    """Return True if a thread that was admitted may still write: by what it does, its run time, and the time since.

    Run time counts, because on a busy host a thread may wait for a processor for longer than its write takes.
    """
    age, now = time.monotonic_ns() - since, run_time(pid)
    if age > _LONGEST or (age if ran is None or now is None else now - ran) > _FLIGHT:
        return False
    try:
        call = look(pid)
    except BlockingIOError:
        return True
    return call is not None and call.count > 0
