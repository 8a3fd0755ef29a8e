# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of memory that RAM may consist of, and how to tell them apart.

    kind     memory                        unused pages     survives                         named as
    file     a file                        are holes        its file system's end: tmpfs's   PATH[:SIZE]
                                                            with the kernel
    fsdax    a file on ext4 or xfs with    are zeroed       a kexec, if `memmap=` is given   PATH[:SIZE]
             dax, on memory set aside                       to the next kernel, too
    devdax   /dev/daxN.M, such memory      are zeroed       the same                         PATH
    devmem   a range of /dev/mem, set      are zeroed       the same                         /dev/mem:SIZE@ADDRESS
             aside by `memmap=`
    block    any other block device, by    are zeroed       processes only                   PATH, forced
             way of the page cache

Memory set aside is never given back: the file system could give the freed blocks of a file on DAX to another file, and
a later store into the mapping would end in SIGBUS.

A machine's own `ram` file (directory.py) is a `file`, and the only one whose size the machine chooses. The others are
named by the user, and examined before they are taken: `problems` yields their faults. Only a regular file is
read or written by its descriptor. On the other kinds an offset may not mean an address of the machine's memory (in
/dev/mem it is a physical address of the host), so they are accessed through their mapping alone (mapped.py).

Kernel: drivers/dax/device.c, fs/dax.c, drivers/char/mem.c, drivers/nvdimm/e820.c; statx(2), STATX_ATTR_DAX
"""

import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pkramfs import schema
from pkramfs.errors import MachineError, UsageError, explain
from pkramfs.machine.firmware import LOWEST
from pkramfs.machine.host import Host
from pkramfs.units import BLOCK_SIZE, MIB, PAGE_SIZE, format_size, parse_size, round_down

FILE, FSDAX, DEVDAX, DEVMEM, BLOCK = "file", "fsdax", "devdax", "devmem", "block"


class Kind(NamedTuple):
    """The properties of a kind of backing."""

    sparse: bool
    """Pages that nobody uses are holes, which cost nothing and can be told from pages in use."""
    granule: int
    """Bytes in whose multiples memory is given back to the host; 0 where it is only zeroed."""
    pinnable: bool
    """The kernel can copy from it by itself, so that a reply may point into it."""
    survives: str


_KEXEC = "a kexec, where both kernels set it aside (memmap=); no power loss, and no boot through firmware"
KINDS = {
    FILE: Kind(True, PAGE_SIZE, True, "the end of processes; a kexec only if its file system does"),
    FSDAX: Kind(False, 0, True, _KEXEC),
    DEVDAX: Kind(False, 0, True, _KEXEC),
    DEVMEM: Kind(False, 0, False, _KEXEC),
    BLOCK: Kind(False, 0, True, "the end of processes, but no kexec: its pages are in the page cache"),
}
DECLARED = schema.Object(
    {
        "kind": schema.OneOf(tuple(KINDS)),
        "path": schema.Text(),
        "start": schema.Whole(0, (1 << 62) - 1),
        "size": schema.Whole(LOWEST, (1 << 62) - 1),
    },
    closed=True,
)
"""A backing as machine.json has it."""
_SPEC = re.compile(r"(?P<path>.*?)(?::(?P<size>[^:@/]+)(?:@(?P<start>[^:@/]+))?)?", re.DOTALL)
_MEM = (1, 1)
"""Device number of /dev/mem."""
_STATX_ATTR_DAX, _AT_EMPTY_PATH = 0x200000, 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Backing:
    """Memory that the user named: `size` bytes of `path` from `start`."""

    kind: str
    path: str
    size: int
    start: int = 0

    @property
    def traits(self) -> Kind:
        """Return the properties of its kind."""
        return KINDS[self.kind]

    @property
    def spec(self) -> str:
        """Return the words that name it."""
        if self.kind == DEVMEM:
            return f"{self.path}:{self.size:#x}@{self.start:#x}"
        return self.path

    def to_json(self) -> dict[str, Any]:
        """Return it as machine.json has it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Spec(NamedTuple):
    """The words of a user: PATH, PATH:SIZE or /dev/mem:SIZE@ADDRESS. None means: not given."""

    path: str
    size: int | None = None
    start: int | None = None


