# SPDX-License-Identifier: GPL-2.0-or-later
"""FUSE's requests and replies as bytes on the device: numbers and structures, no rules.

    request   header · fields of the opcode · names, each with its NUL · data
    reply     length, error, number of the request · fields of the opcode

All numbers are little-endian and naturally aligned, so that one Struct reads a C structure.

Kernel: include/uapi/linux/fuse.h
"""

from enum import IntEnum
from struct import Struct


class Op(IntEnum):
    """The opcodes of requests."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


HEADER = Struct("<IIQQIIIHH")
"""length, opcode, number, inode, uid, gid, pid, length of extensions, padding"""
REPLY = Struct("<IiQ")
"""length, error, number"""

Header = tuple[int, int, int, int, int, int, int, int, int]

_ATTR = "QQQqqqIIIIIIIIII"
"""ino, size, blocks, seconds and nanoseconds of atime, mtime, ctime, mode, nlink, uid, gid, rdev, blksize, flags"""
ENTRY = Struct("<QQQQII" + _ATTR)
"""inode, generation, seconds of name and of attributes, nanoseconds of both, attributes"""
ATTRIBUTES = Struct("<QII" + _ATTR)
"""seconds, nanoseconds, padding, attributes"""
ENTRY_OF_LISTING = Struct("<QQQQII" + _ATTR + "QQII")
"""ENTRY and DIRENT"""
DIRENT = Struct("<QQII")
"""ino, where to go on, length of the name, type"""
OPENED = Struct("<QIi")
"""handle, FOPEN_ flags, backing file"""
KEEP_CACHE = 1 << 1
WRITE_CACHE = 1
"""Flag of a WRITE: the kernel writes back from its cache."""
STATFS = Struct("<QQQQQIIII24x")
"""blocks, free, available, files, free files, block size, longest name, fragment size, padding"""

COUNT = Struct("<II")
COUNT_64 = Struct("<Q")

NUMBER = Struct("<Q")
FORGET_ONE = Struct("<QQ")
GETATTR = Struct("<I4xQ")
GETATTR_FH = 1
SETATTR = Struct("<IIQQQqqqIIIIIIII")
"""valid, padding, handle, size, lock owner, seconds and nanoseconds of times, mode, unused, uid, gid, unused"""
STAMP = Struct("<I36xqq4xII")
"""Of these valid, and seconds and nanoseconds of mtime and ctime."""
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME = 1, 2, 4, 8, 16, 32
FATTR_FH, FATTR_ATIME_NOW, FATTR_MTIME_NOW, FATTR_CTIME = 1 << 6, 1 << 7, 1 << 8, 1 << 10
MKNOD = Struct("<IIII")
"""mode, rdev, umask, padding"""
MKDIR = Struct("<II")
"""mode, umask"""
RENAME = Struct("<Q")
RENAME2 = Struct("<QII")
"""new directory, flags, padding"""
OPEN = Struct("<II")
CREATE = Struct("<IIII")
"""flags, mode, umask, open flags"""
READ = Struct("<QQIIQII")
WRITE = Struct("<QQIIQII")
"""handle, offset, size, flags, lock owner, open flags, padding"""
HANDLE = Struct("<Q")
FSYNC = Struct("<QII")
SETXATTR = Struct("<II")
"""size, flags"""
GETXATTR = Struct("<II")

FALLOCATE = Struct("<QQQII")
"""handle, offset, length, mode, padding"""
LSEEK = Struct("<QqII")
"""handle, offset, whence, padding"""
COPY = Struct("<QQQQQQQ")
"""handle and offset to read from; inode, handle and offset to write to; length, flags"""
IOCTL = Struct("<QIIQII")
"""handle, flags, command, argument, bytes that came with it, bytes that may go back"""
IOCTL_DONE = Struct("<iIII")
"""result, flags, pieces in, pieces out"""
FLAGS = Struct("<I")
FSXATTR = Struct("<IIIII8x")
"""flags, extent size, extents, project, extent size for copies"""
STATX = Struct("<QII16x" + "IIQIIIHHQQQQ" + "qIi" * 4 + "IIII112x")
"""how long it is good; mask, blksize, attributes, nlink, uid, gid, mode, ino, size, blocks, attributes' mask;
access, birth, change, modification; device that the inode is, device that it is on"""
STATX_BASIC, STATX_BTIME = 0x7FF, 0x800

NOTIFY_INVAL_INODE, NOTIFY_RESEND = 2, 7
RESEND = REPLY.pack(REPLY.size, NOTIFY_RESEND, 0)
"""The notification by which the kernel sends again all that was read and not answered (Linux 6.9)."""
INVAL_INODE = Struct("<Qqq")
"""inode, offset, length"""


def notification(inode: int, offset: int, length: int) -> bytes:
    """Return the notification by which the kernel drops a file's pages (negative offset: its attributes alone)."""
    body = INVAL_INODE.pack(inode, offset, length)
    return REPLY.pack(REPLY.size + len(body), NOTIFY_INVAL_INODE, 0) + body
