# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel command line: words, `name=value`, quotes, and the few options that boot understands.

    BOOT_IMAGE=builtin ro quiet pkram=34f nokaslr crashkernel=64M@1G scratch=128M

A word may hold spaces inside double quotes; quotes around a word, or around its value, are no part
of it. The word `--` ends the kernel's words: all that follows is init's, and is neither understood
nor changed here; words are added before it. An option given twice means its last value, as in the
kernel's own parser, except that two different `pkram=` are an error: the announcement's `sed` strips
the old one, and a forgotten one would make the next kernel restore nothing.

    pkram=PFN               hexadecimal pfn of the super block; 0 or absent: restore nothing
    pkram=off               no PKRAM in this kernel: nothing is restored, nothing can be preserved
    pkram=NAME:PFN          the same for machine NAME alone, of several on memory of the host (hostboot.py)
    nokaslr                 run the kernel where it was loaded
    mem=SIZE                use no RAM above this address
    crashkernel=SIZE[@ADDR] set RAM aside for a crash kernel (-p)
    scratch=SIZE[@ADDR]     set RAM aside in which kernels are placed and early boot allocates

Kernel: lib/cmdline.c (next_arg), kernel/params.c (parse_args, parameq), patch 8 (early_param "pkram")
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pkramfs.errors import UsageError
from pkramfs.units import PAGE_SIZE, parse_size, round_up

_BLANK = " \t\n\v\f\r"
INIT = "--"
"""The word that ends the kernel's words."""
_HIGHEST = 1 << 62
_PFN = re.compile(r"(?:0[xX])?[0-9a-fA-F]{1,16}")
PKRAM, PKRAM_OFF = "pkram", "off"
PANIC_ON_OOPS = "panic_on_oops"
MAX_LENGTH = 2047
"""Longest command line in bytes: COMMAND_LINE_SIZE of x86 less its NUL."""


@dataclass(frozen=True)
class Reservation:
    """A piece of RAM asked for on the command line, in bytes; `start` None lets boot choose."""

    size: int
    start: int | None = None


class _Word(NamedTuple):
    """A word of a command line: its place, and its name and value without quotes."""

    start: int
    end: int
    name: str
    value: str | None


def _parse(cmdline: str) -> Iterator[_Word]:
    """Yield every word, init's too, cut and unquoted as next_arg() does."""
    at = 0
    while True:
        while at < len(cmdline) and cmdline[at] in _BLANK:
            at += 1
        if at == len(cmdline):
            return
        start, quoted = at, False
        while at < len(cmdline) and (quoted or cmdline[at] not in _BLANK):
            quoted ^= cmdline[at] == '"'
            at += 1
        yield _Word(start, at, *_unquoted(cmdline[start:at]))


def _unquoted(text: str) -> tuple[str, str | None]:
    """Name and value of a word. A `=` that begins it belongs to the name."""
    quoted = text.startswith('"')
    text = text[1:] if quoted else text
    equals = text.find("=", 1)
    name, value = (text, None) if equals < 0 else (text[:equals], text[equals + 1 :])
    closed = text.endswith('"')
    if value is not None and value.startswith('"'):
        return name, value[1:-1] if closed and len(value) > 1 else value[1:]
    if quoted and closed:
        return (name[:-1], None) if value is None else (name, value[:-1])
    return name, value


def _ours(cmdline: str) -> Iterator[_Word]:
    """Yield the words before `--`."""
    for word in _parse(cmdline):
        if word.value is None and word.name == INIT:
            return
        yield word


def _is(word: _Word, name: str) -> bool:
    """Return True if a word is the option `name`; the kernel takes - and _ for the same."""
    return word.name.replace("-", "_") == name.replace("-", "_")


def split(cmdline: str) -> tuple[str, str]:
    """Split a command line into the kernel's words and init's, which are empty or begin with `--`."""
    for word in _parse(cmdline):
        if word.value is None and word.name == INIT:
            return cmdline[: word.start].strip(_BLANK), f"{INIT} {cmdline[word.end :].strip(_BLANK)}".strip()
    return cmdline.strip(_BLANK), ""


def join(cmdline: str, more: str) -> str:
    """Join two command lines: the kernel's words of both, then init's of both."""
    (ours, init), (also, also_init) = split(cmdline), split(more)
    if init:
        also_init = also_init.removeprefix(INIT).strip()
    return " ".join(part for part in (ours, also, init, also_init) if part)


def words(cmdline: str) -> list[str]:
    """Return the kernel's words of a command line, as they were written."""
    return [cmdline[word.start : word.end] for word in _ours(cmdline)]


def values(cmdline: str, name: str) -> list[str]:
    """Return every value of `name=value`, in order, without quotes around it."""
    return [word.value for word in _ours(cmdline) if word.value is not None and _is(word, name)]


def get(cmdline: str, name: str) -> str | None:
    """Return the value of an option (the last one given), or None."""
    found = values(cmdline, name)
    return found[-1] if found else None


def has(cmdline: str, flag: str) -> bool:
    """Return True if a word without a value is there."""
    return any(word.value is None and _is(word, flag) for word in _ours(cmdline))