def is_path(text: str) -> bool:
    """Return True if --ram names memory, False if it is a size."""
    return "/" in text


def parse(text: str) -> Spec:
    """Parse the words that name memory; raise UsageError for anything else."""
    match = _SPEC.fullmatch(text)
    if match is None or not os.path.isabs(match["path"]):
        raise UsageError(f"invalid memory {text!r}: write /PATH, /PATH:SIZE or /dev/mem:SIZE@ADDRESS")
    try:
        size, start = (None if part is None else parse_size(part) for part in (match["size"], match["start"]))
    except ValueError as error:
        raise UsageError(f"invalid memory {text!r}: {error}") from None
    return Spec(match["path"], size, start)


def find(spec: Spec, host: Host) -> Backing:
    """Return the memory at a path without changing it; raise MachineError for a file that cannot be memory."""
    fd = _open(spec.path, os.O_RDWR)
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            found = Backing(FSDAX if is_dax(fd) else FILE, spec.path, round_down(status.st_size, BLOCK_SIZE))
        elif stat.S_ISBLK(status.st_mode):
            found = Backing(BLOCK, spec.path, round_down(os.lseek(fd, 0, os.SEEK_END), BLOCK_SIZE))
        else:
            found = _character_device(spec, status, host)
    finally:
        os.close(fd)
    if found.kind != DEVMEM and spec.start is not None:
        raise UsageError(f"{spec.path}: only of /dev/mem a range can be taken, as in /dev/mem:1G@4G")
    if spec.size is not None and found.kind != DEVMEM and round_down(spec.size, BLOCK_SIZE) != found.size:
        raise MachineError(f"{spec.path} has {format_size(found.size)}, not {format_size(spec.size)}")
    if found.size < LOWEST:
        has, least = format_size(found.size), format_size(LOWEST)
        raise MachineError(f"{spec.path} is too small: it has {has}, and {least} is the least")
    return found


def _character_device(spec: Spec, status: os.stat_result, host: Host) -> Backing:
    if not stat.S_ISCHR(status.st_mode):
        raise MachineError(f"{spec.path} is neither a file nor a device")
    if (os.major(status.st_rdev), os.minor(status.st_rdev)) == _MEM:
        if spec.size is None or spec.start is None:
            raise UsageError(f"{spec.path}: which range of it? Write {spec.path}:SIZE@ADDRESS, as memmap=SIZE$ADDRESS")
        if spec.start % BLOCK_SIZE or spec.size % BLOCK_SIZE:
            raise UsageError(f"{spec.path}: address and size are multiples of 2 MiB")
        return Backing(DEVMEM, spec.path, spec.size, spec.start)
    known = host.memory_device(status.st_rdev)
    if known is None:
        raise MachineError(f"{spec.path} is not a device of memory: give /dev/daxN.M")
    size, align = known
    return Backing(DEVDAX, spec.path, round_down(size, max(align, BLOCK_SIZE)))


