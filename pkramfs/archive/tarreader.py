# SPDX-License-Identifier: GPL-2.0-or-later
"""The members of a tar archive, one after the other, from a stream that need not seek.

    for member in read(stream, "in.tar"):
        member.path, member.mode, …
        for offset, data in member.data(): …        the next member begins where this one's data end

Read are the formats of 1988 and POSIX, pax, and GNU with long names and both kinds of sparse files. Whatever an
archive says is checked, and nothing of it is kept but the member at hand:

    headers and records      have a checksum, or a length that agrees; at most HEADER_MAX together
    the map of a file        see sparsemap
    contents                 exactly as many bytes as the header says

A member that breaks a rule ends the work with an ArchiveError that names it. The standard library reads one header
at a time (tarfile); it reads a map or a long name of any size into memory.

Counterparts: GNU tar (list.c, xheader.c, sparse.c), libarchive (archive_read_support_format_tar.c)
"""

import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pkramfs.archive import keywords, sparsemap
from pkramfs.archive.keywords import BLOCK
from pkramfs.archive.stream import Body, Stream
from pkramfs.text import exact

HEADER_MAX = 16 << 20
"""Bytes of extended headers of one member: names, attributes."""
_KINDS = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE), stat.S_IFREG),
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.LNKTYPE: 0,
}
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)


@dataclass
class Member:
    """A file of an archive. `kind` is its S_IF bits, 0 for a hard link to `target`; times are None where not said."""

    path: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    rdev: tuple[int, int]
    target: bytes
    mtime: int
    atime: int | None
    ctime: int | None
    records: dict[str, str]
    """All that its extended headers say."""
    data: Callable[[], Iterator[tuple[int, bytes]]] = field(repr=False)
    """Returns its contents once, as (offset, bytes), holes left out."""


def read(source: Callable[[int], bytes], name: str) -> Iterator[Member]:
    """Yield each member; its contents can be read until the next one is requested."""
    stream, common = Stream(source, name), dict[str, str]()
    records, kept = dict[str, str](), 0
    while (block := stream.block()) is not None:
        info = _parse(stream, block)
        if info.type in _PAX or info.type in _LONG:
            kept += info.size
            if kept > HEADER_MAX:
                stream.wrong(f"an extended header of {kept:,} bytes, and at most {HEADER_MAX:,} are read")
            content = stream.padded(info.size)
            if info.type == tarfile.XGLTYPE:
                common |= _records(stream, content)
            elif info.type in _LONG:
                records[_LONG[info.type]] = exact(content.rstrip(b"\0"))
            else:
                records |= _records(stream, content)
            continue
        body, found = _member(stream, info, block, common | records)
        yield found
        body.skip()
        records, kept, stream.member = {}, 0, ""


def _parse(stream: Stream, block: bytes) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        if stream.at > BLOCK:
            stream.wrong(f"a damaged header at byte {stream.at - BLOCK:,}")
        stream.wrong("not a tar archive")
    if info.size < 0:
        stream.wrong(f"a header at byte {stream.at - BLOCK:,} says a size of {info.size}")
    return info


def _records(stream: Stream, content: bytes) -> dict[str, str]:
    """Return the records of a pax header: `30 mtime=1350244992.023960108` and a newline."""
    found, at = dict[str, str](), 0
    while at < len(content) and content[at]:
        blank = content.find(b" ", at, at + 10)
        digits = content[at:blank] if blank > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[blank + 1 : max(end - 1, 0)].partition(b"=")
        if not blank < end <= len(content) or not equals or content[end - 1 : end] != b"\n":
            stream.wrong("a damaged extended header")
        found[exact(key)] = exact(value)
        at = end
    return found


def _member(stream: Stream, info: tarfile.TarInfo, block: bytes, records: dict[str, str]) -> tuple[Body, Member]:
    """Return the member that a header and the records before it describe, and the bytes behind the header."""
    stream.member = records.get(keywords.SPARSE_NAME) or records.get("path") or info.name
    if info.type not in _KINDS:
        stream.wrong(f"a member of type {info.type!r}, which is not known")
    stored = 0 if info.type in _WITHOUT_DATA else _number(stream, records, "size", int, info.size)
    if stored < 0:
        stream.wrong(f"a size of {stored} bytes")
    body = Body(stream, stored)
    size, extents = sparsemap.read(body, block, records, old=info.type == tarfile.GNUTYPE_SPARSE)
    # Archives of 1988 mark a directory by a slash at the end of its name.
    kind = stat.S_IFDIR if info.type == tarfile.AREGTYPE and stream.member.endswith("/") else _KINDS[info.type]
    return body, Member(
        path=_raw(stream.member),
        kind=kind,
        mode=info.mode & 0o7777,
        uid=_number(stream, records, "uid", int, info.uid),
        gid=_number(stream, records, "gid", int, info.gid),
        size=size,
        rdev=(info.devmajor, info.devminor),
        target=_raw(records.get("linkpath") or info.linkname),
        mtime=_number(stream, records, "mtime", keywords.parse_time, int(info.mtime) * 10**9),
        atime=_number(stream, records, "atime", keywords.parse_time, None),
        ctime=_number(stream, records, "ctime", keywords.parse_time, None),
        records=records,
        data=lambda: body.data(extents),
    )


def _number(stream: Stream, records: dict[str, str], key: str, parse: Callable[[str], int], other: Any) -> Any:
    """Return the number that a record says, or another one where there is no such record."""
    if key not in records:
        return other
    try:
        return parse(records[key])
    except ValueError:
        stream.wrong(f"{key} is {records[key]!r}, which is no number")


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
