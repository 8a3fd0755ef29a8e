# SPDX-License-Identifier: GPL-2.0-or-later
"""The map of a file with holes: where in the file the bytes belong that an archive has for it.

    GNU 1.0    in front of the data: number of parts, then offset and size of each, a line for each number
    GNU 0.1    in a record of the extended header, separated by commas
    GNU old    four parts in the header itself, twenty-one in each further block

An archive may say anything here. So parts must rise and lie inside the file, and there are at most MAP_MAX: a map takes
16 times as much memory as it says in bytes, and each part takes a page of the tree. Empty parts say nothing: GNU tar
ends with one where a file ends with a hole, bsdtar begins with one where there is nothing but a hole.

Counterparts: GNU tar (sparse.c)
"""

from pkramfs.archive import keywords
from pkramfs.archive.keywords import BLOCK
from pkramfs.archive.stream import Body, Extents
from pkramfs.fs.rules import MAX_SIZE

MAP_MAX = 1 << 20
"""Parts of a file with holes."""
_LINE_MAX = 20
"""Digits of a number, and its newline."""
_ENTRIES, _MORE, _SIZE = 386, 482, 483
"""Where GNU's old header has the first parts, the mark that there are more, and the size of the file."""
_FURTHER = 21
_DIGITS = 12


def read(body: Body, block: bytes, records: dict[str, str], *, old: bool) -> tuple[int, Extents]:
    """Return a file's size and the ranges of its bytes; the rest of `body` are those bytes."""
    if old:
        numbers, size = _old(body, block), _field(body, block[_SIZE : _SIZE + _DIGITS])
    elif (records.get(keywords.SPARSE_MAJOR), records.get(keywords.SPARSE_MINOR)) == ("1", "0"):
        numbers, size = _lines(body), _number(body, records.get(keywords.SPARSE_SIZE, ""))
    elif "GNU.sparse.map" in records:
        numbers = [_number(body, word) for word in records["GNU.sparse.map"].split(",")]
        size = _number(body, records.get("GNU.sparse.size", ""))
    elif any(key.startswith("GNU.sparse.") for key in records):
        body.stream.wrong("its map of holes is of a version that is not known")
    else:
        size, numbers = body.size, [0, body.size]
    if size > MAX_SIZE:
        body.stream.wrong(f"a size of {size:,} bytes, which no file can have")
    return size, _checked(body, size, numbers)


def _checked(body: Body, size: int, numbers: list[int]) -> Extents:
    extents, end = list(zip(numbers[::2], numbers[1::2], strict=False)), 0
    if len(numbers) % 2 or len(extents) > MAP_MAX:
        body.stream.wrong(f"a map of {len(extents):,} parts, and at most {MAP_MAX:,} are read")
    for number, (offset, length) in enumerate(extents, 1):
        if offset < end or offset + length > size:
            body.stream.wrong(f"part {number:,} of its map, {length} bytes at {offset}, does not follow the one before")
        end = offset + length
    stored = sum(length for _, length in extents)
    if stored != body.left:
        body.stream.wrong(f"its map names {stored:,} bytes, and the archive has {body.left:,} for it")
    return [extent for extent in extents if extent[1]]


def _lines(body: Body) -> list[int]:
    """Read the numbers in front of the data, which begin with their count."""
    rest, wanted, found = b"", 0, list[int]()
    while not wanted or len(found) < wanted:
        lines = (rest + body.take(min(BLOCK, body.left) or 1)).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if wanted and len(found) == wanted:
                break
            number = _number(body, line.decode("ascii", "replace"))
            if wanted:
                found.append(number)
                continue
            wanted = 2 * number
            if not 0 < number <= MAP_MAX:
                body.stream.wrong(f"a map of {number:,} parts, and at most {MAP_MAX:,} are read")
        if len(found) < (wanted or 1) and len(rest) > _LINE_MAX:
            body.stream.wrong("its map is damaged")
    return found


def _old(body: Body, block: bytes) -> list[int]:
    numbers = _parts(body, block[_ENTRIES:_MORE])
    more = block[_MORE]
    while more:
        further = body.stream.exactly(BLOCK)  # these blocks are no part of the size
        numbers += _parts(body, further[: _FURTHER * 2 * _DIGITS])
        more = further[_FURTHER * 2 * _DIGITS]
        if len(numbers) > 2 * MAP_MAX:
            body.stream.wrong(f"a map of more than {MAP_MAX:,} parts")
    return numbers


def _parts(body: Body, table: bytes) -> list[int]:
    found = []
    for at in range(0, len(table), 2 * _DIGITS):
        if not table[at]:
            break
        found += [_field(body, table[at + place : at + place + _DIGITS]) for place in (0, _DIGITS)]
    return found


def _field(body: Body, field: bytes) -> int:
    """Return a number in octal digits, or in bytes behind a mark."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    try:
        return int(digits, 8)
    except ValueError:
        body.stream.wrong("its map is damaged")


def _number(body: Body, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _LINE_MAX:
        body.stream.wrong("its map is damaged")
    return int(text)
