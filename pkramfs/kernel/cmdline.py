"""The kernel command line: words, `name=value`, quotes, and the few options that boot understands.

    BOOT_IMAGE=builtin ro quiet pkram=34f nokaslr crashkernel=64M@1G scratch=128M

A word may hold spaces inside double quotes. An option given twice means its last value, as the
kernel's own parser has it, except that two different `pkram=` are an error: the announcement's
`sed` strips the old one, and a forgotten one would make the next kernel restore nothing.

    pkram=PFN               hexadecimal pfn of the super block; 0 or absent: restore nothing
    pkram=off               no PKRAM in this kernel: nothing is restored, nothing can be preserved
    nokaslr                 run the kernel where it was loaded
    mem=SIZE                use no RAM above this address
    crashkernel=SIZE[@ADDR] set RAM aside for a crash kernel (-p)
    scratch=SIZE[@ADDR]     set RAM aside in which kernels are placed and early boot allocates

Kernel: lib/cmdline.c, kernel/params.c, patch 8 (early_param "pkram")
"""

import re
from dataclasses import dataclass

from pkramfs.errors import UsageError
from pkramfs.units import PAGE_SIZE, parse_size, round_up

_WORD = re.compile(r'(?:[^\s"]|"[^"]*"?)+')
_PFN = re.compile(r"(?:0[xX])?[0-9a-fA-F]{1,16}")
PKRAM_OFF = "off"
MAX_LENGTH = 2047
"""Longest command line in bytes: COMMAND_LINE_SIZE of x86 less its NUL."""


@dataclass(frozen=True)
class Reservation:
    """A piece of RAM asked for on the command line, in bytes; `start` None lets boot choose."""

    size: int
    start: int | None = None


def words(cmdline: str) -> list[str]:
    """The words of a command line, quotes kept."""
    return _WORD.findall(cmdline)


def values(cmdline: str, name: str) -> list[str]:
    """Every value of `name=value`, in order, without quotes around it."""
    found = []
    for word in words(cmdline):
        key, equals, value = word.replace('"', "").partition("=")
        if equals and key == name:
            found.append(value)
    return found


def get(cmdline: str, name: str) -> str | None:
    """The value of an option (the last one given), or None."""
    found = values(cmdline, name)
    return found[-1] if found else None


def has(cmdline: str, flag: str) -> bool:
    """Whether a word without a value is there."""
    return flag in words(cmdline)


def remove(cmdline: str, name: str) -> str:
    """The command line without any `name` or `name=value`."""
    return " ".join(w for w in words(cmdline) if w.replace('"', "").partition("=")[0] != name)


def put(cmdline: str, name: str, value: str) -> str:
    """The command line with `name=value` appended, and no other value for it."""
    return f"{remove(cmdline, name)} {name}={value}".strip()


def pkram_off(cmdline: str) -> bool:
    """Whether the command line switches PKRAM off, as leaving it out of the kernel's configuration would."""
    return get(cmdline, "pkram") == PKRAM_OFF


def pkram_pfn(cmdline: str) -> int | None:
    """The super block's pfn that `pkram=` names; None where it is absent, empty, 0 or off."""
    found = {value for value in values(cmdline, "pkram") if value}
    if len(found) > 1:
        shown = " and ".join(f"pkram={value}" for value in values(cmdline, "pkram"))
        raise UsageError(f"the command line says {shown}: leave the current one only")
    for value in found - {PKRAM_OFF}:
        if not _PFN.fullmatch(value):
            raise UsageError(
                f"pkram={value}: not a page frame number: write it in hexadecimal, as in `pkram=34f`, or off"
            )
        return int(value, 16) or None
    return None


def reservation(cmdline: str, name: str) -> Reservation | None:
    """What `crashkernel=` or `scratch=` asks for: SIZE or SIZE@ADDRESS."""
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
    if start is not None and start % PAGE_SIZE:
        raise UsageError(f"{name}={text}: the address is not a multiple of {PAGE_SIZE}")
    return Reservation(round_up(size, PAGE_SIZE), start)


def memory_limit(cmdline: str) -> int | None:
    """The highest address that `mem=` lets the kernel use, or None."""
    text = get(cmdline, "mem")
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"mem={text}: {error}") from None


def validate(cmdline: str) -> None:
    """UsageError unless boot will understand every option that it looks at."""
    if "\n" in cmdline or "\0" in cmdline:
        raise UsageError("the command line has a line break or a NUL in it")
    if len(cmdline.encode()) > MAX_LENGTH:
        raise UsageError(f"the command line has {len(cmdline.encode())} bytes; the kernel takes {MAX_LENGTH}")
    pkram_pfn(cmdline)
    memory_limit(cmdline)
    for name in ("crashkernel", "scratch"):
        reservation(cmdline, name)
