# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers to requests that a daemon had done when it died, before it could answer them.

A daemon may die between the store that makes a request count and its reply. The kernel sends the request again. Doing
it again would be wrong: the name exists already, or is gone. So the answer is taken from the tree as it is now.

    CREATE, MKNOD, MKDIR, SYMLINK, LINK, TMPFILE     the inode that the name stands for
    OPEN                                             the handle
    UNLINK, RMDIR, RENAME, RELEASE, an xattr         success

All other requests may be done twice with the same result: data at the same place, the same attributes.

Kernel: fs/fuse/dev.c (fuse_chan_resend)
"""

from collections.abc import Callable
from typing import Any

from pkramfs.fs.data import handle_for
from pkramfs.fs.inode import Inode
from pkramfs.fuse import wire
from pkramfs.fuse.operations import Operations
from pkramfs.fuse.requests import Requests, first_name
from pkramfs.fuse.wire import Header, Op

_DONE = (Op.UNLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.RELEASE, Op.SETXATTR, Op.REMOVEXATTR)
_ALL = 1 << 60
_NAME_AT = {Op.MKNOD: wire.MKNOD.size, Op.MKDIR: wire.MKDIR.size, Op.SYMLINK: 0, Op.LINK: wire.NUMBER.size}


def resume(operations: Operations) -> None:
    """Take over from another daemon: count what the kernel may know, and free what it has forgotten."""
    tree = operations.tree
    tree.assume_known()
    operations.translate.guessed.update(tree.writing)
    for number in [ino for ino in tree.orphans if not tree.inodes[ino].opens]:
        if not operations.cache.knows(number):
            tree.forget(number, _ALL)
    tree.commit()


class Again:
    """The answers of one mount."""

    def __init__(self, requests: Requests) -> None:
        self._operations, self._tree = requests.operations, requests.tree
        self._table: dict[int, Callable[[Header, memoryview, int], Any]] = {
            **dict.fromkeys(_DONE, self._done),
            **dict.fromkeys(_NAME_AT, self._made),
            Op.CREATE: self._created,
            Op.TMPFILE: self._unnamed,
            Op.OPEN: self._opened,
        }

    def answer(self, header: Header, body: memoryview, made: int) -> Any:
        """Return the body of the reply to a request that was done and `made` an inode (or 0); None: do it again."""
        method = self._table.get(header[1])
        return None if method is None else method(header, body, made)

    def _done(self, header: Header, body: memoryview, made: int) -> Any:
        return b""

    def _made(self, header: Header, body: memoryview, made: int) -> Any:
        inode = self._inode(made) or self._tree.lookup(header[3], first_name(body, _NAME_AT[Op(header[1])]))
        return None if inode is None else self._operations.named(inode)

    def _created(self, header: Header, body: memoryview, made: int) -> Any:
        inode = self._inode(made) or self._tree.lookup(header[3], first_name(body, wire.CREATE.size))
        return None if inode is None else self._entry_and_handle(inode, body)

    def _unnamed(self, header: Header, body: memoryview, made: int) -> Any:
        inode = self._inode(made)
        return None if inode is None else self._entry_and_handle(inode, body)

    def _inode(self, made: int) -> Inode | None:
        """Return the inode that a request has made, or None."""
        return self._tree.inodes.get(made)

    def _entry_and_handle(self, inode: Inode, body: memoryview) -> Any:
        flags, *_ = wire.CREATE.unpack_from(body)
        entry: Any = self._operations.named(inode)
        return entry + self._operations.translate.opened(handle_for(inode.ino, flags))

    def _opened(self, header: Header, body: memoryview, made: int) -> Any:
        return self._operations.translate.opened(handle_for(header[3], wire.OPEN.unpack_from(body)[0]))
