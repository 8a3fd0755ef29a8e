# SPDX-License-Identifier: GPL-2.0-or-later
"""Bind mounts: the file below a mount, and mounting a part of a file system elsewhere.

    covered()   open_tree(2) of the directory above, cloned ─▶ in the copy nothing is mounted ─▶ stat of the name
    bind()      open_tree(2) of the part, cloned ─▶ mount_setattr(2) ─▶ move_mount(2) onto what is held

The clone gets its flags before anybody can reach it: a bind mount that has to be nosuid is never there
without. Only root may clone. The calls came with Linux 5.2, mount_setattr with 5.12; the C library has
no names for them.

Kernel: fs/namespace.c (open_tree, mount_setattr, move_mount)
"""

import ctypes
import errno
import os
import struct

from pkramfs.mounting import options as o
from pkramfs.mounting.syscalls import Mounted, Table, holding, mount_id

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
"""Numbers of the calls, the same on every architecture that Linux gave them to after 5.1."""
_CLONE, _EMPTY_PATH, _BOTH_EMPTY = 1, 0x1000, 0x44
_ATTRIBUTES = {
    o.MS_RDONLY: 0x1,
    o.MS_NOSUID: 0x2,
    o.MS_NODEV: 0x4,
    o.MS_NOEXEC: 0x8,
    o.MS_NOATIME: 0x10,
    o.MS_STRICTATIME: 0x20,
    o.MS_NODIRATIME: 0x80,
    o.MS_NOSYMFOLLOW: 0x200000,
}
_ALL = sum(_ATTRIBUTES.values()) | 0x70  # of the access times, all must be cleared to set one
_MOUNT_ATTR = struct.Struct("=4Q")

_libc = ctypes.CDLL(None, use_errno=True)


def covered(one: Mounted, table: Table) -> tuple[int, int] | None:
    """Return device and inode number of what a mount lies on; None where we may not look, or it is the root of
    another mount."""
    above, name = os.path.split(one.mountpoint)
    upper = table.by_id.get(one.parent)
    if upper is None or not name or upper.mountpoint == one.mountpoint:
        return None
    try:
        with holding(above) as held:
            if mount_id(held) != one.parent:
                return None  # something was mounted on the way since
            clone = _clone(held)
        try:
            found = os.stat(name, dir_fd=clone, follow_symlinks=False)
        finally:
            os.close(clone)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def bind(root: int, part: str, held: int, flags: int, inode: int | None = None) -> None:
    """Mount a part of the file system whose root is held onto a held file, with a mount's own flags.

    ESTALE if the part has another inode number than the one that is expected.
    """
    with holding(part, root, directory=False) as source:
        if inode is not None and os.fstat(source).st_ino != inode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), part)
        clone = _clone(source)
    try:
        wanted = sum(bit for flag, bit in _ATTRIBUTES.items() if flags & flag)
        _call(_MOUNT_SETATTR, clone, b"", _EMPTY_PATH, _MOUNT_ATTR.pack(wanted, _ALL, 0, 0), _MOUNT_ATTR.size)
        _call(_MOVE_MOUNT, clone, b"", held, b"", _BOTH_EMPTY)
    finally:
        os.close(clone)


def _clone(held: int) -> int:
    """Copy the mount in which something held lies, from there on and without what is mounted in it."""
    return _call(_OPEN_TREE, held, b"", _CLONE | _EMPTY_PATH | os.O_CLOEXEC)


def _call(number: int, *words: int | bytes) -> int:
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(w) if isinstance(w, int) else w for w in words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
