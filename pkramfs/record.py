# SPDX-License-Identifier: GPL-2.0-or-later
"""One declaration of a binary record: a struct for one, a dtype for many, a table for the manual.

    NODE = Record("Node", 344, "One named node.", [
        F("magic", "u8", 0, "NODE_MAGIC"),
        F("name", "256s", 88, "NUL-padded bytes"),
    ])

    NODE.read(buffer, 0).magic        one record as a named tuple (fast: struct)
    NODE.pack(magic=…, name=…)        its bytes
    np.frombuffer(buffer, NODE.dtype) many records as an array
    NODE.table()                      rows for pkramfs-format(5)

Everything is little-endian and of fixed width; gaps are zero and are checked to be declared in
order. Type codes: u1 u2 u4 u8, i8, and Ns for N bytes.

Kernel: include/linux/kho/abi (structures as a contract)
"""

import struct
from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np

_STRUCT = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "i8": "q"}


class F(NamedTuple):
    """One field: its name, type code, byte offset and meaning."""

    name: str
    code: str
    offset: int
    meaning: str

    @property
    def size(self) -> int:
        """Return the size of the field in bytes."""
        return int(self.code[:-1]) if self.code.endswith("s") else int(self.code[1:])

    @property
    def numpy_code(self) -> str:
        """Return the field as a numpy type."""
        return f"S{self.size}" if self.code.endswith("s") else f"<{self.code}"


class Record:
    """A record of `size` bytes; see the module's page."""

    def __init__(self, name: str, size: int, meaning: str, fields: list[F]) -> None:
        self.name, self.size, self.meaning, self.fields = name, size, meaning, tuple(fields)
        self._struct = struct.Struct(self._layout())
        self.tuple: Any = _tuple_type(name, fields)
        self.dtype = np.dtype(
            {
                "names": [f.name for f in fields],
                "formats": [f.numpy_code for f in fields],
                "offsets": [f.offset for f in fields],
                "itemsize": size,
            }
        )
        self._offsets = {f.name: f.offset for f in fields}
        self._zero = {f.name: b"" if f.code.endswith("s") else 0 for f in fields}

    def _layout(self) -> str:
        parts, at = ["<"], 0
        for field in self.fields:
            if field.offset < at:
                raise AssertionError(f"{self.name}.{field.name} at {field.offset} overlaps what ends at {at}")
            parts.append(f"{field.offset - at}x")
            parts.append(field.code if field.code.endswith("s") else _STRUCT[field.code])
            at = field.offset + field.size
        if at > self.size:
            raise AssertionError(f"{self.name}: fields end at {at}, declared {self.size}")
        parts.append(f"{self.size - at}x")
        return "".join(parts)

    def offset(self, field: str) -> int:
        """Return the byte offset of a field in the record."""
        return self._offsets[field]

    def read(self, buffer: Any, at: int = 0) -> Any:
        """Return the record at byte `at` of a buffer, as a named tuple. Trusts nothing but the length."""
        return self.tuple._make(self._struct.unpack_from(buffer, at))

    def pack(self, **values: Any) -> bytes:
        """Return the record's bytes; fields not given are zero, unknown names are a TypeError."""
        unknown = values.keys() - self._zero.keys()
        if unknown:
            raise TypeError(f"{self.name} has no field {', '.join(sorted(unknown))}")
        return self._struct.pack(*(self._zero | values).values())

    def table(self) -> list[tuple[int, int, str, str]]:
        """Return rows (offset, size, field, meaning) for the manual."""
        return [(f.offset, f.size, f.name, f.meaning) for f in self.fields]


def _tuple_type(name: str, fields: list[F]) -> Any:
    return namedtuple(name, [f.name for f in fields])
