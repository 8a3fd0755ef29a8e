# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON from an unknown writer: parsed within limits, and checked against a declaration.

    ENTRY = Object({"name": Maybe(Text()), "pid": Whole(0, 1 << 22)}, optional={"options": MapOf(Text())})

    ENTRY.read(parse(data))       the value, or Invalid: field, found, expected

A declaration stands beside the owner of the data, who need not think of damage anywhere else: a value
that was read has the declared types and lies in the declared ranges. A list of fixed length becomes a
tuple. Keys that an Object does not declare are left out, unless `others` declares them or `closed`
forbids them.

`parse` accepts JSON only, less than Python's reader: no NaN, no Infinity, no key twice, no more than
DEPTH levels. Text may hold bytes that are not UTF-8, as file names do (surrogateescape).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pkramfs.text import literal

DEPTH = 32
"""Most levels of lists and objects in one text."""
_WIDEST = (1 << 63) - 1
_LONGEST = 1 << 20


class Invalid(ValueError):
    """A value does not match its declaration. `field` names the place (`segments[2].pfn`), empty for the whole text."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        self.field, self.found, self.expected = field, found, expected
        super().__init__(f"{field} is {found}, expected {expected}" if field else found)


def parse(data: bytes | str) -> Any:
    """Parse a JSON text; raise Invalid if it is not JSON, or nested too deeply."""
    text = data.decode("utf-8", "surrogateescape") if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except Invalid:
        raise
    except ValueError as error:
        raise Invalid("", f"not JSON ({error})", "what this program writes") from None
    except RecursionError:
        _too_deep()
    _check_depth(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Invalid(literal(twice), "there twice", "each key once")
    return found


def _no_constant(word: str) -> NoReturn:
    raise Invalid("", f"not JSON ({word} is no number of JSON)", "finite numbers")


def _check_depth(value: Any) -> None:
    """Raise Invalid if anything lies deeper than DEPTH; go level by level, so that no depth exhausts the stack."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        if not level:
            return
        inner: Iterable[Any] = (v for held in level for v in (held.values() if isinstance(held, dict) else held))
        level = [v for v in inner if isinstance(v, dict | list)]
    if level:
        _too_deep()


def _too_deep() -> NoReturn:
    raise Invalid("", f"nested more than {DEPTH} levels deep", f"at most {DEPTH} levels")


class Kind:
    """A declaration of a value; `expected` describes it in words.

    Kinds are made once and never changed or compared: a dataclass that forbids the one or does the other is five more
    functions to compile whenever a command starts.
    """

    expected = "something else"

    def read(self, value: Any, at: str = "") -> Any:
        """Return the value as declared; raise Invalid, naming the place `at`, if it does not match."""
        raise NotImplementedError

    def refuse(self, value: Any, at: str) -> NoReturn:
        """Raise Invalid for a value that does not match."""
        raise Invalid(at, literal(value), self.expected)


@dataclass(eq=False, repr=False)
class Whole(Kind):
    """A whole number, not 1.0 and not true."""

    low: int = 0
    high: int = _WIDEST

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: Any, at: str = "") -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            self.refuse(value, at)
        return value


@dataclass(eq=False, repr=False)
class Number(Kind):
    """A finite number, whole or not."""

    low: float = -1e300
    high: float = 1e300

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a number from {self.low:g} to {self.high:g}"

    def read(self, value: Any, at: str = "") -> float:
        if type(value) not in (int, float) or not self.low <= value <= self.high or not math.isfinite(value):
            self.refuse(value, at)
        return float(value)


@dataclass(eq=False, repr=False)
class Flag(Kind):
    """True or false."""

    expected = "true or false"

    def read(self, value: Any, at: str = "") -> bool:
        if not isinstance(value, bool):
            self.refuse(value, at)
        return value


