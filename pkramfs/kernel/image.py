# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel images: the memory that a kernel wants, as its file says.

    bzImage   real-mode setup | protected-mode kernel     header: version, alignment, preferred
              0 … (sects+1)*512                           address, init size, relocatable
    ELF       program headers                             PT_LOAD: physical address, sizes
    builtin   nothing but a size                          where no kernel is at hand

An Image says how many bytes there are to load (`size`), how much memory the kernel takes while it
starts (`init_size`, never less), and where it may lie. `payload` gives the bytes as pieces of the
image, so that an ELF file's holes cost nothing.

The header of a file is checked here and nowhere else: magic, version, lengths against the file's
own, alignment. Numbers that a foreign file could choose freely are bounded by MAX_IMAGE.

Kernel: Documentation/arch/x86/boot.rst, kernel/kexec_elf.c, arch/x86/kernel/kexec-bzimage64.c
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from pkramfs import __version__
from pkramfs.errors import UsageError, explain
from pkramfs.machine.files import open_regular
from pkramfs.record import F, Record
from pkramfs.units import BLOCK_SIZE, GIB, MIB, PAGE_SIZE, format_size, parse_size, round_up

BUILTIN = "builtin"
BUILTIN_SIZE = 16 * MIB
MAX_IMAGE = 4 * GIB
_CHUNK = 1 * MIB

SETUP = Record(
    "SetupHeader",
    0x264,
    "The start of a bzImage, as far as kexec reads it.",
    [
        F("setup_sects", "u1", 0x1F1, "512-byte sectors of real-mode code after the first; 0 means 4"),
        F("syssize", "u4", 0x1F4, "protected-mode code in 16-byte units"),
        F("boot_flag", "u2", 0x1FE, "0xAA55"),
        F("header", "4s", 0x202, "HdrS"),
        F("version", "u2", 0x206, "boot protocol, 0x020c for 2.12"),
        F("kernel_version", "u2", 0x20E, "offset of the version string less 0x200, or 0"),
        F("loadflags", "u1", 0x211, "bit 0: loaded high"),
        F("kernel_alignment", "u4", 0x230, "physical alignment of a relocatable kernel"),
        F("relocatable_kernel", "u1", 0x234, "non-zero: may run at any aligned address"),
        F("xloadflags", "u2", 0x236, "bit 0: has a 64-bit entry point"),
        F("pref_address", "u8", 0x258, "where it would like to run"),
        F("init_size", "u4", 0x260, "memory it needs while it unpacks itself"),
    ],
)
EHDR = Record(
    "ElfHeader",
    64,
    "The header of a 64-bit ELF file.",
    [
        F("ident", "16s", 0, "0x7f ELF, class 2, data 1"),
        F("type", "u2", 16, "2 executable, 3 position independent"),
        F("machine", "u2", 18, "62 x86-64"),
        F("phoff", "u8", 32, "file offset of the program headers"),
        F("phentsize", "u2", 54, "56"),
        F("phnum", "u2", 56, "number of program headers"),
    ],
)
PHDR = Record(
    "ProgramHeader",
    56,
    "One segment of an ELF file.",
    [
        F("type", "u4", 0, "1 is PT_LOAD"),
        F("offset", "u8", 8, "in the file"),
        F("paddr", "u8", 24, "physical address"),
        F("filesz", "u8", 32, "bytes in the file"),
        F("memsz", "u8", 40, "bytes in memory, the rest zero"),
    ],
)
HEADER_AT = 0x1F1
"""Where the setup header begins, in a bzImage as in boot parameters."""

_OLDEST = 0x020C
_ET_EXEC, _ET_DYN, _X86_64 = 2, 3, 62
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3


@dataclass(frozen=True)
class Part:
    """Bytes of the file that belong at `offset` of the loaded image."""

    offset: int
    at: int
    size: int


