# SPDX-License-Identifier: GPL-2.0-or-later
"""POSIX ACLs: what they do to a mode, and what a mode does to them.

An ACL is the value of an xattr, in the kernel's own form: a version word and entries of 8 bytes.

    02 00 00 00 | tag perm id | tag perm id | …      tags in rising order: owner, users, group,
                                                     groups, mask, other

* An access ACL and the mode are two views of the same thing: owner and other are equal in both, and
  the group bits of the mode are the mask (or the group's entry where there is no mask). Setting
  one updates the other. An ACL that says no more than a mode is not kept.
* A default ACL of a directory replaces the umask for what is created in it, and is inherited by
  new directories.

The kernel decides access with them; we only keep both views equal.

Kernel: fs/posix_acl.c (posix_acl_create_masq, posix_acl_equiv_mode, posix_acl_chmod)
"""

import errno
import stat
import struct

from pkramfs.fs.failure import fail

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION = 2
_RWX = 0o777

Entry = tuple[int, int, int]
"""(tag, permissions, user or group id)"""


def parse(value: bytes) -> list[Entry]:
    """Return the entries of a valid ACL; EINVAL (EOPNOTSUPP for another version) otherwise. No entries: no ACL."""
    if len(value) < _HEADER.size:
        raise fail(errno.EINVAL)
    if _HEADER.unpack_from(value)[0] != _VERSION:
        raise fail(errno.EOPNOTSUPP)
    if (len(value) - _HEADER.size) % _ENTRY.size:
        raise fail(errno.EINVAL)
    entries = list(_ENTRY.iter_unpack(value[_HEADER.size :]))
    if entries and not _is_valid(entries):
        raise fail(errno.EINVAL)
    return entries


def pack(entries: list[Entry]) -> bytes:
    """Encode entries as the value of an extended attribute."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _is_valid(entries: list[Entry]) -> bool:
    tags = [tag for tag, _, _ in entries]
    if tags != sorted(tags) or any(perm & ~7 for _, perm, _ in entries):
        return False
    if any(tags.count(tag) != 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) or tags.count(MASK) > 1:
        return False
    known = {USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER}
    return set(tags) <= known and (MASK in tags or not {USER, GROUP} & set(tags))


def to_mode(entries: list[Entry]) -> tuple[int, bool]:
    """Return the nine permission bits that an access ACL stands for, and whether it says more than they do."""
    perms = {tag: perm for tag, perm, _ in entries}
    mode = perms[USER_OBJ] << 6 | perms.get(MASK, perms[GROUP_OBJ]) << 3 | perms[OTHER]
    return mode, any(tag in (USER, GROUP, MASK) for tag in perms)


def with_mode(value: bytes, mode: int) -> bytes:
    """Return an access ACL after chmod."""
    entries = parse(value)
    group = MASK if any(tag == MASK for tag, _, _ in entries) else GROUP_OBJ
    new = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return pack([(tag, new.get(tag, perm), who) for tag, perm, who in entries])


def inherit(default: bytes, mode: int) -> tuple[int, dict[bytes, bytes]]:
    """Return the mode and ACLs of what is created with `mode` in a directory that has this default ACL."""
    entries = parse(default)
    group = MASK if any(tag == MASK for tag, _, _ in entries) else GROUP_OBJ
    limit = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    access = [(tag, perm & limit.get(tag, 7), who) for tag, perm, who in entries]
    bits, more = to_mode(access)
    xattrs = {}
    if more:
        xattrs[ACCESS] = pack(access)
    if stat.S_ISDIR(mode):
        xattrs[DEFAULT] = default
    return mode & ~_RWX | bits, xattrs