def panics_on_oops(cmdline: str) -> bool:
    """Return True if a mount daemon that faults ends the kernel."""
    value = get(cmdline, PANIC_ON_OOPS)
    return has(cmdline.strip(), PANIC_ON_OOPS) if value is None else value != "0"


def remove(cmdline: str, name: str) -> str:
    """Return the command line without any `name` or `name=value` of the kernel's; init's words stay."""
    kept = " ".join(cmdline[word.start : word.end] for word in _ours(cmdline) if not _is(word, name))
    return " ".join(part for part in (kept, split(cmdline)[1]) if part)


def put(cmdline: str, name: str, value: str) -> str:
    """Return the command line with `name=value` after the kernel's words, and no other value for it."""
    return join(remove(cmdline, name), f"{name}={value}")


def pkram_off(cmdline: str, machine: str = "") -> bool:
    """Return True if the command line switches PKRAM off, as a kernel configured without it would be."""
    said = pkram_of(cmdline, machine) if machine else values(cmdline, PKRAM)
    return said[-1:] in ([PKRAM_OFF], [f"{machine}:{PKRAM_OFF}"])


def names(value: str, pfn: int) -> bool:
    """Return True if the value of a `pkram=` is this pfn, whatever machine it names."""
    value = value.rpartition(":")[2]
    return bool(_PFN.fullmatch(value)) and int(value, 16) == pfn


def pkram_of(cmdline: str, machine: str) -> list[str]:
    """Return the values of `pkram=` that are for a machine on memory of the host, without empty ones.

    They are those that name it, `NAME:PFN`; if there is none, those that name no machine.
    """
    said = [(value, *value.rpartition(":")) for value in values(cmdline, PKRAM)]
    ours = [(value, pfn) for value, name, colon, pfn in said if colon and name == machine]
    return [value for value, pfn in ours or [(value, value) for value, _, colon, _ in said if not colon] if pfn]


def pkram_word(pfn: str, machine: str = "") -> str:
    """Return the word `pkram=PFN`, or for a machine by its name `pkram=NAME:PFN`, in quotes if the name has blanks."""
    value = f"{machine}:{pfn}" if machine else pfn
    return f'{PKRAM}="{value}"' if any(letter in _BLANK for letter in value) else f"{PKRAM}={value}"


def only(cmdline: str, name: str) -> str:
    """Return the words `name=value` of a command line, and nothing else of it."""
    return " ".join(cmdline[word.start : word.end] for word in _ours(cmdline) if _is(word, name))


def pkram_pfn(cmdline: str) -> int | None:
    """Return the super block's pfn that `pkram=` names; None where it is absent, empty, 0 or off."""
    found = {value for value in values(cmdline, "pkram") if value}
    if len(found) > 1:
        shown = " and ".join(f"pkram={value}" for value in values(cmdline, "pkram"))
        raise UsageError(f"the command line says {shown}: leave the current one only")
    for value in found - {PKRAM_OFF}:
        if not _PFN.fullmatch(value):
            raise UsageError(
                f"invalid pkram={value}: give a page frame number in hexadecimal, as in `pkram=34f`, or off"
            )
        return int(value, 16) or None
    return None


def reservation(cmdline: str, name: str) -> Reservation | None:
    """Return the reservation that `crashkernel=` or `scratch=` asks for: SIZE or SIZE@ADDRESS."""
    text = get(cmdline, name)
    if text is None:
        return None
    size_text, at, start_text = text.partition("@")
    try:
        size, start = parse_size(size_text), parse_size(start_text) if at else None
    except ValueError as error:
        raise UsageError(f"{name}={text}: {error}") from None
    if size == 0:
        return None
    if size + (start or 0) > _HIGHEST:
        raise UsageError(f"{name}={text}: the range ends beyond physical memory")
    if start is not None and start % PAGE_SIZE:
        raise UsageError(f"{name}={text}: the address is not a multiple of {PAGE_SIZE}")
    return Reservation(round_up(size, PAGE_SIZE), start)


def memory_limit(cmdline: str) -> int | None:
    """Return the highest address that `mem=` lets the kernel use, or None."""
    text = get(cmdline, "mem")
    if text is None:
        return None
    try:
        return min(parse_size(text), _HIGHEST)
    except ValueError as error:
        raise UsageError(f"mem={text}: {error}") from None


def check_text(cmdline: str) -> None:
    """Raise UsageError for a text that no kernel accepts as a command line."""
    if "\n" in cmdline or "\0" in cmdline:
        raise UsageError("the command line has a line break or a NUL in it")
    length = len(cmdline.encode("utf-8", "surrogateescape"))
    if length > MAX_LENGTH:
        raise UsageError(f"the command line has {length} bytes; the kernel takes {MAX_LENGTH}")


def validate(cmdline: str) -> None:
    """Raise UsageError unless boot will understand every option that it looks at."""
    check_text(cmdline)
    pkram_pfn(cmdline)
    memory_limit(cmdline)
    for name in ("crashkernel", "scratch"):
        reservation(cmdline, name)
