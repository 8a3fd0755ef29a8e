# SPDX-License-Identifier: GPL-2.0-or-later
"""The floor: a file system of pyfuse3 that does as little as one can, served as ours is.

    python -m benchmarks.floor DIRECTORY MEMORY        prints "serving", ends with umount

The same INIT, request sizes, timeouts and loop as pkramfs (it is mounted by the same Session); what is left
out is the file system. No checks, limits, times, owners, link counts, save; answers are made once and
reused. What is kept is what the workload cannot do without: a dictionary of names, so that look-ups
of absent names say so, an inode number for each, a size for each file, and the bytes themselves:

    MEMORY   |  file 1   |  file 2   |  …     a sparse file, mapped, a fixed piece for each file
             a write is one copy (Ram.fill, Ram.overwrite); a read is a view, not copied at all

so that what is read back is what was written. How far pkramfs is above this floor is what pkramfs costs.
"""

import errno
import mmap
import os
import stat
import sys
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from pkramfs.fuse.session import Session
from pkramfs.fuse.translate import FOREVER
from pkramfs.machine.ram import Ram

PIECES, PIECE = 64, 1 << 30


class Floor(pyfuse3.Operations):
    """Answers made ready, and the names."""

    supports_dot_lookup = True
    enable_writeback_cache = True
    enable_acl = True

    def __init__(self, memory: str) -> None:
        super().__init__()
        self.ram = Ram(memory, PIECES * PIECE, create=True)
        self.names: dict[tuple[int, bytes], int] = {}
        self.sizes: dict[int, int] = {}
        self.listed: list[tuple[tuple[int, bytes], int]] = []
        self.next = 2
        self.handle = FileInfo(keep_cache=True)
        self.file, self.directory, self.absent = _answer(stat.S_IFREG), _answer(stat.S_IFDIR), _answer(0)
        self.statistics = pyfuse3.StatvfsData()
        self.ready = print  # the session puts its own here

    def init(self) -> None:
        self.ready()

    def entry(self, ino: int) -> EntryAttributes:
        size = self.sizes.get(ino)
        answer = self.directory if size is None else self.file
        answer.st_ino = ino
        answer.st_size = size or 0
        return answer

    def new(self, parent: int, name: bytes) -> int:
        ino = self.names[parent, name] = self.next
        self.next += 1
        return ino

    async def lookup(self, parent: int, name: bytes, ctx: object) -> EntryAttributes:
        ino = self.names.get((parent, name))
        return self.absent if ino is None else self.entry(ino)

    async def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        pass

    async def getattr(self, inode: int, ctx: object) -> EntryAttributes:
        return self.entry(inode)

    async def setattr(self, inode: int, attr: object, fields: object, handle: object, ctx: object) -> EntryAttributes:
        return self.entry(inode)

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: object) -> EntryAttributes:
        return self.entry(self.new(parent, name))

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: object) -> tuple[FileInfo, object]:
        ino = self.new(parent, name)
        self.sizes[ino] = 0
        return self.opened(ino), self.entry(ino)

    async def open(self, inode: int, flags: int, ctx: object) -> FileInfo:
        return self.opened(inode)

    def opened(self, ino: int) -> FileInfo:
        self.handle.fh = ino
        return self.handle

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, handle: int, start: int, token: object) -> None:
        if not start:
            self.listed = list(self.names.items())
        for place in range(start, len(self.listed)):
            (parent, name), ino = self.listed[place]
            if parent == handle and not pyfuse3.readdir_reply(token, name, self.entry(ino), place + 1):
                return

    async def unlink(self, parent: int, name: bytes, ctx: object) -> None:
        ino = self.names.pop((parent, name))
        if self.sizes.pop(ino):
            self.ram.punch_run(ino % PIECES * PIECE >> 12, PIECE >> 12)

    async def rmdir(self, parent: int, name: bytes, ctx: object) -> None:
        del self.names[parent, name]

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: object) -> None:
        self.names[new_parent, new_name] = self.names.pop((parent, name))

    async def read(self, handle: int, offset: int, size: int) -> memoryview:
        at = handle % PIECES * PIECE + offset
        return self.ram.bytes[at : at + min(size, max(self.sizes[handle] - offset, 0))]

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        at, size = handle % PIECES * PIECE + offset, len(data)
        if offset + size > self.sizes[handle]:
            self.sizes[handle] = offset + size
            self.ram.fill(at, memoryview(data))
        else:
            self.ram.overwrite(at, memoryview(data))
        return size

    async def release(self, handle: int) -> None:
        pass

    async def releasedir(self, handle: int) -> None:
        pass

    async def flush(self, handle: int) -> None:
        raise FUSEError(errno.ENOSYS)

    async def fsync(self, handle: int, datasync: bool) -> None:
        raise FUSEError(errno.ENOSYS)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        return self.statistics

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        raise FUSEError(errno.ENODATA)


def _answer(kind: int) -> EntryAttributes:
    answer = EntryAttributes()
    answer.entry_timeout = answer.attr_timeout = FOREVER
    answer.st_mode = kind | 0o755
    answer.st_nlink = 2 if stat.S_ISDIR(kind) else 1
    answer.st_uid, answer.st_gid = os.getuid(), os.getgid()
    answer.st_blksize = mmap.PAGESIZE
    return answer


def main() -> None:
    directory, memory = sys.argv[1:]
    session = Session(Floor(memory), os.path.abspath(directory), filtered=False)  # type: ignore[arg-type]
    session.mount(0)
    trio.run(_serve, session)
    session.close()


async def _serve(session: Session) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.serve)
        await session.ready.wait()
        print("serving", flush=True)


if __name__ == "__main__":
    main()