def make_file(spec: Spec) -> None:
    """Make the file that PATH:SIZE names, all of it allocated where it lies on a DAX file system."""
    if os.path.lexists(spec.path):
        return
    if spec.size is None or spec.start is not None or _is_among_devices(spec.path):
        more = "" if _is_among_devices(spec.path) else f"; {spec.path}:SIZE makes it"
        raise MachineError(f"{spec.path} does not exist{more}")
    size = round_down(spec.size, BLOCK_SIZE)
    if size < LOWEST:
        raise MachineError(f"{spec.path}: {format_size(spec.size)} is too small, {format_size(LOWEST)} is the least")
    fd = _open(spec.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        if is_dax(fd):
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
        os.fsync(fd)
    except OSError as error:
        os.unlink(spec.path)
        raise MachineError(f"cannot make {spec.path} of {format_size(size)}: {explain(error)}") from None
    finally:
        os.close(fd)


def _is_among_devices(path: str) -> bool:
    """Return True for a path in /dev itself, where a missing device must not become a file."""
    try:
        return os.stat(os.path.dirname(path)).st_dev == os.stat("/dev").st_dev
    except OSError:
        return False  # making the file reports the error


def allocate(backing: Backing) -> None:
    """Make the file system allocate all of a DAX file, so that no store can fail; other kinds need nothing."""
    if backing.kind != FSDAX:
        return
    fd = _open(backing.path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, backing.size)
        os.fsync(fd)
    except OSError as error:
        raise MachineError(f"cannot allocate all of {backing.path}: {explain(error)}") from None
    finally:
        os.close(fd)


def problems(backing: Backing, host: Host) -> Iterator[str]:
    """Yield the reasons not to take this memory, each as one line with its remedy."""
    status = os.stat(backing.path)
    if backing.kind in (FILE, FSDAX):
        if status.st_uid != os.geteuid():
            yield f"{backing.path} belongs to user {status.st_uid}: chown it"
        if status.st_mode & 0o022:
            yield f"{backing.path} can be written by others: chmod go-w"
    elif status.st_mode & 0o002:
        yield f"{backing.path} can be written by everybody: chmod o-w"
    if backing.kind == BLOCK:
        if _is_claimed(backing.path):
            yield f"{backing.path} is in use: it is mounted, swap, or a part of another device"
        yield (
            f"{backing.path} is a block device: stores go to the page cache, not to its memory. Make a devdax "
            "namespace of it, or ext4 mounted with dax=always, and name a file there"
        )
    if backing.kind == DEVMEM:
        yield from _of_range(backing, host)


def refuse_used(backing: Backing, host: Host) -> None:
    """Raise MachineError while another process has the memory open: two machines must not share it."""
    if pids := host.users(backing.path) if backing.kind != DEVMEM else []:
        raise MachineError(f"{backing.path} is open in process {pids[0]}: end it first")


def overlap(one: Spec, other: Spec) -> bool:
    """Return True if two ranges of the same device have bytes in common."""
    if None in (one.start, one.size, other.start, other.size) or one.path != other.path:
        return False
    assert one.start is not None and one.size is not None and other.start is not None and other.size is not None
    return one.start < other.start + other.size and other.start < one.start + one.size


def _of_range(backing: Backing, host: Host) -> Iterator[str]:
    """Yield the faults of a range of physical memory."""
    start, end = backing.start, backing.start + backing.size
    name = next((name for first, last, name in host.resources() if first <= start and end <= last), "not set aside")
    where = f"{start:#x}-{end - 1:#x}"
    if name.lower() != "reserved":
        size = f"{backing.size // MIB}M${start // MIB}M"
        yield f"{where} is {name} in /proc/iomem, not Reserved: boot with memmap={size}"


def _is_claimed(path: str) -> bool:
    """Return True if the kernel uses a block device for something else."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


_SIGNS = (
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0, b"XFSB", "an xfs file system"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    (4086, b"SWAPSPACE2", "swap"),
    (512, b"LABELONE", "an LVM physical volume"),
    (512, b"EFI PART", "a partition table"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
)
LOOKED_AT = 128 << 10
"""Bytes at the beginning of memory that must be zeros if it is to be taken unforced."""


def contents(first: bytes) -> str:
    """Return the likely content of memory that begins with these bytes; empty if they are all zeros."""
    for at, sign, what in _SIGNS:
        if first[at : at + len(sign)] == sign:
            return what
    return "data of somebody" if any(first) else ""


def is_dax(fd: int) -> bool:
    """Return True if stores into a mapping of this file go to the memory itself."""
    buffer = ctypes.create_string_buffer(256)
    try:
        if _libc.statx(fd, b"", _AT_EMPTY_PATH, 0, buffer):
            return False
    except AttributeError:  # a C library without statx
        return False
    return bool(int.from_bytes(buffer.raw[8:16], "little") & _STATX_ATTR_DAX)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise MachineError(f"cannot open RAM: {explain(error)}") from None
