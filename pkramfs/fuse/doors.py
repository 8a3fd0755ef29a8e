# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations for which FUSE has no request: hole punching and the like, through extended attributes of a file.

    setfattr -n user.pkramfs.punch    -v OFFSET:LENGTH FILE     FALLOC_FL_PUNCH_HOLE
    setfattr -n user.pkramfs.allocate -v OFFSET:LENGTH FILE     FALLOC_FL_KEEP_SIZE: pages now, or ENOSPC
    setfattr -n user.pkramfs.sparsify FILE                      pages that are all zeros become holes
    getfattr -n user.pkramfs.sparsify --only-values FILE        the same, and how many pages that were
    getfattr -n user.pkramfs.extents[.OFFSET] --only-values FILE    parts that are no holes: `offset:length` lines

pyfuse3 has no request for any of them, and setxattr(2) is the one call that carries a file and a text.
These attributes are commands, not values: they are in no listing and in no preserved tree. After a setxattr(2) the
kernel sets the change time of the file. So a command that changes no contents can also be given by getxattr(2), while a
program has the file open for writing: a restored tree without zeros stays preserved.

A page that is punched may also be in the kernel's cache, dirty or not. So the kernel is told to drop its pages of
the file before the punch (dirty data arrive first) and after it (pages that were read meanwhile). This notification
waits for WRITEs, which the daemon must answer: hence a thread, and few pages at a time. Writers wait for as long,
because setxattr(2) holds the inode's lock, as write(2) does. Stores through a mapping are possible meanwhile, as with
a real fallocate.

Kernel: mm/shmem.c (shmem_fallocate), fs/fuse/inode.c (fuse_reverse_inval_inode)
"""

import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial

import pyfuse3
import trio

from pkramfs.fs.failure import fail
from pkramfs.fuse import wire
from pkramfs.units import PAGE_SHIFT, pages, parse_size

PREFIX = b"user.pkramfs."
PUNCH, ALLOCATE, SPARSIFY, EXTENTS = (PREFIX + name for name in (b"punch", b"allocate", b"sparsify", b"extents"))
WINDOW = 1 << 18
"""Pages that are searched for zeros before others have a turn: 1 GiB."""
_ROOM = 60_000
"""Bytes of an answer; the kernel takes 64 KiB."""
_THREADS = 4


class Cache:
    """The kernel's cache of the mount's files, and notifications to drop it: through `device`, or pyfuse3's session."""

    def __init__(self) -> None:
        self.device: int | None = None
        self.write_back: Callable[[], Awaitable[None]] = self._nothing_to_do
        """Has the kernel write back all that is dirty, and waits for it."""
        self._limit: trio.CapacityLimiter | None = None
        self._going = 0
        self._closed: trio.Event | None = None

    async def drop(self, number: int, offset: int = 0, length: int = 0) -> None:
        """Make the kernel write back and drop the data of an inode (a length of 0: from `offset` to its end).

        It may wait for WRITEs to be answered.
        """
        await self._in_thread(partial(self._drop, number, offset, length))

    async def drop_all(self, numbers: Iterable[int]) -> None:
        """Make the kernel write back and drop the data, the attributes and the listings of many inodes."""
        await self._in_thread(partial(self._drop_each, numbers))

    async def _in_thread(self, work: Callable[[], None]) -> None:
        if self._closed is not None:
            raise fail(errno.ENOTCONN)
        self._limit = self._limit or trio.CapacityLimiter(_THREADS)
        self._going += 1
        try:
            await trio.to_thread.run_sync(work, limiter=self._limit)
        finally:
            self._going -= 1
            if self._closed is not None and not self._going:
                self._closed.set()

    async def close(self) -> None:
        """Accept no more notifications, and wait for those under way, while requests are still answered.

        A thread that waits for a WRITE without an answer cannot even be killed; it would keep the process and all
        users of the mount waiting.
        """
        self._closed = trio.Event()
        if self._going:
            await self._closed.wait()

    def drop_attributes(self, number: int) -> None:
        """Make the kernel ask for the attributes again. Never waits."""
        self.knows(number)

    def knows(self, number: int) -> bool:
        """Return True if the kernel has an inode with this number; it then asks for its attributes again."""
        try:
            self._tell(number, -1, 0)
        except FileNotFoundError:
            return False
        return True

    async def _nothing_to_do(self) -> None:
        """Write back nothing: no mount is known."""

    def _drop_each(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self._closed is not None:
                return
            self._drop(number, 0, 0)

    def _drop(self, number: int, offset: int, length: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # the kernel has no pages of the inode
            self._tell(number, offset, length)

    def _tell(self, number: int, offset: int, length: int) -> None:
        if self.device is not None:
            os.write(self.device, wire.notification(number, offset, length))
        else:
            pyfuse3.invalidate_inode(number, offset < 0)


def parse_range(value: bytes) -> tuple[int, int]:
    """Parse `OFFSET:LENGTH` into bytes, with k, M, G or T; raise EINVAL for anything else."""
    try:
        offset, colon, length = value.decode("ascii").strip().partition(":")
        if not colon:
            raise ValueError
        return parse_size(offset), parse_size(length)
    except ValueError:
        raise fail(errno.EINVAL) from None


def parse_start(name: bytes) -> int:
    """Return the start of a listing of extents: the number behind the attribute's name, if there is one."""
    tail = name.removeprefix(EXTENTS)
    if not tail:
        return 0
    if not tail.startswith(b".") or not tail[1:].isdigit():
        raise fail(errno.ENODATA)
    return int(tail[1:])


def listing(extents: Iterable[tuple[int, int]]) -> bytes:
    """Return lines of `offset:length`, as many as fit into an attribute; the caller asks again for the rest."""
    found = bytearray()
    for offset, length in extents:
        found += b"%d:%d\n" % (offset, length)
        if len(found) > _ROOM:
            break
    return bytes(found)


async def in_turn(act: Callable[[int, int], Awaitable[int]], windows: Iterable[tuple[int, int]]) -> int:
    """Call the function for each window, with a turn for other requests in between, and return the sum."""
    found = 0
    for first, last in list(windows):
        found += await act(first, last)
        await trio.lowlevel.checkpoint()
    return found


def windows(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the page ranges [first, last) that cover all extents, with no more than WINDOW pages in each."""
    first = last = count = 0
    for offset, length in extents:
        low, last = offset >> PAGE_SHIFT, pages(offset + length)
        while count + last - low > WINDOW:
            cut = low + WINDOW - count
            yield first, cut
            first, low, count = cut, cut, 0
        count += last - low
    if count:
        yield first, last
