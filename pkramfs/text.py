# SPDX-License-Identifier: GPL-2.0-or-later
"""Text that came from outside, on its way to people: one line that cannot talk to a terminal or forge a log.

Names of files, mounts and nodes, mount points, command lines and messages about them may hold anything. They are kept
as they are, and escaped at the door where they leave for people: the kernel log, iomem, a daemon's log, whatever a
command prints. JSON is for programs and has them exact.

    \\n \\t \\r …          the control characters that have a letter
    \\x1b \\x7f           other control characters below 128
    \\xff                a byte that is not UTF-8
    \\u009b \\u202e …     whatever else does not print: C1, format and bidi controls, line separators, unassigned

A backslash stays as it is: so text that was escaped is not escaped again. As text, bytes that are not UTF-8 are lone
surrogates U+DC80 to U+DCFF, one each (`exact`), as Python has it everywhere (PEP 383).

Kernel: fs/seq_file.c (mangle_path), lib/string_helpers.c (string_escape_mem)
"""

from typing import Any

_LETTERS = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}


def printable(value: Any) -> str:
    """One line of text that is safe to print, whatever it was made from."""
    text = exact(bytes(value)) if isinstance(value, bytes | bytearray | memoryview) else str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def exact(raw: bytes) -> str:
    """Bytes as text from which they can be had again: UTF-8, and lone surrogates for what is none."""
    return raw.decode("utf-8", "surrogateescape")


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x80:
        return _LETTERS.get(char, f"\\x{code:02x}")
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