@dataclass(frozen=True)
class Image:
    """A kernel that can be loaded; sizes and addresses in bytes."""

    kind: str
    name: str
    version: str
    size: int
    init_size: int
    align: int
    preferred: int
    relocatable: bool
    path: str | None = None
    parts: tuple[Part, ...] = ()
    header: bytes = b""
    """The setup header of a bzImage, from 0x1f1, as boot parameters hand it on."""

    def payload(self) -> Iterator[tuple[int, bytes]]:
        """Yield everything to be loaded as (offset in the image, bytes)."""
        if self.path is None:
            yield 0, f"pkramfs {self.version}: a kernel of {format_size(self.init_size)}\n".encode()
            return
        try:
            with open(self.path, "rb", opener=_regular) as file:
                for part in self.parts:
                    yield from _chunks(file, part)
        except OSError as error:
            raise UsageError(f"cannot load a kernel from {explain(error)}") from None


def load_image(spec: str) -> Image:
    """Return the kernel that `builtin`, `builtin:SIZE` or a path names; raise UsageError with the reason otherwise."""
    if spec == BUILTIN or spec.startswith(BUILTIN + ":"):
        return _builtin(spec)
    try:
        with open(spec, "rb", opener=_regular) as file:
            return _read(spec, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UsageError(f"cannot load a kernel from {explain(error)}") from None


def _regular(path: str, flags: int) -> int:
    """Open a regular file only: a FIFO would block, and a device might never end."""
    return open_regular(path, flags, follow=True)


def _builtin(spec: str) -> Image:
    try:
        size = round_up(parse_size(spec[len(BUILTIN) + 1 :] or str(BUILTIN_SIZE)), PAGE_SIZE)
    except ValueError as error:
        raise UsageError(f"{spec}: {error}") from None
    if not 0 < size <= MAX_IMAGE:
        raise UsageError(f"{spec}: a kernel has between {PAGE_SIZE} bytes and {format_size(MAX_IMAGE)}")
    return Image(BUILTIN, spec, __version__, PAGE_SIZE, size, BLOCK_SIZE, 16 * MIB, relocatable=True)


def _read(path: str, file: BinaryIO, size: int) -> Image:
    start = file.read(max(SETUP.size, PAGE_SIZE))
    if start.startswith(b"\x7fELF"):
        return _read_elf(path, file, size, start)
    if start[0x202:0x206] == b"HdrS":
        return _read_bzimage(path, file, size, start)
    if start.startswith(b"\x1f\x8b"):
        _refuse(path, "compressed with gzip; unpack it first")
    if start.startswith(b"MZ"):
        _refuse(path, "a PE program without a Linux setup header")
    return _refuse(path, "neither a bzImage (no HdrS at 0x202) nor an ELF file")


def _read_bzimage(path: str, file: BinaryIO, size: int, start: bytes) -> Image:
    if len(start) < SETUP.size:
        _refuse(path, f"cut off inside its setup header ({size} bytes)")
    head = SETUP.read(start)
    if head.boot_flag != 0xAA55:
        _refuse(path, f"boot flag is {head.boot_flag:#06x}, expected 0xaa55")
    if head.version < _OLDEST:
        _refuse(path, f"boot protocol {_protocol(head.version)} is too old for kexec, which needs 2.12")
    if not head.xloadflags & 1 or not head.loadflags & 1:
        _refuse(path, "no 64-bit entry point")
    setup, payload = ((head.setup_sects or 4) + 1) * 512, head.syssize * 16
    if size < setup + payload - 15:  # syssize is rounded up
        _refuse(path, f"cut off: {size} bytes, its header promises {setup + payload}")
    payload = size - setup
    init_size = round_up(max(head.init_size, payload), PAGE_SIZE)
    _check_shape(path, head.kernel_alignment, head.pref_address, init_size)
    return Image(
        "bzImage",
        os.path.basename(path),
        _kernel_version(file, head.kernel_version),
        payload,
        init_size,
        max(head.kernel_alignment, PAGE_SIZE),
        head.pref_address,
        relocatable=bool(head.relocatable_kernel),
        path=path,
        parts=(Part(0, setup, payload),),
        header=start[HEADER_AT : SETUP.size],
    )


def _read_elf(path: str, file: BinaryIO, size: int, start: bytes) -> Image:
    if size < EHDR.size:
        _refuse(path, f"cut off inside its ELF header ({size} bytes)")
    head = EHDR.read(start)
    if head.ident[4:6] != b"\x02\x01" or head.machine != _X86_64:
        _refuse(path, "an ELF file, but not a 64-bit x86 one")
    if head.type not in (_ET_EXEC, _ET_DYN):
        _refuse(path, f"an ELF file of type {head.type}; a kernel is an executable")
    loads = _program_headers(path, file, size, head)
    low = min(p.paddr for p in loads) // PAGE_SIZE * PAGE_SIZE
    high = max(p.paddr + p.memsz for p in loads)
    init_size = round_up(high - low, PAGE_SIZE)
    _check_shape(path, BLOCK_SIZE, low, init_size)
    parts = tuple(Part(p.paddr - low, p.offset, p.filesz) for p in loads if p.filesz)
    return Image(
        "elf",
        os.path.basename(path),
        "",
        max((p.offset + p.size for p in parts), default=0),
        init_size,
        BLOCK_SIZE,
        low,
        relocatable=head.type == _ET_DYN,
        path=path,
        parts=parts,
    )


def _program_headers(path: str, file: BinaryIO, size: int, head: Any) -> list[Any]:
    """Return the PT_LOAD entries; refuse one that leaves the file or overlaps another."""
    phoff, phnum, phentsize = head.phoff, head.phnum, head.phentsize
    if phentsize != PHDR.size or phnum == 0 or phoff + phnum * PHDR.size > size:
        _refuse(path, f"cut off: {phnum} program headers of {phentsize} bytes at {phoff} in {size} bytes")
    file.seek(phoff)
    table = file.read(phnum * PHDR.size)
    found = [PHDR.read(table, at) for at in range(0, len(table), PHDR.size)]
    if any(p.type in (_PT_DYNAMIC, _PT_INTERP) for p in found):
        _refuse(path, "an ELF file that is linked dynamically: a program or a library")
    loads = sorted((p for p in found if p.type == _PT_LOAD and p.memsz), key=lambda p: p.paddr)
    if not loads:
        _refuse(path, "an ELF file with nothing to load")
    end = 0
    for p in loads:
        if p.filesz > p.memsz or p.offset + p.filesz > size:
            _refuse(path, f"cut off: {p.filesz} bytes at {p.offset} wanted, the file has {size}")
        if p.paddr < end:
            _refuse(path, f"two of its segments overlap at {p.paddr:#x}")
        end = p.paddr + p.memsz
    return loads


def _check_shape(path: str, align: int, preferred: int, init_size: int) -> None:
    if align & (align - 1) or align > GIB:
        _refuse(path, f"alignment {align:#x} is not a power of two up to 1 GiB")
    if init_size > MAX_IMAGE:
        _refuse(path, f"wants {format_size(init_size)} of memory, more than {format_size(MAX_IMAGE)}")
    if preferred >= 1 << 52:
        _refuse(path, f"preferred address {preferred:#x} is beyond physical memory")


def _kernel_version(file: BinaryIO, offset: int) -> str:
    """Read the version string that the header points to; empty where there is none."""
    if not offset:
        return ""
    file.seek(offset + 0x200)
    return file.read(256).split(b"\0")[0].split(b" ")[0].decode("ascii", "replace")


def _chunks(file: BinaryIO, part: Part) -> Iterator[tuple[int, bytes]]:
    file.seek(part.at)
    done = 0
    while done < part.size:
        data = file.read(min(_CHUNK, part.size - done))
        if not data:
            raise UsageError(f"{file.name}: became shorter while it was loaded")
        yield part.offset + done, data
        done += len(data)


def _protocol(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF:02d}"


def _refuse(path: str, reason: str) -> NoReturn:
    raise UsageError(f"{path}: not a kernel that can be loaded: {reason}")


def setup_header(image: Image) -> bytes:
    """Return the setup header that boot parameters carry: the image's own, or one that says the same."""
    if image.header:
        return image.header
    return SETUP.pack(
        boot_flag=0xAA55,
        header=b"HdrS",
        version=_OLDEST,
        loadflags=1,
        kernel_alignment=image.align,
        relocatable_kernel=int(image.relocatable),
        xloadflags=1,
        pref_address=image.preferred,
        init_size=min(image.init_size, 0xFFFFFFFF),
    )[HEADER_AT:]
