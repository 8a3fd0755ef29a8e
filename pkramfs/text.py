# SPDX-License-Identifier: GPL-2.0-or-later
"""Escaping of text from outside before people see it, so that it can neither control a terminal nor forge a log line.

Names of files, mounts and nodes, mount points, command lines and messages about them may hold any bytes. They are kept
as they are and escaped on output for people: in the kernel log, iomem, a daemon's log and all that a command prints.
JSON is for programs and has them exact. `printable` escapes text; `literal` writes a value of JSON that is wrong.

    \\n \\t \\r …          the control characters that have a letter
    \\x1b \\x7f           other control characters below 128
    \\xff                a byte that is not UTF-8
    \\u009b \\u202e …     all else that does not print: C1, format and bidi controls, line separators, unassigned

A backslash stays as it is, so that text is never escaped twice. Each byte that is not UTF-8 is a lone surrogate U+DC80
to U+DCFF in text (`exact`), as everywhere in Python (PEP 383).

Kernel: fs/seq_file.c (mangle_path), lib/string_helpers.c (string_escape_mem)
"""

import reprlib
import stat
from typing import Any

FILE_KINDS = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character special file",
    stat.S_IFBLK: "block special file",
}
"""What stat(1) calls files, by the S_IF bits of their mode."""

_LETTERS = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}


def printable(value: Any) -> str:
    """Return any value as one line of text that is safe to print."""
    text = exact(bytes(value)) if isinstance(value, bytes | bytearray | memoryview) else str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def literal(value: Any) -> str:
    """Return a value as Python writes it, for errors: short, one line, ASCII, so that look-alikes differ."""
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()


def exact(raw: bytes) -> str:
    """Decode bytes so that encoding gives them back: UTF-8, and a lone surrogate for each byte that is not."""
    return raw.decode("utf-8", "surrogateescape")


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x80:
        return _LETTERS.get(char, f"\\x{code:02x}")
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
