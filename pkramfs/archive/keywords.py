# SPDX-License-Identifier: GPL-2.0-or-later
"""The keywords of pax headers: facts of a file that do not fit into tar's header of 1988, written and read.

    mtime atime ctime               seconds with a fraction of nine digits
    SCHILY.xattr.NAME               one extended attribute; in NAME `=` and `%` are %3D and %25, as GNU tar has it,
                                    and so are bytes that are not UTF-8
    SCHILY.acl.access  …default     an ACL as text: user::rw-,user:7:r--,group::r--,mask::r--,other::---
    SCHILY.fflags                   flags of chattr(1), as libarchive names them
    GNU.sparse.*                    version 1.0: the map of a file with holes stands before its data

GNU tar (with --xattrs and --acls), bsdtar and star read them. Owners are numbers only, in archives that we write: names
of this host mean nothing in memory that outlives it.

Counterparts: GNU tar (xheader.c, xattrs.c), libarchive (archive_write_set_format_pax.c)
"""

import grp
import pwd
import re
from urllib.parse import unquote_to_bytes

from pkramfs.fs import acl
from pkramfs.fs.protection import APPEND, IMMUTABLE, NOATIME, NODUMP

XATTR, ACL_ACCESS, ACL_DEFAULT = "SCHILY.xattr.", "SCHILY.acl.access", "SCHILY.acl.default"
FLAGS = "SCHILY.fflags"
SPARSE_MAJOR, SPARSE_MINOR = "GNU.sparse.major", "GNU.sparse.minor"
SPARSE_NAME, SPARSE_SIZE = "GNU.sparse.name", "GNU.sparse.realsize"
BLOCK = 512

_TIME = re.compile(r"(-?)(\d{1,18})(?:\.(\d*))?")
_FLAG_NAMES = {"schg": IMMUTABLE, "sappnd": APPEND, "nodump": NODUMP, "noatime": NOATIME}
_SAME_FLAGS = {"schange": "schg", "simmutable": "schg", "sappend": "sappnd"}
_TAGS = {acl.USER_OBJ: "user", acl.USER: "user", acl.GROUP_OBJ: "group", acl.GROUP: "group"}
_TAGS |= {acl.MASK: "mask", acl.OTHER: "other"}
_KINDS = {
    **dict.fromkeys(("user", "u"), (acl.USER_OBJ, acl.USER)),
    **dict.fromkeys(("group", "g"), (acl.GROUP_OBJ, acl.GROUP)),
    **dict.fromkeys(("mask", "m"), (acl.MASK, None)),
    **dict.fromkeys(("other", "o"), (acl.OTHER, None)),
}
_PERMS = ("r", 4), ("w", 2), ("x", 1)
_NOBODY = 0xFFFFFFFF


def time_text(ns: int) -> str:
    """Write a time as seconds with nine digits behind the point."""
    seconds, rest = divmod(abs(ns), 10**9)
    return f"{'-' if ns < 0 else ''}{seconds}.{rest:09d}"


def parse_time(text: str) -> int:
    """Return a time in ns; raise ValueError for an invalid one."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"time {text!r}")
    ns = int(match[2]) * 10**9 + int((match[3] or "0")[:9].ljust(9, "0"))
    return -ns if match[1] else ns


def xattr_key(name: bytes) -> str:
    """Return the keyword of an extended attribute."""
    text = name.replace(b"%", b"%25").replace(b"=", b"%3D").decode("utf-8", "surrogateescape")
    return XATTR + "".join(c if not 0xDC80 <= ord(c) <= 0xDCFF else f"%{ord(c) - 0xDC00:02X}" for c in text)


def xattr_name(key: str) -> bytes:
    """Return the name of the extended attribute that a keyword stands for."""
    return unquote_to_bytes(key[len(XATTR) :].encode("utf-8", "surrogateescape"))


def flags_text(flags: int) -> str:
    """Write flags of chattr(1)."""
    return ",".join(name for name, bit in _FLAG_NAMES.items() if flags & bit)


def parse_flags(text: str) -> int:
    """Return those flags of a list that a tmpfs has; others mean nothing here."""
    names = (_SAME_FLAGS.get(name.strip(), name.strip()) for name in text.split(","))
    return sum({_FLAG_NAMES[name] for name in names if name in _FLAG_NAMES})


def acl_text(value: bytes) -> str:
    """Write an ACL in its short text form, with numbers for users and groups."""
    lines = []
    for tag, perm, who in acl.parse(value):
        letters = "".join(letter if perm & bit else "-" for letter, bit in _PERMS)
        lines.append(f"{_TAGS[tag]}:{who if tag in (acl.USER, acl.GROUP) else ''}:{letters}")
    return ",".join(lines)


def parse_acl(text: str) -> bytes:
    """Parse the text of an ACL; raise ValueError if it is invalid, or names a user that this host does not have."""
    entries = [_acl_entry(line) for line in re.split(r"[,\n]", text) if line.partition("#")[0].strip()]
    return acl.pack(sorted(entries, key=lambda entry: (entry[0], entry[2])))


def _acl_entry(line: str) -> acl.Entry:
    """Parse `user:joe:rwx`, with a numeric id behind it or without."""
    kind, *rest = line.partition("#")[0].strip().split(":")
    if kind not in _KINDS or not 1 <= len(rest) <= 3:
        raise ValueError(f"ACL entry {line!r}")
    named, (own, other) = "", _KINDS[kind]
    if len(rest) > 1:
        named, rest = rest[0], rest[1:]
    perms = sum(bit for letter, bit in _PERMS if letter in rest[0])
    if set(rest[0]) - set("rwx-"):
        raise ValueError(f"ACL entry {line!r}")
    if not named:
        return own, perms, _NOBODY
    if other is None:
        raise ValueError(f"ACL entry {line!r}")
    number = rest[1] if len(rest) > 1 and rest[1].isdecimal() else named
    who = int(number) if number.isdecimal() else _known(named, user=other == acl.USER)
    if who >= _NOBODY:
        raise ValueError(f"ACL entry {line!r}")
    return other, perms, who


def _known(name: str, *, user: bool) -> int:
    try:
        return pwd.getpwnam(name).pw_uid if user else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ValueError(f"{'user' if user else 'group'} {name!r} in an ACL, which this host does not have") from None