@dataclass(eq=False, repr=False)
class Text(Kind):
    """Text that can be a name or a path: without NUL, and with surrogates only for bytes that are not UTF-8."""

    most: int = _LONGEST
    nul: bool = False
    matches: Any = None
    """A compiled expression that the whole text must match."""
    meaning: str = "text"

    @property
    def expected(self) -> str:  # type: ignore[override]
        return self.meaning + (f" of at most {self.most} bytes" if self.most != _LONGEST else "")

    def read(self, value: Any, at: str = "") -> str:
        if not isinstance(value, str) or ("\0" in value and not self.nul):
            self.refuse(value, at)
        try:
            size = len(value.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            self.refuse(value, at)
        if size > self.most or (self.matches is not None and not self.matches.fullmatch(value)):
            self.refuse(value, at)
        return value


@dataclass(eq=False, repr=False)
class OneOf(Kind):
    """One of some values, or of some kinds."""

    choices: tuple[Any, ...]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return " or ".join(c.expected if isinstance(c, Kind) else literal(c) for c in self.choices)

    def read(self, value: Any, at: str = "") -> Any:
        for choice in self.choices:
            if isinstance(choice, Kind):
                try:
                    return choice.read(value, at)
                except Invalid:
                    continue
            if type(value) is type(choice) and value == choice:
                return value
        return self.refuse(value, at)


@dataclass(eq=False, repr=False)
class Maybe(Kind):
    """A value, or null."""

    kind: Kind

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.kind.expected} or null"

    def read(self, value: Any, at: str = "") -> Any:
        return None if value is None else self.kind.read(value, at)


@dataclass(eq=False, repr=False)
class ListOf(Kind):
    """A list whose items are of one kind."""

    kind: Kind
    expected = "a list"

    def read(self, value: Any, at: str = "") -> list[Any]:
        if not isinstance(value, list | tuple):
            self.refuse(value, at)
        return [self.kind.read(item, f"{at}[{number}]") for number, item in enumerate(value)]


@dataclass(eq=False, repr=False)
class Row(Kind):
    """A list of fixed length, read as a tuple."""

    kinds: tuple[Kind, ...]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a list of {len(self.kinds)}"

    def read(self, value: Any, at: str = "") -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or len(value) != len(self.kinds):
            self.refuse(value, at)
        return tuple(
            kind.read(item, f"{at}[{n}]") for n, (kind, item) in enumerate(zip(self.kinds, value, strict=True))
        )


@dataclass(eq=False, repr=False)
class Range(Kind):
    """A range [start, end) within 0 … `limit`, read as a tuple."""

    limit: int
    unit: str = "pages"

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"[start, end) in {self.unit}, not empty and at most {self.limit}"

    def read(self, value: Any, at: str = "") -> tuple[int, int]:
        whole = Whole(0, self.limit)
        if not isinstance(value, list | tuple) or len(value) != 2:
            self.refuse(value, at)
        start, end = (whole.read(item, f"{at}[{n}]") for n, item in enumerate(value))
        if start >= end:
            self.refuse(value, at)
        return start, end


@dataclass(eq=False, repr=False)
class MapOf(Kind):
    """An object whose keys are names and whose values are of one kind."""

    kind: Kind
    expected = "an object"

    def read(self, value: Any, at: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(value, at)
        key_of = Text()
        return {
            key_of.read(key, f"a key of {at}"): self.kind.read(item, _below(at, key)) for key, item in value.items()
        }


@dataclass(eq=False, repr=False)
class Object(Kind):
    """An object with these fields, of which `optional` ones may be missing."""

    fields: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    others: Kind | None = None
    closed: bool = False
    expected = "an object"

    def read(self, value: Any, at: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            if at:
                self.refuse(value, at)
            raise Invalid("", f"not a JSON object but {literal(value)}", "a JSON object")
        found = {}
        for name, kind in self.fields.items():
            if name not in value:
                raise Invalid(_below(at, name), "missing", kind.expected)
            found[name] = kind.read(value[name], _below(at, name))
        for name, kind in self.optional.items():
            if name in value:
                found[name] = kind.read(value[name], _below(at, name))
        for name in value.keys() - found.keys():
            if self.closed:
                raise Invalid(_below(at, name), "unknown", "only what this version writes")
            if self.others is not None:
                found[name] = self.others.read(value[name], _below(at, name))
        return found


@dataclass(eq=False, repr=False)
class Empty(Kind):
    """An object without fields."""

    expected = "an empty object"

    def read(self, value: Any, at: str = "") -> dict[str, Any]:
        if value != {}:
            self.refuse(value, at)
        return {}


@dataclass(eq=False, repr=False)
class Anything(Kind):
    """Any value, kept as it is: another version may have written it."""

    expected = "anything"

    def read(self, value: Any, at: str = "") -> Any:
        return value


def _below(at: str, name: str) -> str:
    name = name if name.isidentifier() and name.isascii() else literal(name)
    return f"{at}.{name}" if at else name
