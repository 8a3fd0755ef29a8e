# SPDX-License-Identifier: GPL-2.0-or-later
"""The staging directory kexec/: the kernel loaded for the next boot, until it is copied into RAM.

    kexec/kexec.json        the loaded kernel: image, command line, segments, mode
    kexec/kernel.1a2b …     the segments' bytes; kexec.json names them
    kexec/crash.json        the crash kernel, whose bytes are in RAM already

Loading writes new files first, then renames kexec.json, then removes files that nothing names any
more: loading again replaces, and a load that dies leaves the earlier one. After the point of no return,
a kexec.json in the directory means that copying is not finished.

Boot parameters and purgatory depend on the destinations of the others, so `seal` writes them, again
whenever a destination changes.

Kernel: struct kimage; arch/x86/kernel/kexec-bzimage64.c (bzImage64_load), arch/x86/purgatory
"""

import hashlib
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from typing import TYPE_CHECKING, Any

from pkramfs import schema
from pkramfs.errors import DamagedError, MachineError, UsageError, explain
from pkramfs.kernel.image import HEADER_AT, Image
from pkramfs.kernel.nvram import IMAGE, ImageInfo
from pkramfs.kernel.segments import Segment, from_json, page_count
from pkramfs.kernel.segments import declared as segments_declared
from pkramfs.machine.files import open_regular
from pkramfs.machine.ram import Ram
from pkramfs.text import literal, printable
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine

DIRECTORY, KEXEC_JSON, CRASH_JSON = "kexec", "kexec/kexec.json", "kexec/crash.json"
FILE_MODE, LOAD_MODE, CRASH_MODE = "kexec_file_load", "kexec_load", "crash"
_ALWAYS = ("kernel", "cmdline", "params", "purgatory")
_CHUNK = 1 << 20

# offsets in boot parameters (the "zero page") where the loader writes addresses: low and high halves
_LOADER, _INITRD, _INITRD_SIZE, _CMDLINE = 0x210, (0x218, 0x0C0), (0x21C, 0x0C4), (0x228, 0x0C8)
_KEXEC_LOADER = 0xD0
_PURGATORY_LINE = 160


