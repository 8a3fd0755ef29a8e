# SPDX-License-Identifier: GPL-2.0-or-later
"""Units, records and errors."""

import errno

import numpy as np
import pytest

from pkramfs import errors
from pkramfs.record import F, Record
from pkramfs.units import format_size, pages, parse_size, plural


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("2G", 2 << 30), ("64MiB", 64 << 20), ("1k", 1024), ("0x1000", 4096), (" 3 T", 3 << 40)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "2X", "twelve"])
def test_other_words_are_no_size(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_sizes_are_written_for_people():
    assert [format_size(n) for n in (0, 17, 1024, 640 << 10, 2 << 30, 1536)] == [
        "0 B",
        "17 B",
        "1.0 KiB",
        "640 KiB",
        "2.0 GiB",
        "1.5 KiB",
    ]
    assert (plural(1, "node"), plural(2, "node"), plural(0, "entry", "entries")) == ("1 node", "2 nodes", "0 entries")
    assert [pages(n) for n in (0, 1, 4096, 4097)] == [0, 1, 1, 2]


def test_a_record_is_struct_and_dtype():
    record = Record("R", 32, "", [F("a", "u8", 0, ""), F("b", "u4", 12, ""), F("c", "6s", 20, "")])
    raw = record.pack(a=1, b=2, c=b"xyz")
    assert len(raw) == 32 and record.read(raw) == (1, 2, b"xyz\0\0\0")
    many = np.frombuffer(raw * 3, record.dtype)
    assert many["b"].tolist() == [2, 2, 2]
    with pytest.raises(TypeError):
        record.pack(d=1)


def test_overlapping_fields_are_refused():
    with pytest.raises(AssertionError, match="overlaps"):
        Record("R", 16, "", [F("a", "u8", 0, ""), F("b", "u8", 4, "")])
    with pytest.raises(AssertionError, match="declared"):
        Record("R", 8, "", [F("a", "u8", 4, "")])


def test_errors_carry_errno_and_status():
    error = errors.PkramError("no node x", errno.ENOENT)
    assert isinstance(error, OSError) and error.errno == errno.ENOENT and str(error) == "no node x"
    statuses = {c.exit_status for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)}
    assert statuses >= set(range(1, 10))
    assert str(errors.FormatError("Node", "magic", pfn=0x34F, found=1, expected=2)) == (
        "Node at pfn 34f: magic is 1, expected 2"
    )