@dataclass(frozen=True)
class Loaded:
    """A kernel that is ready to be executed, as kexec.json has it."""

    mode: str
    image: ImageInfo
    cmdline: str
    segments: tuple[Segment, ...]

    def segment(self, name: str) -> Segment | None:
        """Return the segment of this name, or None."""
        return next((s for s in self.segments if s.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return the loaded kernel as JSON data."""
        return {
            "mode": self.mode,
            "image": dict(vars(self.image)),
            "cmdline": self.cmdline,
            "segments": [s.to_json() for s in self.segments],
        }


def read(machine: "Machine", name: str = KEXEC_JSON) -> Loaded | None:
    """Read the loaded kernel; None if there is none."""
    if not machine.has(name):
        return None
    declared = _declared(machine.hardware().size >> PAGE_SHIFT)
    data = machine.read_json(name, declared, "remove it and load the kernel again")
    if data is None:
        return None  # removed since has() saw it
    return Loaded(data["mode"], ImageInfo(**data["image"]), data["cmdline"], tuple(from_json(data["segments"])))


class _Segments(schema.Kind):
    """The segments of a loaded kernel: none twice, and none missing that every kernel has."""

    expected = f"a list of segments with {', '.join(_ALWAYS)}"

    def __init__(self, frames: int) -> None:
        self._list = segments_declared(frames)

    def read(self, value: Any, at: str = "") -> list[dict[str, Any]]:
        """Return the segments; raise Invalid if one is there twice or missing."""
        found: list[dict[str, Any]] = self._list.read(value, at)
        names = [segment["name"] for segment in found]
        if len(set(names)) != len(names) or not set(_ALWAYS) <= set(names):
            raise schema.Invalid(at, ", ".join(map(literal, names)) or "empty", self.expected)
        return found


def _declared(frames: int) -> schema.Object:
    """Declare kexec.json and crash.json, for RAM of so many frames."""
    return schema.Object(
        {
            "mode": schema.OneOf((FILE_MODE, LOAD_MODE, CRASH_MODE)),
            "image": IMAGE,
            "cmdline": schema.Text(),
            "segments": _Segments(frames),
        }
    )


def write(machine: "Machine", loaded: Loaded, name: str = KEXEC_JSON) -> None:
    """Make `loaded` the kernel that the next kexec boots, and drop the files of the one it replaces."""
    machine.write_json(name, loaded.to_json())
    sweep(machine)


def remove(machine: "Machine", name: str = KEXEC_JSON) -> bool:
    """Forget the loaded kernel, and return True if there was one."""
    if not machine.has(name):
        return False
    machine.remove(name)
    sweep(machine)
    return True


def sweep(machine: "Machine") -> None:
    """Remove staged files that no loaded kernel names; remove none if a record is damaged."""
    named = {os.path.basename(KEXEC_JSON), os.path.basename(CRASH_JSON)}
    for name in (KEXEC_JSON, CRASH_JSON):
        try:
            loaded = read(machine, name)
        except DamagedError:
            return  # an execution of that kernel gets the error; loading again sweeps
        named |= {s.file for s in loaded.segments} if loaded else set()
    with os.scandir(machine.path(DIRECTORY)) as entries:
        for entry in entries:
            if entry.name not in named and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


class Stage:
    """Files of one load, removed again if the load fails."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._directory, self._token = machine.path(DIRECTORY), secrets.token_hex(4)
        self._written: list[str] = []
        os.makedirs(self._directory, mode=0o700, exist_ok=True)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for name in self._written:
                os.unlink(os.path.join(self._directory, name))

    def check_room(self, size: int) -> None:
        """Raise ExhaustedError if the machine's file system has no room for `size` more bytes."""
        ram = self._machine.ram()
        ram.check_room(size)
        ram.close()

    def kernel(self, image: Image) -> Segment:
        """Write the image's payload, flattened; the segment has room for all that the kernel needs to start."""
        file = self._new("kernel")
        with open(os.path.join(self._directory, file), "wb") as out:
            for offset, data in image.payload():
                out.seek(offset)
                out.write(data)
            out.truncate(image.size)
        pfn = 0 if image.relocatable else image.preferred >> PAGE_SHIFT
        align, source = max(1, image.align >> PAGE_SHIFT), image.path or image.name
        return self._segment("kernel", file, page_count(image.init_size), align, pfn, source)

    def copy(self, name: str, path: str, pfn: int = 0) -> Segment:
        """Copy a regular file of the user's, as long as it was when it was opened."""
        file = self._new(name)
        try:
            with (
                FileIO(open_regular(path, follow=True)) as source,
                open(os.path.join(self._directory, file), "wb") as out,
            ):
                left = os.fstat(source.fileno()).st_size
                while left and (data := source.read(min(left, _CHUNK))):
                    out.write(data)
                    left -= len(data)
        except OSError as error:
            raise UsageError(f"cannot load the {name} from {explain(error)}") from None
        return self._segment(name, file, 0, 1, pfn, path)

    def data(self, name: str, data: bytes, pages: int = 0) -> Segment:
        """Write bytes that the loader made."""
        file = self._new(name)
        with open(os.path.join(self._directory, file), "wb") as out:
            out.write(data)
        return self._segment(name, file, pages, 1, 0)

    def _new(self, name: str) -> str:
        file = f"{name}.{self._token}.{len(self._written)}"
        with open(os.path.join(self._directory, file), "xb"):
            self._written.append(file)
        return file

    def _segment(self, name: str, file: str, pages: int, align: int, pfn: int, source: str = "") -> Segment:
        with open(os.path.join(self._directory, file), "rb") as staged:
            size = os.fstat(staged.fileno()).st_size
            digest = hashlib.file_digest(staged, "sha256").hexdigest()
        return Segment(name, file, size, max(pages, page_count(size)), align, pfn, digest, source)

    def reserve(self, others: int) -> list[Segment]:
        """Make segments for boot parameters and purgatory, to be placed now and filled by `seal`."""
        return [self.data("params", b"", 1), self.data("purgatory", b"", page_count(others * _PURGATORY_LINE))]

    def seal(self, segments: Sequence[Segment], header: bytes) -> tuple[Segment, ...]:
        """Fill in boot parameters and purgatory now that every destination is known."""
        by_name = {s.name: s for s in segments}
        for name, data in (("params", _parameters), ("purgatory", _purgatory)):
            content = data(by_name, header)
            sealed = self.data(name, content)
            by_name[name] = replace(by_name[name], file=sealed.file, size=sealed.size, sha256=sealed.sha256)
        return tuple(by_name[s.name] for s in segments)


def _parameters(segments: dict[str, Segment], header: bytes) -> bytes:
    """Return the zero page: the image's setup header and the addresses of the other segments."""
    page = bytearray(PAGE_SIZE)
    page[HEADER_AT : HEADER_AT + len(header)] = header
    page[_LOADER] = _KEXEC_LOADER
    _address(page, _CMDLINE, segments["cmdline"].pfn << PAGE_SHIFT)
    if initrd := segments.get("initrd"):
        _address(page, _INITRD, initrd.pfn << PAGE_SHIFT)
        _address(page, _INITRD_SIZE, initrd.size)
    return bytes(page)


def _address(page: bytearray, fields: tuple[int, int], value: int) -> None:
    for at, half in zip(fields, (value & 0xFFFFFFFF, value >> 32), strict=True):
        struct.pack_into("<I", page, at, half)


def _purgatory(segments: dict[str, Segment], _header: bytes) -> bytes:
    lines = (
        f"{s.sha256} {s.pfn:x} {s.size:x} {printable(s.name[:60])}" for s in segments.values() if s.name != "purgatory"
    )
    return "\n".join(lines).encode()


def header_of(machine: "Machine", loaded: Loaded) -> bytes:
    """Read the setup header from the staged boot parameters."""
    params = loaded.segment("params")
    if params is None:
        raise MachineError("the loaded kernel has no boot parameters: load it again")
    with _staged(machine, params) as file:
        page = bytearray(file.read(PAGE_SIZE))
    if len(page) < PAGE_SIZE:
        raise MachineError(f"the staged params have {len(page)} bytes, expected {PAGE_SIZE}: load the kernel again")
    for low, high in (_INITRD, _INITRD_SIZE, _CMDLINE):
        page[low : low + 4] = page[high : high + 4] = bytes(4)
    return bytes(page[HEADER_AT:])


def _staged(machine: "Machine", segment: Segment) -> FileIO:
    """Open the staged bytes of a segment."""
    try:
        return FileIO(open_regular(machine.path(DIRECTORY, segment.file)))
    except OSError as error:
        raise MachineError(f"cannot read the staged {segment.name}: {explain(error)}; load the kernel again") from None


def cmdline_address(params: bytes) -> int:
    """Read the command line's address from boot parameters."""
    low, high = (struct.unpack_from("<I", params, at)[0] for at in _CMDLINE)
    return int(high << 32 | low)


def copy_into_ram(
    machine: "Machine", ram: Ram, segments: Sequence[Segment], tell: Callable[[float], None] = lambda _: None
) -> None:
    """Copy every segment to its destination, telling which part is done; may be repeated."""
    total, copied = sum(s.size for s in segments), 0
    ram.check_room(total)

    def told(count: int) -> None:
        nonlocal copied
        copied += count
        tell(copied / total)

    for segment in segments:
        with _staged(machine, segment) as file:
            done = _copy(file, ram, segment, told)
        if done != segment.size:
            raise MachineError(f"the staged {segment.name} has {done} bytes, expected {segment.size}: load it again")


def _copy(file: FileIO, ram: Ram, segment: Segment, tell: Callable[[int], None]) -> int:
    """Copy a staged file to its destination, and zeros to the end of the last page; return its size.

    Pages that are there already are overwritten, not punched first: others could take the host's memory.
    """
    buffer, done, at = bytearray(_CHUNK), 0, segment.pfn << PAGE_SHIFT
    ram.back_run(segment.pfn, page_count(segment.size))
    while done < segment.size and (count := _read_into(file, memoryview(buffer)[: segment.size - done])):
        whole = -(-count // PAGE_SIZE) * PAGE_SIZE
        buffer[count:whole] = bytes(whole - count)
        ram.fill(at + done, memoryview(buffer)[:whole])
        done += count
        tell(count)
    behind = segment.pfn + -(-done // PAGE_SIZE)
    if behind < segment.end:
        ram.punch_run(behind, segment.end - behind)
    return done


def _read_into(file: FileIO, target: memoryview) -> int:
    """Fill `target` from a file; return the number of bytes, fewer only at the end of the file."""
    done = 0
    while done < len(target) and (count := file.readinto(target[done:])):
        done += count
    return done


def verify_in_ram(ram: Ram, segments: Sequence[Segment]) -> None:
    """Raise MachineError unless every segment is in RAM as it was loaded; purgatory's check."""
    for segment in segments:
        found = _digest(ram, segment)
        if found != segment.sha256:
            raise MachineError(
                f"purgatory: the {segment.name} at pfn {segment.pfn:x} is not what was loaded "
                f"(sha256 {found[:12]}…, expected {segment.sha256[:12]}…)"
            )


def _digest(ram: Ram, segment: Segment) -> str:
    """Sum up a segment in RAM. Read the file, not the mapping: damage may have punched holes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    for done in range(0, segment.size, _CHUNK):
        size = min(_CHUNK, segment.size - done)
        part = buffer[: -(-size // PAGE_SIZE) * PAGE_SIZE]
        ram.read(segment.pfn + (done >> PAGE_SHIFT), part)
        digest.update(part[:size])
    return digest.hexdigest()
